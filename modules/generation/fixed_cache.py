"""A key/value cache whose shapes never change, for a step that is compiled once or recorded as a CUDA graph.

Shape legend: B rows, K key/value heads, L slots, E width of one head, S source tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.modules.backbone.attention import KVCache

SOURCE_SLOTS = 64
"""Sources are padded to a multiple of this, so that few lengths occur."""


class FixedCache(KVCache):
    """The tokens of another cache, with room up to L slots; takes one token of each row at a time.

    The number of tokens is a tensor, and attention always reads all slots: `seen` masks those that are not filled.

    Args:
        cache: keys and values of prompts, which are copied.
        slots: number L of tokens that fit.
        form: by what its owner finds it again; not used here.
    """

    keys: Any
    """Of each layer (B, K, L, E): a layer is changed without touching the others."""
    values: Any
    length: Any
    """(1,) int64, number of tokens in the cache."""

    def __init__(self, cache: KVCache, slots: int, form: Any = None) -> None:
        depth, rows, heads, _, width = cache.keys.shape
        self.keys, self.values = (
            [cache.keys.new_zeros(rows, heads, slots, width) for _ in range(depth)] for _ in range(2)
        )
        self.length = torch.zeros(1, dtype=torch.int64, device=cache.keys.device)
        self.cross = {layer: (padded_source(k), padded_source(v)) for layer, (k, v) in cache.cross.items()}
        self.form, self.source = form, cache.source
        self.load(cache)

    def load(self, cache: KVCache) -> None:
        """Replace the tokens by those of another cache of the same rows and sources."""
        count = cache.length
        for layer, (k, v) in enumerate(zip(cache.keys, cache.values, strict=True)):
            self.keys[layer][:, :, :count] = k[:, :, :count]
            self.values[layer][:, :, :count] = v[:, :, :count]
        for layer, pair in cache.cross.items():
            for kept, new in zip(self.cross[layer], pair, strict=True):
                kept.copy_(padded_source(new))
        self.source = cache.source
        self.length.fill_(count)

    def plain(self) -> KVCache:
        """The same tokens as a cache that may be reordered to other numbers of rows; all slots count as tokens."""
        cache: KVCache = KVCache.__new__(KVCache)
        cache.keys, cache.values = torch.stack(self.keys), torch.stack(self.values)
        cache.cross, cache.source, cache.length = dict(self.cross), self.source, self.max_length
        return cache

    @property
    def max_length(self) -> int:
        """Number L of tokens that fit."""
        return self.keys[0].shape[2]

    def tensors(self) -> list[Tensor]:
        """All tensors that a step reads or changes."""
        return [*self.keys, *self.values, *(t for pair in self.cross.values() for t in pair), self.length]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, K, 1, E) of one layer; return all its slots, (B, K, L, E)."""
        return (
            self.keys[layer].index_copy_(2, self.length, k.to(self.keys[layer].dtype)),
            self.values[layer].index_copy_(2, self.length, v.to(self.values[layer].dtype)),
        )

    def seen(self, mask: Tensor | None, count: int = 1) -> Tensor:
        """(B or 1, L) bool, True for the slots of the cached and the `count` new tokens that are True in the mask."""
        filled = (torch.arange(self.max_length, device=self.length.device) < self.length + count)[None]
        return filled if mask is None else mask & filled

    def advance(self, count: int) -> None:
        """Count tokens that all layers have added."""
        self.length.add_(count)

    def reorder(self, index: Tensor) -> None:
        """Make row b continue the old row `index[b]`, in place; rows and sources keep their number and order."""
        for buffer in (*self.keys, *self.values):
            buffer.copy_(buffer.index_select(0, index))


def padded_source(states: Tensor) -> Tensor:
    """Keys or values of sources (B, K, S, E) -> the same with S a multiple of `SOURCE_SLOTS`."""
    return F.pad(states, (0, 0, 0, -states.shape[2] % SOURCE_SLOTS))
