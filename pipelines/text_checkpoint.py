"""Networks and tokenizers out of training checkpoints, and the device that they run on."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from trunkline import TrunklineError
from trunkline.datamodules.tokenizers import size_of
from trunkline.modules.checkpoints import load_checkpoint
from trunkline.modules.networks import BERT, GPT
from trunkline.modules.networks.base import config_from_dict

LANGUAGE_MODELS: dict[str, type[GPT | BERT]] = {"CausalLM": GPT, "MaskedLM": BERT}
"""Objectives, and the networks in their checkpoints."""


def load_language_model(
    checkpoint: str, objectives: tuple[str, ...], tokenizer: str | None = None
) -> tuple[GPT | BERT, Tokenizer]:
    """Network, in evaluation mode, and tokenizer of a training checkpoint.

    Args:
        checkpoint: the file.
        objectives: those of `LANGUAGE_MODELS` that will do.
        tokenizer: a tokenizer.json in place of the checkpoint's own.

    Raises:
        TrunklineError: if it is damaged, of another objective, or without a tokenizer, or if they do not fit.
    """
    content: Any = load_checkpoint(checkpoint)
    objective = content.get("objective", "something else")
    if objective not in objectives:
        raise TrunklineError(f"{checkpoint} is no checkpoint of {' or '.join(objectives)}, but of {objective}")
    words, source = _tokenizer(content, checkpoint, tokenizer)
    shape = content.get("hyper_parameters", {}).get("network")
    if shape is None:
        raise TrunklineError(f"{checkpoint} is no checkpoint of a Trunkline run: it names no network")
    kind = LANGUAGE_MODELS[objective]
    config: Any = config_from_dict(kind.config_class, shape)
    if size_of(words) > config.vocab_size:
        raise TrunklineError(
            f"{source} has {size_of(words)} tokens, but the network of {checkpoint} knows {config.vocab_size}; "
            "use the tokenizer that it was trained with"
        )
    network = kind(config)
    weights = {k.removeprefix("network."): v for k, v in content["state_dict"].items() if k.startswith("network.")}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).split("\n")[1:2] or [str(error)]
        raise TrunklineError(f"the weights in {checkpoint} do not fit its configuration: {first[0].strip()}") from error
    return network.eval(), words


def _tokenizer(content: dict[str, Any], checkpoint: str, name: str | None) -> tuple[Tokenizer, str]:
    """The tokenizer, and where it is from, for messages."""
    if name is None:  # the datamodule's state has it
        states = [s["tokenizer"] for s in content.values() if isinstance(s, dict) and s.get("tokenizer")]
        if not states:
            raise TrunklineError(f"{checkpoint} holds no tokenizer; name its file with --tokenizer tokenizer.json")
        text, source = states[0], f"the tokenizer in {checkpoint}"
    else:
        try:
            text, source = Path(name).read_text(encoding="utf-8"), f"--tokenizer {name}"
        except (OSError, UnicodeDecodeError) as error:
            raise TrunklineError(f"cannot read --tokenizer {name}: {error}; name a tokenizer.json") from error
    try:
        return Tokenizer.from_str(text), source
    except Exception as error:  # the library raises bare ones
        raise TrunklineError(f"{source} is no tokenizer of the tokenizers library: {error}") from error


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is an accelerator, where there is one.

    Raises:
        TrunklineError: if there is no such device here.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise TrunklineError(f"--device {name} cannot be used here: {reason}; try --device cpu") from error
