"""The processes of one launch: which is the first, and how it tells the others what it chose.

torchrun, `srun` and others start all processes of a run themselves. Lightning connects them when training starts; the
run's folder is chosen before that, so the first process opens a store at the same address a little earlier. Nothing
that several launches share decides: not a job's number, not a file, not the name that torchrun gives to a run.
"""

import hashlib
import json
import os
import secrets
import socket
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

from trunkline import TrunklineError

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JSM_NAMESPACE_RANK")
"""Environment variables that number the processes of a run, by whoever starts them."""
PATIENCE = timedelta(minutes=5)
"""How long the processes of a run wait for each other, as in the recipes of machines."""
PAUSE = 0.02
"""Seconds between two looks of the first process at the others' questions."""
AGENT = "TORCHELASTIC_USE_AGENT_STORE"
"""Whether processes connect through torchrun's store."""
UNNAMED = "none"
"""What torchrun calls a run that was not given a name."""


def is_first_process() -> bool:
    """Whether this is the process of a run that writes its files, before Lightning knows the processes."""
    # torchrun may run inside a SLURM job, whose numbers are then those of the hosts, in another order.
    names = ("RANK",) if "TORCHELASTIC_RUN_ID" in os.environ else RANKS
    return all(os.environ.get(name, "0") in ("", "0") for name in names)


def attempt_mark() -> str | None:
    """What all attempts of a job have in common, as hexadecimal digits; None for a process that nothing restarts.

    A job that SLURM queues again keeps its number, and processes that torchrun restarts keep the run's name. The
    command line is a part of it, because one job may train several runs.
    """
    job, name = os.environ.get("SLURM_JOB_ID"), os.environ.get("TORCHELASTIC_RUN_ID")
    if job:
        launcher = ["slurm", os.environ.get("SLURM_CLUSTER_NAME", ""), job]
    elif name:
        # Without a name, torchrun's own process must do, which starts this one again.
        launcher = ["torchrun", name, *([socket.gethostname(), str(os.getppid())] if name == UNNAMED else [])]
    else:
        return None
    return hashlib.sha256(json.dumps([launcher, sys.argv[1:]]).encode()).hexdigest()[:12]


def command_mark() -> str:
    """What all runs with this command line have in common, whatever they resume, as hexadecimal digits."""
    flag, arguments = "--resume", sys.argv[1:]
    pairs = zip(["", *arguments], arguments, strict=False)
    command = [part for before, part in pairs if flag not in (before, part.partition("=")[0])]
    return hashlib.sha256(json.dumps(["command", command]).encode()).hexdigest()[:12]


def may_be_restarted() -> bool:
    """Whether an earlier run with the same `attempt_mark` is certainly an attempt of the same job.

    Runs without a name of their own are told apart only by torchrun's count of restarts.
    """
    unnamed = os.environ.get("TORCHELASTIC_RUN_ID") == UNNAMED and not os.environ.get("SLURM_JOB_ID")
    return not unnamed or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


class Peers(NamedTuple):
    """The processes of a launch that must agree."""

    rank: int
    size: int
    address: str
    port: int
    launch: str
    """Tells this launch from others that may meet at the same address."""


def find_peers(nodes: int = 1, devices: Any = 1) -> Peers | None:
    """The processes that something other than Lightning starts together; None for a process that is alone.

    Args:
        nodes: number of hosts, for processes that are started by hand.
        devices: of each host, as the Trainer takes them.

    Raises:
        TrunklineError: if the numbers of the processes do not follow from the environment.
    """
    from lightning.pytorch.plugins.environments import (
        LSFEnvironment,
        MPIEnvironment,
        SLURMEnvironment,
        TorchElasticEnvironment,
    )

    _address_of_step(SLURMEnvironment.resolve_root_node_address)
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID")
    launch = "trunkline/" + ".".join(os.environ.get(name, "") for name in names)
    for kind in (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment):  # in Lightning's order
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning says again that `srun` is not used
            if not kind.detect():
                continue
        try:
            environment = kind()
        except RuntimeError as error:
            raise TrunklineError(str(error), "trainer.num_nodes") from error
        if environment.world_size() == 1:
            return None
        rank, address = environment.global_rank(), environment.main_address
        return Peers(rank, environment.world_size(), address, environment.main_port, launch)
    return _started_by_hand(nodes, devices, launch)


def _address_of_step(first_host: Callable[[str], str]) -> None:
    """Give each step of a SLURM job an address of its own; Lightning would give all of them that of the job."""
    job, step = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_STEP_ID", "")
    if job.isdecimal() and step.isdecimal():
        os.environ.setdefault("MASTER_PORT", str(15000 + (int(job[-4:]) + 101 * int(step)) % 10000))
    hosts = os.environ.get("SLURM_STEP_NODELIST")
    if hosts and step.isdecimal():
        os.environ.setdefault("MASTER_ADDR", first_host(hosts))


