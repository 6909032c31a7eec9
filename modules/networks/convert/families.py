"""All families of foreign models, and the conversion of a network by its family."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.files import replacing
from trunkline.modules.networks.base import Network
from trunkline.modules.networks.companions import CARD_FILE
from trunkline.modules.networks.convert.companion_files import companions_to_theirs, end_of_text
from trunkline.modules.networks.convert.family import ForeignFamily, Library
from trunkline.modules.networks.convert.open_clip_siglip import OPEN_CLIP_SIGLIP
from trunkline.modules.networks.convert.open_clip_vit import OPEN_CLIP_VIT
from trunkline.modules.networks.convert.timm_vit import TIMM
from trunkline.modules.networks.convert.transformers_ast import TRANSFORMERS_AST
from trunkline.modules.networks.convert.transformers_bart import BART, MARIAN
from trunkline.modules.networks.convert.transformers_bert import DISTILBERT, ROBERTA, TRANSFORMERS_BERT
from trunkline.modules.networks.convert.transformers_clip import SIGLIP, TRANSFORMERS_CLIP
from trunkline.modules.networks.convert.transformers_gpt2 import GPT2
from trunkline.modules.networks.convert.transformers_llama import LLAMA, MISTRAL, QWEN2, QWEN3
from trunkline.modules.networks.convert.transformers_t5 import T5
from trunkline.modules.networks.convert.transformers_text_head import TEXT_HEADS
from trunkline.modules.networks.convert.transformers_vit import DEIT, DINOV2, DINOV2_REGISTERS, TRANSFORMERS_VIT
from trunkline.modules.networks.convert.transformers_whisper import TRANSFORMERS_WHISPER
from trunkline.modules.networks.lora import merged_copy
from trunkline.modules.networks.model_card import model_card
from trunkline.modules.networks.weights import assign_weights, refuse_changed, unfilled
from trunkline.names import with_article

FOREIGN_FAMILIES: tuple[ForeignFamily, ...] = (
    GPT2,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    *TEXT_HEADS,
    DISTILBERT,
    TRANSFORMERS_BERT,
    ROBERTA,
    TRANSFORMERS_VIT,
    DEIT,
    DINOV2,
    DINOV2_REGISTERS,
    TIMM,
    TRANSFORMERS_CLIP,
    SIGLIP,
    OPEN_CLIP_SIGLIP,
    OPEN_CLIP_VIT,
    T5,
    BART,
    MARIAN,
    TRANSFORMERS_WHISPER,
    TRANSFORMERS_AST,
)
"""If several can be what a network becomes, the first that has its options is taken: a BERT without segments is a
DistilBERT."""
FILES: dict[Library, tuple[str, str]] = {
    "transformers": ("config.json", "model.safetensors"),
    "timm": ("config.json", "model.safetensors"),
    "open_clip": ("open_clip_config.json", "open_clip_model.safetensors"),
}
"""Names of the files of configuration and weights."""


def foreign_family(config: Mapping[str, Any], source: object) -> ForeignFamily:
    """The family that the content of a configuration file describes.

    Raises:
        TrunklineError: if there is none.
    """
    found = next((family for family in FOREIGN_FAMILIES if family.recognises(config)), None)
    if found is None:
        kind = config.get("model_type") or config.get("architecture") or "no model_type"
        known = ", ".join(sorted(family.name.removeprefix("a ").removeprefix("an ") for family in FOREIGN_FAMILIES))
        raise TrunklineError(f"{source} is of a kind that cannot be converted ({kind}); known are {known}")
    return found


@contextmanager
def described_by(family: ForeignFamily, source: object) -> Iterator[None]:
    """Read a configuration file of theirs, which may lack a field, or have one of another kind.

    Raises:
        TrunklineError: if it does.
    """
    try:
        yield
    except KeyError as error:
        raise TrunklineError(
            f"the configuration of {source} has no field {error}, without which {family.name} is not described; copy "
            "or download the file again"
        ) from error
    except (TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, RuntimeError) as error:
        if isinstance(error, TrunklineError):
            raise
        raise TrunklineError(
            f"the configuration of {source} has a value that {family.name} cannot have ({error}); copy or download the "
            "file again"
        ) from error


def from_foreign(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype | None = torch.float32
) -> Any:
    """A model of another library, in memory, as our network in training mode; it shares no memory with it.

    Args:
        config: content of its configuration file, such as `model.config.to_dict()` of transformers.
        weights: its state dict, with the names of its files.
        dtype: type of the weights of our network; None keeps theirs.

    Raises:
        TrunklineError: if no network of ours can be such a model, or the weights do not fit.
    """
    family = foreign_family(config, "the given configuration")
    with described_by(family, "the given model"):
        own = family.config_from(config, weights)
        network = unfilled(family.network, own)
    converted = family.weights_from(weights, own)
    assign_weights(network, {name: value.clone() for name, value in converted.items()}, "the given weights", dtype)
    return network


def to_foreign(network: Network, library: Library) -> tuple[ForeignFamily, dict[str, Any], dict[str, Tensor]]:
    """A network as a model of another library: its family, content of the configuration file, and state dict.

    Raises:
        TrunklineError: if no model of that library is such a network; says what each of them lacks.
    """
    network = merged_copy(network)
    refuse_changed(network)
    candidates = [f for f in FOREIGN_FAMILIES if f.origin == library and isinstance(network, f.network)]
    candidates = [family for family in candidates if family.suits is None or family.suits(network)]
    reasons = []
    config = network.config
    seen = getattr(config, "text_padding", 0) is not None  # a SigLIP is read at its last place
    if library == "open_clip" and not seen and config.end_token is None:
        # Ours may read the last token of the mask; theirs looks for that token.
        config = replace(config, end_token=end_of_text(network.companions))
    for family in candidates:
        try:
            content = family.config_to(config)
            return family, content, family.weights_to(network.state_dict(), config)
        except TrunklineError as error:
            reasons.append(str(error))
    kind = type(network).__name__
    raise TrunklineError("; ".join(reasons) or f"{library} has no model that {with_article(kind)} could become")


def save_foreign(
    network: Network,
    folder: str | Path,
    library: Library,
    ids: Mapping[str, int] | None = None,
    repository: str | None = None,
) -> ForeignFamily:
    """Write a network, and what goes with it, as the files from which another library loads it.

    Args:
        network: the network.
        folder: the folder to write, which is created if missing.
        library: "transformers", "timm" or "open_clip".
        ids: numbers of special tokens for the configuration file, such as `eos_token_id`, which a network does not
            know. The text tower of a CLIP is read at that token; others need them to write texts.
        repository: to which the folder will be uploaded; open_clip looks for the tokenizer there.

    Raises:
        TrunklineError: if no model of that library is such a network, or an id is needed that neither knows.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    family, content, weights = to_foreign(network, library)
    texts: dict[str, str] = {}
    if network.companions is not None:
        content, texts = companions_to_theirs(content, network.companions, library, repository or folder.resolve().name)
    content.update(ids or {})
    if isinstance(of_text := content.get("text_config"), dict):
        of_text.update(ids or {})
        unknown = [name for name, value in of_text.items() if value is None and name.endswith("_token_id")]
        if unknown:
            raise TrunklineError(
                f"{family.name} reads a text at its {unknown[0]}, which the network does not know; give it in ids, or "
                "set end_token in the network's configuration"
            )
    config_file, weights_file = FILES[library]
    texts[config_file] = json.dumps(content, indent=2) + "\n"
    if not (folder / CARD_FILE).exists():
        names = {
            "transformers": content.get("architectures", ["AutoModel"])[0],
            "timm": content.get("architecture", ""),
        }
        texts[CARD_FILE] = model_card(network, library, names.get(library, ""))
    with replacing(*(folder / name for name in texts), folder / weights_file) as (*files, new_weights):
        for file, text in zip(files, texts.values(), strict=True):
            file.write_text(text, encoding="utf-8")
        save_file({name: value.contiguous() for name, value in weights.items()}, new_weights, {"format": "pt"})
    return family
