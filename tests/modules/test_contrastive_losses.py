import math
from collections.abc import Callable

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn.functional import normalize

from trunkline import TrunklineError
from trunkline.modules import chunked_cross_entropy, losses
from trunkline.modules.losses import infonce_loss, sigmoid_loss

B, E = 7, 5
KEYS = torch.tensor([0, 1, 2, 0, 0, 5, 2])


def embeddings() -> list[Tensor]:
    """Images, texts, factor, bias; in float64, with gradients."""
    draw = torch.Generator().manual_seed(0)
    sides = [normalize(torch.randn(B, E, generator=draw, dtype=torch.float64), dim=1) for _ in range(2)]
    return [x.requires_grad_() for x in (*sides, torch.tensor(6.0).double(), torch.tensor(-2.0).double())]


def infonce(image: Tensor, text: Tensor, factor: Tensor, bias: Tensor, keys: Tensor | None = None) -> Tensor:
    return infonce_loss(image, text, image, text, factor, keys=keys) / B


def sigmoid(image: Tensor, text: Tensor, factor: Tensor, bias: Tensor, keys: Tensor | None = None) -> Tensor:
    return sigmoid_loss(image, text, factor, bias, keys=keys) / B


def infonce_loop(image: Tensor, text: Tensor, factor: Tensor, bias: Tensor, keys: Tensor | None) -> Tensor:
    total = image.new_zeros(())
    for queries, answers in ((image, text), (text, image)):
        for i in range(B):
            rivals = [j for j in range(B) if j == i or keys is None or keys[i] != keys[j]]
            terms = [(factor * (queries[i] @ answers[j])).exp() for j in rivals]
            total = total - ((factor * (queries[i] @ answers[i])).exp() / sum(terms)).log() / 2
    return total / B


def sigmoid_loop(image: Tensor, text: Tensor, factor: Tensor, bias: Tensor, keys: Tensor | None) -> Tensor:
    total = image.new_zeros(())
    for i in range(B):
        for j in range(B):
            logit = factor * (image[i] @ text[j]) + bias
            if i == j:
                total = total - torch.sigmoid(logit).log()
            elif keys is None or keys[i] != keys[j]:
                total = total - torch.sigmoid(-logit).log()
    return total / B


@pytest.mark.parametrize("chunk", [10**9, 2 * B])
@pytest.mark.parametrize("keys", [None, KEYS], ids=["negatives", "ignored"])
@pytest.mark.parametrize(("loss", "loop"), [(infonce, infonce_loop), (sigmoid, sigmoid_loop)])
def test_against_a_loop(
    loss: Callable[..., Tensor],
    loop: Callable[..., Tensor],
    keys: Tensor | None,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values and all gradients, also where only two rows of logits are held at a time."""
    monkeypatch.setattr(chunked_cross_entropy, "LOGITS_AT_ONCE", chunk)
    got, want = embeddings(), embeddings()
    value, expected = loss(*got, keys=keys), loop(*want, keys)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    value.backward()
    expected.backward()
    used = slice(None) if loss is sigmoid else slice(3)
    torch.testing.assert_close([x.grad for x in got[used]], [x.grad for x in want[used]], rtol=0, atol=1e-12)


def test_against_open_clip() -> None:
    inputs = embeddings()
    torch.testing.assert_close(infonce(*inputs), ClipLoss()(*inputs[:3]), rtol=0, atol=1e-12)
    torch.testing.assert_close(sigmoid(*inputs), SigLipLoss()(*inputs), rtol=0, atol=1e-12)


def test_chance() -> None:
    same = normalize(torch.ones(B, E), dim=1)
    assert infonce(same, same, torch.tensor(10.0), torch.tensor(0.0)).item() == pytest.approx(math.log(B))
    # The best that constant logits can do is the probability 1 in B.
    bias = torch.tensor(math.log(1 / (B - 1)))
    best = math.log(B) + (B - 1) * math.log(B / (B - 1))
    assert sigmoid(same, same, torch.tensor(0.0), bias).item() == pytest.approx(best)


@pytest.mark.parametrize("loss", [infonce, sigmoid])
def test_autocast_does_not_coarsen(loss: Callable[..., Tensor]) -> None:
    inputs = [x.float() for x in embeddings()]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(*inputs), rtol=0, atol=1e-6)


def test_keys_and_label_smoothing_exclude_each_other() -> None:
    x, target, keys = torch.randn(3, 4), torch.arange(3), (torch.zeros(3), torch.zeros(3))
    with pytest.raises(TrunklineError, match="use one of them"):
        losses.linear_cross_entropy(x, torch.randn(3, 4), target, keys=keys, label_smoothing=0.1)
