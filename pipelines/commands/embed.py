"""`trunkline embed`: write embeddings of texts, images and sounds to a table and to TensorBoard's projector."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from trunkline import TrunklineError
from trunkline.datamodules.images.image_decoding import to_channels
from trunkline.datamodules.images.preprocessing import Preprocessing
from trunkline.datamodules.pairs.captions import CaptionEncoder
from trunkline.datamodules.tables import STANDARD, read_column, read_lines, reader_of
from trunkline.datamodules.text.masking import special_ids
from trunkline.files import atomic_write
from trunkline.modules.callbacks.retrieval import sprites
from trunkline.modules.networks import BERT, CLIP, GPT, TextHead, TextHeadConfig, ViT
from trunkline.modules.networks.clip import unit
from trunkline.names import check_regular
from trunkline.pipelines.commands.embed_audio import LISTENERS, embed_audio
from trunkline.pipelines.commands.output import check_output
from trunkline.pipelines.devices import find_device
from trunkline.pipelines.embedding import (
    Pictures,
    clip_network,
    embed_images,
    embed_texts,
    image_network,
    open_pictures,
    pooled,
    progress_bar,
)
from trunkline.pipelines.trained import Trained, language_model_of
from trunkline.pipelines.translating import check_batch

PROJECTED = 10_000
"""Largest number of images in the projector: browsers cannot show more."""


def embed(
    checkpoint: str,
    texts: str | None = None,
    output: str = "embeddings.parquet",
    images: str | None = None,
    audio: str | None = None,
    text_column: str = "text",
    pool: Literal["mean", "cls", "last"] = "mean",
    normalise: bool = True,
    batch_size: int = 64,
    num_workers: int = 0,
    skip_corrupt: bool = False,
    projector: str | None = None,
    device: str = "auto",
    tokenizer: str | None = None,
) -> None:
    """Embed texts with a language model, texts and images with a CLIP, images with a ViT, or sounds with a network
    that hears.

    The table has the columns `text`, `embedding`, `nearest` (the most similar other text), `similarity` (its cosine);
    with images also `path`, and with sounds `path` and `embedding` alone.

    Args:
        checkpoint: a checkpoint of a masked or causal language model, of a CLIP, of a classifier of images, or of a
            network that hears, from `trunkline fit`.
        texts: a .txt file with one text per line, or a .jsonl, .csv or .parquet file; - is the standard input.
        output: a .parquet file.
        images: a folder or a file, `twemoji` or `openmoji`; needs a CLIP or a ViT, whose pooled features are written.
        audio: a folder with audio files, or a file; needs a network that hears. An embedding is what the head of a
            classifier reads, or the mean of the encoder's states; of a long recording, the mean of its windows.
        text_column: column of the texts in a table.
        pool: for a language model: the mean over all tokens, the first token (`cls`, for a BERT), or the last token.
        normalise: scale embeddings to length 1, so that products are cosines. A CLIP always does.
        batch_size: number of texts, images or windows at a time.
        num_workers: number of processes that read images and sounds.
        skip_corrupt: leave out images and sounds that cannot be read, instead of stopping.
        projector: a folder for TensorBoard's projector, which shows at most the first 10,000 images or sounds.
        device: auto, cpu, cuda, cuda:1, mps, …
        tokenizer: for a language model: a tokenizer.json to use instead of the checkpoint's own tokenizer.

    Raises:
        TrunklineError: for a missing file, a text that is too long, or a checkpoint that cannot be used.
    """
    check_output(output, (".parquet",))
    check_batch(batch_size, num_workers)
    if texts is None and images is None and audio is None:
        raise TrunklineError("there is nothing to embed; give --texts, --images or both, or --audio")
    place, trained = find_device(device), Trained.read(checkpoint, "embed")
    hears, shown = issubclass(trained.network_class, LISTENERS), 0 if projector is None else PROJECTED
    if hears != (audio is not None) or (hears and (texts is not None or images is not None)):
        kind = "hears, and embeds only sounds; give --audio alone" if hears else "does not hear; leave --audio out"
        raise TrunklineError(f"the network of {checkpoint} {kind}")
    if hears:
        if tokenizer is not None or pool != "mean":
            raise TrunklineError("--pool and --tokenizer are for language models; leave them out")
        assert audio is not None
        found = [Embedded("sounds", *embed_audio(trained, audio, batch_size, num_workers, skip_corrupt, shown, place))]
    elif issubclass(trained.network_class, CLIP):
        if tokenizer is not None or not normalise or pool != "mean":
            raise TrunklineError(
                f"--pool, --normalise and --tokenizer are for language models, but {checkpoint} is of a CLIP, which "
                "embeds as in training; leave them out"
            )
        clip = clip_network(trained, place)
        rows = [] if texts is None else read_texts(Path(texts), text_column)
        found = embed_clip(clip, batch_size, place, num_workers, rows, images, skip_corrupt, shown)
    elif issubclass(trained.network_class, ViT):
        if images is None or texts is not None or tokenizer is not None or pool != "mean":
            raise TrunklineError(f"the network of {checkpoint} sees, and embeds only images; give --images alone")
        found_network = image_network(trained, place)
        seen = found_network.preprocessing, pooled(found_network.trunk)
        found = [embed_pictures(*seen, images, batch_size, place, num_workers, skip_corrupt, shown)]
    elif texts is None or images is not None:
        raise TrunklineError(
            f"{checkpoint} is of a language model, which embeds only texts; give --texts, or a checkpoint of a CLIP"
        )
    else:
        body, words = language_model_of(trained, tokenizer)
        rows = read_texts(Path(texts), text_column)
        found = [Embedded("texts", rows, read_states(body, words, rows, pool, batch_size, place))]
    write_embeddings(found, normalise, output, projector)


def write_embeddings(found: list["Embedded"], normalise: bool, output: str, projector: str | None) -> None:
    """Write the table, and the data of the projector."""
    tables = [part.table(normalise) for part in found]
    atomic_write(Path(output), [pd.concat(tables, ignore_index=True).to_parquet(index=False)], field="output")
    if projector is not None:
        with SummaryWriter(projector) as writer:
            for part in found:
                part.project(writer)
    count, numbers = sum(len(part.names) for part in found), found[0].vectors.shape[1]
    print(f"wrote {count} embeddings of {numbers} numbers to {output}")


class Embedded(NamedTuple):
    """Embeddings of texts, images or sounds."""

    what: Literal["texts", "images", "sounds"]
    names: list[str]
    """Texts or paths."""
    vectors: Tensor
    """(N, D) embeddings."""
    pictures: Sequence[Image.Image] = ()
    """Thumbnails of the first images or sounds, for the projector."""

    def table(self, normalise: bool) -> pd.DataFrame:
        """A table with one row per embedding."""
        scaled = unit(self.vectors)
        vectors = list((scaled if normalise else self.vectors).numpy())
        table = pd.DataFrame({"text" if self.what == "texts" else "path": self.names, "embedding": vectors})
        if self.what == "texts" and len(scaled) > 1:
            table["nearest"], table["similarity"] = most_similar(scaled)
            table["nearest"] = [self.names[n] for n in table["nearest"]]
        return table

    def project(self, writer: SummaryWriter) -> None:
        """Write the data of TensorBoard's projector."""
        count = len(self.pictures) or len(self.names)
        names = [" ".join(name.split()) for name in self.names[:count]]
        shown: dict[str, Any] = {"label_img": sprites(list(self.pictures))} if self.pictures else {}
        writer.add_embedding(unit(self.vectors[:count]), metadata=names, tag=self.what, **shown)


