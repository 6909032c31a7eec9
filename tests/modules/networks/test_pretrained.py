"""Networks from the files of another library: parts, pickles, types, ties, and how files can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parity import assert_near, randomise
from safetensors.torch import load_file, save_file

import trunkline
from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import EncoderDecoder, EncoderDecoderConfig, ViT, ViTConfig
from trunkline.modules.networks.convert.families import save_foreign
from trunkline.modules.networks.pretrained import load_pretrained

SIZES = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


@pytest.fixture
def theirs() -> Any:
    return randomise(transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES)).eval(), 0.05)


def results(network: Any) -> torch.Tensor:
    """Logits (2, 4, 40) of our network or of theirs."""
    generator = torch.Generator().manual_seed(0)
    tokens, given = (torch.randint(3, 40, (2, length), generator=generator) for length in (7, 4))
    with torch.no_grad():
        if isinstance(network, EncoderDecoder):
            return network.eval()(tokens, given)
        return network(input_ids=tokens, decoder_input_ids=given).logits


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("parts", [False, True], ids=["one", "parts"])
def test_folders_of_transformers(safe: bool, parts: bool, theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path, max_shard_size="40KB" if parts else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is parts
    if not safe:
        to_pickles(tmp_path)
    assert_near(results(EncoderDecoder.from_pretrained(tmp_path)), results(theirs))


def to_pickles(folder: Path, archive: bool = True) -> None:
    """The layout of the files before safetensors; without an archive, that of files before version 1.6 of torch."""
    for file in folder.glob("*.safetensors"):
        place = folder / file.name.replace("model", "pytorch_model").replace("safetensors", "bin")
        torch.save(load_file(file), place, _use_new_zipfile_serialization=archive)
        file.unlink()
    for index in folder.glob("*.index.json"):
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def test_one_file_and_its_configuration(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    file = (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    want = results(theirs)
    assert_near(results(EncoderDecoder.from_pretrained(file)), want)
    config = (tmp_path / "config.json").rename(tmp_path / "other.json")
    with pytest.raises(TrunklineError, match=r"cannot read .*config\.json, which says what network"):
        EncoderDecoder.from_pretrained(file)
    assert_near(results(EncoderDecoder.from_pretrained(file, config=config)), want)
    assert_near(results(EncoderDecoder.from_pretrained(file, config=json.loads(config.read_text()))), want)


def test_types(theirs: Any, tmp_path: Path) -> None:
    theirs.bfloat16().save_pretrained(tmp_path)
    usual, kept = EncoderDecoder.from_pretrained(tmp_path), EncoderDecoder.from_pretrained(tmp_path, dtype=None)
    assert {p.dtype for p in usual.parameters()} == {torch.float32}
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b.float()) for a, b in zip(usual.parameters(), kept.parameters(), strict=True))


def test_one_weight_stays_one(theirs: Any, tmp_path: Path) -> None:
    """Tied embeddings are one parameter after loading, so that they learn as one."""
    theirs.save_pretrained(tmp_path)
    network = EncoderDecoder.from_pretrained(tmp_path)
    assert network.head.weight is network.token_embed.weight
    assert network.target_embed.weight is network.token_embed.weight


def test_random_numbers_are_not_drawn(theirs: Any, tmp_path: Path) -> None:
    """Loading takes no time for values that are then thrown away, and changes no seeded run."""
    theirs.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    EncoderDecoder.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_there_and_back(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "theirs")
    network = load_pretrained(tmp_path / "theirs")
    save_foreign(network, tmp_path / "back", "transformers")
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    with pytest.raises(TrunklineError, match="timm has no model that an EncoderDecoder could become"):
        save_foreign(network, tmp_path, "timm")
    trunk = TransformerConfig(dim=16, depth=1, num_heads=2)
    with pytest.raises(TrunklineError, match=r"cannot become a T5"):
        save_foreign(EncoderDecoder(EncoderDecoderConfig(encoder=trunk, decoder=trunk)), tmp_path, "transformers")


def test_save_over_the_file_that_was_read(tmp_path: Path) -> None:
    """Nothing of the file stays mapped into memory."""
    from test_networks import vit

    randomise(ViT(vit())).save_pretrained(tmp_path)
    network = ViT.from_pretrained(tmp_path)
    want = load_file(tmp_path / "model.safetensors")
    network.save_pretrained(tmp_path)
    for found in (network.state_dict(), load_file(tmp_path / "model.safetensors")):
        assert all(torch.equal(found[name], value) for name, value in want.items())


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.glob(pattern)).unlink()


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))

    return change


def lose(field: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        del content[field]
        (folder / "config.json").write_text(json.dumps(content))

    return change


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = next(folder.glob("*.safetensors"))
        weights = load_file(file)
        change(weights)
        save_file(weights, file)

    return write


def add_to_index(part: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        places = json.loads(index.read_text())["weight_map"]
        index.write_text(json.dumps({"weight_map": places | {"more": part.format(min(places.values()))}}))

    return change


def cut(pattern: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = next(folder.glob(pattern))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


NAME = "encoder.block.0.layer.0.SelfAttention"


@pytest.mark.parametrize(
    ("parts", "damage", "message"),
    [
        (True, remove("model-00002*"), r"names \d parts, but model-00002-of-\d+\.safetensors is not there"),
        (True, cut("model-00001*"), r"cannot read weights from .*model-00001-of-\d+\.safetensors"),
        (True, add_to_index("../{}"), "names a part outside its folder"),
        (True, add_to_index("{}"), "hold other weights than it says, such as 'more'"),
        (True, cut("*.index.json"), "is no list of parts"),
        (False, cut("config.json"), "cannot read .*config.json"),
        (False, remove("*.safetensors"), "holds no weights; it needs one of model.safetensors"),
        (False, edit(model_type="mixtral"), r"a kind that cannot be converted \(mixtral\); known are .*T5"),
        (False, edit(feed_forward_proj="gated-relu"), "T5 with feed_forward_proj=gated-relu cannot be converted"),
        (False, edit(d_ff=40), r"'encoder\.blocks\.0\.mlp\.fc1\.weight' is \(48, 32\) there and \(40, 32\) here; '"),
        (False, edit_weights(lambda w: w.pop(f"{NAME}.k.weight")), f"have '{NAME}.o.weight'|but no '{NAME}.k.weight'"),
        (False, edit_weights(lambda w: w.pop(f"{NAME}.o.weight")), r"'encoder\.blocks\.0\.attn\.proj.* is missing"),
        (False, edit_weights(lambda w: w.update(a=torch.ones(1), b=torch.ones(1))), "no place in .*: 'a'; 'b'"),
        (False, edit_weights(lambda w: w["shared.weight"].fill_(torch.nan)), "not finite, first in token_embed"),
        (
            False,
            edit_weights(lambda w: w.update({"shared.weight": w["shared.weight"].char()})),
            "_embed.* is int8 there",
        ),
        (False, edit(d_model="big"), "has a value that a T5 cannot have"),
        (False, edit(vocab_size=None), "has a value that a T5 cannot have"),
        (False, lose("d_model"), "has no field 'd_model', without which a T5 is not described; copy"),
    ],
)
def test_what_is_wrong_is_named(
    parts: bool, damage: Callable[[Path], None], message: str, theirs: Any, tmp_path: Path
) -> None:
    theirs.save_pretrained(tmp_path, max_shard_size="40KB" if parts else "1GB")
    damage(tmp_path)
    with pytest.raises(TrunklineError, match=message):
        EncoderDecoder.from_pretrained(tmp_path)


def test_a_pickle_with_code_is_refused(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for archive in (True, False):
        code = {"shared.weight": Path("code")}
        torch.save(code, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
        with pytest.raises(
            TrunklineError, match=r"pytorch_model\.bin: .*; only files of torch\.save with nothing but tensors"
        ):
            EncoderDecoder.from_pretrained(tmp_path)
    torch.save({"epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(TrunklineError, match="holds no state dict"):
        EncoderDecoder.from_pretrained(tmp_path)


def test_tied_weights_that_differ(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    edit_weights(lambda w: w.update({"lm_head.weight": w["shared.weight"] + 1}))(tmp_path)
    with pytest.raises(TrunklineError, match=r"'head\.weight' and '\w+_embed\.weight' differ, but are one here"):
        EncoderDecoder.from_pretrained(tmp_path)


def test_another_network(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    with pytest.raises(TrunklineError, match="describes an EncoderDecoder, not a ViT; load it with EncoderDecoder"):
        ViT.from_pretrained(tmp_path)


def test_an_error_names_the_place(tmp_path: Path) -> None:
    vit = ViT(ViTConfig(8, 4, backbone=TransformerConfig(dim=16, depth=1, num_heads=2)))
    vit.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["backbone"]["num_heads"] = 3
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(TrunklineError, match=rf"cannot load {tmp_path}: num_heads=3 does not divide dim=16"):
        trunkline.load(tmp_path)


@pytest.mark.parametrize("library", ["trunkline", "transformers"])
def test_a_network_with_another_head_is_not_saved(library: Any, tmp_path: Path) -> None:
    """Its files could not be loaded."""
    vit = ViT(ViTConfig(8, 4, num_classes=5, backbone=TransformerConfig(dim=16, depth=1, num_heads=2)))
    vit.head = torch.nn.Linear(16, 3)
    message = r"'head\.weight' is \(3, 16\), but \(5, 16\) by the configuration; 'head\.bias' .*Change the config"
    with pytest.raises(TrunklineError, match=message):
        vit.save_pretrained(tmp_path / "out") if library == "trunkline" else save_foreign(vit, tmp_path, library)
    assert not (tmp_path / "out").exists()
    vit.head = torch.nn.Identity()
    with pytest.raises(TrunklineError, match=r"'head\.weight' is missing, but \(5, 16\) by the configuration"):
        vit.save_pretrained(tmp_path / "out")
    vit.config.num_classes = 0
    vit.save_pretrained(tmp_path / "out")
    assert trunkline.load(tmp_path / "out").config.num_classes == 0


class Reading(ViT):
    """Its constructor reads a value of a tensor."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.first = float(self.head.weight[0, 0])


