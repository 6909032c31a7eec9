"""Networks and tokenizers out of training checkpoints, and the device that they run on."""

from typing import Any

import torch
from tokenizers import Tokenizer

from trunkline import TrunklineError
from trunkline.datamodules.tokenizers import load_tokenizer, size_of, tokenizer_of_checkpoint
from trunkline.files import load_checkpoint
from trunkline.modules.networks import BERT, GPT
from trunkline.modules.training.warm_start import network_of

LANGUAGE_MODELS: dict[str, type[GPT | BERT]] = {"CausalLM": GPT, "MaskedLM": BERT}
"""Objectives, and the networks in their checkpoints."""


def load_language_model(
    checkpoint: str, objectives: tuple[str, ...], tokenizer: str | None = None
) -> tuple[GPT | BERT, Tokenizer]:
    """Network, in evaluation mode, and tokenizer of a training checkpoint.

    Args:
        checkpoint: the file.
        objectives: those of `LANGUAGE_MODELS` that will do.
        tokenizer: of `load_tokenizer`, in place of the checkpoint's own.

    Raises:
        TrunklineError: if it is damaged, of another objective, or without a tokenizer, or if they do not fit.
    """
    content: Any = load_checkpoint(checkpoint)
    objective = content.get("objective", "something else")
    if objective not in objectives:
        raise TrunklineError(f"{checkpoint} is no checkpoint of {' or '.join(objectives)}, but of {objective}")
    words, source = _tokenizer(content, checkpoint, tokenizer)
    network = network_of(LANGUAGE_MODELS[objective], content, checkpoint)
    if size_of(words) > network.config.vocab_size:
        raise TrunklineError(
            f"{source} has {size_of(words)} tokens, but the network of {checkpoint} knows {network.config.vocab_size}; "
            "use the tokenizer that it was trained with"
        )
    return network.eval(), words


def _tokenizer(content: dict[str, Any], checkpoint: str, name: str | None) -> tuple[Tokenizer, str]:
    """The tokenizer, and where it is from, for messages."""
    if name is not None:
        return load_tokenizer(name, "--tokenizer"), f"--tokenizer {name}"
    own = own_tokenizer(content, checkpoint, "name its file with --tokenizer tokenizer.json")
    return own, f"the tokenizer in {checkpoint}"


def own_tokenizer(content: dict[str, Any], checkpoint: str, mend: str) -> Tokenizer:
    """The tokenizer that a checkpoint holds.

    Args:
        content: of the checkpoint.
        checkpoint: the file, for messages.
        mend: what to do if there is none, for messages too.

    Raises:
        TrunklineError: if it is missing or broken.
    """
    text = tokenizer_of_checkpoint(content)
    if text is None:
        raise TrunklineError(f"{checkpoint} holds no tokenizer; {mend}")
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare ones
        raise TrunklineError(
            f"the tokenizer in {checkpoint} is no tokenizer of the tokenizers library: {error}; {mend}"
        ) from error


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
