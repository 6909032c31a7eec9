"""A run of torchrun on two hosts goes on by itself after the loss of a process or of a host, bit for bit.

Run by `make test-cluster`. The hosts are network namespaces of this machine, with the settings of docs/cluster.md.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_runs import EVERY, assert_equals, environment, first_steps, uninterrupted, write_extra
from local_slurm import wait_for
from recorded_run import GONE_WITHIN, go_on, halt_at, halted_file, members
from two_hosts import Host, missing, two_hosts

HALT = 10
"""The step at which something happens to a run."""
RESUMED_WITHIN = 60.0
"""Seconds until a run goes on."""

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := missing():
        pytest.skip(reason)
    return uninterrupted(tmp_path_factory.mktemp("reference"))


class Launched:
    """A run on two hosts that has halted at the end of step `HALT`, until `go_on`."""

    def __init__(self, folder: Path, hosts: tuple[Host, Host]) -> None:
        self.folder, self.hosts = folder, hosts
        halt_at(folder, "batch end", HALT, [0, 1])
        extra = str(write_extra(folder))
        flags = ["--config", "vit/digits", "--config", "trainer/torchrun", "--config", extra, "--resume", "auto"]
        self.command = [environment()["TRUNKLINE"], "fit", *flags]
        for host in hosts:
            self.start(host)
        files = [halted_file(folder, rank) for rank in (0, 1)]
        wait_for(lambda: all(file.exists() for file in files), 120, "halted processes", self.output)

    def start(self, host: Host) -> None:
        host.torchrun(self.command, self.folder, environment())

    def output(self) -> str:
        return "\n".join(file.read_text() for file in sorted(self.folder.glob("host*.log")))

    def resumed_after(self) -> float:
        """Seconds until the run goes on."""
        start = time.monotonic()
        wait_for(lambda: len(first_steps(self.folder)) == 2, RESUMED_WITHIN, "a run that goes on", self.output)
        return time.monotonic() - start

    def wait(self) -> None:
        for host in self.hosts:
            assert host.agent is not None
            assert host.agent.wait(200) == 0, self.output()


@pytest.fixture
def launched(tmp_path: Path, reference: Path) -> Iterator[Launched]:
    with two_hosts() as hosts:
        yield Launched(tmp_path, hosts)


def test_a_killed_process(launched: Launched, reference: Path, record_property: Callable[..., None]) -> None:
    first = [host.worker() for host in launched.hosts]
    os.kill(first[1], signal.SIGKILL)
    go_on(launched.folder)
    wait_for(lambda: not any(map(members, first)), GONE_WITHIN, "the end of the other process", launched.output)
    record_property("seconds", launched.resumed_after())
    launched.wait()
    assert first_steps(launched.folder) == [0, HALT - HALT % EVERY]
    assert_equals(launched.folder, reference)


def test_a_host_that_is_lost_and_comes_back(
    launched: Launched, reference: Path, record_property: Callable[..., None]
) -> None:
    lost = launched.hosts[1]
    lost.lose()
    go_on(launched.folder)
    launched.start(lost)
    record_property("seconds", launched.resumed_after())
    launched.wait()
    assert first_steps(launched.folder) == [0, HALT - HALT % EVERY]
    assert_equals(launched.folder, reference)
