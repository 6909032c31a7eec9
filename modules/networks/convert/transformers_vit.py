"""Convert ViT, DeiT and DINOv2 of transformers to a `ViT`, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.convert.family import ForeignFamily, with_model_type
from trunkline.modules.networks.convert.key_tables import KeyTable, refuse_difference, refuse_options
from trunkline.modules.networks.convert.vit_tables import (
    OUR_VIT,
    VitNames,
    tiling,
    with_learned_positions,
)
from trunkline.modules.networks.vit import ViT, ViTConfig

ACTIVATIONS_OF_VIT = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
"""`hidden_act` -> `mlp` of the trunk."""
BLOCKS_OF_VIT = "encoder.layer.*"
TABLE_OF_VIT: KeyTable = {
    "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "backbone.blocks.*.attn.qkv": tuple(
        f"{BLOCKS_OF_VIT}.attention.attention.{part}" for part in ("query", "key", "value")
    ),
    "backbone.blocks.*.attn.proj": (f"{BLOCKS_OF_VIT}.attention.output.dense",),
    "backbone.norm": ("layernorm",),
    "pooler": ("pooler.dense",),
}
"""Names of a `ViT` -> what ViT, DeiT and DINOv2 have in common."""
OF_VIT: KeyTable = {
    "backbone.blocks.*.norm1": (f"{BLOCKS_OF_VIT}.layernorm_before",),
    "backbone.blocks.*.norm2": (f"{BLOCKS_OF_VIT}.layernorm_after",),
    "backbone.blocks.*.mlp.fc1": (f"{BLOCKS_OF_VIT}.intermediate.dense",),
    "backbone.blocks.*.mlp.fc2": (f"{BLOCKS_OF_VIT}.output.dense",),
}
OF_DINOV2: KeyTable = {
    f"backbone.blocks.*.{ours}": (f"{BLOCKS_OF_VIT}.{theirs}",)
    for ours, theirs in {
        **{"norm1": "norm1", "norm2": "norm2", "ls1": "layer_scale1", "ls2": "layer_scale2"},
        **{"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
    }.items()
}
OF_SWIGLU: KeyTable = {
    "backbone.blocks.*.mlp.fc1": (f"{BLOCKS_OF_VIT}.mlp.weights_in",),
    "backbone.blocks.*.mlp.fc2": (f"{BLOCKS_OF_VIT}.mlp.weights_out",),
}


@dataclass(frozen=True)
class VitLike:
    """What ViT, DeiT and DINOv2 differ in."""

    name: str
    """With its article, for messages."""
    model_type: str
    prefix: str
    """What the names of the body begin with in a classifier."""
    classes: tuple[str, str]
    """Their models: a body, and a classifier."""
    blocks: KeyTable
    tokens: Mapping[str, str]
    """Our tokens -> theirs."""
    eps: float
    """The usual `layer_norm_eps`."""
    patch_size: int = 16
    """The usual one."""
    prefix_positions: int = 1
    """Number of tokens before the patches that have a position."""
    antialias: bool = False
    """Whether positions are smoothed that it interpolates."""

    @property
    def is_dino(self) -> bool:
        """Whether it is a DINOv2, with LayerScale and a classifier over class token and mean."""
        return self.blocks is OF_DINOV2

    def names(self, body: bool, gated: bool) -> VitNames:
        """Their names, of a body or a classifier."""
        table = {**TABLE_OF_VIT, **self.blocks, **(OF_SWIGLU if gated else {})}
        place = "" if body else f"{self.prefix}."
        return VitNames(
            family=self.name,
            table={ours: tuple(place + name for name in theirs) for ours, theirs in table.items()}
            | {"head": ("classifier",)},
            patches=f"{place}embeddings.patch_embeddings.projection",
            positions=f"{place}embeddings.position_embeddings",
            tokens={ours: f"{place}embeddings.{theirs}" for ours, theirs in self.tokens.items()},
        )

    def modules(self, config: ViTConfig) -> tuple[KeyTable, ...]:
        """Names of the layers as modules: in version 5 of transformers, and before it, as files still have them."""
        gated = config.backbone.mlp == "swiglu"
        before = self.names(not config.num_classes, gated).table
        place = f"{self.prefix}." if config.num_classes else ""
        place += BLOCKS_OF_VIT if self.is_dino else "layers.*"
        first, second = (("gate_proj", "up_proj"), "down_proj") if gated else (("fc1",), "fc2")
        today = {
            "backbone.blocks.*.attn.qkv": tuple(f"{place}.attention.{part}_proj" for part in "qkv"),
            "backbone.blocks.*.attn.proj": (f"{place}.attention.o_proj",),
            "backbone.blocks.*.mlp.fc1": tuple(f"{place}.mlp.{part}" for part in first),
            "backbone.blocks.*.mlp.fc2": (f"{place}.mlp.{second}",),
        }
        if not self.is_dino:
            names = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
            today |= {f"backbone.blocks.*.{own}": (f"{place}.{name}",) for own, name in names.items()}
        return {**before, **today}, before

    def weights_from(self, weights: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
        """Their state dict -> ours; errors as in `VitNames.weights_from`."""
        own = {name.replace(".lambda1", ".gamma"): value for name, value in weights.items()}
        body = not any(name.startswith(f"{self.prefix}.") for name in own)
        return self.names(body, config.backbone.mlp == "swiglu").weights_from(own, config)

    def weights_to(self, weights: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
        """Our state dict -> theirs; errors as in `VitNames.weights_to`."""
        names = self.names(not config.num_classes, config.backbone.mlp == "swiglu")
        flat = {names.tokens.get("mask_token", ""): 2}
        converted = names.weights_to(weights, config, flat, self.prefix_positions)
        return {name.replace(".gamma", ".lambda1"): value for name, value in converted.items()}

    def config_from(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ViTConfig:
        """Content of their config.json -> our configuration; the weights tell which outputs there are.

        Raises:
            TrunklineError: if theirs uses an option that a `ViT` does not have.
        """
        gated = bool(config.get("use_swiglu_ffn"))
        refuse_options(config, {"hidden_act": ACTIVATIONS_OF_VIT, "pooler_act": ("tanh",)}, self.name, OUR_VIT)
        dim = config.get("hidden_size", 768)
        body = "classifier.weight" not in weights
        hidden = int(dim * config.get("mlp_ratio", 4)) if self.is_dino else config.get("intermediate_size", 3072)
        qkv_bias = config.get("qkv_bias", True)
        dino = self.is_dino
        return ViTConfig(
            **tiling(config.get("image_size", 224), config.get("patch_size", self.patch_size), self.name),
            in_chans=config.get("num_channels", 3),
            num_classes=0 if body else len(config.get("id2label", range(2))),  # files leave out what is usual
            pool="cls" if body or not dino else "cls_mean",
            num_registers=self.registers(config),
            prefix_positions=self.prefix_positions,
            pooler=body and not dino and "pooler.dense.weight" in weights,  # classifiers do not read one
            mask_token=any(name.endswith("embeddings.mask_token") for name in weights),
            backbone=TransformerConfig(
                dim=dim,
                depth=config.get("num_hidden_layers", 12),
                num_heads=config.get("num_attention_heads", 12),
                mlp_dim=gated_width(hidden) if gated else hidden,
                mlp="swiglu" if gated else ACTIVATIONS_OF_VIT[config.get("hidden_act", "gelu")],  # type: ignore[arg-type]
                norm_eps=config.get("layer_norm_eps", self.eps),
                qkv_bias=None if qkv_bias else False,
                layer_scale=config.get("layerscale_value", 1.0) if dino else None,
                dropout=config.get("hidden_dropout_prob", 0.0),
                drop_path=config.get("drop_path_rate", 0.0),
            ),
        )

    def registers(self, config: Mapping[str, Any]) -> int:
        """Number of our registers: theirs, or the distillation token of a DeiT, which its classifier does not read."""
        if self.model_type == "deit":
            return 1
        return config.get("num_register_tokens", 4) if self.model_type == "dinov2_with_registers" else 0

    def config_to(self, config: ViTConfig, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """Our configuration -> content of their config.json.

        Args:
            config: of our network.
            class_names: of the outputs; None numbers them.

        Raises:
            TrunklineError: if ours has an option that theirs does not have.
        """
        trunk, names = config.backbone, {ours: theirs for theirs, ours in ACTIVATIONS_OF_VIT.items()}
        if self.is_dino and config.size[0] != config.size[1]:
            raise TrunklineError(
                f"{OUR_VIT} with image_size={config.image_size} cannot become {self.name}, which sees square images"
            )
        gated = trunk.mlp == "swiglu" and self.is_dino
        content: dict[str, Any] = {
            "model_type": self.model_type,
            "architectures": [self.classes[1 if config.num_classes else 0]],
            "image_size": config.image_size if isinstance(config.image_size, int) else list(config.image_size),
            "patch_size": config.patch_size,
            "num_channels": config.in_chans,
            "hidden_size": trunk.dim,
            "num_hidden_layers": trunk.depth,
            "num_attention_heads": trunk.num_heads,
            "hidden_act": "gelu" if gated else names.get(trunk.mlp, "gelu"),
            "layer_norm_eps": trunk.norm_eps,
            "qkv_bias": trunk.attention_bias,
            "hidden_dropout_prob": trunk.dropout,
        }
        if config.num_classes:
            labels = class_names or [f"LABEL_{number}" for number in range(config.num_classes)]
            content["id2label"] = {str(number): label for number, label in enumerate(labels)}
            content["label2id"] = {label: number for number, label in enumerate(labels)}
        if self.is_dino:
            content |= {"mlp_ratio": whole_ratio(trunk.hidden_dim, trunk.dim, gated), "use_swiglu_ffn": gated}
            content |= {"drop_path_rate": trunk.drop_path}
            content |= {} if trunk.layer_scale is None else {"layerscale_value": trunk.layer_scale}
            content |= {"use_mask_token": config.mask_token, "num_register_tokens": config.num_registers}
        else:
            content["intermediate_size"] = trunk.hidden_dim
        present = ["classifier.weight"] if config.num_classes else []
        present += ["embeddings.mask_token"] if config.mask_token else []
        present += ["pooler.dense.weight"] if config.pooler else []
        expressed = self.config_from(content, dict.fromkeys(present))  # type: ignore[arg-type]
        refuse_difference(with_learned_positions(config, self.prefix_positions), expressed, self.name, OUR_VIT)
        return content

    def family(self) -> ForeignFamily:
        """Its entry among the families."""
        return ForeignFamily(
            name=self.name,
            origin="transformers",
            network=ViT,
            recognises=with_model_type(self.model_type),
            config_from=self.config_from,
            config_to=self.config_to,
            weights_from=self.weights_from,
            weights_to=self.weights_to,
            layers=self.modules,
            antialias=self.antialias,
        )


def gated_width(hidden: int) -> int:
    """Hidden width of a DINOv2's gated MLP: two thirds of the width without a gate, rounded up to eights."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def whole_ratio(hidden: int, dim: int, gated: bool) -> int:
    """The `mlp_ratio` of a DINOv2 with this hidden width, or a near one: transformers takes whole numbers alone."""
    exact = [ratio for ratio in range(1, 33) if (gated_width(dim * ratio) if gated else dim * ratio) == hidden]
    return exact[0] if exact else max(1, hidden // dim)


CLASS_TOKEN = {"cls_token": "cls_token"}
VIT_LIKE = (
    VitLike(
        name="a ViT of transformers",
        model_type="vit",
        prefix="vit",
        classes=("ViTModel", "ViTForImageClassification"),
        blocks=OF_VIT,
        tokens=CLASS_TOKEN,
        eps=1e-12,
    ),
    VitLike(
        name="a DeiT of transformers",
        model_type="deit",
        prefix="deit",
        classes=("DeiTModel", "DeiTForImageClassification"),
        blocks=OF_VIT,
        tokens={**CLASS_TOKEN, "reg_token": "distillation_token"},
        eps=1e-12,
        prefix_positions=2,
    ),
    VitLike(
        name="a DINOv2",
        model_type="dinov2",
        prefix="dinov2",
        classes=("Dinov2Model", "Dinov2ForImageClassification"),
        blocks=OF_DINOV2,
        tokens={**CLASS_TOKEN, "mask_token": "mask_token"},
        eps=1e-6,
        patch_size=14,
    ),
    VitLike(
        name="a DINOv2 with registers",
        model_type="dinov2_with_registers",
        prefix="dinov2_with_registers",
        classes=("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
        blocks=OF_DINOV2,
        tokens={**CLASS_TOKEN, "mask_token": "mask_token", "reg_token": "register_tokens"},
        eps=1e-6,
        antialias=True,
    ),
)
TRANSFORMERS_VIT, DEIT, DINOV2, DINOV2_REGISTERS = (kind.family() for kind in VIT_LIKE)
