"""Contrastive learning of images and texts, exact on any number of processes."""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric, Metric

from trunkline import TrunklineError
from trunkline.contract import Loss, PairBatch
from trunkline.modules.losses import infonce_loss, sigmoid_loss
from trunkline.modules.metrics.retrieval import retrieval_metrics
from trunkline.modules.networks import CLIP, CLIPConfig, TextHead, ViT
from trunkline.modules.networks.clip import Embeddings
from trunkline.modules.networks.resizing import SharedWords
from trunkline.modules.objectives.arguments import as_config
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.objectives.checks import facts_of
from trunkline.modules.objectives.reduction import Terms
from trunkline.modules.training.distributed import Gather
from trunkline.modules.training.lora_runs import refuse_beside_lora
from trunkline.modules.training.start_parts import donors, sizes_from, start_from
from trunkline.modules.training.warm_start import TrainedWeights, freeze

INPUTS: tuple[Literal["image", "tokens", "mask"], ...] = ("image", "tokens", "mask")
"""Fields of a batch that the network takes."""


class ContrastiveImageText(TrunklineModule):
    """Pull the embeddings of an image and its text together, and push all others of the batch apart.

    The batch consists of the batches of all processes and of all steps of an accumulation: loss and gradients are the
    same as if one process saw all of it at once.

    Logged: `loss` (in training only the first process's part) and `chance_loss`, the loss of uninformative embeddings
    if all captions differ; in training also `logit_scale`. Evaluation also logs retrieval over the whole split with one
    caption per image: `image_to_text_R@1`, `@5`, `@10`, `image_to_text_median_rank`, and the same for `text_to_image`.

    Args:
        network: shape of the towers.
        loss: `infonce` (CLIP) or `sigmoid` (SigLIP), which needs `network.init_logit_bias`.
        same_captions: whether pairs with the same caption are each other's wrong answers (`negatives`) or `ignored`.
        chunk_size: pairs per process that run through the towers at a time. Each chunk runs twice, and memory holds the
            activations of one chunk (gradient caching, arXiv:2101.06983). None runs the whole batch at once; with
            accumulated gradients, each batch is a chunk.
        init_image_from: trained weights for the image tower alone: a ViT, or that of another CLIP.
        init_text_from: trained weights for the text tower alone: a BERT, a GPT, a task's network built on one, or the
            text tower of another CLIP.
        freeze_image_blocks: number of first blocks of the image tower that keep their weights. With the depth or more,
            only the tower's projection learns (LiT, arXiv:2111.07991).
        freeze_text_blocks: the same for the text tower.
        **shared: see `TrunklineModule`; its `freeze_blocks` applies to both towers.
    """

    network: CLIP
    network_class = CLIP
    unit = "pairs"
    counted: ClassVar[dict[str, str]] = {"skipped": "skipped_images", "truncated": "truncated_captions"}
    shown: ClassVar[tuple[str, ...]] = ("loss", "text_to_image_R@10")
    joint = True

    def __init__(
        self,
        network: CLIPConfig,
        *,
        loss: Literal["infonce", "sigmoid"] = "infonce",
        same_captions: Literal["negatives", "ignored"] = "ignored",
        chunk_size: int | None = None,
        init_image_from: str | None = None,
        init_text_from: str | None = None,
        freeze_image_blocks: int = 0,
        freeze_text_blocks: int = 0,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.kind, self.same_captions, self.chunk_size = loss, same_captions, chunk_size
        stated, frozen = as_config(CLIPConfig, network), (freeze_image_blocks, freeze_text_blocks)
        self.check_options(stated, (init_image_from, init_text_from), frozen)
        towers_frozen = {"freeze_image_blocks": freeze_image_blocks, "freeze_text_blocks": freeze_text_blocks}
        refuse_beside_lora(self.lora, towers_frozen)
        image = self.read_weights(init_image_from, "init_image_from", donors(ViT))
        text = self.read_weights(init_text_from, "init_text_from", donors(TextHead))
        sizes = text and sizes_from(TextHead, text)
        towers = {name: getattr(sizes, name, None) for name in ("bert", "gpt")}
        source = SimpleNamespace(image=image and sizes_from(ViT, image), **towers)
        words = None if text is None else self.words_of(text, TextHead)
        config = self.configured(CLIPConfig, stated, source if image or text else None, words)
        self.keep_hyperparameters(
            network=config,
            loss=loss,
            same_captions=same_captions,
            chunk_size=chunk_size,
            init_image_from=init_image_from,
            init_text_from=init_text_from,
            freeze_image_blocks=freeze_image_blocks,
            freeze_text_blocks=freeze_text_blocks,
        )
        self.network = CLIP(config)
        self.start(lambda: self.copy_towers(image, text, words or {}))
        for tower, blocks in zip((self.network.image, self.network.text), frozen, strict=True):
            self.frozen += freeze(tower, blocks) if blocks > 0 else []
        self.train()
        self.equal_shares = False
        """Whether the data says so; see `DataFacts`."""
        self.evaluated: list[tuple[Embeddings, Tensor]] = []
        """Embeddings and caption keys of the batches evaluated so far."""

    def copy_towers(
        self, image: TrainedWeights | None, text: TrainedWeights | None, words: Mapping[str, SharedWords]
    ) -> None:
        """Copy the trained weights of single towers; `words` is what the vocabularies of the texts have in common."""
        if image is not None:
            start_from(self.network.image, image, place="model.network.image")
        if text is not None:
            start_from(self.network.text, text, words)

    def check_options(
        self, config: CLIPConfig, trained: tuple[str | None, str | None], frozen: tuple[int, int]
    ) -> None:
        """Refuse options that contradict each other.

        Args:
            config: the network's configuration.
            trained: `init_image_from` and `init_text_from`.
            frozen: `freeze_image_blocks` and `freeze_text_blocks`.

        Raises:
            TrunklineError: if options do not fit each other or are out of range.
        """
        if self.kind == "sigmoid" and config.init_logit_bias is None:
            raise TrunklineError(
                "the sigmoid loss needs a bias; set network.init_logit_bias to -10",
                field="model.network.init_logit_bias",
            )
        if self.chunk_size is not None and self.chunk_size < 1:
            raise TrunklineError(f"chunk_size {self.chunk_size} must be 1 or more, or null", field="model.chunk_size")
        if config.share_trunk and any(frozen):
            raise TrunklineError(
                "with share_trunk both towers have the same blocks; set freeze_image_blocks and freeze_text_blocks to "
                "0, or network.share_trunk to false",
                field="model.freeze_image_blocks" if frozen[0] else "model.freeze_text_blocks",
            )
        if config.share_trunk and None not in trained:
            raise TrunklineError(
                "with share_trunk both towers have the same blocks; give init_image_from or init_text_from, not both",
                field="model.init_image_from",
            )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.equal_shares = bool(facts_of(self.trainer).equal_shares)

    def forward(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Embeddings:
        """Embeddings of images and texts, as in `CLIP.forward`."""
        return self.network(image, tokens, mask)

    def embed(self, *batches: PairBatch, chunk: int | None = None) -> Embeddings:
        """Embeddings of the pairs of all batches; chunks are recomputed in the backward pass, to save memory."""
        parts = [
            part
            for batch in batches
            for part in zip(*(batch[name].split(chunk or len(batch[name])) for name in INPUTS), strict=True)
        ]
        if len(parts) == 1:
            return self.network(*parts[0])
        # The graph keeps the input and the embedding of a chunk; backward runs through one chunk after the other.
        found = [checkpoint(self.network, *part, use_reentrant=False) for part in parts]
        return Embeddings(*(torch.cat(side) for side in zip(*found, strict=True)))

    def contrast(self, embeddings: Embeddings, keys: Tensor, gather: Gather) -> Tensor:
        """Sum of the losses of this process's pairs, each compared with the pairs of all processes."""
        scale, texts = self.network.scale, gather(embeddings.text)
        same = gather(keys) if self.same_captions == "ignored" else None
        if self.kind == "sigmoid":
            assert scale.logit_bias is not None
            return sigmoid_loss(embeddings.image, texts, scale.factor, scale.logit_bias, gather.start, same)
        return infonce_loss(*embeddings, gather(embeddings.image), texts, scale.factor, gather.start, same)

    def loss(self, batch: PairBatch) -> Terms:
        return self.joint_loss([batch])

    def joint_loss(self, batches: list[PairBatch]) -> Terms:
        """The loss over the pairs of all batches.

        Raises:
            TrunklineError: if there is only one pair, which has no wrong answers to be compared with.
        """
        keys = torch.cat([batch["caption_key"] for batch in batches])
        embeddings, gather = self.embed(*batches, chunk=self.chunk_size), self.gather(keys, self.equal_shares)
        if gather.total < 2:
            raise TrunklineError(
                "a batch of one pair has no other pair to compare it with; set batch_size to 2 or more",
                field="data.batch_size",
            )
        logs = {"chance_loss": self.chance(gather.total), "logit_scale": self.network.scale.factor.detach()}
        return [Loss(self.contrast(embeddings, keys, gather), keys.new_full((), len(keys)), logs)]

    def chance(self, pairs: int) -> float:
        """Loss of uninformative embeddings among this many pairs, with the best scale and bias."""
        if self.kind == "infonce":
            return math.log(pairs)
        # Each text belongs to an image with probability 1 / pairs.
        return math.log(pairs) + (pairs - 1) * math.log(pairs / max(pairs - 1, 1))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step as usual, then clamp the logit scale to its limits."""
        super().optimizer_step(*args, **kwargs)
        self.network.scale.clamp()

    def make_metrics(self) -> dict[str, Metric]:
        return {"loss": MeanMetric(), "chance_loss": MeanMetric()}

    def start_evaluation(self) -> None:
        self.evaluated = []

    def evaluate(self, batch: PairBatch, metrics: Any) -> dict[str, Tensor]:
        """Returns pictures, embeddings, indices and caption keys of the valid pairs."""
        valid = batch["valid"]
        embeddings, keys = self.embed(batch), batch["caption_key"][valid]
        found = Embeddings(embeddings.image[valid], embeddings.text[valid])
        gather = self.gather(keys)
        total, pairs = self.contrast(found, keys, gather), gather.total
        metrics["loss"].update(total / max(len(keys), 1), weight=len(keys))
        metrics["chance_loss"].update(self.chance(max(pairs, 1)), weight=len(keys))
        self.evaluated.append((found, keys))
        return {
            "image": batch["image"][valid],
            "image_embedding": found.image,
            "text_embedding": found.text,
            "index": batch["index"][valid],
            "caption_key": keys,
        }

    def finish_evaluation(self, stage: str, metrics: Any) -> dict[str, Any]:
        images, texts, keys = (
            torch.cat(parts) for parts in zip(*((*found, keys) for found, keys in self.evaluated), strict=True)
        )
        self.evaluated = []
        gather = self.gather(keys)
        images, texts, keys = (gather(x) for x in (images, texts, keys))
        if not len(keys):
            raise TrunklineError(
                f"not one pair of the {stage} split could be read; check its images and captions (see the warnings)"
            )
        return retrieval_metrics(images, texts, keys, keys)

    def flops_per_batch(self, batch: PairBatch) -> int:
        """As in the base class; the recomputation of chunks is not counted."""
        return self.network_flops(batch["image"], batch["tokens"], mask=batch["mask"])
