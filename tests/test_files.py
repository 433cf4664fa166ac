"""files.py: files are whole or not there, whatever happens while they are written; locks and what the dead left."""

import errno
import os
import platform
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import files
from files import held, locked, replace_file, tidy

ROOT = Path(__file__).parents[1]


def test_replace_file_makes_folders_and_leaves_only_the_result(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    seen = []
    replace_file(path, lambda temporary: (seen.append(temporary), temporary.write_text("new")))
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]
    assert seen[0] != path and seen[0].parent == path.parent  # the same folder: a rename is atomic there


def test_an_exception_while_writing_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        replace_file(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_interrupt_before_the_first_byte_leaves_nothing(tmp_path):
    def write(temporary: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "file.txt", write)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_replaced_keeps_its_permissions_and_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "a" / "file.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    replace_file(link, lambda temporary: temporary.write_text("new"))
    assert link.is_symlink() and target.read_text() == "new" and stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_name_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("\u00e9" * 125 + ".json")
    replace_file(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"


def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    replace_file(pipe, lambda path: path.write_text("through"))
    assert os.read(reader, 100) == b"through" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)


def test_the_former_file_gets_its_name_when_the_next_is_whole(tmp_path):
    path, former = tmp_path / "last.pt", tmp_path / "former.pt"
    for text in ("one", "two", "three"):
        replace_file(path, lambda temporary, text=text: temporary.write_text(text), former="former.pt")
    assert (former.read_text(), path.read_text()) == ("two", "three") and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(OSError, match="full"):
        replace_file(path, full, former="former.pt")
    assert (former.read_text(), path.read_text()) == ("two", "three") and len(list(tmp_path.iterdir())) == 2


def full(temporary: Path) -> None:
    temporary.write_text("half")
    raise OSError("full")


def test_an_output_that_is_read_only_is_replaced_as_it_may_be(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    path.chmod(0o444)
    replace_file(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o444


def test_standard_output_is_written_to_wherever_it_goes(tmp_path):
    code = "import files\nprint('before', flush=True)\n"
    code += "files.replace_file('/dev/stdout', lambda path: open(path, 'a').write('x'))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "before\nx"
    with open(tmp_path / "out.txt", "w") as file:
        subprocess.run(command, cwd=ROOT, stdout=file, check=True)
    assert (tmp_path / "out.txt").read_text() == "before\nx" and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_something_is_mounted_on_is_written_in_place(tmp_path, monkeypatch):
    def busy(self, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    path = tmp_path / "file.txt"
    monkeypatch.setattr(Path, "replace", busy)
    replace_file(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_what_dead_processes_left_goes_and_what_others_write_stays(tmp_path):
    node, day = platform.node(), files.OLD + 60
    gone = [f"a.png.{node}.{2**22 + 1}.7.tmp", f"a\nb.{node}.1.77.tmp", "old.png.elsewhere.org.5.7.tmp"]
    stays = ["a.png.elsewhere.5.7.tmp", "notes.tmp", "a.png", "a.b.c.d.tmp", f"alive.{node}.1.8.tmp"]
    for name in gone + stays:
        (tmp_path / name).write_text("half")
    os.utime(tmp_path / gone[-1], (time.time() - day,) * 2)
    with files._in_use(tmp_path / stays[-1]):  # as in a container that has process numbers of its own
        tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(stays)


def test_a_file_waits_for_whoever_is_just_tidying_it_away(tmp_path, monkeypatch):
    """`tidy` of another thread may find a file that is there and not locked yet."""
    flock, threads = files.fcntl.flock, []

    def late(file, how):
        if not threads:
            theirs = open(file.name, "rb")  # noqa: SIM115, closed below
            flock(theirs, files.fcntl.LOCK_EX)

            def remove() -> None:
                time.sleep(0.2)
                Path(file.name).unlink(missing_ok=True)
                theirs.close()

            threads.append(threading.Thread(target=remove))
            threads[0].start()
        return flock(file, how)

    tidy(tmp_path)
    monkeypatch.setattr(files.fcntl, "flock", late)
    replace_file(tmp_path / "file.txt", lambda temporary: (temporary.write_text("new"), time.sleep(0.4)))
    threads[0].join()
    assert (tmp_path / "file.txt").read_text() == "new" and list(tmp_path.iterdir()) == [tmp_path / "file.txt"]


def test_a_folder_that_cannot_be_tidied_is_no_error(tmp_path, monkeypatch):
    def refuse(self, *given, **options):
        raise PermissionError("another user's")

    (tmp_path / f"a.{platform.node()}.1.7.tmp").write_text("half")
    monkeypatch.setattr(Path, "unlink", refuse)
    tidy(tmp_path)
    monkeypatch.setattr(Path, "glob", refuse)
    files._tidied.discard(tmp_path)
    tidy(tmp_path)


def other_process(folder: Path) -> subprocess.Popen:
    """A process that holds the lock of `folder`."""
    code = "import sys, time, pathlib, files\n"
    code += (
        "with files.held(pathlib.Path(sys.argv[1]), 'a training'):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, folder / "own.lock"], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_lock_is_one_processs_names_it_and_goes_with_it(tmp_path):
    with other_process(tmp_path) as process:
        with (
            pytest.raises(ValueError, match=f"a training is at work there, process {process.pid} on {platform.node()}"),
            held(tmp_path / "own.lock", "a training"),
        ):
            pass
        process.kill()
    assert (tmp_path / "own.lock").exists()  # it died without a word
    for _ in range(2):
        with held(tmp_path / "own.lock", "a training"), pytest.raises(ValueError, match=f"process {os.getpid()} "):
            held(tmp_path / "own.lock", "a training").__enter__()
        assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_told_in_a_line(tmp_path, monkeypatch, caplog):
    def missing(*given):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", missing)
    with held(tmp_path / "own.lock", "a training"), locked(tmp_path):
        replace_file(tmp_path / "a", lambda temporary: temporary.write_text("new"))
    assert "cannot be locked" in caplog.text and (tmp_path / "a").read_text() == "new"


WRITER = """
import sys, pathlib, files
path, number = pathlib.Path(sys.argv[1]), 0
print("begun", flush=True)
while True:
    number += 1
    files.replace_file(path, lambda temporary: temporary.write_text(f"{number:09d}" * 50_000))
"""


def test_a_process_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "file.txt"
    for turn in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, path], cwd=ROOT, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.02 + 0.013 * turn)
        process.kill()
        process.wait()
        if path.exists():
            text = path.read_text()
            assert len(text) == 450_000 and text == text[:9] * 50_000
    files._tidied.discard(tmp_path)
    replace_file(path, lambda temporary: temporary.write_text("new"))
    assert list(tmp_path.iterdir()) == [path]
