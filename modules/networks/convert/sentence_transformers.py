"""Models of sentence-transformers (arXiv:1908.10084) as a `TextHead` without an output layer."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trunkline import TrunklineError
from trunkline.modules.networks.bert import BERT
from trunkline.modules.networks.convert.family import ForeignFamily
from trunkline.modules.networks.gpt import GPT
from trunkline.modules.networks.text_head import TextHead, TextHeadConfig

MODULES_FILE = "modules.json"
POOLING_FILES = "*_Pooling/config.json"
"""Where the pooling of a model on the hub is."""
OF_LANGUAGE_MODELS = ("head.", "masked_head.", "next_head.", "pooler.")
"""Beginnings of the names of output layers, which sentence-transformers does not read."""
POOLS = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}
"""`pooling_mode_` -> `pool` of a `TextHead`."""


def sentence_options(folder: Path) -> dict[str, Any] | None:
    """Fields `pool` and `normalise` of a `TextHead` for a folder of sentence-transformers; None for another folder.

    Raises:
        TrunklineError: if a file is damaged, or the model has a part that a `TextHead` does not have.
    """
    file = folder / MODULES_FILE
    if not file.is_file():
        return None
    parts = part_of_model(file)
    try:
        kinds = [str(part["type"]).rpartition(".")[2] for part in parts]
        places = [str(part["path"]) for part in parts]
    except (TypeError, KeyError) as error:
        raise TrunklineError(f"{file} does not list the parts of a model: {error!r}; copy it again") from error
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]) or places[0]:
        raise TrunklineError(
            f"{file} names as parts {', '.join(kinds) or 'nothing'}, but a TextHead has Transformer, Pooling and "
            "Normalize; load its BERT or GPT alone with BERT.from_pretrained or GPT.from_pretrained"
        )
    pooling = folder / places[1] / "config.json"
    if Path(places[1]).name != places[1]:
        raise TrunklineError(f"{file} names a part outside its folder: {places[1]}")
    options = part_of_model(pooling)
    if not isinstance(options, dict):
        raise TrunklineError(f"{pooling} does not say how tokens are pooled: it is no object; copy it again")
    modes = [name.removeprefix("pooling_mode_") for name, value in options.items() if value is True]
    modes = [mode for mode in modes if mode != "include_prompt"]
    if "pooling_mode" in options:  # of newer versions
        newer = str(options["pooling_mode"])
        modes = [{"cls": "cls_token", "mean": "mean_tokens"}.get(newer, newer)]
    if len(modes) != 1 or modes[0] not in POOLS:
        raise TrunklineError(
            f"{pooling} asks for {' and '.join(map(str, modes)) or 'no pooling'}, but a TextHead pools by one of "
            f"{', '.join(POOLS)}; load its BERT or GPT alone with BERT.from_pretrained or GPT.from_pretrained"
        )
    return {"pool": POOLS[modes[0]], "normalise": kinds[2:] == ["Normalize"]}


def part_of_model(file: Path) -> Any:
    """Content of one of the files beside a network.

    Raises:
        TrunklineError: if it is missing or damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrunklineError(
            f"cannot read {file} of a model of sentence-transformers: {error}; copy it again"
        ) from error


def sentence_family(body: ForeignFamily, options: Mapping[str, Any]) -> ForeignFamily:
    """A family of foreign models whose body is of another one: a `BERT` or a `GPT`."""
    kind = {BERT: "bert", GPT: "gpt"}[body.network]

    def config_from(content: Mapping[str, Any], weights: Any) -> TextHeadConfig:
        return TextHeadConfig(**{kind: body.config_from(content, weights)}, num_outputs=0, dropout=0.0, **options)

    def weights_from(weights: Any, config: TextHeadConfig) -> dict[str, Any]:
        own = body.weights_from(weights, config.body)
        return {f"body.{name}": value for name, value in own.items() if not name.startswith(OF_LANGUAGE_MODELS)}

    name = f"{body.name} with pooling of sentence-transformers"
    return replace(body, name=name, network=TextHead, config_from=config_from, weights_from=weights_from)
