"""What makes a command start sooner: imports that are left out, and garbage that is not looked for.

Lightning imports torchmetrics, and that imports torchvision, transformers, scipy and matplotlib, if they are installed,
for metrics that Trunkline does not have. A class of the user's own may use them, and then nothing is left out.
"""

import atexit
import gc
import re
import sys

from trunkline import TrunklineError
from trunkline.pipelines.configs import find_config
from trunkline.pipelines.errors import config_files

LEFT_OUT = {"torchvision", "transformers", "scipy", "matplotlib"}
OWN = ("trunkline.", "lightning.", "torch.")


def names_foreign_class(arguments: list[str]) -> bool:
    """Whether a command line, or a config that it names, has the path of a class that is not ours or Lightning's."""
    texts = list(arguments)
    try:
        texts += [find_config(config).read_text(encoding="utf-8") for config in config_files(arguments)]
    except (TrunklineError, OSError, UnicodeDecodeError):
        return False  # reported when the config is read
    paths = re.findall(r"(?:^|[\s:='\"])((?:\w+\.)+[A-Z]\w*)", "\n".join(texts))
    return any(not path.startswith(OWN) for path in paths)


def import_torchmetrics(arguments: list[str]) -> None:
    """Import torchmetrics as if `LEFT_OUT` were not installed, unless the command line names a class of the user's own.

    Afterwards they can be imported as usual.
    """
    if "torchmetrics" in sys.modules or names_foreign_class(arguments):
        return
    from lightning_utilities.core import imports

    package_available, is_available = imports.package_available, imports.RequirementCache.__bool__

    def available(self: imports.RequirementCache) -> bool:
        name = re.match(r"[\w-]+", self.requirement or "")
        return (name is None or name[0] not in LEFT_OUT) and is_available(self)

    imports.package_available = lambda name: name not in LEFT_OUT and package_available(name)  # type: ignore[assignment]
    imports.RequirementCache.__bool__ = available  # type: ignore[method-assign]
    try:
        import torchmetrics  # noqa: F401
    finally:
        imports.package_available = package_available
        imports.RequirementCache.__bool__ = is_available  # type: ignore[method-assign]


def put_off_collection() -> None:
    """Look for no garbage while libraries are imported, where it takes a quarter of the time and finds nothing.

    Nor at the end of the process, where Python would look through all objects of all libraries for a second or two.
    """
    gc.disable()
    atexit.register(gc.freeze)


def resume_collection() -> None:
    """Collect garbage again, if that was put off, but not among what has been imported, which stays to the end."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
