"""Time and memory that loading weights takes, against the library that wrote them; each load in a fresh process."""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

PEERS = {
    "GPT-2 124M": ("GPT", "transformers", "GPT2LMHeadModel GPT2Config"),
    "BERT-base": ("BERT", "transformers", "BertForPreTraining BertConfig"),
    "ViT-B/16": ("ViT", "transformers", "ViTForImageClassification ViTConfig"),
    "ViT-B/16 of timm": ("ViT", "timm", "vit_base_patch16_224"),
    "CLIP ViT-B/32": ("CLIP", "transformers", "CLIPModel CLIPConfig"),
}
"""Model -> our class, the other library, and its model: classes of model and configuration, or a name in timm."""

WRITE = """
import sys
library, model, folder = sys.argv[1:]
if library == "timm":
    import timm
    from timm.models import save_for_hf
    save_for_hf(timm.create_model(model), folder, safe_serialization=True)
else:
    import transformers
    kind, config = (getattr(transformers, name) for name in model.split())
    kind(config(num_labels=1000)).save_pretrained(folder)
"""

LOAD = """
import json, re, sys, time
from pathlib import Path
side, kind, library, model, folder = sys.argv[1:]
import torch
if side == "ours":
    from trunkline.modules import networks
    import trunkline.modules.networks.pretrained
    load = lambda: getattr(networks, kind).from_pretrained(folder)
elif library == "timm":
    import timm
    load = lambda: timm.create_model(f"local-dir:{folder}", pretrained=True)
else:
    import transformers
    peer = getattr(transformers, model.split()[0])
    load = lambda: peer.from_pretrained(folder)
torch.set_num_threads(1)

def resident(field):
    return 1024 * int(re.search(rf"^{field}:\\s*(\\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[1])

Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before, start = resident("VmRSS"), time.perf_counter()
network = load()
float(sum(p.detach().sum() for p in network.parameters()))  # a file that is only mapped into memory is not yet read
seconds = time.perf_counter() - start
peak = resident("VmHWM") - before
size = sum(p.numel() * p.element_size() for p in {id(p): p for p in network.parameters()}.values())
print(json.dumps([seconds, peak / size]))
"""


class Load(NamedTuple):
    """One load."""

    seconds: float
    """Until all weights have been read, without importing the library."""
    memory: float
    """Peak of the memory that it took, mapped files included, in times the bytes of the weights."""


def run_python(code: str, *arguments: str) -> str:
    """What a program prints, in a process of its own.

    Raises:
        RuntimeError: if it fails.
    """
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a load failed: {done.stderr}")
    return done.stdout


def loading_times(rounds: int, models: tuple[str, ...] = tuple(PEERS)) -> list[dict[str, Any]]:
    """Medians for each of `PEERS`, whose weights are random and in the layout of published files; needs Linux."""
    rows = []
    for name in models:
        kind, library, model = PEERS[name]
        with tempfile.TemporaryDirectory() as folder:
            run_python(WRITE, library, model, folder)
            loads: dict[str, list[Load]] = {"ours": [], "theirs": []}
            for turn in range(rounds):
                for side in sorted(loads, reverse=turn % 2 == 1):
                    printed = run_python(LOAD, side, kind, library, model, folder)
                    loads[side].append(Load(*json.loads(printed.splitlines()[-1])))
            size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        ratios = sorted(a.seconds / b.seconds for a, b in zip(loads["ours"], loads["theirs"], strict=True))
        ours, theirs = (Load(*map(statistics.median, zip(*loads[side], strict=True))) for side in ("ours", "theirs"))
        rows.append(
            {
                "model": name,
                "library": library,
                "megabytes": size / 1e6,
                "seconds": ours.seconds,
                "peer_seconds": theirs.seconds,
                "ratio": statistics.median(ratios),
                "range": (ratios[0], ratios[-1]),
                "memory": ours.memory,
                "peer_memory": theirs.memory,
            }
        )
    return rows


def show_loads(rows: list[dict[str, Any]]) -> None:
    """Print what `loading_times` returns."""
    for row in rows:
        low, high = row["range"]
        print(
            f"{row['model']}, {row['megabytes']:.0f} MB: {row['seconds']:.2f} s, {row['ratio']:.2f} times "
            f"{row['library']}'s own ({low:.2f} to {high:.2f}); peak memory {row['memory']:.2f} times the weights, "
            f"{row['library']}'s {row['peer_memory']:.2f}"
        )
