"""The configuration of the trunk."""

from dataclasses import dataclass
from typing import Literal

from trunkline import TrunklineError
from trunkline.ranges import check_ranges

MLPKind = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu2", "swiglu", "geglu"]
GATED = ("swiglu", "geglu")
"""Kinds whose first layer computes both gate and value."""
NormKind = Literal["layernorm", "rmsnorm"]


@dataclass
class TransformerConfig:
    """Shape and options of a trunk. Plain types only, so that YAML, JSON and checkpoints can hold it.

    Raises:
        TrunklineError: if the sizes do not fit each other; the message names the fields.
    """

    dim: int = 192
    """Width D of the token embeddings."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 3
    """Query heads H; must divide `dim`, unless `head_dim` is given."""
    num_kv_heads: int | None = None
    """Key/value heads K (grouped-query attention, arXiv:2305.13245); None means one per query head."""
    mlp_dim: int | None = None
    """Hidden width F of the MLP; None means 4 D, or if it is gated 8/3 D rounded up to a multiple of 8."""
    mlp: MLPKind = "gelu"
    """Activation; `swiglu` and `geglu` (with GELU's tanh approximation) gate the hidden layer (arXiv:2002.05202),
    `relu2` is ReLU squared (arXiv:2109.08668)."""
    norm: NormKind = "layernorm"
    """Normalisation layer; `rmsnorm` is arXiv:1910.07467."""
    norm_eps: float = 1e-6
    """Added to the variance in each norm."""
    norm_first: bool = True
    """True: pre-norm, x + f(norm(x)). False: post-norm, norm(x + f(x)), as in the original paper and BERT."""
    final_norm: bool = True
    """One more norm after the last block; usual with pre-norm, absent with post-norm."""
    qk_norm: bool = False
    """Normalise each head's queries and keys (arXiv:2302.05442)."""
    bias: bool = True
    """Biases in linear layers and layer norms."""
    causal: bool = False
    """A token attends only to itself and to tokens before it."""
    cross_attention: bool = False
    """Each block also attends to `context` (the decoder of an encoder-decoder)."""
    rope_theta: float | None = None
    """Base of the rotary position embedding (arXiv:2104.09864, half-split layout); None turns it off."""
    dropout: float = 0.0
    """Dropout probability of attention weights and of each sub-layer's output."""
    drop_path: float = 0.0
    """Stochastic depth (arXiv:1603.09382): rate of the last block; it grows linearly from 0 at the first block."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    head_dim: int | None = None
    """Width E of a head (as in T5 1.1 and Qwen3); None means D / H."""
    attn_scale: float | None = None
    """Factor of the attention scores (T5: 1, muP: 1 / E); None means 1 / sqrt(E)."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values, if other layers differ (Qwen2 has no others); None means `bias`."""
    layer_scale: float | None = None
    """Initial value of learned factors (D,) of what each sub-layer adds (LayerScale, arXiv:2103.17239; DeiT III and
    DINOv2 have it); None means no factors."""
    window: int | None = None
    """Tokens that a token of a causal trunk sees, itself included: the last ones (arXiv:2004.05150; Mistral and Qwen2
    can have it); None means all."""

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(
            ("dim", "depth", "num_heads", "num_kv_heads", "mlp_dim", "head_dim", "window"), "[1, inf)"
        )
        check_ranges("model.network.*", self, **sizes, dropout="[0, 1)", drop_path="[0, 1)")
        check_ranges("model.network.*", self, norm_eps="[0, inf)", rope_theta="(0, inf)", attn_scale="(-inf, inf)")
        check_ranges("model.network.*", self, layer_scale="(-inf, inf)")
        if self.head_dim is None and self.dim % self.num_heads:
            fits = [h for h in range(1, self.dim + 1) if self.dim % h == 0]
            raise TrunklineError(
                f"num_heads={self.num_heads} does not divide dim={self.dim}; "
                f"set num_heads to {min(fits, key=lambda h: abs(h - self.num_heads))}, change dim or set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise TrunklineError(
                f"num_kv_heads={self.kv_heads} does not divide num_heads={self.num_heads}; "
                "each key/value head serves the same number of query heads"
            )
        if self.rope_theta is not None and self.head_width % 2:
            raise TrunklineError(
                f"rope_theta needs an even width per head, but it is {self.head_width} (head_dim, else dim / num_heads)"
            )

    @property
    def head_width(self) -> int:
        """Width E of one head."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def attention_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def kv_heads(self) -> int:
        """Number K of key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def hidden_dim(self) -> int:
        """Hidden width F of the MLP."""
        if self.mlp_dim is not None:
            return self.mlp_dim
        return -(-8 * self.dim // 24) * 8 if self.mlp in GATED else 4 * self.dim
