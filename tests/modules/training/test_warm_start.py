"""Freezing, and starting from trained weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import batches, classifier, fit, vit, weights

from trunkline import TrunklineError
from trunkline.modules.objectives.image_classifier import ImageClassifier

BLOCKS_1_2 = ("backbone.blocks.1.", "backbone.blocks.2.", "backbone.norm.")


@pytest.mark.parametrize(
    ("blocks", "pool", "learning"),
    [
        (0, "cls", ("",)),
        (1, "cls", (*BLOCKS_1_2, "head.")),
        (1, "map", (*BLOCKS_1_2, "head.", "attn_pool.")),
        (3, "mean", ("head.",)),
        (7, "map", ("head.", "attn_pool.")),
    ],
)
def test_exactly_what_is_not_frozen_learns(tmp_path: Path, blocks: int, pool: Any, learning: tuple[str, ...]) -> None:
    model = classifier(vit(depth=3, pool=pool, num_registers=2), freeze_blocks=blocks)
    before = weights(model)
    assert fit(model, tmp_path, batches(2)).global_step == 2
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith(learning)}


@pytest.mark.parametrize("rate", ["dropout", "drop_path"])
def test_frozen_parts_do_not_drop_and_the_others_do(rate: str) -> None:
    def modes(blocks: int) -> dict[str, bool]:
        model = classifier(vit(depth=3, **{rate: 0.5}), freeze_blocks=blocks).eval().train()
        return {name: module.training for name, module in model.network.named_modules()}

    assert all(modes(0).values())
    frozen = ("patch_embed", "embed_norm", "dropout", "backbone.blocks.0")
    assert {name for name, training in modes(1).items() if not training} == {
        name for name in modes(1) if name.startswith(frozen)
    }
    assert {name for name, training in modes(3).items() if training} == {"", "head"}
    image = torch.randn(64, 1, 8, 8)
    for blocks, same in ((0, False), (1, False), (3, True)):
        model = classifier(vit(depth=3, **{rate: 0.5}), freeze_blocks=blocks)
        assert torch.equal(model(image), model(image)) == same
        assert torch.equal(model.train().network.embed(image), model.network.embed(image)) == (
            blocks > 0 or rate == "drop_path"
        )


# --- starting from trained weights


@pytest.fixture(params=["folder", "checkpoint"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ImageClassifier, str]:
    """A trained classifier and where it is saved."""
    model = classifier()
    fitted = fit(model, tmp_path, batches(2))
    if request.param == "folder":
        model.network.save_pretrained(tmp_path / "vit")
        return model, str(tmp_path / "vit")
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    return model, str(tmp_path / "a.ckpt")


def test_init_from(saved: tuple[ImageClassifier, str]) -> None:
    source, name = saved
    model = ImageClassifier(vit(), init_from=name)
    torch.testing.assert_close(weights(model), weights(source), rtol=0, atol=0)
    # Another image size and another number of classes: positions are interpolated, the head stays as it was made.
    model, want = ImageClassifier(vit(image_size=(12, 16), num_classes=3), init_from=name), weights(source)
    positions = want.pop("pos_embed").reshape(1, 2, 2, 16).permute(0, 3, 1, 2)
    resized = F.interpolate(positions, (3, 4), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 12, 16)
    want |= {"pos_embed": resized, "head.weight": torch.zeros(3, 16), "head.bias": torch.zeros(3)}
    torch.testing.assert_close(weights(model), want, rtol=0, atol=1e-6)
    assert model(torch.zeros(2, 1, 12, 16)).shape == (2, 3)
    assert model.network.config.num_classes == 3
    with pytest.raises(TrunklineError, match=r"init_from .* does not fit: .* is \(.*16.*\) there and \(.*32.*\) here"):
        ImageClassifier(vit(dim=32), init_from=name)
    with pytest.raises(TrunklineError, match=r"backbone\.blocks\.2.* is missing there"):
        ImageClassifier(vit(depth=3), init_from=name)
