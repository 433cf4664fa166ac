"""Files that are whole or not there at all, and what one process has to itself.

    replace_file("results/manifest.json", lambda path: path.write_text(text))
    with held(folder / "vqgan.lock", "the training"):
        ...

A process that dies at any moment, or a full disk, leaves the file that was there before. What it leaves of the new one,
NAME.HOST.PID.THREAD.tmp, goes when a process first writes to the folder again.
"""

import contextlib
import os
import platform
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows, where nothing here is locked
    fcntl = None

NAME = 40  # characters of a file's name that its temporary one begins with: file systems have a limit
_tidied: set[Path] = set()  # folders


def replace_file(path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary path)`, brings what it wrote to the disk and renames it to `path`; makes the folder.

    A link stays one: what it points to is replaced. What is no plain file (a pipe, /dev/stdout) is written to.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        write(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    tidy(path.parent)
    own = f"{platform.node()}.{os.getpid()}.{threading.get_native_id()}"  # two machines may share a folder
    temporary = path.with_name(f"{path.name[:NAME]}.{own}.tmp")
    try:
        write(temporary)
        if path.exists():
            shutil.copymode(path, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def keep_former(path: Path, former: Path) -> None:
    """`former` becomes what `path` is now; that stays there too."""

    def copy(temporary: Path) -> None:
        try:
            os.link(path, temporary)
        except OSError:  # not every file system can
            shutil.copyfile(path, temporary)

    replace_file(former, copy)


def tidy(folder: Path) -> None:
    """Removes what processes of this machine that are no more left half-written in a folder; once in a process."""
    if folder in _tidied:
        return
    _tidied.add(folder)
    left = re.compile(rf".*\.{re.escape(platform.node())}\.(\d+)(?:\.\d+)?\.tmp", re.DOTALL)
    for path in folder.iterdir():
        if (match := left.fullmatch(path.name)) and not _lives(int(match[1])):
            path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        return True
    return True


@contextlib.contextmanager
def locked(folder) -> Iterator[None]:
    """The block runs in one process of this machine at a time; not so on Windows."""
    if not fcntl:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """This process alone has the lock `path`, a file, until the block or the process ends; not so on Windows.

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
