"""Whether the processes of a launch will find each other: said within seconds, where torch would wait for minutes."""

import errno
import os
import socket
import sys
import time

from trunkline import TrunklineError
from trunkline.pipelines.launch import Peers

CONNECT_SECONDS = 5.0
"""How long a host may take to answer; it answers within milliseconds, or its answer never comes."""
START_SECONDS = 10.0
"""How much later than another process the first one may start without a word."""
PAUSE_SECONDS = 0.2
"""Between two looks whether it has started."""


def check_first_process(peers: Peers) -> None:
    """Check that the first process can listen at its address, or from another process that it can be reached there.

    Raises:
        TrunklineError: if the host is unknown or does not answer, or if the port is taken.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ and "SLURM_STEP_ID" not in os.environ and "SLURM_NTASKS" in os.environ:
        raise TrunklineError(
            f"this SLURM job has {peers.size} tasks, but this is one process, which would wait for the others; write "
            "srun before the command, or use configs/slurm/train.sbatch"
        )
    here = socket.gethostname()
    try:
        family = socket.getaddrinfo(peers.address, peers.port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        raise TrunklineError(
            f"{here} knows no host '{peers.address}', where the first process of the run is; set MASTER_ADDR to a name "
            "or address of it that all hosts know"
        ) from error
    if peers.rank > 0:
        wait_until_reached(peers.address, peers.port, here)
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):  # otherwise torchrun listens there already
        check_port(family, peers.port, here)


def check_port(family: int, port: int, here: str) -> None:
    """Check that no other program listens at a port of this host.

    Raises:
        TrunklineError: if one does.
    """
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch: closed connections linger
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                return  # torch finds a way of its own
            raise TrunklineError(
                f"the first process cannot listen at port {port} of {here}: {error.strerror}; set MASTER_PORT to a "
                "free port, the same for all processes"
            ) from error


def wait_until_reached(host: str, port: int, here: str) -> None:
    """Wait a little until the first process listens, and say so if it takes longer: it may only start later than this.

    Raises:
        TrunklineError: if its host does not answer.
    """
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
            return
        except (ConnectionRefusedError, ConnectionResetError):  # the host is there
            if time.monotonic() > end:
                mend = "if it does not start there, MASTER_ADDR or MASTER_PORT is wrong"
                print(f"{here} waits for the first process at {host}:{port}; {mend}", file=sys.stderr, flush=True)
                return
            time.sleep(PAUSE_SECONDS)
        except OSError as error:
            raise TrunklineError(
                f"{here} cannot reach {host}:{port}, where the first process is: {error.strerror or error}; check the "
                "network and the firewall between the hosts, and that MASTER_ADDR is in a network of all of them"
            ) from error
