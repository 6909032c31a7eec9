"""Exported networks: other programs get the same results for sizes that neither tracing nor the comparison has seen."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from test_networks import NETWORKS, bert, build, gpt, randomise, vit
from torch import Tensor, nn

from trunkline import TrunklineError, __version__
from trunkline.modules.networks import (
    AST,
    BERT,
    CLIP,
    GPT,
    CLIPConfig,
    GPTConfig,
    Network,
    SpeechEncoder,
    TextHead,
    TextHeadConfig,
    ViT,
)
from trunkline.modules.networks import export as module
from trunkline.modules.networks.companions import Companions
from trunkline.modules.networks.conditional import ConditionalNetwork
from trunkline.modules.networks.export import SUFFIXES, Format, axes_of, export_network, trial_sizes
from trunkline.modules.networks.graphs import BATCH, Axis, Graph, number_input

FORMATS: list[Format] = ["onnx", "torch-export"]
both = pytest.mark.parametrize("to", FORMATS)


def head(**options: Any) -> TextHeadConfig:
    return TextHeadConfig(**{"num_outputs": 3, **options})


def towers(**options: Any) -> CLIPConfig:
    return CLIPConfig(**{"image": vit(pool="map"), "dim": 12, **options})


MORE: dict[str, Callable[[], Network]] = {
    "bert-next": lambda: BERT(bert(next_sentence=True)),
    "bert-body": lambda: BERT(bert({"norm_first": True}, predicts_tokens=False, first_position=2)),
    "classes": lambda: TextHead(head(bert=bert(), pool="mean")),
    "tags": lambda: TextHead(head(bert=bert(num_segments=0), pool="none")),
    "classes-gpt": lambda: TextHead(head(gpt=gpt({"num_kv_heads": 2}), pool="last", end_token=3)),
    "tags-gpt": lambda: TextHead(head(gpt=gpt(), pool="none")),
    "clip": lambda: CLIP(towers(gpt=gpt(), end_token=18)),
    "siglip": lambda: CLIP(towers(bert=bert(), text_padding=1, init_logit_bias=-10.0, text_pool="mean")),
    "clip-shared": lambda: CLIP(towers(bert=bert({"norm_first": True, "final_norm": True}), share_trunk=True)),
}
FAST: dict[Format, set[str]] = {
    "onnx": {"vit-cls", "gpt-modern", "t5", "speech-conv"},
    "torch-export": {"bert-next", "ast"},
}
"""One of each kind; of CLIP, two are written below, and `export_network` itself compares them at several sizes.
The rest is slow: a graph takes a second or two."""
ALL = [
    pytest.param(name, to, marks=[] if name in FAST[to] else pytest.mark.slow)
    for to in FORMATS
    for name in (*NETWORKS, *MORE)
]


def network_called(name: str) -> Any:
    torch.manual_seed(0)
    return (randomise(MORE[name]()) if name in MORE else build(name)[0]).eval()


def opened(file: Path) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Run a file as a stranger would."""
    if file.suffix == ".pt2":
        program = torch.export.load(file).module()
        return lambda inputs: program(**inputs)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return run


