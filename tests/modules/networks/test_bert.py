"""What the BERT promises beyond the contract of all networks: its heads run inside `forward`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_networks import assert_near, bert, loss_of, randomise
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.networks import BERT

POSITIONS = torch.tensor([[3, 7, 1], [0, 8, 8]])
KEPT: dict[str, Any] = {"all": None, "positions": POSITIONS, "slice": slice(2, 5)}


def network(**options: Any) -> BERT:
    return randomise(BERT(bert(next_sentence=True, **options)))


def batch() -> dict[str, Tensor]:
    mask = torch.arange(9) < torch.tensor([[9], [9]])
    mask[0, 5:] = False
    return {"tokens": torch.randint(0, 19, (2, 9)), "segment": (torch.arange(9) > 4).long().expand(2, 9), "mask": mask}


def outside(net: BERT, inputs: dict[str, Tensor], logits: bool) -> tuple[Tensor, Tensor]:
    """The heads called one by one on the trunk's states, as the objective did before they ran inside."""
    keep = torch.cat([torch.zeros_like(POSITIONS[:, :1]), POSITIONS], dim=1)
    states = net.forward_features(**inputs, keep=keep).x
    assert net.pooler is not None
    assert net.next_head is not None
    follows, states = net.next_head(net.pooler(states[:, 0])), net.masked_head(states[:, 1:])
    return (net.head(states) if logits else states), follows


def inside(net: BERT, inputs: dict[str, Tensor], logits: bool) -> tuple[Tensor, Tensor]:
    return net(**inputs, keep=POSITIONS, return_logits=logits, return_next=True)


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("trunk", [{}, {"dropout": 0.2}, {"norm_first": True, "final_norm": True, "rope_theta": 1e4}])
def test_heads_inside_equal_heads_outside_to_the_last_bit(logits: bool, trunk: dict[str, Any]) -> None:
    net, inputs = network(trunk=trunk), batch()
    found = []
    for path in (outside, inside):
        call: Callable[..., tuple[Tensor, Tensor]] = path
        net.zero_grad()
        torch.manual_seed(2)
        out, follows = call(net, inputs, logits)
        (loss_of(out) + loss_of(follows)).backward()
        found.append([out, follows, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 30
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("logits", [False, True])
def test_compile_captures_the_heads_in_the_trunks_graph(logits: bool) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    net, inputs = network().eval(), batch()
    compiled = torch.compile(net, backend=record, fullgraph=True)
    found = compiled(**inputs, keep=POSITIONS, return_logits=logits, return_next=True)
    torch.testing.assert_close(found, inside(net, inputs, logits))
    (graph,) = graphs
    names = " ".join(node.name for node in graph.graph.nodes)
    assert all((f"modules_{head}_" in names) for head in ("backbone", "masked_head", "pooler", "next_head"))
    assert ("modules_head_" in names) == logits


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("logits", [False, True])
def test_shapes_and_positions(kept: str, logits: bool) -> None:
    """What is kept is what the whole has there; the first token's answer is the same whatever is kept."""
    net, inputs = network().eval(), batch()
    whole, want = net(**inputs, return_next=True)
    assert whole.shape == (2, 9, 19)
    assert want.shape == (2, 2)
    keep = KEPT[kept]
    rows = torch.arange(9).expand(2, 9)[:, keep] if isinstance(keep, slice) else torch.arange(9).expand(2, 9)
    rows = POSITIONS if kept == "positions" else rows
    out, follows = net(**inputs, keep=keep, return_logits=logits, return_next=True)
    assert out.shape == (*rows.shape, 19 if logits else 32)
    assert_near(out if logits else net.head(out), whole.take_along_dim(rows[..., None], dim=1))
    assert_near(follows, want)
    alone = net(**inputs, keep=keep, return_logits=logits)
    assert isinstance(alone, Tensor)
    assert_near(alone, out)


def test_forward_features_are_the_states_before_the_heads() -> None:
    net, inputs = network().eval(), batch()
    states = net.forward_features(**inputs).x
    assert torch.equal(net.masked_head(states), net(**inputs, return_logits=False))
    assert (states - net(**inputs, return_logits=False)).abs().max() > 0.1


def test_no_output_for_the_next_sentence() -> None:
    with pytest.raises(TrunklineError, match="no output for the next sentence; make it with next_sentence=True"):
        BERT(bert())(torch.zeros(1, 4, dtype=torch.long), return_next=True)