def _started_by_hand(nodes: int, devices: Any, launch: str) -> Peers | None:
    """The processes whose numbers were set by hand, see Lightning's "cluster without a scheduler"."""
    environ = os.environ
    numbered = {name: environ[name] for name in ("RANK", "NODE_RANK", "LOCAL_RANK") if environ.get(name)}
    if not numbered or not (environ.get("MASTER_ADDR") and environ.get("MASTER_PORT")):
        return None
    if "RANK" in numbered and environ.get("WORLD_SIZE"):
        rank, count = int(numbered["RANK"]), int(environ["WORLD_SIZE"])
    elif "LOCAL_RANK" not in numbered:  # one process for each host; Lightning starts the others there
        rank, count = int(numbered.get("NODE_RANK", 0)), nodes
    elif str(devices).isdecimal():
        rank = int(numbered.get("NODE_RANK", 0)) * int(devices) + int(numbered["LOCAL_RANK"])
        count = nodes * int(devices)
    else:
        raise TrunklineError(
            "LOCAL_RANK is set, but not how many processes there are; set RANK and WORLD_SIZE too, or devices to their "
            "number on each host",
            "trainer.devices",
        )
    return Peers(rank, count, environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), launch) if count > 1 else None


def agree(stack: ExitStack, peers: Peers, choose: Callable[[], Any]) -> Any:
    """What the first process chooses, as plain data, in all processes.

    Under torchrun the processes then connect through a store of their own. In torchrun's store, those that were
    restarted find the addresses of the processes before them, and wait for these (gloo in torch 2.14).

    Args:
        stack: keeps the store open. Lightning's own store at that address finds it there, and uses it too.
        peers: the processes.
        choose: called in the first process only.

    Raises:
        TrunklineError: that of `choose`, in all processes; or if one does not come.
    """
    from torch.distributed import DistError, PrefixStore

    # torchrun's own store lives as long as its agent: nobody else can open one at that address.
    agent = os.environ.get(AGENT) == str(True)
    try:
        store = PrefixStore(peers.launch, _open_store(stack, peers, peers.port, peers.rank == 0 and not agent))
        if peers.rank == 0:
            answer, own = _chosen(choose)
            if agent:
                answer["port"] = _open_store(stack, peers, 0, True).port
            _tell(store, peers.size, answer)
        else:
            answer, own = _ask(store, peers.rank), None
    except (DistError, ConnectionError, TimeoutError) as error:
        raise _unreachable(peers, error) from error
    if agent:
        os.environ.update({"MASTER_PORT": str(answer["port"]), AGENT: str(False)})
    if "error" in answer:
        raise own or TrunklineError(answer["error"], answer["field"])
    return answer["choice"]


def _open_store(stack: ExitStack, peers: Peers, port: int, serve: bool) -> Any:
    """A store at a port of the first process's host, open as long as the stack; 0 is any free port."""
    from torch.distributed import TCPStore

    store = TCPStore(peers.address, port, is_master=serve, timeout=PATIENCE, wait_for_workers=False, multi_tenant=True)
    stack.enter_context(nullcontext(store))
    return store


def _chosen(choose: Callable[[], Any]) -> tuple[dict[str, Any], Exception | None]:
    """The choice for the others, or what went wrong, for them and for this process."""
    try:
        return {"choice": choose()}, None
    except Exception as error:
        return {"error": str(error), "field": getattr(error, "field", None)}, error


def _ask(store: Any, rank: int) -> Any:
    """The first process's answer to a question of our own.

    torchrun's store may still hold questions and answers of processes that it has restarted, perhaps of the same rank.
    So each process asks by a number that nobody else has.
    """
    number = secrets.token_hex(8)
    store.set(f"asks/{rank}", number)
    store.wait([f"answer/{number}"], PATIENCE)
    answer = json.loads(store.get(f"answer/{number}"))
    store.set(f"heard/{answer['by']}/{rank}", b"")
    return answer


def _tell(store: Any, size: int, answer: dict[str, Any]) -> None:
    """Answer the questions of all other processes, and wait until they have heard the answer."""
    by = secrets.token_hex(8)
    content = json.dumps({**answer, "by": by})
    answered: dict[int, bytes] = {}
    waiting, until = list(range(1, size)), time.monotonic() + PATIENCE.total_seconds()
    while waiting:
        for rank in waiting:
            if store.check([f"asks/{rank}"]) and (number := store.get(f"asks/{rank}")) != answered.get(rank):
                store.set(f"answer/{number.decode()}", content)
                answered[rank] = number
        waiting = [rank for rank in waiting if not store.check([f"heard/{by}/{rank}"])]
        if waiting and time.monotonic() > until:
            raise TimeoutError(f"process {waiting[0]} of {size} did not come")
        if waiting:
            time.sleep(PAUSE)


def _unreachable(peers: Peers, error: Exception) -> TrunklineError:
    reason = str(error).partition("\n")[0]
    return TrunklineError(
        f"the {peers.size} processes of this run do not find each other at {peers.address}:{peers.port} within "
        f"{PATIENCE.total_seconds():.0f} s: process {peers.rank} says: {reason}; check that all were started, and that "
        "this port of the first host can be reached and is free, or set MASTER_ADDR and MASTER_PORT",
        "trainer.num_nodes",
    )
