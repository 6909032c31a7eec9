"""16-mixed on a CPU, where Lightning would choose bfloat16."""

from lightning.pytorch.plugins.precision import MixedPrecision
from torch.amp import GradScaler


class HalfOnCPU(MixedPrecision):
    """Begins with a loss scale, which does not grow in a few steps."""

    def __init__(self, scale: float = 2.0**10) -> None:
        super().__init__("16-mixed", "cpu", GradScaler("cpu", init_scale=scale))
