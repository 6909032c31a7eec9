"""`trunkline embed`: sentence embeddings to a table and to TensorBoard's projector."""

from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import torch.nn.functional as F
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from trunkline import TrunklineError
from trunkline.datamodules.masking import special_ids
from trunkline.datamodules.text_files import read_column, reader_of
from trunkline.modules.networks import BERT, GPT, TextHead, TextHeadConfig
from trunkline.pipelines.text_checkpoint import find_device, load_language_model


def embed(
    checkpoint: str,
    texts: str,
    output: str,
    text_column: str = "text",
    pool: Literal["mean", "cls", "last"] = "mean",
    normalise: bool = True,
    batch_size: int = 64,
    projector: str | None = None,
    device: str = "auto",
    tokenizer: str | None = None,
) -> None:
    """Embed texts with the trunk of a language model.

    The table has the columns `text`, `embedding`, `nearest` (the most similar other text), `similarity` (its cosine).

    Args:
        checkpoint: of a `trunkline fit` of a masked or causal language model.
        texts: a .txt file with one text a line, or a .jsonl, .csv or .parquet file.
        output: a .parquet file.
        text_column: of a table.
        pool: the mean over all tokens, the first one (`cls`, of a BERT), or the last one (of a GPT).
        normalise: scale embeddings to length 1, so that their product is the cosine of their angle.
        batch_size: texts at a time.
        projector: a folder for TensorBoard's projector.
        device: auto, cpu, cuda, cuda:1, mps, …
        tokenizer: a tokenizer.json in place of the checkpoint's own.

    Raises:
        TrunklineError: for a missing file, a text that is too long, or a checkpoint of something else.
    """
    if Path(output).suffix.lower() != ".parquet" or not Path(output).absolute().parent.is_dir():
        raise TrunklineError(f"--output {output} must be a .parquet file in a folder that exists")
    place = find_device(device)
    body, words = load_language_model(checkpoint, ("MaskedLM", "CausalLM"), tokenizer)
    kind = "bert" if isinstance(body, BERT) else "gpt"
    network = TextHead(TextHeadConfig(**{kind: body.config}, pool=pool))
    network.body.load_state_dict(body.state_dict(), strict=False)  # all but the heads, which are not there
    rows = read_texts(Path(texts), text_column)
    ids = [encoded(text, number, body, words) for number, text in enumerate(rows, start=1)]
    vectors = embeddings(network.to(place).eval(), ids, batch_size)
    unit = F.normalize(vectors, dim=1)
    table = pd.DataFrame({"text": rows, "embedding": list((unit if normalise else vectors).numpy())})
    if len(rows) > 1:
        table["nearest"], table["similarity"] = nearest(unit)
        table["nearest"] = [rows[n] for n in table["nearest"]]
    table.to_parquet(output, index=False)
    if projector is not None:
        with SummaryWriter(projector) as writer:
            writer.add_embedding(unit, metadata=[" ".join(text.split()) for text in rows], tag="texts")
    print(f"wrote {len(rows)} embeddings of {vectors.shape[1]} numbers to {output}")


def read_texts(file: Path, column: str) -> list[str]:
    """The texts of a table's column, or the lines of a text file that are not empty.

    Raises:
        TrunklineError: if there are none, naming the file or row.
    """
    try:
        rows = list(read_column([file], column)) if reader_of(file) else file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrunklineError(f"cannot read --texts {file}: {error}; give a text file or a table") from error
    rows = [row for row in rows if row.strip()]
    if not rows:
        raise TrunklineError(f"--texts {file} holds no text; give one text a line, or a row")
    return rows


def encoded(text: str, number: int, body: BERT | GPT, words: Tokenizer) -> list[int]:
    """Ids of a text, as its kind of network was trained to see it.

    Raises:
        TrunklineError: if it is longer than the network's positions.
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
    """(texts, D) float32 on the CPU; texts of like length go together."""
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    device = next(network.parameters()).device
    vectors = torch.empty(len(ids), network.config.body.backbone.dim)
    for start in track(range(0, len(order), batch_size), description="embedding", transient=True):
        chosen = order[start : start + batch_size]
        length = max(len(ids[n]) for n in chosen)
        tokens = torch.tensor([ids[n] + [0] * (length - len(ids[n])) for n in chosen], device=device)
        mask = torch.tensor([[True] * len(ids[n]) + [False] * (length - len(ids[n])) for n in chosen], device=device)
        vectors[chosen] = network.states(tokens, None, mask).float().cpu()
    return vectors


def nearest(unit: Tensor) -> tuple[list[int], list[float]]:
    """Of each of (N, D) rows of length 1: the most similar other row, and the cosine of their angle."""
    found, cosines = [], []
    for start in range(0, len(unit), 1024):
        similarity = unit[start : start + 1024] @ unit.T
        similarity[torch.arange(len(similarity)), torch.arange(start, start + len(similarity))] = -2.0  # itself
        best = similarity.max(dim=1)
        found += best.indices.tolist()
        cosines += best.values.tolist()
    return found, cosines
