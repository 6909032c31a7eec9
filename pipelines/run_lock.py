"""Holds a run's folder, so that no two runs write into it.

The kernel's lock ends with the process that holds it, however that ends. It holds between the processes of one machine,
and between machines on a file system that shares locks (NFS as it is usually mounted, Lustre with `flock`). For those
that do not share them, the holder also keeps writing into a file, and a run on another machine first watches whether it
still does. A holder that is stopped or cut off for longer than that is not noticed there.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from trunkline import TrunklineError
from trunkline.files import cannot_write, read_json

LOCK, HOLDER = ".lock", ".running.json"
"""Files in a run's folder: the lock of the process that trains it, and who that is."""
MARK = ".attempt-"
"""How the names of files begin that tell which jobs have trained a run."""
BEAT = 5.0
"""Seconds between two signs of life of the holder."""
WATCHED = 3
"""Signs of life that must be missing before a holder on another machine counts as gone."""
BOOT = Path("/proc/sys/kernel/random/boot_id")


def machine() -> str:
    """What tells this machine from others, also where all have the same name; another one after each start."""
    try:
        return BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def holds_nothing(folder: Path) -> bool:
    """Whether a run's folder has no files but those that hold it."""
    return all(_holds(file) for file in folder.iterdir()) if folder.is_dir() else True


def _holds(file: Path) -> bool:
    return file.name in (LOCK, HOLDER) or file.name.startswith(MARK)


@contextmanager
def held(folder: Path, unused: bool, marks: Sequence[str] = ()) -> Iterator[None]:
    """Hold a run's folder, so that no other run writes into it.

    A folder that this made and that holds nothing in the end is removed again, so that bad input leaves nothing behind.

    Args:
        folder: of the run; it is made.
        unused: whether it must not exist yet.
        marks: by which a later attempt knows the run, see `attempt_mark` and `command_mark`; they stay in the folder.

    Raises:
        FileExistsError: if it does.
        TrunklineError: if another process holds the folder, or if nothing can be written there.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    lock, done = FileLock(folder / LOCK, timeout=0), threading.Event()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if unused and not made:
            raise FileExistsError(folder)
        folder.mkdir(exist_ok=not unused)
        beating = _announce(folder, _acquire(lock), done)
        for mark in marks:
            (folder / f"{MARK}{mark}").touch()
    except Timeout:
        raise held_by_another(folder) from None
    except TrunklineError:
        lock.release()
        raise
    except (FileExistsError, NotADirectoryError):
        if unused and folder.is_dir():
            raise
        raise _no_folder(folder) from None
    except OSError as error:
        _clear(folder, lock, made)
        raise cannot_write(folder, error, "run_dir") from error
    try:
        yield
    finally:
        done.set()
        beating.join()
        _clear(folder, lock, made)


def _acquire(lock: FileLock) -> bool:
    """Take the kernel's lock; False on a file system that has none, such as Lustre without `flock`.

    Raises:
        Timeout: if another process has it.
    """
    try:
        lock.acquire()
    except Timeout:
        if not isinstance(lock, SoftFileLock):  # what filelock turns the lock into, which a kill would leave behind
            raise
    except NotImplementedError:  # of older versions of filelock
        pass
    return lock.is_locked and not isinstance(lock, SoftFileLock)


def _announce(folder: Path, locked: bool, done: threading.Event) -> threading.Thread:
    """Write who holds the folder, again and again until `done`.

    Raises:
        TrunklineError: if another process does the same.
    """
    file = folder / HOLDER
    if file.exists():
        before = read_json(file) or {}
        if not (locked and before.get("machine") == machine()) and _beats(file, before):
            raise held_by_another(folder)
        file.unlink(missing_ok=True)
    holder = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "machine": machine(),
        "since": datetime.now().isoformat(" ", "seconds"),
    }
    try:
        file.touch(exist_ok=False)
    except FileExistsError:  # another run resumed this one in the same moment
        raise held_by_another(folder) from None
    file.write_text(json.dumps(holder), encoding="utf-8")
    thread = threading.Thread(target=_beat, args=(file, holder, done), daemon=True)
    thread.start()
    return thread


def _beat(file: Path, holder: dict[str, Any], done: threading.Event) -> None:
    for number in count(1):
        if done.wait(BEAT):
            return
        with suppress(OSError):  # the disk may be full for a while
            file.write_text(json.dumps({**holder, "beat": number}), encoding="utf-8")


def _beats(file: Path, holder: dict[str, Any]) -> bool:
    """Whether the holder of a folder still writes into its file; looks for as long as it takes to know."""
    seconds = WATCHED * BEAT
    host, folder = holder.get("host", "another host"), file.parent
    print(f"waiting {seconds:.0f} s to see that {host} no longer trains {folder}", file=sys.stderr)
    before, until = _content(file), time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(BEAT / 10)
        if (now := _content(file)) != before:
            return now is not None  # None: it has just ended
    return False


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _clear(folder: Path, lock: FileLock, made: list[Path]) -> None:
    """Release a run's folder, and remove what `held` made if the run left nothing in it."""
    with suppress(OSError):  # the disk may have become read-only
        (folder / HOLDER).unlink(missing_ok=True)
        if folder in made and holds_nothing(folder):
            for file in folder.iterdir():
                file.unlink(missing_ok=True)
    lock.release()
    with suppress(OSError):  # one is not empty, or was never made
        for path in made:
            path.rmdir()


def held_by_another(folder: Path) -> TrunklineError:
    """The error for a folder that another process holds."""
    holder = read_json(folder / HOLDER) or {}
    who = f"process {holder['process']} on {holder['host']}, since {holder['since']}" if holder else "another process"
    return TrunklineError(
        f"{folder} is being trained by {who}; wait for its end or stop it, or start a new run with resume=null",
        "resume",
    )


def _no_folder(folder: Path) -> TrunklineError:
    file = next(path for path in (folder, *folder.parents) if path.exists() and not path.is_dir())
    return TrunklineError(f"{file} is a file, so that no run can be saved below it; choose another run_dir", "run_dir")