def right_padding(rows: int, length: int) -> Tensor:
    """The last row is the shortest."""
    return torch.arange(length) < torch.linspace(length, max(1, length // 3), rows).long()[:, None]


def ids(rows: int, length: int, limit: int = 19) -> Tensor:
    return torch.randint(0, limit, (rows, length))


def inputs_and_results(network: Any, rows: int, length: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of one call, and what the network's own methods make of them; an encoder-decoder is run as a whole."""
    mask = right_padding(rows, length)
    if isinstance(network, ViT):
        image = torch.randn(rows, network.config.in_chans, *network.config.size)
        return {"image": image}, {"logits" if network.config.num_classes else "features": network(image)}
    if isinstance(network, GPT):
        tokens = ids(rows, length)
        return {"tokens": tokens}, {"logits": network(tokens)}
    if isinstance(network, BERT):
        given = {"tokens": ids(rows, length), "mask": mask}
        given |= {"segment": ids(rows, length, 2)} if network.segment_embed is not None else {}
        want = {"states": network.forward_features(**given).x}
        if network.config.predicts_tokens:
            want["logits"] = network(**given)
        if network.next_head is not None:
            want |= {"pooled": network.pool(want["states"]), "follows": network(**given, return_next=True)[1]}
        return given, want
    if isinstance(network, TextHead):
        given = {"tokens": ids(rows, length), "mask": mask}
        given |= {"segment": ids(rows, length, 2)} if getattr(network.body, "segment_embed", None) is not None else {}
        want = {"logits": network(**given)}
        if isinstance(network.body, GPT) and network.config.pool == "none":
            del given["mask"]
        return given, want
    features = torch.randn(rows, length, network.config.num_mels)
    given = {"features": features, "mask": mask}
    if isinstance(network, SpeechEncoder):
        logits = network(**given)
        return given, {"log_probs": logits.log_softmax(-1), "state_mask": network.output_mask(mask)}
    assert isinstance(network, AST)
    return given, {"logits": network(**given)}


def check(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        if not value.is_floating_point():
            assert torch.equal(found[name], value)
            continue
        assert found[name].shape == value.shape
        assert (found[name] - value).abs().max() <= 1e-4 * value.abs().max(), name


def sizes_to_try(network: Any) -> list[tuple[int, int]]:
    """(rows, length), up to the longest that the network takes."""
    if isinstance(network, AST):
        return [(1, 24), (4, 23), (6, network.config.patch_size + 1)]
    if hasattr(network.config, "num_mels"):
        return [(1, 24), (4, 23), (6, network.subsampling + 1)]
    return [(1, 9), (4, 8), (6, 3), (1, 1)]


def check_pair(network: Any, folder: Path, suffix: str) -> None:
    """The outputs of the encoder are the inputs of the decoder, and both together the network."""
    encoder, decoder = (opened(folder / f"out_{name}{suffix}") for name in ("encoder", "decoder"))
    for (rows, length), targets in zip(sizes_to_try(network), (9, 1, 4, 2), strict=False):
        mask, tokens = right_padding(rows, length), ids(rows, targets)
        sounds = hasattr(network.config, "num_mels")
        source = torch.randn(rows, length, 8) if sounds else ids(rows, length)
        context = encoder({"features" if sounds else "tokens": source, "mask": mask})
        assert context.keys() == {"context", "context_mask"}
        check(decoder({"target_tokens": tokens, **context}), {"logits": network(source, tokens, mask)})


@pytest.mark.parametrize(("name", "to"), ALL)
@torch.no_grad()
def test_results_at_new_sizes(name: str, to: Format, tmp_path: Path) -> None:
    network, suffix = network_called(name), SUFFIXES[to]
    found = export_network(network, tmp_path / f"out{suffix}", to)
    assert all(each.difference <= 1e-5 for each in found)
    names = [each.path.name for each in found]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)
    if isinstance(network, ConditionalNetwork):
        check_pair(network, tmp_path, suffix)
    elif isinstance(network, CLIP):
        pictures, texts = (opened(tmp_path / f"out_{part}{suffix}") for part in ("image", "text"))
        for rows, length in sizes_to_try(network):
            image, tokens, mask = torch.randn(rows, 3, 16, 16), ids(rows, length), right_padding(rows, length)
            check(pictures({"image": image}), {"embeddings": network.encode_image(image)})
            check(texts({"tokens": tokens, "mask": mask}), {"embeddings": network.encode_text(tokens, mask)})
    else:
        assert names == [f"out{suffix}"]
        run = opened(tmp_path / f"out{suffix}")
        for rows, length in sizes_to_try(network):
            check(*(lambda given, want: (run(given), want))(*inputs_and_results(network, rows, length)))


def test_a_padded_row_is_that_row_alone(tmp_path: Path) -> None:
    network = network_called("classes")
    export_network(network, tmp_path / "out.onnx", "onnx")
    tokens, mask, run = ids(3, 7), right_padding(3, 7), opened(tmp_path / "out.onnx")
    found = run({"tokens": tokens, "mask": mask, "segment": torch.zeros_like(tokens)})["logits"]
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        with torch.no_grad():
            want = network(tokens[row : row + 1, :length])
        torch.testing.assert_close(found[row : row + 1], want, rtol=1e-4, atol=1e-5)


def wide_gpt() -> GPT:
    """Most of its weights are the embedding."""
    return GPT(GPTConfig(vocab_size=20_000, max_length=9, backbone=gpt().backbone)).eval()


@both
def test_tied_weights_are_saved_once(to: Format, tmp_path: Path) -> None:
    network = wide_gpt()
    weights = 4 * sum(p.numel() for p in network.parameters())
    (found,) = export_network(network, tmp_path / f"out{SUFFIXES[to]}", to)
    assert weights < found.path.stat().st_size < 1.1 * weights
    if to == "onnx":
        model = onnx.load(found.path)
        sizes = Counter(tuple(sorted(each.dims)) for each in model.graph.initializer)
        assert sizes[(32, 20_000)] == 1


def test_one_file_until_it_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ONE_FILE", 1000)
    network = network_called("gpt-2")
    export_network(network, tmp_path / "out.onnx", "onnx")
    assert {file.name for file in tmp_path.iterdir()} == {"out.onnx", "out.onnx.data"}
    tokens = ids(2, 5)
    with torch.no_grad():
        check(opened(tmp_path / "out.onnx")({"tokens": tokens}), {"logits": network(tokens)})


def test_what_an_onnx_file_says(tmp_path: Path) -> None:
    network = network_called("siglip")
    network.companions = Companions(class_names=["cat", "dög"], tokenizer_json='{"some": "tokenizer"}')
    export_network(network, tmp_path / "out.onnx", "onnx")
    model = onnx.load(tmp_path / "out_text.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert (model.producer_name, model.producer_version) == ("trunkline", __version__)
    assert [each.version for each in model.opset_import if each.domain == ""] == [20]
    shapes = {each.name: [d.dim_param for d in each.type.tensor_type.shape.dim] for each in model.graph.input}
    assert shapes == {"tokens": ["batch", "length"], "mask": ["batch", "length"]}
    facts = {each.key: each.value for each in model.metadata_props}
    assert facts["network"] == "CLIP"
    assert json.loads(facts["class_names"]) == ["cat", "dög"]
    assert json.loads(facts["logit_bias"]) == pytest.approx(network.scale.logit_bias.item())
    assert json.loads(facts["logit_scale"]) == pytest.approx(network.scale.logit_scale.exp().item())
    assert (tmp_path / "tokenizer.json").read_text() == '{"some": "tokenizer"}'
    # The image tower may go beside it again, but not over other files.
    with pytest.raises(TrunklineError, match=r"there is .*out_image\.onnx and .*out_text\.onnx already; choose"):
        export_network(network, tmp_path / "out.onnx", "onnx")
    network.companions.tokenizer_json = "another"
    with pytest.raises(TrunklineError, match=r"there is .*tokenizer\.json already"):
        export_network(network, tmp_path / "other.onnx", "onnx")


def test_what_a_program_says(tmp_path: Path) -> None:
    network = network_called("vit-cls")
    network.companions = Companions(class_names=["cat", "dog"])
    export_network(network, tmp_path / "out.pt2", "torch-export")
    kept = {"trunkline.json": ""}
    program = torch.export.load(tmp_path / "out.pt2", extra_files=kept)
    assert json.loads(kept["trunkline.json"]) == {"network": "ViT", "class_names": ["cat", "dog"]}
    with pytest.raises(AssertionError, match="image"):  # another size of pictures
        program.module()(image=torch.zeros(1, 3, 16, 20))


# --- what can go wrong


@dataclass
class OwnConfig:
    """Nothing to set."""


class Silent(Network):
    """A network of one's own that says nothing about export."""

    config_class = OwnConfig


class Own(Silent):
    """One that says something."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.run, self.calls = nn.Linear(4, 4), run, 0

    def graphs(self) -> list[Graph]:
        return [Graph(lambda points: {"out": self.run(self.layer(points))}, {"points": number_input(Axis("n"), 4)})]


def drifting() -> Own:
    """Its results change from call to call."""
    network = Own(lambda x: x * (network.layer.calls, network.layer.__setattr__("calls", network.layer.calls + 1))[0])
    network.layer.calls = 1
    return network


@both
def test_a_network_of_ones_own(to: Format, tmp_path: Path) -> None:
    file = tmp_path / f"out{SUFFIXES[to]}"
    network = Own(torch.tanh).eval()
    export_network(network, file, to)
    points = torch.randn(7, 11, 4)
    with torch.no_grad():
        check(opened(file)({"points": points}), {"out": network.layer(points).tanh()})


@both
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: Silent(), "a Silent does not say what of it is exported; give it a method `graphs`"),
        (lambda: Own(lambda x: x if x.sum() > 0 else -x), r"the Own cannot be exported to \S+: .*data.dependent"),
        (drifting, r"out\.\w+ gives other results than the Own: at .*batch .* they differ by .* more than 1e-04"),
        (lambda: Own(lambda x: x / 0 * 0), "gives other results than the Own: .* differ by inf"),
    ],
)
def test_what_cannot_be_exported(network: Callable[[], Network], message: str, to: Format, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=message):
        export_network(network(), tmp_path / f"out{SUFFIXES[to]}", to)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_the_second_file_leaves_no_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, calls = network_called("clip"), []
    real = network.encode_text
    monkeypatch.setattr(network, "encode_text", lambda *given: calls.append(1) or real(*given) * len(calls))
    with pytest.raises(TrunklineError, match=r"out_text\.pt2 gives other results than the text of the CLIP"):
        export_network(network, tmp_path / "out.pt2", "torch-export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(TrunklineError, match=rf"the package {package}: pip install 'trunkline\[onnx\]'"):
        export_network(network_called("gpt-2"), tmp_path / "out.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=r"cannot write .*nowhere/out\.pt2"):
        export_network(network_called("gpt-2"), tmp_path / "nowhere" / "out.pt2", "torch-export")


def test_sizes_to_compare_with() -> None:
    """One row and several, the shortest and the longest of each length, and an odd one."""
    for name in ("gpt-2", "speech-conv", "t5"):
        for graph in network_called(name).graphs():
            tried = trial_sizes(graph)
            assert {1, 3} <= {each["batch"] for each in tried}
            for axis in axes_of(graph):
                if axis is not BATCH and axis.high is not None:
                    found = {each[axis.name] for each in tried}
                    assert {axis.low, min(axis.high, 1024)} & found
                    assert all(axis.low <= size <= axis.high for size in found)
                    assert len(found) >= 3
    limited = {each["length"] for each in trial_sizes(GPT(GPTConfig(10, 50_000, backbone=gpt().backbone)).graphs()[0])}
    assert max(limited) == 1024
