"""Parameter groups and Muon, each against a slow or hand-made reference."""

import io
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.networks import Network, ViT, ViTConfig
from trunkline.modules.training import muon
from trunkline.modules.training.muon import Muon, orthogonalize
from trunkline.modules.training.optim import OptimizerConfig, RowwiseAdamW, build_optimizer, parameter_groups


@dataclass
class TiedConfig:
    backbone: TransformerConfig = field(default_factory=lambda: TransformerConfig(16, 3, 2))


class Tied(Network):
    """A language model in miniature: its head is its embedding."""

    config_class = TiedConfig

    def __init__(self, config: TiedConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(11, config.backbone.dim)
        self.backbone = Transformer(config.backbone)
        self.head = nn.Linear(config.backbone.dim, 11, bias=False)
        self.head.weight = self.embed.weight

    def output_modules(self) -> list[nn.Module]:
        return [self.head]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.backbone(self.embed(tokens)).x)


def vit(depth: int = 2, **changes: Any) -> ViT:
    trunk = TransformerConfig(16, depth, 2, **{"qk_norm": True, **changes.pop("trunk", {})})
    return ViT(ViTConfig(**{"image_size": 8, "patch_size": 4, "num_classes": 3, "backbone": trunk, **changes}))


def by_name(network: Network, config: OptimizerConfig) -> dict[str, dict[str, Any]]:
    """The group of each parameter; asserts that each that learns is in exactly one, and nothing else is."""
    groups = parameter_groups(network, config)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in network.parameters() if p.requires_grad}
    owner = {id(p): group for group in groups for p in group["params"]}
    return {name: owner[id(p)] for name, p in network.named_parameters() if p.requires_grad}


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# --- groups ---


LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
BLOCK_WEIGHTS = {f"backbone.blocks.{i}.{layer}.weight" for i in range(2) for layer in LAYERS}
POOL_WEIGHTS = {f"attn_pool.{part}.weight" for part in ("attn.q", "attn.kv", "attn.proj", "mlp.fc1", "mlp.fc2")}


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_only_linear_weights_decay(name: Any) -> None:
    network = vit(pool="map", num_registers=2, prefix_positions=2, fc_norm=True, trunk={"layer_scale": 0.1})
    groups = by_name(network, OptimizerConfig(name, weight_decay=0.3))
    decaying = {key for key, group in groups.items() if group["weight_decay"]}
    assert decaying == BLOCK_WEIGHTS | POOL_WEIGHTS | {"patch_embed.proj.weight", "head.weight"}
    assert {group["weight_decay"] for group in groups.values()} == {0.0, 0.3}
    assert {group["lr"] for group in groups.values()} == {1e-3}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_tied_weight_counts_as_an_embedding(name: Any) -> None:
    groups = by_name(Tied(TiedConfig()), OptimizerConfig(name, lr=1.0, layer_decay=0.5))
    assert groups["embed.weight"]["weight_decay"] == 0.0
    assert groups["embed.weight"]["lr"] == 0.5**4
    assert not groups["embed.weight"].get("muon")
    assert "head.weight" not in groups
    assert groups["backbone.blocks.0.mlp.fc1.weight"]["weight_decay"] == 0.05


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_layer_decay(name: Any) -> None:
    network = vit(depth=3, num_registers=1, pool="cls")
    groups = by_name(network, OptimizerConfig(name, lr=0.8, layer_decay=0.5))
    rates = {"backbone.blocks.0.": 0.1, "backbone.blocks.1.": 0.2, "backbone.blocks.2.": 0.4, "backbone.norm.": 0.8}
    rates |= {"patch_embed.": 0.05, "cls_token": 0.05, "reg_token": 0.05, "pos_embed": 0.05, "head.": 0.8}
    for key, group in groups.items():
        (rate,) = (rate for prefix, rate in rates.items() if key.startswith(prefix))
        assert group["lr"] == pytest.approx(rate), key
    pooled = by_name(vit(pool="map"), OptimizerConfig(name, lr=0.8, layer_decay=0.5))
    assert {group["lr"] for key, group in pooled.items() if key.startswith("attn_pool.")} == {0.8}


