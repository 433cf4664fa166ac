"""A signal while a script still imports: the time in which most mistakes are noticed."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "run_script(main)" in path.read_text(encoding="utf-8"))
SLOW = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"


@pytest.fixture(scope="module")
def slow_packages(tmp_path_factory) -> Path:
    """Packages in place of those that take long, which take as long as it needs."""
    folder = tmp_path_factory.mktemp("packages")
    for name in ("torch", "numpy", "gradio", "PIL"):
        (folder / f"{name}.py").write_text(SLOW)
    return folder


def start(script: str, packages: Path, interrupt=signal.SIG_DFL) -> subprocess.Popen:
    """A script that has come to its imports; `interrupt`: what SIGINT does, whatever here."""
    process = subprocess.Popen([sys.executable, str(ROOT / script)], env=os.environ | {"PYTHONPATH": str(packages)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, interrupt))  # fmt: skip
    assert process.stdout.readline() == "importing\n"
    return process


def test_all_scripts_are_among_these():
    assert {"inpainting.py", "training_transformer.py", "training_vqgan.py", "fid_score.py", "demo.py"} < {*SCRIPTS}
    told = re.findall(
        r"^    interrupts\.in_one_line\(\)$", "".join((ROOT / name).read_text() for name in SCRIPTS), re.M
    )
    assert len(told) == len(SCRIPTS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_while_a_script_imports_ends_it_with_a_line(script, number, slow_packages):
    process = start(script, slow_packages)
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (128 + number, "stopped before it began\n")


def test_ctrl_c_that_is_ignored_stays_so_while_a_script_imports(slow_packages):
    """A job in the background."""
    process = start(SCRIPTS[0], slow_packages, signal.SIG_IGN)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


def test_a_script_that_is_imported_leaves_signals_alone():
    code = "import signal\nbefore = signal.getsignal(signal.SIGINT)\nimport make_masks\n"
    code += "assert signal.getsignal(signal.SIGINT) is before"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
