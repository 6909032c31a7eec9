"""Memory and time that a process needs to begin an epoch of a very large data set, whose files are made up.

    python tests/support/data_memory.py shards FOLDER 10
    python tests/support/data_memory.py images FOLDER 1.28

FOLDER is for the index. The second run in the same FOLDER is what each process but the first one does.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trunkline.datamodules import folders
from trunkline.datamodules.folders import Visited, folder_state, listed_files
from trunkline.datamodules.images.image_sources import IMAGE_SUFFIXES
from trunkline.datamodules.pairs import tar_index
from trunkline.datamodules.pairs.image_text_data import set_aside
from trunkline.datamodules.pairs.tar_shards import TarPairs
from trunkline.datamodules.samplers import ResumableBatchSampler

SHARD, BATCH = 10_000, 4096


class Meter:
    """Prints how memory grew since the beginning: what is the process's own, its peak, and mapped files."""

    def __init__(self) -> None:
        self.before, self.since = self.read(), time.monotonic()

    def read(self) -> dict[str, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        return {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines if " kB" in line)}

    def tell(self, what: str) -> None:
        now, seconds = self.read(), time.monotonic() - self.since
        grown = {name: (now[name] - self.before[name]) / 1024 for name in ("RssAnon", "RssFile", "VmHWM")}
        own, mapped, peak = grown.values()
        print(f"{what:40} {seconds:6.1f} s; own {own:8.1f} MiB, mapped {mapped:6.1f}, peak of both {peak:8.1f}")
        self.since = time.monotonic()


def measure_shards(folder: Path, samples: int) -> None:
    """Tar shards of pairs, from opening the index to the first and the last batch of an epoch."""
    number = np.arange(SHARD)
    content = np.zeros(SHARD, tar_index.SAMPLE)
    content["image"], content["image_size"] = number * 32_768 + 512, 30_000
    content["text"], content["text_size"] = number * 32_768 + 31_744, 60
    tar_index.scan = lambda shard: (content.copy(), "")
    shards = [folder / f"{n:06}.tar" for n in range(samples // SHARD)]
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        if not shard.exists():
            shard.touch()
    meter = Meter()
    rows = TarPairs(shards, "caption", folder / "cache", 16, False)
    meter.tell(f"{len(rows):,} samples opened")
    train = set_aside({"train": rows}, {"val": 0.1})["train"]
    meter.tell("a tenth set aside")
    for start in (0, len(train) // BATCH - 1):
        sampler = ResumableBatchSampler(
            len(train), BATCH, shuffle=True, drop_last=True, world_size=8, order=train.order
        )
        sampler.start = start
        next(iter(sampler))
        meter.tell(f"batch {start:,} of an epoch")


def measure_images(folder: Path, files: int) -> None:
    """An image folder with the names of ImageNet, as a list of paths and as our list."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    time.sleep(2.1)  # the list of a folder that changed just now is not kept

    def walk(root: Path, visited: Visited) -> Iterator[str]:
        visited.folders.append(["", *folder_state(root)])
        for n in range(files):
            yield f"n{n // 1300:08}/n{n // 1300:08}_{n % 1300 * 37}.JPEG"

    folders.walk = walk
    meter = Meter()
    names = listed_files(folder / "images", IMAGE_SUFFIXES, folder / "cache")
    meter.tell(f"our list of {len(names):,} files")
    total = sum(len(names.name(n)) for n in range(len(names)))
    meter.tell(f"{total / 2**20:.1f} MiB of names read")
    paths = sorted(folder / "images" / name for name in walk(folder, Visited()))
    meter.tell("a list of paths")
    assert paths[-1] == names[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["shards", "images"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("millions", type=float, help="of samples or files")
    arguments = parser.parse_args()
    {"shards": measure_shards, "images": measure_images}[arguments.what](
        arguments.folder, round(arguments.millions * 1e6)
    )