def embed_clip(
    clip: tuple[CLIP, Preprocessing, CaptionEncoder],
    batch_size: int,
    device: torch.device,
    num_workers: int,
    texts: list[str],
    images: str | None,
    skip_corrupt: bool,
    thumbnails: int,
) -> list[Embedded]:
    """Embed texts, images or both with a CLIP.

    Args:
        clip: the network, and how its images and texts are prepared.
        batch_size: number of texts or images at a time.
        device: device of the network.
        num_workers: number of processes that read images.
        texts: the texts; may be empty.
        images: as for `open_pictures`; None without images.
        skip_corrupt: as for `Pictures`.
        thumbnails: largest number of thumbnails that are kept.
    """
    (network, preprocessing, encoder), found = clip, []
    if texts:
        found.append(Embedded("texts", texts, embed_texts(network, encoder, texts, batch_size, device)))
    if images is not None:
        seen = preprocessing, network.encode_image
        found.append(embed_pictures(*seen, images, batch_size, device, num_workers, skip_corrupt, thumbnails))
    return found


def embed_pictures(
    preprocessing: Preprocessing,
    encode: Callable[[Tensor], Tensor],
    images: str,
    batch_size: int,
    device: torch.device,
    num_workers: int,
    skip_corrupt: bool,
    thumbnails: int,
) -> Embedded:
    """Embed pictures by `encode`, (B, C, height, width) -> (B, E); the other arguments as for `embed_clip`."""
    rows, length = open_pictures(images)
    pictures = Pictures(rows, length, preprocessing, skip_corrupt)
    vectors, kept = embed_images(encode, pictures, batch_size, device, num_workers)
    shown = [thumbnail(rows.image(row)) for row in kept[:thumbnails]]
    return Embedded("images", [rows.name(row) for row in kept], vectors, shown)


