"""`trunkline.load`: a network from whatever holds one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from trunkline import TrunklineError
from trunkline.files import check_parts, load_checkpoint
from trunkline.modules import networks
from trunkline.modules.networks.base import Network, nameless, network_of, stored_config
from trunkline.modules.networks.convert.family import ForeignFamily
from trunkline.modules.networks.convert.foreign_files import CONFIG_FILES, other_content
from trunkline.modules.networks.convert.peft_folders import ADAPTER_CONFIG
from trunkline.modules.networks.pretrained import find_pretrained
from trunkline.modules.networks.vit import ViT
from trunkline.run_folders import find_checkpoint, is_checkpoint


def load_network(source: str | Path) -> Any:
    """The network in a checkpoint, a folder or a hub repository, in evaluation mode; see `trunkline.load`."""
    path = Path(source)
    if is_checkpoint(path) or (
        path.is_dir() and not any((path / name).is_file() for name in (*CONFIG_FILES, ADAPTER_CONFIG))
    ):
        try:
            file = find_checkpoint(path)
        except TrunklineError as error:
            if not (other := other_content(path)):
                raise
            raise TrunklineError(
                f"the folder {path} holds no network that can be loaded{other}; give a folder with a configuration "
                f"({' or '.join(CONFIG_FILES)}) and weights, a run or a checkpoint"
            ) from error
        content = load_checkpoint(file)
        return network_of(class_in_checkpoint(content, file), content, file).eval()
    try:
        found = find_pretrained(source)
        network = found.network().eval()
        if isinstance(network, ViT) and found.family is not None:
            fit_to_transform(network, found.family)
        return network
    except TrunklineError as error:
        if str(source) in str(error):
            raise
        raise TrunklineError(f"cannot load {source}: {error}") from error


def fit_to_transform(network: ViT, family: ForeignFamily) -> None:
    """Let a network take the pictures that its transform makes, if the files state another size for it, in place.

    A published DINOv2 has positions for 518 pixels and is given pictures of 224, for which it interpolates them at each
    call; here that happens once.

    Args:
        network: the network.
        family: the model that it was, which says how positions are interpolated.
    """
    size = network.config.size if network.transform is None else network.transform.image_size
    if size != network.config.size:
        rest = any(side % network.config.patch_size for side in size)  # such pixels are left out there
        network.config = replace(network.config, drop_remainder=rest)
        network.resize(size[0] if size[0] == size[1] else size, antialias=family.antialias)


def class_in_checkpoint(content: dict[str, Any], file: Path) -> type[Network]:
    """Class of the network in a training checkpoint.

    Raises:
        TrunklineError: if it names none, or one that is not Trunkline's own.
    """
    if stored_config(content) is None:
        raise nameless(file)
    check_parts(content, file, {"classes": dict} if "classes" in content else {})
    path = str(content.get("classes", {}).get("network", ""))
    if not path:
        raise TrunklineError(
            f"{file} is of an old version and does not name the class of its network; load it with from_checkpoint of "
            "that class, such as ViT.from_checkpoint"
        )
    name = path.rpartition(".")[2]
    kind = getattr(networks, name, None) if path.startswith("trunkline.") else None
    if not (isinstance(kind, type) and issubclass(kind, Network)):
        raise TrunklineError(
            f"{file} holds a {path}, which is no network of Trunkline's; import the class and load it with "
            f"{name}.from_checkpoint"
        )
    return kind
