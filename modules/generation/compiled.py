"""Generation with one compiled step: on a GPU as a CUDA graph, so that a token costs one launch.

Needs only torch. Shape legend: B rows, T tokens of the prompt, L slots of the cache, V vocabulary.
"""

import copy
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.compilers import REMEDIES, compiler_failure
from trunkline.modules.backbone import KVCache
from trunkline.modules.generation.fixed_cache import SOURCE_SLOTS, FixedCache, padded_source
from trunkline.modules.generation.low_precision import Int8Linear

Memory = tuple[FixedCache, Tensor, Tensor | None]
"""A cache, the mask of its slots and that of the sources."""
Form = tuple[Any, ...]
"""What a graph of the step is for: the kind of network, and sizes, type and device of its memory."""
SPARE = 2
"""How many memories of finished texts are kept."""
LEAST_SLOTS = 256
"""Length of the shortest cache. Longer ones have twice, four times, … as many slots, up to what the network can see."""


class CompiledDecoder(nn.Module):
    """A decoder whose step is compiled; give it to `generate`, `stream` or `beam_search` in the decoder's place.

    The first step compiles, which takes up to a minute. Later texts use the same code, whatever the length of their
    prompts, if they are as many and need a cache with as many slots: generate in few different batch sizes. In float32
    the greedy text is the same as without it. Keep the object: it uses the memory of its last two texts, and the CUDA
    graphs that were recorded for it, again.

    Args:
        decoder: a `GPT`, or the decoder of some sources, from `decoder_of`. Must already be on its device.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder
        network = getattr(decoder, "network", decoder)
        self._kind = type(decoder), repr(getattr(network, "config", None))
        self._compile, self._options = compiled_step, step_options(decoder)
        self._spare: deque[tuple[Form, Memory]] = deque(maxlen=SPARE)

    @property
    def vocab_size(self) -> int:
        """Number V of tokens."""
        return int(self.decoder.vocab_size)

    @property
    def max_length(self) -> int:
        """Largest number of tokens seen at once."""
        return int(self.decoder.max_length)

    def prefill(self, tokens: Tensor, mask: Tensor | None, room: int, state: Any = None) -> tuple[Tensor, Any]:
        """Read prompts, not compiled: their lengths differ. As in `Decoder`."""
        old = None
        if state is not None:
            old = copy.copy(state)
            old.cache = state.cache.plain()
        logits, filled = self.decoder.prefill(tokens, mask, 0, old)
        if not isinstance(getattr(filled, "cache", None), KVCache):
            raise TrunklineError(
                f"{type(self.decoder).__name__} keeps no key/value cache in its state, so its step cannot be compiled; "
                "generate with the decoder itself"
            )
        return logits, self._fixed(filled, cache_slots(tokens.shape[1] + room, self.max_length), state)

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        """Add one token (B,) to each row -> (B, V) logits of the next, which the next step may overwrite.

        Raises:
            TrunklineError: if the step cannot be compiled.
        """
        torch.compiler.cudagraph_mark_step_begin()
        try:
            logits: Tensor = self._compile(self._options, state.cache.form)(self.decoder, tokens, state)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            failure, said = compiler_failure(error), " ".join(str(error.__cause__ or error).split())
            reason = f"{failure}; {REMEDIES}" if failure else f"{said[:200]};"
            raise TrunklineError(
                f"the step of generation cannot be compiled: {reason} generate without compiling"
            ) from error
        return logits

    def reorder(self, state: Any, rows: Tensor) -> Any:
        """A state in which row b continues row `rows[b]`; in place if rows and sources keep their number."""
        cache: FixedCache = state.cache
        same = len(rows) == len(cache.source)
        if same and (not cache.cross or torch.equal(cache.source[rows], cache.source)):
            cache.reorder(rows)
            state.mask.copy_(state.mask[rows])
            return state
        plain, count = copy.copy(state), cache.length
        plain.cache, plain.mask = cache.plain(), state.mask
        moved = self._fixed(self.decoder.reorder(plain, rows), cache.max_length, None)
        moved.cache.length.copy_(count)
        return moved

    def _fixed(self, state: Any, slots: int, old: Any) -> Any:
        """Copy a state of the decoder into memory of fixed shapes; that of `old` if it has as many slots."""
        cache, rows = state.cache, state.cache.keys.shape[1]
        mask = torch.ones(rows, slots, dtype=torch.bool, device=cache.keys.device)
        if state.mask is not None:
            mask[:, : state.mask.shape[1]] = state.mask
        source_mask = source_slots(state)
        if old is not None and old.cache.max_length == slots:
            old.cache.load(cache)
            old.mask.copy_(mask)
            return old
        fixed = copy.copy(state)
        shapes = tuple((layer, padded_source(k).shape) for layer, (k, _) in cache.cross.items())
        form = (self._kind, rows, slots, cache.keys.dtype, cache.keys.device, shapes)
        kept = self._memory_for(form) or self._memory(FixedCache(cache, slots, form), mask, source_mask)
        kept[0].load(cache)
        fixed.cache, fixed.mask = kept[0], kept[1].copy_(mask)
        if source_mask is not None and kept[2] is not None:
            fixed.context, fixed.context_mask = (
                state.context.new_empty(rows, 0, state.context.shape[2]),
                kept[2].copy_(source_mask),
            )
        weakref.finalize(fixed, self._spare.append, (form, kept))
        return fixed

    def _memory_for(self, form: Form) -> Memory | None:
        """Take the newest spare memory of this form."""
        found, others = None, []
        while self._spare and found is None:
            entry = self._spare.pop()  # at once out of reach: a text that ends meanwhile appends its own
            if entry[0] == form:
                found = entry[1]
            else:
                others.append(entry)
        self._spare.extendleft(others)
        return found

    @staticmethod
    def _memory(cache: FixedCache, mask: Tensor, source_mask: Tensor | None) -> Memory:
        """Tensors that a CUDA graph may read where they are, without copying them at each step."""
        memory = (cache, mask.clone(), None if source_mask is None else source_mask.clone())
        for tensor in [*cache.tensors(), *memory[1:]]:
            if tensor is not None and tensor.is_cuda:
                torch._dynamo.mark_static_address(tensor)
        return memory


def step_options(decoder: nn.Module) -> tuple[tuple[str, bool], ...]:
    """Options of the compiler (name, value): on a GPU a CUDA graph, and int8 weights that are read as int8.

    The compiler only joins a product with the conversion of its matrix if it writes the product itself. With
    `coordinate_descent_tuning` it does so for a single row; for more, a library multiplies, after a conversion.
    """
    if next(decoder.parameters()).device.type != "cuda":
        return ()
    options = [("triton.cudagraphs", True)]
    if any(isinstance(module, Int8Linear) for module in decoder.modules()):
        options.append(("coordinate_descent_tuning", True))
    return tuple(options)


@functools.cache
def compiled_step(options: tuple[tuple[str, bool], ...], form: Form) -> Callable[[Any, Tensor, Any], Tensor]:
    """The step of all decoders whose memory has this form, so that those of other sources run the code that is there.

    A form has a function of its own: the compiler counts the graphs of a function, and refuses the ninth. They are kept
    for good, so a program that runs long should have few forms.
    """
    own = types.FunctionType(_step.__code__.replace(), _step.__globals__, _step.__name__)
    compiled: Callable[[Any, Tensor, Any], Tensor] = torch.compile(
        own, dynamic=False, fullgraph=True, options=dict(options) or None
    )
    return compiled


def _step(decoder: Any, tokens: Tensor, state: Any) -> Tensor:
    """What is compiled."""
    logits: Tensor = decoder.step(tokens, state)
    return logits


def cache_slots(length: int, limit: int) -> int:
    """Slots of a cache for `length` tokens, of a network that sees `limit`: few different numbers."""
    slots = LEAST_SLOTS
    while slots < length:
        slots *= 2
    return max(length, min(slots, limit))


def source_slots(state: Any) -> Tensor | None:
    """(B, padded S) bool, True for the states of sources that are not padding; None if there are no sources."""
    if not state.cache.cross:
        return None
    states = next(iter(state.cache.cross.values()))[0].shape[2]
    mask = state.context_mask
    if mask is None:
        mask = torch.ones(state.cache.keys.shape[1], states, dtype=torch.bool, device=state.cache.keys.device)
    return F.pad(mask, (0, -states % SOURCE_SLOTS), value=False)
