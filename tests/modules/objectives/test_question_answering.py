"""QuestionAnswering: windows of all processes, fillers, the loss, and exact match 100% on a file."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import mean_loss, trainer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from trunkline import TrunklineError
from trunkline.datamodules.text_tasks.squad import SquadData
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.metrics.squad import WindowAnswer
from trunkline.modules.networks import BERTConfig, GPTConfig
from trunkline.modules.networks.text_head import TextHeadConfig
from trunkline.modules.objectives.question_answering import QuestionAnswering
from trunkline.modules.training.optim import OptimizerConfig

# --- on a file


WORDS = "the a river mill tower king built near old who what where is was in stood town of".split()  # noqa: SIM905
NAMES = "arno bruin cyril delia edda fritz gilda hugo iris jonas karla lotte".split()  # noqa: SIM905


def tokenizer_file(folder: Path, special: list[str]) -> str:
    vocab = {word: n for n, word in enumerate([*special, *WORDS, *NAMES, ".", "?"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=special[0]))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def squad_file(folder: Path, impossible: bool) -> str:
    """Who built what: four texts of two answers each, and with `impossible` a question without one."""
    paragraphs = []
    for n in range(4):
        mill, tower, king = NAMES[3 * n : 3 * n + 3]
        context = (
            f"The old mill was built near the river . {mill.title()} built the mill . The tower , {tower} {king} built."
        )
        asked = {"who built the mill ?": mill.title(), "who built the tower ?": f"{tower} {king}"}
        qas: list[dict[str, Any]] = [
            {"id": f"{n}-{i}", "question": q, "answers": [{"text": a, "answer_start": context.index(a)}]}
            for i, (q, a) in enumerate(asked.items())
        ]
        if impossible:
            qas.append({"id": f"{n}-x", "question": "where is the king ?", "is_impossible": True, "answers": []})
        paragraphs.append({"context": context, "qas": qas})
    path = folder / "squad.json"
    path.write_text(json.dumps({"version": "test", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return str(path)


def data(folder: Path, gpt: bool = False, impossible: bool = True) -> SquadData:
    special = ["<|unk|>", "<|endoftext|>"] if gpt else ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
    path = squad_file(folder, impossible)
    sizes: dict[str, int] = {"max_length": 20, "max_question_length": 8, "doc_stride": 6, "batch_size": 12}
    return SquadData(path, tokenizer=tokenizer_file(folder, special), val_source=path, num_workers=0, **sizes)


def model(gpt: bool = False, **options: Any) -> QuestionAnswering:
    torch.manual_seed(0)
    trunk = TransformerConfig(dim=32, depth=2, num_heads=2)
    body: Any = {"gpt": GPTConfig(60, 20, backbone=trunk)} if gpt else {"bert": BERTConfig(60, 20, backbone=trunk)}
    network = TextHeadConfig(**{**body, "pool": "none", "dropout": 0.0, **options})
    # AdamW learns this too, but how far it gets depends on the seed and on rounding; Muon arrives from all of them.
    return QuestionAnswering(network, optimizer=OptimizerConfig("muon", lr=0.02, warmup=0.1, weight_decay=0.0))


@pytest.mark.parametrize(("gpt", "impossible"), [(False, False), (False, True), (True, True)])
def test_overfits_a_file_to_exact_match(gpt: bool, impossible: bool, tmp_path: Path) -> None:
    fitted = trainer(tmp_path, max_epochs=60, num_sanity_val_steps=1, check_val_every_n_epoch=60)
    fitted.fit(model(gpt), datamodule=data(tmp_path, gpt, impossible))
    metrics = {name: float(value) for name, value in fitted.callback_metrics.items() if name.startswith("val/")}
    assert metrics["val/loss"] < 0.2
    assert (metrics["val/exact"], metrics["val/f1"]) == (1.0, 1.0)


class Oracle(torch.nn.Module):
    """Points where it is told to: 5 for the answer's borders, 0 for all else."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.batches = iter(batches)
        self.config = model().network.config

    def forward(self, tokens: Tensor, *_: Any, **__: Any) -> Tensor:
        batch = next(self.batches)
        assert torch.equal(batch["tokens"], tokens)
        row, outputs = torch.arange(len(tokens)), torch.zeros(*tokens.shape, 2)
        outputs[row, batch["start"], 0] = 5.0
        outputs[row, batch["end"], 1] = 5.0
        return outputs