def test_frozen_parameters_are_left_out() -> None:
    network = vit()
    network.patch_embed.requires_grad_(False)
    network.backbone.blocks[0].requires_grad_(False)
    groups = by_name(network, OptimizerConfig())
    assert not any(key.startswith(("patch_embed.", "backbone.blocks.0.")) for key in groups)
    assert {"backbone.blocks.1.attn.qkv.weight", "pos_embed", "head.bias"} <= groups.keys()
    with pytest.raises(TrunklineError, match="every parameter is frozen; lower freeze_blocks"):
        parameter_groups(network.requires_grad_(False), OptimizerConfig())


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_what_muon_gets(kv_heads: int | None) -> None:
    network = vit(pool="map", trunk={"num_kv_heads": kv_heads})
    groups = by_name(network, OptimizerConfig("muon"))
    assert {key for key, group in groups.items() if group["muon"]} == BLOCK_WEIGHTS
    splits = {key: group["splits"] for key, group in groups.items() if group["splits"] > 1}
    fused = {f"backbone.blocks.{i}.attn.qkv.weight": 3 for i in range(2)}
    assert splits == ({} if kv_heads else fused)  # grouped queries are no equal matrices
    decoder = Tied(TiedConfig(TransformerConfig(16, 1, 2, num_kv_heads=1, cross_attention=True)))
    for config in (OptimizerConfig("muon"), OptimizerConfig(rms_scaled=True)):
        assert by_name(decoder, config)["backbone.blocks.0.cross_attn.kv.weight"]["splits"] == 2


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_other_optimizers_get_no_keys_of_muon(name: Any) -> None:
    for group in parameter_groups(vit(), OptimizerConfig(name)):
        assert group.keys() == {"params", "lr", "weight_decay"}


# --- Muon ---


