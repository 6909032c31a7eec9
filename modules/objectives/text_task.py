"""Base class of the tasks on labelled text: a BERT or GPT with a new output layer."""

from torch import Tensor

from trunkline.contract import TextBatch
from trunkline.modules.networks import TextHead, TextHeadConfig
from trunkline.modules.objectives.base import TrunklineModule


class TextTask(TrunklineModule):
    """Base class of the tasks on a `TextHead`; they can start from a BERT, a GPT, another such task, or a CLIP."""

    network: TextHead
    network_class = TextHead
    unit = "texts"

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
