"""Text generation, one token at a time: sampling and greedy choice.

Needs only torch. Shape legend: B rows, T tokens of the prompt, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.generation.beams import beam_search
from trunkline.modules.generation.compiled import CompiledDecoder
from trunkline.modules.generation.decoding import (
    STEPS_AT_ONCE,
    Decoder,
    Draws,
    GenerationConfig,
    Window,
    check_prompts,
    choose,
    cut,
    evaluating,
    filter_logits,
    tokens_seen,
)


def stream(
    decoder: Decoder,
    tokens: Tensor,
    mask: Tensor | None = None,
    config: GenerationConfig | None = None,
    end_ids: Sequence[int] = (),
    ended: Tensor | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Continue each row, one token at a time.

    Args:
        decoder: the model, such as a `GPT`.
        tokens: (B, T) prompts, padded on the left to the same length.
        mask: (B, T) bool, False for padding; None without padding.
        config: how tokens are chosen; must not ask for beam search.
        end_ids: tokens that end a row.
        ended: (B,) bool, all False at first. It is updated here, and the caller may set it to end a row.
        numbers: (B,) number of each row, which decides its random numbers; None counts from 0.

    Returns:
        Iterator over the (B,) next tokens, at most `config.max_new_tokens` times, until all rows have ended. For a row
        that has ended it gives the first of `end_ids`, or 0. A `CompiledDecoder` goes on for up to `STEPS_AT_ONCE`
        steps after the last row has ended, and gives only these there: asking waits for the device.

    Raises:
        TrunklineError: before the first token, for an empty prompt, one that is longer than the decoder's `max_length`,
            an unknown token, a mask that is not left padding, or beam search.
    """
    config = config or GenerationConfig()
    if config.num_beams > 1:
        raise TrunklineError(f"num_beams={config.num_beams} is beam search, which cannot stream; call beam_search")
    tokens, mask = check_prompts(decoder, tokens, mask, config)
    if ended is None:
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    drawn = range(len(tokens)) if numbers is None else numbers
    draws = Draws(config.seed, drawn, tokens.device) if config.temperature > 0 else None
    return _stream(decoder, tokens, mask, config, tokens.new_tensor(end_ids), ended, draws)


@torch.inference_mode()
def _stream(
    decoder: Decoder,
    tokens: Tensor,
    mask: Tensor | None,
    config: GenerationConfig,
    ends: Tensor,
    ended: Tensor,
    draws: Draws | None,
) -> Iterator[Tensor]:
    """The loop of `stream`. Rows that have ended are removed from the batch; `rows` are the remaining ones.

    A compiled step needs all rows to the end. There the device is only asked now and then whether all have ended.
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    filler = ends[:1] if len(ends) else tokens.new_zeros(1)
    keeps_rows = isinstance(decoder, CompiledDecoder)
    with evaluating(decoder):
        seen = tokens_seen(decoder, tokens, mask, config)
        window = Window(decoder, tokens, mask, config.max_new_tokens - 1)
        for step in range(config.max_new_tokens):
            drawn = None if draws is None else draws.next()[rows]
            repeated = window.repeats(config.no_repeat_ngram)
            chosen = choose(filter_logits(window.logits.float(), config, seen, repeated, first=step == 0), drawn)
            if keeps_rows:
                given = chosen = torch.where(ended, filler, chosen)
            else:
                given = filler.repeat(len(tokens)).index_copy_(0, rows, chosen)
            ended |= torch.isin(given, ends)
            yield given
            if keeps_rows:
                if (step + 1) % STEPS_AT_ONCE == 0 and bool(ended.all()):
                    return
            elif not (going := ~ended[rows]).all():
                rows, chosen = rows[going], chosen[going]
                if not len(rows):
                    return
                window.take(going.nonzero()[:, 0])
                seen = None if seen is None else seen[going]
            if seen is not None:
                seen.scatter_(1, chosen[:, None], True)
            if step + 1 < config.max_new_tokens:
                window.append(chosen)


def generate(
    decoder: Decoder,
    tokens: Tensor,
    mask: Tensor | None = None,
    config: GenerationConfig | None = None,
    end_ids: Sequence[int] = (),
    numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """The new tokens of each row, without the end token; uses beam search if `config.num_beams` is above 1.

    Arguments and errors are those of `stream`.
    """
    config = config or GenerationConfig()
    if config.num_beams > 1:
        return [beams[0].tokens for beams in beam_search(decoder, tokens, mask, config, end_ids)]
    steps = torch.stack(list(stream(decoder, tokens, mask, config, end_ids, numbers=numbers)), dim=1).tolist()
    return [cut(row, end_ids) for row in steps]
