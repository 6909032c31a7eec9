"""A folder of the library peft: which model it adapts, and its options."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trunkline import TrunklineError
from trunkline.modules.networks.convert.foreign_files import CONFIG_FILES

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FREE_OPTIONS = {
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save"),
    # What follows from the names of the weights, or changes none of them.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "task_type"),
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "runtime_config"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "ensure_weight_tying"),
}
"""Options of peft's LoRA that are read, or do not matter after training."""
USUAL_OPTIONS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base's weights
}


def is_adapter_folder(place: Path) -> bool:
    """Whether a place is a folder of peft, without a network of its own."""
    return (place / ADAPTER_CONFIG).is_file() and not any((place / name).is_file() for name in CONFIG_FILES)


def base_of_adapter(folder: Path, find: Callable[[str], Path]) -> Path:
    """The place of the model for which the adapters in a folder of peft were trained.

    Args:
        folder: the folder of peft.
        find: gives the place of a model of that name, which may be one of the hub.

    Raises:
        TrunklineError: if the folder names none, or another with adapters.
    """
    base = read_adapter_config(folder).get("base_model_name_or_path")
    place = find(str(base)) if base else None
    if place is None or is_adapter_folder(place):
        raise TrunklineError(
            f"{folder / ADAPTER_CONFIG} has base_model_name_or_path={base}, which is no model without adapters; write "
            "there which model they were trained for, or load that and give it to load_adapter of "
            "trunkline.modules.networks.convert.peft_adapters"
        )
    return place


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The options in a folder of peft.

    Raises:
        TrunklineError: if they cannot be read, or for one that has no counterpart here.
    """
    file = folder / ADAPTER_CONFIG
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise TrunklineError(f"cannot read {file}, which says what the adapters are: {error}") from error
    for name, value in config.items():
        if name not in FREE_OPTIONS and value not in USUAL_OPTIONS.get(name, (None, False, {}, [])):
            raise TrunklineError(
                f"{file} has {name}={value}, which is not LoRA as here; merge the adapter in peft, and load that model"
            )
    return config


def scale_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """What peft multiplies the change of a layer by: alpha / r, or with rank-stabilised LoRA alpha / sqrt(r)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", layer)), config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
