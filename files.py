"""Files that are whole or not there at all, and what one process has to itself.

    write_text("results/manifest.json", text)
    with held(folder / "training.lock", "a training"):
        ...

A process that dies at any moment, or a full disk, leaves the file that was there before. What it leaves of the new one,
NAME.HOST.PID.THREAD.tmp, goes when a process first writes to the folder again.
"""

import contextlib
import errno
import logging
import os
import platform
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows, where nothing here is locked and nothing tidied
    fcntl = None

NAME = 40  # characters of a file's name that its temporary one begins with: file systems have a limit
OLD = 24 * 60 * 60  # seconds after which what another machine left is nobody's
_tidied: set[Path] = set()  # folders


def replace_file(path, write: Callable[[Path], object], former: str = "") -> None:
    """Calls `write(temporary path)`, brings what it wrote to the disk and renames it to `path`; makes the folder.

    former: a name in the folder that the file which was there gets; at no moment is there neither. A link stays one:
    what it points to is replaced. What is no plain file (a pipe, /dev/stdout) is written to.
    """
    given, path = Path(path), Path(os.path.realpath(path))
    if str(given).startswith(("/dev/std", "/dev/fd/", "/proc/")) or (given.exists() and not given.is_file()):
        write(given)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    tidy(path.parent)
    own = f"{platform.node()}.{os.getpid()}.{threading.get_native_id()}"  # two machines may share a folder
    temporary = path.with_name(f"{path.name[:NAME]}.{own}.tmp")
    try:
        with _in_use(temporary):
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, temporary)
                if former:
                    path.replace(path.with_name(former))
            _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text: str) -> None:
    """`replace_file` with a text, in UTF-8."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _rename(temporary: Path, path: Path) -> None:
    try:
        temporary.replace(path)
    except OSError as error:
        if error.errno != errno.EBUSY:  # a file that something is mounted on, as containers do
            raise
        shutil.copyfile(temporary, path)


@contextlib.contextmanager
def _in_use(temporary: Path) -> Iterator[None]:
    """The file, empty, with a lock that tells `tidy` that its process lives, in whatever container."""
    while True:
        with open(temporary, "wb") as file:
            if fcntl:
                with contextlib.suppress(OSError):  # not every file system can
                    fcntl.flock(file, fcntl.LOCK_EX)  # waits for a `tidy` that came between, and may have removed it
            if temporary.exists():
                yield
                return


def tidy(folder: Path) -> None:
    """Removes what processes that are no more left half-written in a folder; once in a process, as far as it may."""
    if folder in _tidied or not fcntl:
        return
    _tidied.add(folder)
    with contextlib.suppress(OSError):
        for path in folder.glob("*.*.*.*.tmp"):
            with contextlib.suppress(OSError):
                _remove_abandoned(path)


def _remove_abandoned(path: Path) -> None:
    status = path.lstat()
    _, *host, pid, thread, _ = path.name.split(".")
    mine = path.name.endswith(f".{platform.node()}.{pid}.{thread}.tmp") and (pid + thread).isdecimal()
    old = host and (pid + thread).isdecimal() and time.time() - status.st_mtime > OLD
    if not stat.S_ISREG(status.st_mode) or not (mine or old):
        return
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where its process lives
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder) -> Iterator[None]:
    """The block runs in one process of this machine at a time; not so on Windows and where the file system has no
    locks."""
    if not fcntl:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """This process alone has the lock `path`, a file, until the block or the process ends; not so on Windows, and, told
    in a line, where the file system has no locks.

    Raises ValueError at once where another one has it: `what` it does there, its number and its machine.
    """
    if not fcntl:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115, it stays open
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                pid, _, host = file.read().strip().partition(" ")
            other = f"process {pid or '?'} on {host or '?'}"
            told = f"{what} is at work there, {other}; wait for it, or take another --out"
            raise ValueError(f"{path.parent}: {told}") from None
        except OSError as error:
            logging.getLogger("maskgit").warning(f"{path.parent}: cannot be locked ({error}); start nothing else there")
            break
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            break
        file.close()  # whoever had it has removed it meanwhile
    with file:
        file.truncate(0)
        file.write(f"{os.getpid()} {platform.node()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
