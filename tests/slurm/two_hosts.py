"""Two hosts on this machine, for tests: network namespaces with a cable between them. Needs root and iproute2."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PORT = 29500


def missing() -> str | None:
    """Why there can be no hosts here; None if there can."""
    if shutil.which("ip") is None:
        return "no ip: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"tl{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    return None if made.returncode == 0 else f"no network namespaces: {made.stderr.strip()}"


class Host:
    """One of the hosts.

    Args:
        number: 0 or 1; the first one is where torchrun's processes meet.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.name, self.cable = f"tl{os.getpid()}n{number}", f"tl{os.getpid()}v{number}"
        self.address = f"10.213.7.{number + 1}"
        self.agent: subprocess.Popen[bytes] | None = None

    def torchrun(self, command: list[str], folder: Path, environ: dict[str, str]) -> None:
        """Start torchrun here, with the settings of docs/cluster.md and one process."""
        options = [
            *("--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-id=test", "--rdzv-backend=c10d"),
            *(f"--rdzv-endpoint=10.213.7.1:{PORT}", f"--local-addr={self.address}"),
            f"--rdzv-conf=is_host={int(self.number == 0)},join_timeout=60",
        ]
        own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": self.cable}
        environ = {**os.environ, **environ, **own}
        environ.pop("MASTER_ADDR", None)
        launcher = [sys.executable, "-m", "torch.distributed.run", *options, "--no-python", *command]
        with (folder / f"host{self.number}.log").open("ab") as log:
            self.agent = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *launcher],
                cwd=folder, env=environ, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def processes(self) -> list[int]:
        """Ids of all processes of this host."""
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [int(word) for word in done.stdout.split()]

    def worker(self) -> int:
        """Id of the process that trains here: the child of torchrun."""
        assert self.agent is not None
        (found,) = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split()
        return int(found)

    def lose(self) -> None:
        """Kill everything that runs here, as a reboot does."""
        while living := self.processes():
            for pid in living:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self.agent is not None:
            self.agent.wait()


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Hosts that live as long as the block."""
    hosts = Host(0), Host(1)

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for host in hosts:
            ip("netns", "add", host.name)
        ip("link", "add", hosts[0].cable, "type", "veth", "peer", "name", hosts[1].cable)
        for host in hosts:
            ip("link", "set", host.cable, "netns", host.name)
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.cable)
            ip("-n", host.name, "link", "set", host.cable, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            host.lose()
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)