class Asking(ViT):
    """Its constructor needs more than a configuration."""

    def __init__(self, config: ViTConfig, more: int) -> None:
        super().__init__(config)


@pytest.mark.parametrize(("kind", "more"), [(Reading, ()), (Asking, (1,))])
def test_a_network_that_its_configuration_does_not_make(kind: type[ViT], more: tuple[int, ...], tmp_path: Path) -> None:
    vit = kind(ViTConfig(8, 4, num_classes=5, backbone=TransformerConfig(dim=16, depth=1, num_heads=2)), *more)
    with pytest.raises(TrunklineError, match=rf"this {kind.__name__} cannot be saved.*need nothing but `config`"):
        vit.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.gguf", "but weights in the format GGUF"),
        ("tf_model.h5", "but weights of TensorFlow"),
        ("flax_model.msgpack", "but weights of Flax"),
        ("modules.json", "but a model of sentence-transformers"),
        ("model.safetensors", r"but weights without the config\.json"),
    ],
)
def test_folders_of_other_formats(file: str, message: str, theirs: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / file).write_bytes(b"")
    with pytest.raises(TrunklineError, match=rf"holds no network that can be loaded, {message}.*; give a folder with"):
        trunkline.load(tmp_path / "folder")
    if file != "model.safetensors":
        theirs.config.save_pretrained(tmp_path / "folder")
        with pytest.raises(TrunklineError, match=rf"holds no weights, {message}.*; it needs one of model\.safetensors"):
            trunkline.load(tmp_path / "folder")
        (tmp_path / "folder/adapter_config.json").write_text("{}")
        (tmp_path / "folder" / file).unlink()
        with pytest.raises(
            TrunklineError,
            match=r"but an adapter of PEFT, which convert\.peft_adapters\.load_adapter gives to its base model",
        ):
            trunkline.load(tmp_path / "folder")
    (tmp_path / file).write_bytes(b"")
    if file.endswith((".gguf", ".h5", ".msgpack")):
        with pytest.raises(TrunklineError, match="convert other formats, such as GGUF or ONNX, to safetensors"):
            trunkline.load(tmp_path / file)
