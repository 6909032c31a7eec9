# Every target makes the virtual environment .venv on first use. ARGS="…" passes options to the command.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
READY := $(VENV)/.ready
# Recipes in bfloat16 are much slower on a CPU without instructions for it; there they train in float32.
BFLOAT16 = from trunkline.modules.training.muon import multiplies_bfloat16
PRECISION = $$($(BIN)/python -c 'import torch; $(BFLOAT16); multiplies_bfloat16(torch.device("cpu")) or print("--trainer.precision 32-true")')

.DEFAULT_GOAL := help
.PHONY: help train-vit train-gpt train-bert finetune-bert train-clip train-translate train-audio slurm gallery test test-all test-everywhere test-cluster lint tensorboard benchmark clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train-vit: $(READY) ## train a Vision Transformer on the digits, offline, in a minute or two
	$(BIN)/trunkline fit --config vit/digits $(ARGS)

train-gpt: $(READY) ## train a GPT on the King James Bible, offline, in two or three minutes, and let it write
	$(BIN)/trunkline fit --config gpt/demo $(ARGS)

train-bert: $(READY) ## pre-train a BERT on names in 14 languages, offline, in about two minutes
	$(BIN)/trunkline fit --config bert/demo $(ARGS)

finetune-bert: $(READY) ## what the pre-training is worth: name the language, against from scratch and n-grams
	@ls runs/bert/demo/*/checkpoints/last.ckpt >/dev/null 2>&1 || $(MAKE) train-bert
	$(BIN)/trunkline benchmark --what ngram
	@start=$$(ls -t runs/bert/demo/*/checkpoints/last.ckpt | head -1) && set -x && \
	$(BIN)/trunkline fit --config bert/classify_demo --name bert/from_scratch --data.tokenizer $$start $(ARGS) && \
	$(BIN)/trunkline fit --config bert/classify_demo --model.init_from $$start --data.tokenizer $$start $(ARGS)

train-clip: $(READY) ## train a CLIP on emoji and their names, offline, in five minutes; another artist's drawings test it
	$(BIN)/trunkline fit --config clip/emoji $(PRECISION) $(ARGS)
	@last=$$(ls -t runs/clip/emoji/*/checkpoints/last.ckpt | head -1) && set -x && \
	$(BIN)/trunkline evaluate --checkpoint $$last --data.source openmoji --data.val_fraction 0 --split train

train-translate: $(READY) ## train an encoder-decoder to read dates in words, offline, in four minutes; test it on unseen locales too
	$(BIN)/trunkline fit --config seq2seq/dates $(PRECISION) $(ARGS)
	@last=$$(ls -t runs/seq2seq/dates/*/checkpoints/last.ckpt | head -1) && set -x && \
	$(BIN)/trunkline evaluate --checkpoint $$last --data.source dates:locales && \
	$(BIN)/trunkline evaluate --checkpoint $$last --data.source dates:languages

train-audio: $(READY) ## train a recogniser of spoken digits, offline, in five minutes; test it on unseen voices, accent and noise
	$(BIN)/trunkline fit --config audio/digits $(ARGS)
	@last=$$(ls -t runs/audio/digits/*/checkpoints/last.ckpt | head -1) && set -x && \
	$(BIN)/trunkline evaluate --checkpoint $$last --data.source spoken_digits:accent && \
	$(BIN)/trunkline evaluate --checkpoint $$last --data.source spoken_digits:white && \
	$(BIN)/trunkline evaluate --checkpoint $$last --data.source spoken_digits:babble

# CONFIG: a recipe. NODES, and GPUS on each: 0 runs one process on a node's CPU. SBATCH: more options of sbatch.
CONFIG ?= vit/imagenet_s16
NODES ?= 1
GPUS ?= 8
SBATCH ?=
TASKS = $(if $(filter 0,$(GPUS)),1,$(GPUS) --gpus-per-node=$(GPUS))

slurm: $(READY) ## submit a recipe to SLURM: make slurm CONFIG=vit/imagenet_s16 NODES=2 GPUS=8 SBATCH="--time=1-0"
	TRUNKLINE=$(abspath $(BIN)/trunkline) sbatch --nodes=$(NODES) --ntasks-per-node=$(TASKS) $(SBATCH) configs/slurm/train.sbatch $(CONFIG) $(ARGS)

# Demo that a folder of runs comes from, for `make gallery`.
DEMOS = vit/digits:train-vit gpt/demo:train-gpt clip/emoji:train-clip seq2seq/dates:train-translate \
	audio/digits:train-audio bert/from_scratch:finetune-bert
DRAW = $(BIN)/trunkline draw

gallery: $(READY) ## draw what the demos learnt, for docs/gallery.md: about a minute; trains those without a run, 25 minutes for all
	@for demo in $(DEMOS); do ls runs/$${demo%:*}/*/checkpoints/last.ckpt >/dev/null 2>&1 || $(MAKE) $${demo#*:} || exit 1; done
	$(DRAW) runs/vit/digits --only val/attention --output docs/images/digits_attention.png
	$(DRAW) runs/vit/digits --only val/features --output docs/images/digits_map.png
	$(DRAW) runs/gpt/demo --only curves --output docs/images/gpt_curves.png
	$(DRAW) runs/gpt/demo --only val/attention --output docs/images/gpt_attention.png
	$(DRAW) runs/gpt/demo --only val/samples --output docs/images/gpt_samples.md
	$(DRAW) runs/bert/classify_demo runs/bert/from_scratch --output docs/images/bert_curves.png
	$(DRAW) runs/clip/emoji --only val/pictures --output docs/images/emoji_map.png
	$(BIN)/trunkline search "a red fruit" --images openmoji --count 5 --checkpoint runs/clip/emoji --output docs/images/emoji_red_fruit.png
	$(DRAW) runs/seq2seq/dates --only val/alignment --output docs/images/dates_alignment.png
	$(DRAW) runs/audio/digits --only val/transcripts --output docs/images/speech_transcripts.png

test: $(READY) ## the fast tests, without a network; two files side by side, the longest first
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: $(READY) ## all tests
	$(BIN)/python -m pytest $(ARGS)

test-everywhere: $(READY) ## tests that could differ, as on other machines: kernels, bfloat16, threads, order, busy cores
	$(BIN)/python tests/support/everywhere.py $(ARGS)

test-cluster: $(READY) ## as root: a real SLURM and two hosts with torchrun on this machine, and what can happen to them
	$(BIN)/python -m pytest -m cluster -rs $(ARGS)

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tensorboard: $(READY) ## look at the runs in a browser
	$(BIN)/tensorboard --logdir runs $(ARGS)

benchmark: $(READY) ## measure speed side by side with timm, transformers and open_clip
	$(BIN)/trunkline benchmark $(ARGS)

clean: ## remove the virtual environment and everything that tools left behind (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Trunkline needs Python 3.11 or newer; say make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,eval,speech,dev]'
	@touch $@
