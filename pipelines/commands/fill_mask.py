"""`trunkline fill-mask`: predict the masked words of a sentence."""

import torch

from trunkline import TrunklineError
from trunkline.datamodules.text.masking import masked_sentence
from trunkline.modules.generation.filling import fill_masks
from trunkline.pipelines.devices import find_device
from trunkline.pipelines.trained import read_language_model


def fill_mask(
    checkpoint: str, sentence: list[str] | str, top_k: int = 5, device: str = "auto", tokenizer: str | None = None
) -> None:
    """Print the likeliest tokens for each `[MASK]`, with their probabilities.

    Args:
        checkpoint: a checkpoint of a masked language model, from `trunkline fit`.
        sentence: a text that holds `[MASK]`, or several texts as "[one, two]".
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
    texts = [sentence] if isinstance(sentence, str) else sentence
    rows = [masked_sentence(words, text, network.config.max_length, "--sentence") for text in texts]
    for text, (ids, mask) in zip(texts, rows, strict=True):
        print(text)
        for filling in fill_masks(network, torch.tensor(ids, device=place), mask, top_k):
            found = zip(filling.tokens, filling.probabilities, strict=True)
            print("  " + "  ".join(f"{words.decode([token])} {probability:.3f}" for token, probability in found))
