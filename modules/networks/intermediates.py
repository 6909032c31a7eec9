"""States between the blocks of a trunk, chosen as timm chooses them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer

Indices = int | Sequence[int] | None
"""Which blocks: the last n, these numbers (negative ones count from the end), or all."""


def block_numbers(indices: Indices, depth: int) -> tuple[int, ...]:
    """The chosen blocks of a trunk of this depth, in the order in which they run.

    Raises:
        TrunklineError: for a number that the trunk does not have, or if none is chosen.
    """
    if indices is None:
        return tuple(range(depth))
    if isinstance(indices, int):
        if not 0 < indices <= depth:
            raise TrunklineError(f"indices={indices}: a trunk of {depth} blocks has the last 1 to {depth}")
        return tuple(range(depth - indices, depth))
    wrong = [index for index in indices if not -depth <= index < depth]
    if wrong or not indices:
        raise TrunklineError(
            f"indices={list(indices)}: a trunk of {depth} blocks has the numbers {-depth} to {depth - 1}; name at "
            "least one of them"
        )
    return tuple(sorted({index % depth for index in indices}))


def states_of(trunk: Transformer, read: Callable[..., Any], indices: Indices, norm: bool) -> tuple[Any, list[Tensor]]:
    """The output of `read(layers=...)`, and the states (B, T, D) after the chosen blocks of the trunk that it runs.

    Args:
        trunk: the trunk.
        read: runs the trunk, and passes `layers` on to it.
        indices: the blocks.
        norm: apply the trunk's final norm to the states.
    """
    out = read(layers=block_numbers(indices, len(trunk.blocks)))
    return out, [trunk.norm(x) for x in out.states] if norm else out.states


def patch_intermediates(
    out: Any,
    states: list[Tensor],
    rows: int,
    output_fmt: Literal["NCHW", "NLC"],
    return_prefix_tokens: bool,
    intermediates_only: bool,
) -> Any:
    """What `forward_intermediates` returns for a network over patches.

    Args:
        out: features with fields `prefix` (B, P, D) and `patches` (B, rows * columns, D).
        states: states (B, P + rows * columns, D) of the chosen blocks.
        rows: rows of the grid of patches.
        output_fmt: `NCHW` for states (B, D, rows, columns), or `NLC` for (B, rows * columns, D).
        return_prefix_tokens: give each state as a tuple with that of the tokens before the patches, if there are any.
        intermediates_only: leave out the final states.

    Raises:
        TrunklineError: for another format.
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise TrunklineError(f"output_fmt={output_fmt} is neither NCHW nor NLC")
    split = out.prefix.shape[1]
    found: list[Any] = [x[:, split:] for x in states]
    if output_fmt == "NCHW":
        found = [x.unflatten(1, (rows, -1)).permute(0, 3, 1, 2).contiguous() for x in found]
    if return_prefix_tokens and split:
        found = [(patches, x[:, :split]) for patches, x in zip(found, states, strict=True)]
    return found if intermediates_only else (torch.cat((out.prefix, out.patches), dim=1), found)
