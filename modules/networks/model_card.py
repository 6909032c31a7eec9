"""The model card that `save_pretrained` writes beside a network: what it is, and how to load it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

HUB_TASKS = {
    "AST": "audio-classification",
    "BERT": "fill-mask",
    "CLIP": "zero-shot-image-classification",
    "EncoderDecoder": "translation",
    "GPT": "text-generation",
    "SpeechEncoder": "automatic-speech-recognition",
    "TextHead": "text-classification",
    "ViT": "image-classification",
    "Whisper": "automatic-speech-recognition",
}
"""Network -> the hub's name of its task."""
METRICS = {"acc": "accuracy", "ppl": "perplexity"}
"""Our name of a score -> the hub's, where it is another."""
LOADING = {
    "trunkline": 'import trunkline\n\nnetwork = trunkline.load("{repo}")',
    "transformers": 'import transformers\n\nmodel = transformers.{model}.from_pretrained("{repo}")',
    "timm": 'import timm\n\nmodel = timm.create_model("local-dir:{repo}", pretrained=True)',
    "open_clip": 'import open_clip\n\nmodel, preprocess = open_clip.create_model_from_pretrained("local-dir:{repo}")',
}
"""Library -> how a model in a folder is loaded."""
NAME_HERE = "NAME_OR_FOLDER"


def model_card(network: nn.Module, library: str = "trunkline", model: str = "", task: str | None = None) -> str:
    """A model card in Markdown with the hub's head in YAML.

    Args:
        network: with `config` and `companions`.
        library: the library that loads the files.
        model: the library's class or architecture.
        task: the hub's name of the task; None for the usual one of the network.
    """
    kind = type(network).__name__
    companions: Any = network.companions
    facts: dict[str, Any] = {} if companions is None else companions.facts
    weights = sum(parameter.numel() for parameter in network.parameters())
    task = task or HUB_TASKS.get(kind)
    head = [f"library_name: {library.replace('_', '-')}", "tags:", "- trunkline", f"- {kind.lower()}"]
    head += [f"pipeline_tag: {task}"] if task else []
    scores: dict[str, float] = {} if companions is None else companions.scores
    head += model_index(kind, task, facts.get("data", ""), scores) if task else []
    lines = ["---", *head, "---", "", f"# {kind}", "", f"{weights:,} weights, trained with Trunkline.", ""]
    if companions is not None and companions.class_names:
        names = companions.class_names
        facts = facts | {"classes": f"{len(names)}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"}
    if facts:
        lines += [
            "| training | |",
            "|---|---|",
            *(f"| {name} | {in_table(value)} |" for name, value in facts.items()),
            "",
        ]
    if scores:
        rows = [f"| {in_table(name)} | {value:.4g} |" for name, value in scores.items()]
        lines += ["| validation | |", "|---|---|", *rows, ""]
    loading = LOADING[library].format(repo=NAME_HERE, model=model or kind)
    lines += ["## Use", "", "```python", loading, "```", ""]
    config = json.dumps(dataclasses.asdict(network.config), indent=2)  # type: ignore[call-overload]
    lines += ["## Network", "", "```json", config, "```", ""]
    lines += ["Add a `license:` to the head of this file before you publish it.", ""]
    return "\n".join(lines)


def model_index(name: str, task: str, data: str, scores: Mapping[str, float]) -> list[str]:
    """Lines of the head with which the hub shows scores: of the validation split of the data.

    Args:
        name: the model's name.
        task: the hub's name of the task.
        data: the data's name; nothing is written without one.
        scores: score -> value; those that are not finite are left out.
    """
    finite = {score: value for score, value in scores.items() if math.isfinite(value)}
    if not data or not finite:
        return []
    quoted = json.dumps(data.partition(" ")[2] or data)  # without the class of the datamodule
    lines = ["model-index:", f"- name: {name}", "  results:", "  - task:", f"      type: {task}"]
    lines += [
        "    dataset:",
        f"      name: {quoted}",
        f"      type: {quoted}",
        "      split: validation",
        "    metrics:",
    ]
    for score, value in finite.items():
        kind = score.removeprefix("val/")
        lines += [f"    - type: {json.dumps(METRICS.get(kind, kind))}", f"      name: {json.dumps(score)}"]
        lines += [f"      value: {value:.6g}"]
    return lines


def in_table(value: object) -> str:
    """A value in a table of Markdown."""
    return str(value).replace("|", "\\|").replace("\n", " ")
