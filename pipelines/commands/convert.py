"""`trunkline convert`: the network of a checkpoint as files for `from_pretrained`, or for another library."""

from pathlib import Path
from typing import Literal

import torch

from trunkline import TrunklineError
from trunkline.files import cannot_write
from trunkline.modules.networks import Network
from trunkline.modules.networks.base import CONFIG_FILE, WEIGHTS_FILE, network_of
from trunkline.modules.networks.companions import CARD_FILE
from trunkline.modules.networks.convert.families import FILES, save_foreign, to_foreign
from trunkline.modules.networks.convert.family import Library
from trunkline.modules.networks.convert.peft_adapters import save_adapter
from trunkline.modules.networks.convert.peft_folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from trunkline.modules.networks.hub import check_repository, upload
from trunkline.modules.networks.pretrained import load_pretrained
from trunkline.pipelines.trained import Trained
from trunkline.run_folders import find_checkpoint

LIBRARY_NAMES: dict[str, Library] = {"hf": "transformers", "timm": "timm", "open_clip": "open_clip"}
"""What a user writes -> the library."""


def convert(
    checkpoint: str,
    output: str | None = None,
    to: Literal["trunkline", "hf", "timm", "open_clip", "peft"] = "trunkline",
    push_to_hub: str | None = None,
) -> None:
    """Write the network of a checkpoint as config.json and one model.safetensors, which need only PyTorch.

    With them go the tokenizer, how pictures and sounds are prepared, the names of the classes, and a model card.

    Args:
        checkpoint: a file that `trunkline fit` wrote, a folder of sharded training, or the folder of a run.
        output: the folder to write; default: beside the checkpoint, by its name without .ckpt. `trunkline.load` and
            `from_pretrained` of the network's class load it, and so does --model.init_from.
        to: the library that is to load the files: trunkline, hf (transformers), timm or open_clip. What was written is
            read back and compared. Or peft, for the adapters of a run with LoRA alone; in all other files they are
            merged into the weights. The default folder for another library ends in its name.
        push_to_hub: a repository of the Hugging Face hub, `owner/name`, to which the folder is uploaded; it is created
            if missing. The token is that of HF_TOKEN or of `hf auth login`.
    """
    library = LIBRARY_NAMES.get(to)
    source = find_checkpoint(checkpoint, "checkpoint")
    beside = source.with_suffix("") if to == "trunkline" else source.with_name(f"{source.stem}-{to}")
    folder = beside if output is None else Path(output)
    if push_to_hub is not None:
        check_repository(push_to_hub)
    if folder.exists() and not folder.is_dir():
        raise TrunklineError(f"{folder} is a file; name a folder", "output")
    own = (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if to == "peft" else (CONFIG_FILE, WEIGHTS_FILE)
    taken = [name for name in (FILES[library] if library else own) if (folder / name).exists()]
    if taken:
        raise TrunklineError(f"{folder} holds {' and '.join(taken)} already; name another folder", "output")
    trained = Trained.read(str(source))
    network = network_of(trained.network_class, trained.content, trained.file, merge=to != "peft").eval()
    try:
        if to == "peft":
            reader = f"peft loads it for {save_adapter(network, folder).name}"
        elif library is None:
            network.save_pretrained(folder)
            reader = f"{type(network).__name__}.from_pretrained loads it"
        else:
            family = save_foreign(network, folder, library, repository=push_to_hub)
            check_weights(network, folder, library)
            reader = f"{library} loads it as {family.name}"
    except OSError as error:
        raise cannot_write(folder, error, "output") from error
    weights = sum(p.numel() for p in network.parameters() if to != "peft" or p.requires_grad)
    print(f"{folder}: {reader}; {weights:,} weights of step {trained.content.get('global_step')}")
    if push_to_hub is not None:
        print(f"{upload(folder, push_to_hub)}: uploaded; the model card is {folder / CARD_FILE}")


def check_weights(network: Network, folder: Path, library: Library) -> None:
    """Read a folder that was just written, and compare the weights bit for bit, as the library has them.

    What is read may have more weights than the network: the other library has positions for tokens that have none here,
    or a table of positions that are computed here.

    Raises:
        TrunklineError: if one differs.
    """
    again = load_pretrained(folder, (type(network),), dtype=None)
    want, found = (to_foreign(each, library)[2] for each in (network, again))
    differs = [n for n in want.keys() | found.keys() if n not in want or n not in found or not same(want[n], found[n])]
    if differs:
        raise TrunklineError(
            f"{folder} does not hold the weights of the checkpoint: {min(differs)} differs; the disk is faulty, or "
            "this is a defect of Trunkline"
        )


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two weights are equal in every bit."""
    return first.dtype == second.dtype and torch.equal(first, second)
