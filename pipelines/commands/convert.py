"""`trunkline convert`: the network of a checkpoint as the two files that `from_pretrained` loads."""

from pathlib import Path

from trunkline import TrunklineError
from trunkline.modules.networks.base import CONFIG_FILE, WEIGHTS_FILE
from trunkline.pipelines.trained import Trained


def convert(checkpoint: str, output: str) -> None:
    """Write the network of a checkpoint as config.json and one model.safetensors, which need only PyTorch.

    Args:
        checkpoint: a file or folder that `trunkline fit` wrote, also one of sharded training; or a run's folder.
        output: the folder to write. `from_pretrained` of the network's class loads it, and so does --model.init_from.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise TrunklineError(f"--output {output} is a file; name a folder")
    taken = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if (folder / name).exists()]
    if taken:
        raise TrunklineError(f"--output {output} holds {' and '.join(taken)} already; name another folder")
    trained = Trained.read(checkpoint)
    network = trained.network
    network.save_pretrained(folder)
    name = type(network).__name__
    print(f"wrote {folder}, for {name}.from_pretrained: {sum(p.numel() for p in network.parameters()):,} weights")
