"""Texts from the outputs of CTC (connectionist temporal classification; Graves et al., 2006).

Needs only torch. Shape legend: B clips, T states of a clip, V tokens; the blank is any id, usually V.
"""

from itertools import groupby

from torch import Tensor


def ctc_greedy(scores: Tensor, lengths: Tensor, blank: int) -> list[list[int]]:
    """The tokens of the likeliest path of each clip: one entry for each run of a token, without blanks.

    Args:
        scores: (B, T, V + 1) logits or log-probabilities.
        lengths: (B,) number of states of each clip.
        blank: id of the blank.
    """
    paths = zip(scores.argmax(dim=2).tolist(), lengths.tolist(), strict=True)
    return [[token for token, _ in groupby(path[:length]) if token != blank] for path, length in paths]