def thumbnail(picture: Image.Image) -> Image.Image:
    """The whole picture on a small white square."""
    return ImageOps.pad(to_channels(picture, 3), (32, 32), color="white")


def read_states(
    body: BERT | GPT, words: Tokenizer, rows: list[str], pool: Any, batch_size: int, device: torch.device
) -> Tensor:
    """Pooled states (texts, D) of a language model.

    Raises:
        TrunklineError: if a text is empty or too long.
    """
    kind = "bert" if isinstance(body, BERT) else "gpt"
    network = TextHead(TextHeadConfig(**{kind: body.config}, pool=pool))
    network.body.load_state_dict(body.state_dict(), strict=False)  # without the heads
    ids = [encoded(text, number, body, words) for number, text in enumerate(rows, start=1)]
    return embeddings(network.to(device).eval(), ids, batch_size)


def read_texts(file: Path, column: str) -> list[str]:
    """The texts in a table's column, or the lines of a text file; empty ones are left out.

    Raises:
        TrunklineError: if the file cannot be read or holds no text.
    """
    if str(file) == STANDARD:
        rows = [cells[column] for _, cells in read_lines(file, column)]
        return some_texts([row for row in rows if row.strip()], file)
    check_regular(file, "texts")
    try:
        rows = list(read_column([file], column)) if reader_of(file) else file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrunklineError(f"cannot read --texts {file}: {error}; give a text file or a table") from error
    return some_texts([row for row in rows if row.strip()], file)


def some_texts(rows: list[str], file: Path) -> list[str]:
    """The texts; an error if there are none."""
    if not rows:
        raise TrunklineError(f"--texts {file} holds no text; give one text per line or row")
    return rows


def encoded(text: str, number: int, body: BERT | GPT, words: Tokenizer) -> list[int]:
    """Token ids of a text, for a BERT with its special tokens around them.

    Raises:
        TrunklineError: if there are no tokens, or more than the network can see.
    """
    ids = words.encode(text, add_special_tokens=False).ids
    if isinstance(body, BERT):
        special = special_ids(words)
        ids = [special["cls"], *ids, special["sep"]]
    limit = body.config.max_length
    if not 0 < len(ids) <= limit:
        raise TrunklineError(
            f"--texts: text {number} ({text[:30]!r}…) has {len(ids)} tokens, but the network sees from 1 to {limit}; "
            "cut or remove it"
        )
    return ids


@torch.inference_mode()
def embeddings(network: TextHead, ids: list[list[int]], batch_size: int) -> Tensor:
    """Embeddings (texts, D) in float32 on the CPU; texts of similar length share a batch."""
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    device = next(network.parameters()).device
    vectors = torch.empty(len(ids), network.config.body.backbone.dim)
    for start in progress_bar(range(0, len(order), batch_size), "embedding"):
        chosen = order[start : start + batch_size]
        length = max(len(ids[n]) for n in chosen)
        tokens = torch.tensor([ids[n] + [0] * (length - len(ids[n])) for n in chosen], device=device)
        mask = torch.tensor([[True] * len(ids[n]) + [False] * (length - len(ids[n])) for n in chosen], device=device)
        vectors[chosen] = network.states(tokens, None, mask).float().cpu()
    return vectors


def most_similar(vectors: Tensor) -> tuple[list[int], list[float]]:
    """For each row of (N, D) vectors of length 1, the most similar other row and its cosine."""
    found, cosines = [], []
    for start in range(0, len(vectors), 1024):
        similarity = vectors[start : start + 1024] @ vectors.T
        similarity[torch.arange(len(similarity)), torch.arange(start, start + len(similarity))] = -2.0  # itself
        best = similarity.max(dim=1)
        found += best.indices.tolist()
        cosines += best.values.tolist()
    return found, cosines
