"""`sort-tiles`: fine-tune a network on tiles in each of the ways of this project, and say what came out."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import trunkline
from modules.loop import Sorter, learn
from modules.probe import features, fit_probe, probe_accuracy
from modules.tiles import make_tiles


def main() -> None:
    """`sort-tiles SOURCE FOLDER loop|lightning|probe...` prints a line of JSON; networks are saved into the folder."""
    source, folder, *ways = sys.argv[1:]
    torch.manual_seed(0)
    known = {"loop": by_loop, "lightning": by_lightning, "probe": by_probe}
    print(json.dumps({way: known[way](source, Path(folder) / way) for way in ways}))


def by_loop(source: str, folder: Path) -> dict[str, Any]:
    """A plain loop over the upper block and the head."""
    sorter = Sorter(trunkline.load(source))
    train, test = tiles_for(sorter.body)
    before = loss_on(sorter, test)
    losses = learn(sorter, *train, steps=40, frozen_blocks=1)
    sorter.body.save_pretrained(folder)
    again = Sorter(trunkline.load(folder)).eval()
    again.head = sorter.head
    return {"before": before, "after": loss_on(sorter, test), "reloaded": loss_on(again, test), "steps": len(losses)}


def by_lightning(source: str, folder: Path) -> dict[str, Any]:
    """A few epochs of Lightning over all weights."""
    from modules import lit  # here, because the other ways need no Lightning

    before = lit.LitSorter(source).eval()
    train, test = tiles_for(before.sorter.body)
    trained, file = lit.train(source, *train, folder, epochs=5)
    trained.sorter.body.save_pretrained(folder)
    again = lit.LitSorter.load_from_checkpoint(file, weights_only=True).eval()
    losses = [loss_on(each.sorter, test) for each in (before, trained, again)]
    return dict(zip(("before", "after", "reloaded"), losses, strict=True))


def by_probe(source: str, folder: Path) -> dict[str, Any]:
    """No training: the accuracy of a linear probe on the states of the first and the last block, and those states."""
    network = trunkline.load(source)
    (pictures, labels), (unseen, answers) = tiles_for(network)
    states = [features(network, rows, [0, -1]) for rows in (pictures, unseen)]
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"pictures": unseen, "states": states[1], "scores": network(unseen).detach()}, folder / "probe.pt")
    return {"accuracy": probe_accuracy(fit_probe(states[0], labels), states[1], answers)}


Rows = tuple[Tensor, Tensor]


def tiles_for(network: Any) -> tuple[Rows, Rows]:
    """Tiles to learn from and others, of the size that the network takes."""
    return make_tiles(128, network.config.size[0], seed=0), make_tiles(64, network.config.size[0], seed=1)


@torch.no_grad()
def loss_on(sorter: Sorter, rows: Rows) -> float:
    """Mean cross-entropy."""
    return F.cross_entropy(sorter(rows[0]), rows[1]).item()
