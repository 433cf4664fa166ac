"""The README is true: its commands parse, its snippets run on the shipped weights, its table names every file."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import benchmark
import config
import fid_score
import inpainting
import make_masks
import sweep
import training_transformer
import training_vqgan

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = (training_vqgan, training_transformer, inpainting, fid_score, sweep, benchmark, make_masks)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
LAB = re.findall(r"^python .*", (ROOT / "docs" / "lab.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
SHELL = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]
COMMANDS = LAB + [line for line in SHELL if line.startswith("python ")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda module: module.__name__)
def test_help_names_every_flag_that_the_readme_gives_the_script(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for command in COMMANDS:
        _, name, *arguments = shlex.split(command)
        if name == f"{script.__name__}.py":
            for flag in (argument for argument in arguments if argument.startswith("--")):
                assert flag in text, f"{command}: no {flag} in --help"


def test_configs_of_the_training_commands_load():
    named = re.findall(r"--config (configs/\w+\.yml)", README)
    assert set(named) >= {"configs/cats64.yml", "configs/smoke.yml", "configs/lab.yml"}
    for path in named:
        config.load_config(ROOT / path)


@pytest.mark.parametrize("target", ["run", "test"])
def test_make_knows_the_targets(target):
    plan = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ("inpainting.py" if target == "run" else "pytest") in plan


def test_python_snippets_run_on_the_shipped_weights(monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(block, names)
    filled, inputs = names["filled"], names["inputs"]
    known = ~inputs.hole.expand_as(inputs.images)
    assert (filled.images[known] == inputs.images[known]).all()
    assert names["vqgan"].config.codebook.codes == 1024


def test_every_file_at_the_top_is_in_the_table():
    listed = set(re.findall(r"^\| `([\w./]+)`", README, flags=re.MULTILINE))
    files = {path.name for path in ROOT.glob("*.py")}
    assert files <= listed, f"not in the README: {files - listed}"
    assert all((ROOT / name).exists() for name in listed)
    assert (ROOT / "docs" / "chelsea.png").is_file()
