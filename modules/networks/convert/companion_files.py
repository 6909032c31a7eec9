"""What goes with a network, in the files of another library: tokenizer, how pictures are prepared, names of classes."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trunkline import TrunklineError
from trunkline.modules.networks.companions import TOKENIZER_FILE, Companions, tokenizer_text
from trunkline.modules.networks.convert.family import Library
from trunkline.modules.networks.convert.feature_extractors import extractor_settings, sounds_of_extractor
from trunkline.modules.networks.convert.image_processors import processor_settings, processor_transform, two_sides
from trunkline.modules.networks.image_transform import ImageTransform

PREPROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
"""How inputs are prepared; version 5 of transformers writes it into the second, beside what a processor adds."""
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS = {
    "bos_token": ("<|startoftext|>", "<s>", "[CLS]", "<|endoftext|>", "<bos>"),
    "eos_token": ("<|endoftext|>", "[SEP]", "</s>", "<eos>"),
    "unk_token": ("<unk>", "[UNK]", "<|unk|>"),
    "pad_token": ("<pad>", "[PAD]", "<|endoftext|>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
"""Name in transformers -> what such a token is called; the first that a tokenizer has is it."""
RESIZE_MODES = {"shortest": False, "squash": True}
"""`resize_mode` of open_clip -> `squash`."""


def companions_from_theirs(folder: Path, content: Mapping[str, Any], library: Library) -> Companions:
    """What lies beside a foreign model.

    A way of preparing pictures that `ImageTransform` does not have, such as borders around them, is left out.

    Args:
        folder: with tokenizer.json and preprocessor_config.json or processor_config.json, if there are such.
        content: of its configuration file.
        library: whose files they are.

    Raises:
        TrunklineError: if a file is damaged.
    """
    tokenizer = folder / TOKENIZER_FILE
    words = tokenizer if tokenizer.is_file() else None
    if library == "open_clip":
        settings = content.get("preprocess_cfg") or {}
        return Companions(words, transform=guarded(open_clip_transform, settings, folder))
    if library == "timm":
        settings = content.get("pretrained_cfg") or {}
        names = content.get("label_names") or settings.get("label_names")
        transform = guarded(timm_transform, settings, folder)
        return Companions(words, transform=transform, class_names=None if names is None else list(names))
    names = class_names(content.get("id2label") or {}, folder)
    found = Companions(words, class_names=names, start_token=start_token(words, content))
    file = next((folder / name for name in (PREPROCESSOR_FILE, PROCESSOR_FILE) if (folder / name).is_file()), None)
    if file is None:
        return found
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if file.name == PROCESSOR_FILE:
            settings = settings.get("image_processor") or settings.get("feature_extractor")
        found.transform = guarded(partial(processor_transform, model_type=content.get("model_type")), settings, file)
        found.sounds = guarded(sounds_of_extractor, settings, file)
        return found
    except (OSError, ValueError, AttributeError) as error:
        raise TrunklineError(f"{file} does not say how inputs are prepared: {error}; copy it again") from error


def with_padding_of_tokenizer(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration of a SigLIP, which sees padding, with the padding token of the tokenizer beside it.

    Nothing of transformers reads `pad_token_id` of a SigLIP: files leave it out, or have the usual value, which is
    wrong for a SigLIP 2. Other configurations, and those without a tokenizer that knows its padding, stay as they are.
    """
    file = folder / TOKENIZER_CONFIG_FILE
    if content.get("model_type") != "siglip" or not file.is_file():
        return content
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        token = settings.get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        known = {added["content"]: int(number) for number, added in settings.get("added_tokens_decoder", {}).items()}
        if token not in known and (folder / TOKENIZER_FILE).is_file():
            known |= vocabulary((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
        number = known.get(token)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrunklineError(f"{file} does not say which token fills texts up: {error!r}; copy it again") from error
    if number is None:
        return content
    return content | {"text_config": (content.get("text_config") or {}) | {"pad_token_id": number}}


def class_names(labels: Any, folder: Path) -> list[str] | None:
    """Names of `id2label` in the order of their numbers; None if they only count.

    Raises:
        TrunklineError: if it does not give each number a name.
    """
    try:
        named = {int(number): str(name) for number, name in labels.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise TrunklineError(
            f'{folder} has an id2label that does not map numbers to names, as {{"0": "cat"}} does: {error}; mend its '
            "config.json"
        ) from error
    return None if all(name == f"LABEL_{n}" for n, name in named.items()) else [named[n] for n in sorted(named)]


def start_token(tokenizer: Path | None, content: Mapping[str, Any]) -> str | None:
    """The token with which a decoder begins every text; None if the tokenizer does not know it or cannot be read."""
    number = content.get("decoder_start_token_id")
    if tokenizer is None or number is None:
        return None
    try:
        known = vocabulary(tokenizer.read_text(encoding="utf-8"))
        return next((token for token, place in known.items() if place == number), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # whoever asks for the tokenizer is told
        return None


def guarded(read: Any, settings: Any, place: Path) -> Any:
    """What `read` makes of settings; None for none.

    Raises:
        TrunklineError: for settings that are not of the kind that the library writes.
    """
    try:
        return read(settings) if settings else None
    except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise TrunklineError(f"{place} does not say how inputs are prepared: {error!r}; copy it again") from error


def open_clip_transform(settings: Mapping[str, Any]) -> ImageTransform | None:
    """Of `preprocess_cfg`; None if the picture gets borders."""
    squash = RESIZE_MODES.get(settings.get("resize_mode", "shortest"))
    size = two_sides(settings["size"])
    if squash is None or (size[0] != size[1] and not squash):
        return None
    return ImageTransform(
        size, 3, settings["mean"], settings["std"], settings.get("interpolation", "bicubic"), size, squash
    )


def timm_transform(settings: Mapping[str, Any]) -> ImageTransform | None:
    """Of `pretrained_cfg`; None if it does not say all, or the picture gets borders."""
    mode = settings.get("crop_mode") or "center"
    if mode not in ("center", "squash") or "mean" not in settings or "input_size" not in settings:
        return None
    channels, *size = settings["input_size"]
    mean, std = settings["mean"], settings["std"]
    resize = tuple(math.floor(side / settings.get("crop_pct", 0.875)) for side in size)
    interpolation = settings.get("interpolation", "bilinear")
    return ImageTransform(two_sides(size), channels, mean, std, interpolation, two_sides(resize), mode == "squash")


def companions_to_theirs(
    content: dict[str, Any], companions: Companions, library: Library, name: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """What goes with a network, as another library has it.

    Args:
        content: of the configuration file of the network.
        companions: what goes with it.
        library: the library.
        name: of the folder, or of the repository that it becomes, where open_clip looks for the tokenizer.

    Returns:
        the content with what belongs into that file, and the other files: name -> content. What the library has not,
        such as grey pictures in transformers, is left out.
    """
    names, transform = companions.class_names, companions.transform
    if library == "timm":
        settings = {**content.get("pretrained_cfg", {}), **timm_settings(transform)}
        labels = {"label_names": names} if names and len(names) == content.get("num_classes") else {}
        return content | {"pretrained_cfg": settings | labels}, {}
    files = {}
    if companions.tokenizer_json is not None and companions.target_tokenizer_json is None:
        words = tokenizer_text(companions.tokenizer_json)
        special = special_tokens(words, text_part(content))
        files = {TOKENIZER_FILE: with_frame(words, content), TOKENIZER_CONFIG_FILE: tokenizer_config(special, content)}
        if library == "transformers":
            ids = token_ids(special, words, content, companions.start_token)
            content = content | ids
            if isinstance(content.get("text_config"), dict):  # a CLIP is read at the token that ends a text
                content["text_config"] = content["text_config"] | ids
    if library == "open_clip":
        if files:  # without a name for it, open_clip takes its own tokenizer
            model = content["model_cfg"]
            content = content | {"model_cfg": {**model, "text_cfg": {**model["text_cfg"], "hf_tokenizer_name": name}}}
        return content | open_clip_settings(transform), files
    if names and len(names) == len(content.get("id2label") or {}):
        numbered = {str(number): name for number, name in enumerate(names)}
        content = content | {"id2label": numbered, "label2id": {name: int(n) for n, name in numbered.items()}}
    processor = processor_settings(transform) or extractor_settings(companions.sounds, content.get("model_type"))
    return content, files | ({PREPROCESSOR_FILE: json.dumps(processor, indent=2) + "\n"} if processor else {})


def timm_settings(transform: ImageTransform | None) -> dict[str, Any]:
    """Fields of `pretrained_cfg`."""
    if transform is None:
        return {}
    shares = [side / resized for side, resized in zip(transform.image_size, transform.resize, strict=True)]
    return {
        "input_size": [transform.channels, *transform.image_size],
        "mean": list(transform.mean),
        "std": list(transform.std),
        "interpolation": transform.interpolation,
        "crop_pct": shares[0],
        "crop_mode": "squash" if transform.squash else "center",
    }


def open_clip_settings(transform: ImageTransform | None) -> dict[str, Any]:
    """`preprocess_cfg`, if open_clip prepares pictures so."""
    if transform is None or transform.channels != 3 or transform.resize != transform.image_size:
        return {}
    return {
        "preprocess_cfg": {
            "size": list(transform.image_size),
            "mean": list(transform.mean),
            "std": list(transform.std),
            "interpolation": transform.interpolation,
            "resize_mode": "squash" if transform.squash else "shortest",
        }
    }


def vocabulary(tokenizer: str) -> Mapping[str, int]:
    """Added tokens of a tokenizer.json, which include the special ones, and their ids."""
    return {token["content"]: token["id"] for token in json.loads(tokenizer).get("added_tokens") or []}


def text_part(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration file that is about texts; all of it, if it is about nothing else."""
    return content.get("text_config") or content.get("model_cfg", {}).get("text_cfg") or content


def special_tokens(tokenizer: str, text: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Name in transformers -> special token of a tokenizer.json, of those that it has.

    Args:
        tokenizer: content of the file.
        text: the part of a configuration file that is about texts; a SigLIP, which sees padding, states its token.
    """
    known = vocabulary(tokenizer)
    found = {name: first_of(names, known) for name, names in SPECIAL_TOKENS.items()}
    padding = (text or {}).get("pad_token_id", (text or {}).get("pad_id"))
    found["pad_token"] = next((token for token, place in known.items() if place == padding), found["pad_token"])
    return {name: token for name, token in found.items() if token is not None}


def first_of(names: Sequence[str], known: Mapping[str, int]) -> str | None:
    """The first of the names that is known."""
    return next((name for name in names if name in known), None)


def tokenizer_config(special: Mapping[str, str], content: Mapping[str, Any]) -> str:
    """Content of tokenizer_config.json."""
    lengths = ("max_position_embeddings", "n_positions", "context_length")
    text = text_part(content)
    length = next((text[name] for name in lengths if text.get(name)), None)
    limit = {} if length is None else {"model_max_length": length}
    segments = ["token_type_ids"] if content.get("model_type") == "bert" else []
    inputs = {"model_input_names": ["input_ids", *segments, "attention_mask"]}
    return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special, **limit, **inputs}, indent=2) + "\n"


def end_of_text(companions: Companions | None) -> int | None:
    """Id of the token with which the tokenizer ends a text; None if that is not known."""
    if companions is None or companions.tokenizer_json is None:
        return None
    words = tokenizer_text(companions.tokenizer_json)
    return vocabulary(words).get(special_tokens(words).get("eos_token", ""))


def token_ids(
    special: Mapping[str, str], tokenizer: str, content: Mapping[str, Any], start: str | None = None
) -> dict[str, Any]:
    """Ids of the tokens that generation needs, for config.json; `start` is the token with which a decoder begins."""
    known, kind = vocabulary(tokenizer), content.get("model_type")
    if kind == "roberta":  # its positions begin after the number of the padding
        return {}
    kinds = ("pad",) if kind in ("bert", "distilbert") else ("bos", "eos", "pad")
    ids = {f"{kind}_token_id": known[special[f"{kind}_token"]] for kind in kinds if f"{kind}_token" in special}
    return ids | ({"decoder_start_token_id": known[start]} if start is not None and start in known else {})


def with_frame(tokenizer: str, content: Mapping[str, Any]) -> str:
    """A tokenizer.json that puts the special tokens around a text as training did, if it does not do so by itself.

    Training does that in its data, but transformers in the tokenizer: for a BERT, `[CLS] text [SEP]` or `[CLS] text
    [SEP] text [SEP]`; for a CLIP the same, or `<|startoftext|> text <|endoftext|>`, or only the last of them.
    """
    words, known = json.loads(tokenizer), vocabulary(tokenizer)
    is_clip = "text_config" in content or "model_cfg" in content
    if words.get("post_processor") or not (is_clip or content.get("model_type") in ("bert", "distilbert")):
        return tokenizer
    frames: tuple[tuple[str | None, str], ...] = (("[CLS]", "[SEP]"), ("<|startoftext|>", "<|endoftext|>"))
    frames = (*frames, (None, "<|endoftext|>")) if is_clip else frames[:1]
    frame = next((f for f in frames if all(token is None or token in known for token in f)), None)
    if frame is None:
        return tokenizer

    def special(token: str, number: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": number}}

    def text(letter: str, number: int) -> dict[str, Any]:
        return {"Sequence": {"id": letter, "type_id": number}}

    begin, end = frame
    first = [*([special(begin, 0)] if begin else []), text("A", 0), special(end, 0)]
    words["post_processor"] = {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, text("B", 1), special(end, 1)],
        "special_tokens": {t: {"id": t, "ids": [known[t]], "tokens": [t]} for t in frame if t is not None},
    }
    return json.dumps(words, ensure_ascii=False, indent=2)
