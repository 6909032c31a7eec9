"""Names that a user gives: of a local path, or of something on the Hugging Face hub."""

import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from trunkline import TrunklineError

FILE = re.compile(
    r"\.(txt|md|csv|tsv|jsonl?|parquet|arrow|tmx|conll|ya?ml|gz|tar|zip|ckpt|pt|bin|safetensors"
    r"|png|jpe?g|gif|bmp|tiff?|webp|wav|flac|ogg|mp3)$",
    re.IGNORECASE,
)


def with_article(name: str) -> str:
    """A class name with its article, for messages: "an EncoderDecoder", "a ViT"."""
    return f"{'an' if name[:1] in set('AEIO') else 'a'} {name}"


def looks_like_path(name: str) -> bool:
    """Whether a name can only be that of a local path: a mistyped path must not be looked for on the hub."""
    begin, _, rest = name.partition("/")
    return (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or "\\" in name
        or "/" in rest  # the hub's names are `owner/name`
        or FILE.search(name) is not None
        or (rest != "" and Path(begin).is_dir())
    )


def check_regular(path: str | Path, field: str | None = None) -> None:
    """Refuse a path that is neither a file nor a folder: reading a pipe or a device may never end.

    Args:
        path: the path; it may be missing.
        field: the field that gave it, for the message.

    Raises:
        TrunklineError: if it is a pipe, a device or a socket.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise TrunklineError(
            f"{path} is not a regular file but a pipe, a device or a socket; write its content to a file first", field
        )


@contextmanager
def hub_access() -> Iterator[None]:
    """A block that reads from the hub. If the hub's host cannot even be found, only what is cached is read.

    The hub's client would repeat each request for half a minute, also for a name that is only mistyped.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or hub_reachable():
        yield
        return
    settings = [constants, sys.modules.get("datasets.config")]
    for module in filter(None, settings):
        module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in filter(None, settings):
            module.HF_HUB_OFFLINE = False  # type: ignore[attr-defined]


def hub_reachable() -> bool:
    """Whether the hub may be asked: it is not switched off, and its host can be found, or a proxy finds it."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    return bool(getproxies()) or _is_known(urlsplit(constants.ENDPOINT).hostname)


def _is_known(host: str | None) -> bool:
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False
