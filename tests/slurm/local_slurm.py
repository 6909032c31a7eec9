"""A real SLURM of two nodes on this machine, for tests: `python tests/slurm/local_slurm.py sbatch --wait job.sh`.

It needs root and Debian's packages (`slurm-wlm slurmd slurmctld slurm-client munge`). All its files are in one folder,
its daemons are children of this process, and nothing of it is left when the block ends.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue")
NODES = ("n1", "n2")
MEMORY = 2000
"""MB that each node claims to have; no test asks for more."""


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm slurmd slurmctld slurm-client munge"
    return None if os.geteuid() == 0 else "SLURM's daemons need root"


def search_path() -> str:
    """The daemons are where only root looks for programs."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def wait_for(condition: Callable[[], bool], seconds: float, what: str, output: Callable[[], str] = str) -> None:
    """Look again and again until the condition holds.

    Raises:
        TimeoutError: if it does not.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s\n{output()}")
        time.sleep(0.2)


def parent(pid: int) -> int:
    """Id of a process's parent; 1 if the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 1


class Slurm:
    """The running cluster.

    Args:
        folder: of its configuration, state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "slurm.conf"
        self.environ = {**os.environ, "SLURM_CONF": str(self.config), "PATH": search_path()}
        for name in [name for name in self.environ if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
            del self.environ[name]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start munge, the controller and the nodes, and wait until the nodes take jobs."""
        self.write_config()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {name: self.folder / f"munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")}
        options = [f"--{name}={file}" for name, file in files.items()]
        # --force: the folder of a test is not as private as munge wants
        self.launch("munge", ["munged", "--foreground", "--force", f"--key-file={key}", *options])
        wait_for(files["socket"].exists, 30, "munge's socket", self.logs)
        self.launch("controller", ["slurmctld", "-D", "-c"])
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.states() == dict.fromkeys(NODES, "idle"), 60, "idle nodes", self.logs)

    def logs(self) -> str:
        """The last lines that the daemons have written."""
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"{file.name}: {file.read_text(errors='replace')[-1500:]}" for file in files)

    def write_config(self) -> None:
        """The configuration of two nodes with different ports on one host, without cgroups."""
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            for probe in (one, two, three):
                probe.bind(("127.0.0.1", 0))
            ports = [probe.getsockname()[1] for probe in (one, two, three)]
        host = socket.gethostname().partition(".")[0]
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            # A requeued job may start again when the credentials of its last attempt are no longer valid: 5 s
            f"AuthInfo=socket={self.folder}/munge.socket,cred_expire=5",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "SelectType=select/cons_tres",
            "SchedulerParameters=sched_interval=2,bf_interval=2",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "ReturnToService=2",
            "SlurmctldTimeout=30",
            "SlurmdTimeout=5",
            "KillWait=10",
            "JobRequeue=1",
            "MpiDefault=none",
            "SlurmdParameters=config_overrides",
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/spool.%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/slurmd.%n.pid",
            f"SlurmctldLogFile={self.folder}/slurmctld.log",
            f"SlurmdLogFile={self.folder}/slurmd.%n.log",
        ]
        for node, port in zip(NODES, ports[1:], strict=True):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory={MEMORY}"
            )
        every = ",".join(NODES)
        lines += [
            f"PartitionName=low Nodes={every} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60",
            f"PartitionName=high Nodes={every} MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=off",
        ]
        self.config.write_text("\n".join(lines) + "\n")
        (self.folder / "state").mkdir(exist_ok=True)

    def launch(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            program = shutil.which(command[0], path=search_path())
            self.daemons[name] = subprocess.Popen(
                [str(program), *command[1:]], env=self.environ, stdout=log, stderr=log, start_new_session=True
            )

    def start_node(self, node: str) -> None:
        """Start a node's daemon, also one that was lost."""
        self.launch(node, ["slurmd", "-D", "-N", node])

    def lose_node(self, node: str) -> None:
        """Kill everything that runs on a node, at once, as a power cut does."""
        daemon = self.daemons.pop(node)
        daemon.kill()
        tasks = [pid for pid, environ in self.processes() if environ.get("SLURMD_NODENAME") == node]
        managers = {parent(pid) for pid in tasks} - {1}  # the first one's is slurmstepd, which has no such variable
        for pid in (*managers, *tasks):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def task(self, rank: int) -> int:
        """Process id of a task of the only job that runs."""
        (found,) = (
            pid
            for pid, environ in self.processes()
            if environ.get("SLURM_TASK_PID") == str(pid)
            and environ.get("SLURM_PROCID") == str(rank)
            and "SLURM_STEP_ID" in environ
        )
        return found

    def of_tasks(self) -> set[int]:
        """Process ids of all tasks, with what these have started."""
        return {pid for pid, environ in self.processes() if {"SLURM_PROCID", "SLURM_STEP_ID"} <= environ.keys()}

    def processes(self) -> Iterator[tuple[int, dict[str, str]]]:
        """(id, environment) of every process of this cluster but this one's own."""
        for file in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has ended meanwhile
                words = file.read_bytes().decode(errors="replace").split("\0")
                environ = dict(word.partition("=")[::2] for word in words)
                if environ.get("SLURM_CONF") == str(self.config) and int(file.parent.name) != os.getpid():
                    yield int(file.parent.name), environ

    def command(self, *arguments: str, cwd: Path | None = None, check: bool = True) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(arguments, env=self.environ, cwd=cwd, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def states(self) -> dict[str, str]:
        """Node -> state."""
        lines = self.command("sinfo", "-h", "-N", "-p", "low", "-o", "%N %t", check=False).split("\n")
        return dict(line.split() for line in lines if line)

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says: `JobState`, `Restarts`, `ExitCode` and so on."""
        words = self.command("scontrol", "show", "job", str(number)).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def stop(self) -> None:
        """End all daemons, and what their jobs have left."""
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        while living := [pid for pid, _ in self.processes()]:
            for pid in living:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


@contextmanager
def local_slurm(folder: Path) -> Iterator[Slurm]:
    """A cluster that lives as long as the block."""
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as place, local_slurm(Path(place)) as running:
        sys.exit(subprocess.run(sys.argv[1:] or ["sinfo"], env=running.environ, check=False).returncode)
