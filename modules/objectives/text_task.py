"""Base class of the tasks on labelled text: a BERT or GPT with a new output layer."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from trunkline.contract import TextBatch
from trunkline.modules.networks import BERT, GPT, TextHead, TextHeadConfig
from trunkline.modules.networks.base import ConfigT, Network
from trunkline.modules.objectives.base import TrunklineModule, as_config
from trunkline.modules.objectives.checks import with_sizes_of_data
from trunkline.modules.training.warm_start import TrainedWeights, start_text_head


class TextTask(TrunklineModule):
    """Base class of the tasks on a `TextHead`; they can start from a BERT, a GPT, or another such task."""

    network: TextHead
    network_class = TextHead
    unit = "texts"

    def accepted(self) -> tuple[type[Network], ...]:
        return (TextHead, BERT, GPT)

    def configured(self, config_class: type[ConfigT], network: ConfigT | None) -> ConfigT:
        config, weights = as_config(config_class, network), self.beginning.weights
        source: Any = None if weights is None else weights.config
        if (
            source is not None and weights is not None and weights.network_class is not TextHead
        ):  # a BERT or GPT without a task
            source = SimpleNamespace(**{"bert" if weights.network_class is BERT else "gpt": source})
        return with_sizes_of_data(config, self.beginning.facts, source)

    def copy_weights(self, weights: TrainedWeights) -> None:
        start_text_head(self.network, weights)

    def make_network(self, config: TextHeadConfig) -> None:
        """Make the network and call `start`."""
        self.network = TextHead(config)
        self.start()

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return self.network.config.num_outputs

    def features(self, batch: TextBatch) -> Tensor:
        """Inputs of the output layer, (B, D) or (B, T, D)."""
        return self.network.states(batch["tokens"], batch.get("segment"), batch.get("mask"))

    def outputs(self, batch: TextBatch) -> Tensor:
        """Outputs on a batch, (B, K) or (B, T, K), in float32 or wider."""
        return self.network(batch["tokens"], batch.get("segment"), mask=batch.get("mask")).float()

    def forward(self, tokens: Tensor, segment: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, T) ids -> (B, K) or (B, T, K) outputs; see `TextHead.forward`."""
        return self.network(tokens, segment, mask=mask)

    def flops_per_batch(self, batch: TextBatch) -> int:
        return self.network_flops(batch["tokens"], mask=batch["mask"])