def test_gold_borders_score_1_and_each_question_counts_once(tmp_path: Path) -> None:
    squad = data(tmp_path)
    squad.setup("validate")
    squad.eval_batch_size = 7  # the last batch is ragged
    own = model()
    own.network = Oracle(list(squad.val_dataloader()))  # type: ignore[assignment, arg-type]
    (metrics,) = trainer(tmp_path).validate(own, datamodule=squad, verbose=False)
    assert (metrics["val/exact"], metrics["val/f1"]) == (1.0, 1.0)
    assert len(squad.datasets["val"]) > len(squad.questions["val"]) == 12  # type: ignore[arg-type]
    assert {window.question for window in own.found} == set(range(12))
    assert len(own.found) == len(squad.datasets["val"])  # type: ignore[arg-type]
    # The same with wrong answers for the questions of one text.
    for number in range(3):
        squad.questions["val"][number] = squad.questions["val"][number]._replace(answers=["zebra"])
    own.network = Oracle(list(squad.val_dataloader()))  # type: ignore[assignment, arg-type]
    (metrics,) = trainer(tmp_path).validate(own, datamodule=squad, verbose=False)
    assert (metrics["val/exact"], metrics["val/f1"]) == (0.75, 0.75)


def test_windows_of_all_processes_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squad, own, logged = data(tmp_path), model(), {}
    squad.setup("validate")
    questions = squad.questions["val"]
    starts = [q.starts[0] if q.answers else 0 for q in questions]
    ends = [s + len(q.answers[0]) if q.answers else 0 for s, q in zip(starts, questions, strict=True)]
    here = [WindowAnswer(n, 1.0, 5.0, 0, 3) for n in range(12)]  # each would be "The", or no answer
    there = [WindowAnswer(n, 2.0, 1.0 if q.answers else 9.0, starts[n], ends[n]) for n, q in enumerate(questions)]
    own.trainer = SimpleNamespace(world_size=2, datamodule=squad)  # type: ignore[assignment]
    own.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]

    def gather(parts: list[Any], mine: list[WindowAnswer]) -> None:
        parts[:] = [mine, there]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    own.found = here
    own.on_validation_epoch_end()
    assert logged == {"val/exact": 1.0, "val/f1": 1.0}


def test_fillers_are_not_counted(tmp_path: Path) -> None:
    squad, own = data(tmp_path), model().eval()
    squad.setup("validate")
    batch = next(iter(squad.val_dataloader()))
    batch["valid"][:5] = False
    with torch.no_grad():
        found = own.predict_step(batch, 0)
    assert [window.question for window in found] == batch["question"][5:].tolist()


def test_the_loss_is_the_mean_of_both_borders(tmp_path: Path) -> None:
    squad, own = data(tmp_path), model()
    own.log = lambda *_, **__: None  # type: ignore[method-assign]
    squad.setup("fit")
    batch = next(iter(squad.val_dataloader()))
    logits = own(batch["tokens"], batch["segment"], batch["mask"]).double()
    want = 0.0
    for row, mask in enumerate(batch["mask"]):
        scores = logits[row, mask].log_softmax(dim=0)
        want -= (scores[batch["start"][row], 0] + scores[batch["end"][row], 1]).item() / 2 / len(logits)
    assert mean_loss(own, batch).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("options", [{"pool": "cls"}, {"num_outputs": 3}])
def test_impossible_heads(options: dict[str, Any]) -> None:
    with pytest.raises(
        TrunklineError, match=r"needs network\.num_outputs 2, not \d, and network\.pool none, not"
    ) as caught:
        model(**options)
    assert caught.value.field == "model.network"
    with pytest.raises(TrunklineError, match=r"^max_answer_length must be at least 1, not 0") as caught:
        QuestionAnswering(model().network.config, max_answer_length=0)
    assert caught.value.field == "model.max_answer_length"
