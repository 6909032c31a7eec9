"""Contrastive learning of images and texts, exact on any number of processes."""

import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric

from trunkline import TrunklineError
from trunkline.modules.losses import infonce_loss, sigmoid_loss
from trunkline.modules.metrics.retrieval import retrieval_metrics
from trunkline.modules.networks import CLIP, CLIPConfig, ViT
from trunkline.modules.networks.clip import Embeddings
from trunkline.modules.objectives.base import (
    TrunklineModule,
    as_config,
    check_text_sizes,
    check_tokenizer,
)
from trunkline.modules.training.distributed import Share, gather_rows, share_of
from trunkline.modules.training.optim import OptimizerConfig
from trunkline.modules.training.warm_start import freeze, load_matching, network_from_checkpoint, start_from

INPUTS = ("image", "tokens", "mask")
"""What of a batch the network sees."""


class ContrastiveImageText(TrunklineModule):
    """Pull the embeddings of an image and its text together, and push all others of the batch apart.

    The batch is that of all processes and of all steps of an accumulation: loss and gradients are those of one
    process that sees it whole.

    Batches: `image` (B, C, height, width); `tokens` and `mask` (B, T), False for padding; `caption_key` (B,) int64,
    the same for the same caption; optionally `skipped` and `truncated` (B,), counted; in evaluation `valid` (B,),
    False where a pair is not to be counted.

    Logged: `loss` (in training the first process's part of it) beside `chance_loss`, that of embeddings that know
    nothing where all captions differ, and in training `logit_scale`; in evaluation over the whole split, one caption an
    image, `image_to_text_R@1`, `@5`, `@10`, `image_to_text_median_rank` and the same for `text_to_image`.

    Args:
        network: shape of the towers.
        optimizer: how they learn.
        loss: `infonce`, CLIP's, or `sigmoid`, SigLIP's, which needs `network.init_logit_bias`.
        same_captions: whether pairs of one caption are each other's wrong answers (`negatives`) or `ignored`.
        chunk_size: pairs of a process that run through the towers at a time; each chunk runs twice, and memory is that
            of one chunk (gradient caching, arXiv:2101.06983). None takes a whole batch; where gradients are
            accumulated, each batch is such a chunk.
        init_from: see `TrunklineModule.prepare_network`.
        init_image_from: the same for the image tower alone: a ViT.
        init_text_from: the same for the text tower: a BERT, a GPT, or a task on one.
        freeze_image_blocks: see `TrunklineModule.prepare_network`; the depth or more locks the image tower but for its
            projection (LiT, arXiv:2111.07991).
        freeze_text_blocks: the same for the text tower.
        seed: see `TrunklineModule`.
    """

    network: CLIP
    unit = "pairs"
    counted: ClassVar[dict[str, str]] = {"skipped": "skipped_images", "truncated": "truncated_captions"}

    def __init__(
        self,
        network: CLIPConfig,
        optimizer: OptimizerConfig | None = None,
        loss: Literal["infonce", "sigmoid"] = "infonce",
        same_captions: Literal["negatives", "ignored"] = "ignored",
        chunk_size: int | None = None,
        init_from: str | None = None,
        init_image_from: str | None = None,
        init_text_from: str | None = None,
        freeze_image_blocks: int = 0,
        freeze_text_blocks: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        config = as_config(CLIPConfig, network)
        self.keep_hyperparameters(
            network=config,
            optimizer=self.optimizer_config,
            loss=loss,
            same_captions=same_captions,
            chunk_size=chunk_size,
            init_from=init_from,
            init_image_from=init_image_from,
            init_text_from=init_text_from,
            freeze_image_blocks=freeze_image_blocks,
            freeze_text_blocks=freeze_text_blocks,
            seed=seed,
        )
        if loss == "sigmoid" and config.init_logit_bias is None:
            raise TrunklineError("the sigmoid loss needs a bias; set --model.network.init_logit_bias -10")
        if chunk_size is not None and chunk_size < 1:
            raise TrunklineError(f"--model.chunk_size {chunk_size} must be 1 or more, or null")
        if config.share_trunk and (freeze_image_blocks or freeze_text_blocks):
            raise TrunklineError(
                "with share_trunk both towers have the same blocks; set --model.freeze_image_blocks and "
                "--model.freeze_text_blocks to 0, or --model.network.share_trunk false"
            )
        if config.share_trunk and init_image_from is not None and init_text_from is not None:
            raise TrunklineError(
                "with share_trunk both towers have the same blocks; give --model.init_image_from or "
                "--model.init_text_from, not both"
            )
        self.loss, self.same_captions, self.chunk_size = loss, same_captions, chunk_size
        self.network = CLIP(config)
        self.prepare_network(init_from, 0)
        if init_image_from is not None:
            self.start_image_from(init_image_from)
        if init_text_from is not None:
            start_from(self.network.text, init_text_from, "init_text_from")
        for tower, blocks in ((self.network.image, freeze_image_blocks), (self.network.text, freeze_text_blocks)):
            self.frozen += freeze(tower, blocks) if blocks > 0 else []
        self.train()
        self.held: list[dict[str, Tensor]] = []
        """Batches of an accumulation that is under way."""
        self.evaluated: list[tuple[Embeddings, Tensor]] = []
        """Embeddings and caption keys of the evaluation so far."""
        self.losses = torch.nn.ModuleDict({stage: MeanMetric() for stage in ("val", "test")})

    def start_image_from(self, name: str) -> None:
        """Copy the weights of a ViT, but for its head.

        Args:
            name: a checkpoint of an image classifier, a folder that `save_pretrained` wrote, or a hub name.

        Raises:
            TrunklineError: if it holds something else, or other sizes.
        """
        network, flag = self.network.image, "--model.network.image"
        try:
            source = network_from_checkpoint(ViT, name) if Path(name).is_file() else ViT.from_pretrained(name)
        except TrunklineError as error:
            raise TrunklineError(f"--model.init_image_from {name} is no ViT: {error}") from error
        load_matching(network, source, name, "init_image_from", flag)

    def setup(self, stage: str) -> None:
        """Compare the network with the data before the first step; see `check_text_sizes`, `check_tokenizer`."""
        config = self.network.config.text
        check_text_sizes(self.trainer, config.body, config.body_flag)
        for argument in ("init_from", "init_text_from"):
            check_tokenizer(self, argument)

    def forward(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Embeddings:
        """See `CLIP.forward`."""
        return self.network(image, tokens, mask)

    def embed(self, *batches: dict[str, Tensor], chunk: int | None = None) -> Embeddings:
        """Embeddings of batches, one after the other; what is in chunks is computed once more in the backward pass."""
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

    def contrast(self, embeddings: Embeddings, keys: Tensor) -> tuple[Tensor, Share]:
        """Sum of the own pairs' losses against those of all processes, whose rows are counted."""
        share, scale = share_of(keys), self.network.scale
        texts = gather_rows(embeddings.text, share)
        same = gather_rows(keys, share) if self.same_captions == "ignored" else None
        if self.loss == "sigmoid":
            assert scale.logit_bias is not None
            return sigmoid_loss(embeddings.image, texts, scale.factor, scale.logit_bias, share.start, same), share
        images = gather_rows(embeddings.image, share)
        return infonce_loss(*embeddings, images, texts, scale.factor, share.start, same), share

    @staticmethod
    def mean_over_pairs(total: Tensor, share: Share) -> Tensor:
        """A loss whose mean over processes, which is what DDP makes of gradients, is the mean over all pairs."""
        return total * len(share.counts) / sum(share.counts)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss on one batch, or at the last step of an accumulation on all of its batches.

        Raises:
            TrunklineError: for a batch of one pair, which has nothing to be told from.
        """
        self.count(batch, "train")
        steps = self.trainer.accumulate_grad_batches
        if batch_idx % steps == 0:  # not what an interrupted epoch left
            self.held = []
        self.held.append({name: batch[name] for name in (*INPUTS, "caption_key")})
        if steps > 1 and self.trainer.fit_loop.epoch_loop._should_accumulate():
            return 0.0 * next(p for p in self.network.parameters() if p.requires_grad).sum()
        batches, self.held = self.held, []
        embeddings = self.embed(*batches, chunk=self.chunk_size)
        total, share = self.contrast(embeddings, torch.cat([held["caption_key"] for held in batches]))
        if sum(share.counts) < 2:
            raise TrunklineError("a batch of one pair has nothing to tell it from; set --data.batch_size to 2 or more")
        loss = self.mean_over_pairs(total, share)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/chance_loss", self.chance(sum(share.counts)))
        self.log("train/logit_scale", self.network.scale.factor.detach())
        return loss * steps  # the trainer divides by them

    def chance(self, pairs: int) -> float:
        """Loss, among so many pairs, of embeddings that know nothing, at the best scale and bias."""
        if self.loss == "infonce":
            return math.log(pairs)
        return math.log(pairs) + (pairs - 1) * math.log(pairs / max(pairs - 1, 1))  # that one in so many is right

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As usual, with the scale kept within its limits."""
        super().optimizer_step(*args, **kwargs)
        self.network.scale.clamp()

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation left."""
        self.evaluated = []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Count one batch towards the metrics; returns pictures, embeddings and indices of its pairs for callbacks."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """See `validation_step`."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        valid = batch["valid"]
        found, keys = self.embed(batch), batch["caption_key"][valid]
        found = Embeddings(found.image[valid], found.text[valid])
        total, share = self.contrast(found, keys)
        metric: Any = self.losses[stage]
        pairs = sum(share.counts)
        metric.update(total / max(len(keys), 1), weight=len(keys))
        self.log(f"{stage}/loss", metric, prog_bar=True)
        if pairs:  # on all processes or on none
            self.log(f"{stage}/chance_loss", self.chance(pairs), batch_size=pairs, sync_dist=True)
        self.count(batch, stage)
        self.evaluated.append((found, keys))
        return {
            "image": batch["image"][valid],
            "image_embedding": found.image,
            "text_embedding": found.text,
            "index": batch["index"][valid],
            "caption_key": keys,
        }

    def on_validation_epoch_end(self) -> None:
        """Log what is found among all pairs."""
        self._log_retrieval("val")

    def on_test_epoch_start(self) -> None:
        """See `on_validation_epoch_start`."""
        self.evaluated = []

    def on_test_epoch_end(self) -> None:
        """See `on_validation_epoch_end`."""
        self._log_retrieval("test")

    def _log_retrieval(self, stage: str) -> None:
        images, texts, keys = (
            torch.cat(parts) for parts in zip(*((*found, keys) for found, keys in self.evaluated), strict=True)
        )
        self.evaluated = []
        share = share_of(keys)
        images, texts, keys = (gather_rows(x, share) for x in (images, texts, keys))
        if not len(keys):
            raise TrunklineError(
                f"not one pair of the {stage} split could be read; mend its images and captions, see the warnings"
            )
        for name, value in retrieval_metrics(images, texts, keys, keys).items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "text_to_image_R@10", sync_dist=True)

    def flops_per_batch(self, batch: dict[str, Tensor]) -> int:
        """Floating-point operations of a training step on this batch, not counting what chunks compute twice."""
        return self.network_flops(batch["image"], batch["tokens"], mask=batch["mask"])
