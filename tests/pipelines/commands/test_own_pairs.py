"""The pages' commands for translations and summaries of one's own, with files as they name them."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from trunkline.pipelines.commands.prepare import run_prepare

ROOT = Path(__file__).parents[3]
PAGES = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/translation.md"))
COMMANDS = re.findall(r"^trunkline fit (--config seq2seq/\S+ --data\.source .+)$", PAGES, re.M)
ROWS = [(f"a red house {n}", f"ein rotes Haus {n}") for n in range(100)]
UNIT = '<tu><tuv xml:lang="en-GB"><seg>{}</seg></tuv><tuv xml:lang="de"><seg>{}</seg></tuv></tu>'
UNITS = "".join(UNIT.format(*row) for row in ROWS)


@pytest.mark.parametrize("command", COMMANDS)
def test_own_files(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trunkline"])
    for side, name in enumerate(("train.en", "train.de")):
        Path(name).write_text("".join(f"{row[side]}\n" for row in ROWS))
    Path("articles.jsonl").write_text("".join(json.dumps({"article": a, "summary": b}) + "\n" for a, b in ROWS))
    Path("memory.tmx").write_text(f'<tmx version="1.4"><header/><body>{UNITS}</body></tmx>')
    learnt = ["--data.tokenizer", "bpe", "--data.vocab_size", "300", "--data.start_token", "null"]  # none of the hub's
    run_prepare(["prepare", *shlex.split(command), *learnt, "--data.cache_dir", "cache"])
    pairs = 2 if "de-en" in command else 1
    printed = capsys.readouterr().out
    counts = [int(count) for count in re.findall(r"([\d,]+) pairs", printed)]
    assert sum(counts) == pairs * len(ROWS)


def test_the_pages_have_such_commands() -> None:
    assert len(COMMANDS) == 3
