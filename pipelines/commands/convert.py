"""`trunkline convert`: the network of a checkpoint as the two files that `from_pretrained` loads."""

from pathlib import Path

from trunkline import TrunklineError
from trunkline.files import cannot_write
from trunkline.modules.networks.base import CONFIG_FILE, WEIGHTS_FILE
from trunkline.pipelines.trained import Trained
from trunkline.run_folders import find_checkpoint


def convert(checkpoint: str, output: str | None = None) -> None:
    """Write the network of a checkpoint as config.json and one model.safetensors, which need only PyTorch.

    Args:
        checkpoint: a file that `trunkline fit` wrote, a folder of sharded training, or the folder of a run.
        output: the folder to write; default: beside the checkpoint, by its name without .ckpt. `from_pretrained` of the
            network's class loads it, and so does --model.init_from.
    """
    source = find_checkpoint(checkpoint, "checkpoint")
    folder = source.with_suffix("") if output is None else Path(output)
    if folder.exists() and not folder.is_dir():
        raise TrunklineError(f"{folder} is a file; name a folder", "output")
    taken = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if (folder / name).exists()]
    if taken:
        raise TrunklineError(f"{folder} holds {' and '.join(taken)} already; name another folder", "output")
    trained = Trained.read(str(source))
    network = trained.network
    try:
        network.save_pretrained(folder)
    except OSError as error:
        raise cannot_write(folder, error, "output") from error
    name, weights = type(network).__name__, sum(p.numel() for p in network.parameters())
    print(
        f"{folder}: {name}.from_pretrained loads it; {weights:,} weights of step {trained.content.get('global_step')}"
    )
