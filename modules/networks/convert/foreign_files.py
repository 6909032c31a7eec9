"""Read a folder of another library: its configuration, and its weights one by one."""

import ctypes
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import torch
from torch import Tensor

from trunkline import TrunklineError

CONFIG_FILES = ("config.json", "open_clip_config.json")
"""Names of configuration files; the first that is there counts."""
WEIGHTS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
"""Names of files of weights, or of their list of parts; the first that is there counts."""
PART_FILES = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
"""Patterns of the parts that a list names."""


class ForeignWeights(Mapping[str, Tensor]):
    """The weights in one or more files, by name. Each is read when it is asked for, and is then a tensor in memory.

    No file stays mapped into memory: one that is written again or cut off later can then neither change a network nor
    end the process, and nothing is twice in memory.

    Args:
        files: safetensors files, or files of `torch.save`, which are read without running code in them.

    Raises:
        TrunklineError: if a file is damaged, cut, or holds something else than weights.
    """

    def __init__(self, *files: Path) -> None:
        self.files = files
        self._place: dict[str, Any] = {}
        """Name -> its place in a safetensors file, or the tensor itself."""
        self._scratch = torch.empty(0, dtype=torch.uint8)
        for file in files:
            self._place |= _places_in(file) if file.suffix == ".safetensors" else _read_torch(file)

    def __getitem__(self, name: str) -> Tensor:
        place = self._place[name]
        return place if isinstance(place, Tensor) else place.read()

    def transposed(self, name: str) -> Tensor:
        """The transpose of a weight, contiguous.

        The file is read into memory that is used again for the next weight: new memory would take longer than reading.
        """
        place = self._place[name]
        if isinstance(place, Tensor):
            return place.T
        if len(self._scratch) < place.length:
            self._scratch = torch.empty(place.length, dtype=torch.uint8)
        matrix = self._scratch[: place.length].view(place.dtype).view(place.shape)
        place.read_into(matrix)
        return torch.empty(place.shape[::-1], dtype=place.dtype).copy_(matrix.T)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, name: object) -> bool:
        return name in self._place  # that of Mapping would read the weight

    def __str__(self) -> str:
        return str(self.files[0]) if len(self.files) == 1 else str(self.files[0].parent)


def transposed(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """The transpose of one of the weights; those in files are read only once for it."""
    return weights.transposed(name) if isinstance(weights, ForeignWeights) else weights[name].T


def shapes_of(weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Name without the prefix -> shape, of the weights whose names begin with it; those in files are not read."""
    places = weights._place if isinstance(weights, ForeignWeights) else weights
    return {n.removeprefix(prefix): tuple(place.shape) for n, place in places.items() if n.startswith(prefix)}


class _Place(NamedTuple):
    """Where a weight stands in a safetensors file."""

    file: Path
    start: int
    """First byte."""
    length: int
    """Bytes."""
    dtype: torch.dtype
    shape: list[int]

    def read(self) -> Tensor:
        """The weight. It is read, not mapped into memory as the library does, which would keep a second copy there."""
        weight = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(weight)
        return weight

    def read_into(self, weight: Tensor) -> None:
        """Fill a contiguous tensor of the weight's type and size.

        Raises:
            TrunklineError: if the file ends before.
        """
        if not self.length:
            return
        memory = (ctypes.c_char * self.length).from_address(weight.data_ptr())  # NumPy may not be there
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            if stream.readinto(memory) != self.length:
                raise TrunklineError(f"{self.file} has been cut off while it was read; copy or download it again")


TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}
"""Types of the safetensors format."""


def _places_in(file: Path) -> dict[str, _Place]:
    """Where the weights stand in a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):  # checks the header: sizes, order, no gaps
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (OSError, SafetensorError) as error:
        raise TrunklineError(f"cannot read weights from {file}: {error}; copy or download it again") from error
    header.pop("__metadata__", None)
    other = sorted({entry["dtype"] for entry in header.values()} - TYPES.keys())
    if other:
        raise TrunklineError(f"{file} holds weights of type {other[0]}, which no network of ours has")
    places = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        places[name] = _Place(file, 8 + length + start, end - start, TYPES[entry["dtype"]], entry["shape"])
    return places


def _read_torch(file: Path) -> dict[str, Tensor]:
    """The weights in a file of `torch.save`: a state dict, or a dictionary that holds one as timm's files do."""
    try:
        # Files from before version 1.6 of torch, such as the first of BERT and GPT-2, are no archives of parts.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:  # a cut or foreign file raises many kinds
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrunklineError(
            f"cannot read weights from {file}: {reason}; only "
            "files of torch.save with nothing but tensors are read, since others may run code; take a safetensors file"
        ) from error
    for key in ("state_dict", "model"):
        content = content[key] if isinstance(content, dict) and isinstance(content.get(key), dict) else content
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise TrunklineError(f"{file} holds no state dict, that is, tensors by name")
    return dict(content)


def read_config(place: Path) -> dict[str, Any]:
    """Content of a configuration file, or of the one in a folder.

    Raises:
        TrunklineError: if there is none, it cannot be read, or is no JSON object.
    """
    file = place
    if place.is_dir():
        file = next((place / name for name in CONFIG_FILES if (place / name).is_file()), place / CONFIG_FILES[0])
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrunklineError(
            f"cannot read {file}, which says what network the weights beside it are of: {error}"
        ) from error
    if not isinstance(content, dict):
        raise TrunklineError(f"{file} is no JSON object, so it describes no network")
    return content


OTHER_CONTENT = {
    "tf_model*.h5": "weights of TensorFlow",
    "flax_model*.msgpack": "weights of Flax",
    "*.gguf": "weights in the format GGUF",
    "adapter_config.json": "an adapter of PEFT, which convert.peft_adapters.load_adapter gives to its base model",
    "modules.json": "a model of sentence-transformers, whose network is in a folder of its own",
    "*.safetensors": "weights without the config.json of their network",
    "pytorch_model*.bin": "weights without the config.json of their network",
}
"""Patterns of files -> what they are."""


def other_content(folder: Path) -> str:
    """What a folder holds that cannot be loaded as it is, as part of a message; empty if nothing is known of it."""
    found = next((what for pattern, what in OTHER_CONTENT.items() if any(folder.glob(pattern))), None)
    return "" if found is None else f", but {found}"


def open_weights(source: Path) -> ForeignWeights:
    """The weights in a folder, or in one file.

    Raises:
        TrunklineError: if there are none, a file is damaged, or a part is missing that the list of parts names.
    """
    file = source
    if source.is_dir():
        found = next((source / name for name in WEIGHTS_FILES if (source / name).is_file()), None)
        if found is None:
            wanted = ", ".join(WEIGHTS_FILES)
            raise TrunklineError(f"{source} holds no weights{other_content(source)}; it needs one of {wanted}")
        file = found
    if not file.name.endswith(".index.json"):
        return ForeignWeights(file)
    try:
        place: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(place.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrunklineError(f"{file} is no list of parts, which names the file of each weight: {error!r}") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise TrunklineError(f"{file} names a part outside its folder: {outside[0]}")
    missing = [name for name in names if not (file.parent / name).is_file()]
    if missing:
        raise TrunklineError(
            f"{file} names {len(names)} parts, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            "there; copy or download the folder again"
        )
    weights = ForeignWeights(*(file.parent / name for name in names))
    unlisted = sorted(place.keys() ^ weights.keys())
    if unlisted:
        raise TrunklineError(
            f"the parts that {file} names hold other weights than it says, such as '{unlisted[0]}'; copy or download "
            "the folder again"
        )
    return weights
