"""`trunkline fill-mask`: predict the masked words of a sentence."""

import json

import torch

from trunkline import TrunklineError
from trunkline.datamodules.text.masking import masked_sentence
from trunkline.datamodules.tokenizers import MASKING_TOKENS
from trunkline.modules.generation.filling import fill_masks
from trunkline.pipelines.devices import find_device
from trunkline.pipelines.trained import read_language_model


def fill_mask(
    checkpoint: str, sentence: list[str] | str, top_k: int = 5, device: str = "auto", tokenizer: str | None = None
) -> None:
    """Print the likeliest tokens for each `[MASK]`, with their probabilities.

    Args:
        checkpoint: a checkpoint of a masked language model, from `trunkline fit`.
        sentence: a text that holds `[MASK]`, or several; they can also follow the command without the flag.
        top_k: number of tokens shown for each mask.
        device: auto, cpu, cuda, cuda:1, mps, …
        tokenizer: a tokenizer.json to use instead of the checkpoint's own tokenizer.

    Raises:
        TrunklineError: for a sentence without a mask or one that is too long, or if the checkpoint cannot be used.
    """
    if top_k < 1:
        raise TrunklineError(f"--top_k must be at least 1, not {top_k}")
    place = find_device(device)
    network, words = read_language_model(checkpoint, "fill-mask", tokenizer)
    network.to(place)
    texts = [one for text in ([sentence] if isinstance(sentence, str) else sentence) for one in sentences_in(text)]
    rows = [masked_sentence(words, text, network.config.max_length, "--sentence") for text in texts]
    for text, (ids, mask) in zip(texts, rows, strict=True):
        print(text)
        for filling in fill_masks(network, torch.tensor(ids, device=place), mask, top_k):
            found = zip(filling.tokens, filling.probabilities, strict=True)
            print("  " + "  ".join(f"{words.decode([token])} {probability:.3f}" for token, probability in found))


def sentences_in(text: str) -> list[str]:
    """The text itself, or the texts in a JSON list.

    Raises:
        TrunklineError: for a list that is not JSON: it must not be taken for one sentence.
    """
    if not text.startswith("[") or not text.endswith("]") or text.startswith(MASKING_TOKENS[-1]):
        return [text]
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not found or not all(isinstance(one, str) for one in found):
        raise TrunklineError(
            f"--sentence {text} looks like a list; write each sentence between its own quotes: "
            "trunkline fill-mask 'one [MASK]' 'two [MASK]'"
        )
    return list(found)
