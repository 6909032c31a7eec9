"""The cross-entropy of an output layer in chunks of tokens, forward and backward at once. Needs only torch.

Between the matrix products of a chunk, its logits are overwritten with their gradients. On a CPU that is done in blocks
that its cache holds. On a GPU it is compiled, to two or three passes over the logits: with the products, each logit of
2 bytes is then written or read 6 or 7 times, where separate operations in float32 move 66 bytes.

Shape legend: N tokens, D width, V vocabulary size; n tokens of a chunk.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, library

from trunkline.contract import IGNORE

LOGITS_AT_ONCE = 2**25
"""Logits in memory at once: 128 MiB in float32, and the matrices are still large enough to multiply at full speed."""
BLOCK = 2**18
"""Logits of which one core of a CPU computes the softmax at once: 1 MiB in float32, which its cache holds."""
SHARE_OF_MEMORY = 256
"""The logits of a chunk take a 256th of a GPU's memory: 320 MiB of 80 GiB, over 3,000 tokens of GPT-2 in bfloat16."""


def logits_at_once(logits: int, size: int, memory: int | None) -> int:
    """How many logits a chunk has.

    After each chunk the gradient of the weight is read and written, which costs a GPU about as much as the softmax of
    D tokens: so it gets larger chunks than a CPU, but a quarter of all logits at most, to save memory in any case. What
    is free at the moment does not count: chunks of other sizes round otherwise, and a resumed run would differ.

    Args:
        logits: those of all tokens.
        size: bytes of a logit.
        memory: bytes of the GPU's memory, free or not; None for a CPU.
    """
    if memory is None:
        return LOGITS_AT_ONCE
    return max(min(memory // SHARE_OF_MEMORY // size, logits // 4), LOGITS_AT_ONCE // 4)


def memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU's memory; None for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def chunks(tokens: int, vocabulary: int, size: int | None, at_once: int | None = None) -> Iterator[slice]:
    """Slices of equal length, of `size` tokens or with about `at_once` logits each; None means LOGITS_AT_ONCE."""
    count = max(1, -(-tokens * vocabulary // (at_once or LOGITS_AT_ONCE)))
    size = size or max(1, -(-tokens // count))
    return (slice(start, min(start + size, tokens)) for start in range(0, max(tokens, 1), size))


def same_key_not_target(row_keys: Tensor, class_keys: Tensor, target: Tensor) -> Tensor:
    """Mask (n, V), True where a class has the same key as the row but is not the row's target.

    `row_keys` and `target` are (n,), `class_keys` is (V,).
    """
    return (row_keys[:, None] == class_keys).scatter_(1, target.clamp(min=0)[:, None], False)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The computation of `linear_cross_entropy`; its forward pass computes the gradients too."""

    @staticmethod
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *rest: Any,
    ) -> Tensor:
        """As `loss_and_gradients`, after the type in which to multiply; the sum of the losses."""
        ctx.dtypes = [None if each is None else each.dtype for each in (x, weight, bias)]
        needed = list(ctx.needs_input_grad[1:4])
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        # Inside a compiled network the loop is one opaque operation: unrolled, it would be a graph for each chunk.
        compute: Any = chunked_cross_entropy if torch.compiler.is_compiling() else loss_and_gradients
        total, *grads = compute(x, weight, bias, *rest, needed)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (outer,) = grad_outputs  # float32 or wider, and so are the products: in float16 small ones would vanish
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for place, (grad, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True), start=1):
            if ctx.needs_input_grad[place]:
                found[place] = (grad.to(outer.dtype) * outer).to(dtype)
        return tuple(found)


def loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_keys: Tensor | None,
    class_keys: Tensor | None,
    smoothing: float,
    z_loss: float,
    chunk: int | None,
    compiled: bool,
    needed: list[bool],
) -> list[Tensor]:
    """The sum of the losses, and its gradients by x (N, D), weight (V, D) and bias (V,), empty if not `needed`.

    The first three arguments have one type. The gradient by x has it too; the others and the loss are in float32 or
    wider.
    """
    result = _empty_results(x, weight, bias, target, row_keys, class_keys, smoothing, z_loss, chunk, compiled, needed)
    total, grad_x, grad_weight, grad_bias = result
    for each in (total, grad_weight, grad_bias):
        each.zero_()
    at_once = logits_at_once(len(x) * len(weight), x.element_size(), memory_of(x.device))
    parts = list(chunks(len(x), len(weight), chunk, at_once))
    memory = x.new_empty(len(x[parts[0]]), len(weight))  # each chunk uses it again, because new pages are slow
    with torch.autocast(x.device.type, enabled=False):  # the inputs have the right types already
        for part in parts:
            logits = _product(x[part], weight, bias, memory[: len(x[part])])  # (n, V)
            counted = (target[part] != IGNORE)[:, None]
            keys = None if row_keys is None or class_keys is None else (row_keys[part], class_keys)
            losses = (_compiled_softmax if compiled else block_by_block)(logits, target[part], smoothing, z_loss, keys)
            total += losses.mul_(counted).sum()
            grad = logits  # its place in memory
            if needed[0]:
                torch.mm(grad, weight, out=grad_x[part]).mul_(counted)
            if needed[1] and total.dtype == x.dtype:
                grad_weight.addmm_(grad.T, x[part] * counted)
            elif needed[1]:
                grad_weight += grad.T @ (x[part] * counted)
            if needed[2]:
                grad_bias += grad.mul_(counted).sum(dim=0)
    return result


def _empty_results(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *options: Any) -> list[Tensor]:
    """Tensors for the results of `loss_and_gradients`, from its arguments."""
    wide, needed = torch.promote_types(x.dtype, torch.float32), options[-1]
    shapes = (x.shape, x.dtype), (weight.shape, wide), (weight.shape[:1], wide)
    grads = [
        x.new_empty(shape if need else 0, dtype=dtype) for (shape, dtype), need in zip(shapes, needed, strict=True)
    ]
    return [x.new_empty((), dtype=wide), *grads]


chunked_cross_entropy = library.custom_op("trunkline::chunked_cross_entropy", loss_and_gradients, mutates_args=())
chunked_cross_entropy.register_fake(_empty_results)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Logits (n, V) of the states x (n, D), written to `out`."""
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias, x, weight.T, out=out)


# --- from logits to gradients, compiled


def _softmax(
    logits: Tensor, target: Tensor, smoothing: float, z_loss: float, keys: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The same as `block_by_block`, in a form of which a compiler makes two or three passes over the logits.

    Where it is not compiled after all, as in an evaluation or for want of a compiler, it is not just the same but calls
    it, because each of its operations would need new memory.
    """
    if not torch.compiler.is_compiling():
        return block_by_block(logits, target, smoothing, z_loss, keys)
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    picked = target.clamp(min=0)[:, None]  # (n, 1)
    is_target = torch.arange(logits.shape[1], device=logits.device) == picked  # (n, V); a compiler need not scatter
    if keys is not None:
        values = values.masked_fill((keys[0][:, None] == keys[1]) & ~is_target, -torch.inf)
    partition = values.logsumexp(dim=1, keepdim=True)
    losses = partition - (1 - smoothing) * values.gather(1, picked)
    grad = (values - partition).exp()
    if smoothing:
        losses = losses - smoothing * values.mean(dim=1, keepdim=True)
    if z_loss:
        losses = losses + z_loss * partition.square()
        grad = grad * (1 + 2 * z_loss * partition)
    grad = grad - smoothing / logits.shape[1]
    logits.copy_(torch.where(is_target, grad - (1 - smoothing), grad))
    return losses


_not_compiled: list[str] = []
"""Why the compiler failed; it is not asked again in this process."""


@cache
def _compiler() -> Callable[..., Tensor]:
    return torch.compile(_softmax)  # here, because it takes a second to import


def _compiled_softmax(
    logits: Tensor, target: Tensor, smoothing: float, z_loss: float, keys: tuple[Tensor, Tensor] | None
) -> Tensor:
    """`_softmax`, compiled for any number of tokens, because the last chunk, or the next batch, may have others."""
    if _not_compiled:
        return block_by_block(logits, target, smoothing, z_loss, keys)
    compiled = _compiler()
    for rows in (logits, target, *(() if keys is None else keys[:1])):
        torch._dynamo.maybe_mark_dynamic(rows, 0)
    try:
        return compiled(logits, target, smoothing, z_loss, keys)
    except torch._dynamo.exc.TorchDynamoException as error:  # before anything has run
        _not_compiled.append(" ".join(str(error).split())[:200])
        warnings.warn(f"the loss could not be compiled, so it takes longer: {_not_compiled[0]}", stacklevel=2)
        return block_by_block(logits, target, smoothing, z_loss, keys)


# --- from logits to gradients, in blocks


def block_by_block(
    logits: Tensor, target: Tensor, smoothing: float, z_loss: float, keys: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Losses (n, 1) of (n, V) logits in float32 or wider; the gradients overwrite the logits.

    Those of tokens that are not counted are not zero yet. A few rows at a time go through all steps, so that a CPU's
    cache holds them.
    """
    rows, vocabulary = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    at_once = BLOCK * torch.get_num_threads() if logits.device.type == "cpu" else LOGITS_AT_ONCE // 4
    count = max(1, at_once // max(vocabulary, 1))
    losses = logits.new_empty(rows, 1, dtype=wide)
    spare, copy = (logits.new_empty(min(count, rows), vocabulary, dtype=wide) for _ in range(2))
    for start in range(0, rows, count):
        block = slice(start, min(start + count, rows))
        size = block.stop - start
        values = logits[block] if wide == logits.dtype else copy[:size].copy_(logits[block])
        if keys is not None:
            values.masked_fill_(same_key_not_target(keys[0][block], keys[1], target[block]), -torch.inf)
        losses[block], grad = _losses_and_gradient(values, target[block], smoothing, z_loss, spare[:size])
        if wide != logits.dtype:
            logits[block] = grad
    return losses


def _log_partition(logits: Tensor, spare: Tensor) -> Tensor:
    """The same as `logits.logsumexp(dim=1, keepdim=True)`, but the exponentials are written to `spare`."""
    largest = logits.amax(dim=1, keepdim=True)
    largest = torch.where(largest.abs() == torch.inf, 0, largest)
    return torch.sub(logits, largest, out=spare).exp_().sum(dim=1, keepdim=True).log_().add_(largest)


def _losses_and_gradient(
    logits: Tensor, target: Tensor, smoothing: float, z_loss: float, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses (n, 1) of (n, V) logits, and their gradient, which overwrites the logits; `spare` is overwritten too."""
    picked = target.clamp(min=0)[:, None]  # (n, 1)
    partition = _log_partition(logits, spare)  # (n, 1)
    losses = partition - (1 - smoothing) * logits.gather(1, picked)
    if smoothing:
        losses -= smoothing * logits.mean(dim=1, keepdim=True)
    if z_loss:
        losses += z_loss * partition.square()
    grad = logits.sub_(partition).exp_()
    if z_loss:
        grad *= 1 + 2 * z_loss * partition
    if smoothing:
        grad -= smoothing / logits.shape[1]
    grad.scatter_add_(1, picked, torch.full_like(partition, smoothing - 1))
    return losses, grad