def with_singular_values(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix and its singular vectors, the values spread over two decades."""
    rank = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, rank, dtype=torch.float64)).Q
    return (u * torch.logspace(-1, 1, rank, dtype=torch.float64)) @ v.T, u, v


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda device: False)


@pytest.mark.parametrize("shape", [(128, 128), (64, 256)])
def test_orthogonalize_in_bfloat16_is_near(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(1, *shape)
    got = []
    for native in (True, False):
        monkeypatch.setattr(muon, "multiplies_bfloat16", lambda device, native=native: native)
        got.append(orthogonalize(matrix))
    assert got[0].dtype == torch.bfloat16
    assert ((got[0] - got[1]).norm() / got[1].norm()).item() < 0.03


def test_muon_runs_where_torch_does_not_tell_about_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert orthogonalize(torch.randn(1, 8, 8)).dtype == torch.float32


def test_gpus_that_would_emulate_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's before Ampere; AMD's tell other numbers."""
    gpu = torch.device("cuda")
    for capability, hip, native in (((7, 5), None, False), ((8, 0), None, True), ((7, 5), "6.4", True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        monkeypatch.setattr(torch.version, "hip", hip)
        assert muon.multiplies_bfloat16(gpu) is native


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (1, 5)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_orthogonalize_keeps_the_singular_vectors(shape: tuple[int, int], scale: float) -> None:
    matrix, u, v = with_singular_values(*shape)
    got = orthogonalize((matrix * scale).float()[None])[0].double()
    inside = u.T @ got @ v  # diagonal exactly if the singular vectors are the same
    values = inside.diag()
    assert_near(inside, torch.diag(values), 1e-4)
    assert_near(u @ inside @ v.T, got, 1e-4)
    assert (values > 0.6).all()
    assert (values < 1.3).all()


@pytest.mark.usefixtures("in_float32")
def test_orthogonalize_batch_equals_one_by_one() -> None:
    batch = torch.randn(5, 12, 7) * torch.logspace(-3, 3, 5)[:, None, None]
    one_by_one = torch.cat([orthogonalize(batch[i : i + 1]) for i in range(5)])
    assert_near(orthogonalize(batch), one_by_one)
    assert (orthogonalize(torch.zeros(1, 3, 4)) == 0).all()


class SlowMuon:
    """Jordan et al. with the scale of arXiv:2502.16982, one float64 matrix at a time."""

    def __init__(self, lr: float, weight_decay: float, momentum: float) -> None:
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.held: dict[int, Tensor] = {}

    def step(self, key: int, weight: Tensor, gradient: Tensor) -> Tensor:
        held = self.momentum * self.held.get(key, torch.zeros_like(gradient)) + (1 - self.momentum) * gradient
        self.held[key] = held
        x = self.momentum * held + (1 - self.momentum) * gradient  # Nesterov
        x = x / x.pow(2).sum().sqrt()
        for _ in range(5):
            gram = x.T @ x
            x = 3.4445 * x - 4.7750 * x @ gram + 2.0315 * x @ gram @ gram
        size = 0.2 * max(weight.shape) ** 0.5
        return weight - self.lr * self.weight_decay * weight - self.lr * size * x


def gradients(p: Tensor, steps: int = 5) -> Tensor:
    return torch.randn(steps, *p.shape)


@pytest.mark.usefixtures("in_float32")
def test_muon_against_slow_reference() -> None:
    """Four matrices of two shapes in groups of different rates, and two fused projections."""
    lr = (0.02, 0.05, 0.1)
    shapes = [((6, 10), 1, 0), ((6, 10), 1, 1), ((10, 6), 1, 0), ((18, 10), 3, 2), ((6, 10), 1, 2), ((12, 10), 2, 1)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape, _, _ in shapes]
    groups = [
        {"params": [p], "splits": splits, "lr": lr[at], "weight_decay": 0.1 * at}
        for p, (_, splits, at) in zip(parameters, shapes, strict=True)
    ]
    optimizer = Muon(groups, lr=1.0, momentum=0.9, weight_decay=0.0)
    want = [list(p.detach().double().chunk(splits)) for p, (_, splits, _) in zip(parameters, shapes, strict=True)]
    slow = [SlowMuon(lr[at], 0.1 * at, 0.9) for _, _, at in shapes]
    plan = [gradients(p) for p in parameters]
    for step in range(5):
        for i, (p, (_, splits, _)) in enumerate(zip(parameters, shapes, strict=True)):
            p.grad = plan[i][step]
            pieces = zip(want[i], p.grad.double().chunk(splits), strict=True)
            want[i] = [slow[i].step(j, weight, gradient) for j, (weight, gradient) in enumerate(pieces)]
        optimizer.step()
    for p, pieces in zip(parameters, want, strict=True):
        assert_near(p.detach().double(), torch.cat(pieces))


def test_muon_update_has_the_size_of_an_adamw_update() -> None:
    p = nn.Parameter(torch.zeros(64, 256))
    p.grad = torch.randn(64, 256) * 1e-3
    Muon([p], lr=1.0, momentum=0.95, weight_decay=0.0).step()
    assert p.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_muon_step_returns_the_loss_and_skips_what_has_no_gradient() -> None:
    p, idle = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([p, idle], lr=0.1, momentum=0.9, weight_decay=0.5)

    def closure() -> Tensor:
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert not torch.equal(p, idle)
    assert (idle == 1).all()


def test_adamw_groups_of_muon_against_torch() -> None:
    ours, theirs = ([nn.Parameter(x.clone()) for x in (torch.ones(4, 3), torch.zeros(5))] for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 0.1, "weight_decay": 0.1}
    optimizers = (
        Muon([{"params": ours, "muon": False}], momentum=0.9, **settings),
        torch.optim.AdamW(theirs, foreach=False, fused=False, **settings),
    )
    plan = [gradients(p) for p in ours]
    for step in range(5):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for p, gradient in zip(parameters, plan, strict=True):
                p.grad = gradient[step].clone()
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            assert_near(p, q, 1e-6)


@pytest.mark.parametrize(("name", "rms_scaled"), [("muon", False), ("adamw", False), ("adamw", True), ("sgd", False)])
def test_saved_state_continues_bit_identically(name: Any, rms_scaled: bool) -> None:
    config = OptimizerConfig(name, lr=0.01, layer_decay=0.7, rms_scaled=rms_scaled)
    network = vit()
    plan = [[torch.randn_like(p) for p in network.parameters()] for _ in range(6)]

    def train(network: ViT, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for p, gradient in zip(network.parameters(), plan[step], strict=True):
                p.grad = gradient.clone()
            optimizer.step()

    optimizer = build_optimizer(network, config)
    train(network, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(network, optimizer, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = vit()
    again.load_state_dict(saved["network"])
    resumed = build_optimizer(again, config)
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), again.parameters(), strict=True))


# --- building, and learning ---


@pytest.mark.parametrize(
    ("name", "kind", "keys"),
    [
        ("adamw", RowwiseAdamW, {"betas": (0.7, 0.8), "eps": 1e-5}),
        ("muon", Muon, {"betas": (0.7, 0.8), "eps": 1e-5, "momentum": 0.6}),
        ("sgd", torch.optim.SGD, {"momentum": 0.6, "nesterov": True}),
    ],
)
def test_build_optimizer(name: Any, kind: type, keys: dict[str, Any]) -> None:
    config = OptimizerConfig(name, lr=0.3, betas=(0.7, 0.8), eps=1e-5, momentum=0.6, layer_decay=0.5)
    optimizer = build_optimizer(vit(depth=1), config)
    assert type(optimizer) is kind
    assert {group["lr"] for group in optimizer.param_groups} == {0.3, 0.15, 0.075}
    for group in optimizer.param_groups:
        assert {key: group[key] for key in keys} == keys


def test_sgd_without_momentum_is_plain() -> None:
    optimizer = build_optimizer(vit(), OptimizerConfig("sgd", momentum=0.0))
    assert not any(group["nesterov"] for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("name", "lr", "rms_scaled"),
    [("adamw", 0.01, False), ("adamw", 0.1, True), ("muon", 0.01, False), ("sgd", 0.05, False)],
)
def test_optimizers_learn_a_tiny_task(name: Any, lr: float, rms_scaled: bool) -> None:
    network = vit()
    image, label = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = build_optimizer(network, OptimizerConfig(name, lr=lr, rms_scaled=rms_scaled))
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(network(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(3))
    assert losses[-1] < 0.2
