"""The README and docs/ are true: commands parse, snippets run on the shipped weights, no file is left out."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import benchmark
import config
import demo
import fid_score
import inpainting
import make_cats
import make_masks
import sweep
import training_transformer
import training_vqgan

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS["README.md"]
SCRIPTS = (
    training_vqgan, training_transformer, inpainting, fid_score, sweep, benchmark, make_masks, make_cats, demo,
)  # fmt: skip
BLOCKS = [
    block for text in TEXTS.values() for block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
]
SHELL = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]
COMMANDS = [line for line in SHELL if line.startswith("python ")]
COMMANDS += [
    line[line.index(name) :]
    for line in SHELL
    if line.startswith("torchrun")
    for name in line.split()
    if name.endswith(".py")
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda module: module.__name__)
def test_help_names_every_flag_that_a_page_gives_the_script(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for command in COMMANDS:
        name, *arguments = shlex.split(command.removeprefix("python "))
        if name == f"{script.__name__}.py":
            for flag in (argument for argument in arguments if argument.startswith("--") and "." not in argument):
                assert flag in text, f"{command}: no {flag} in --help"


def test_commands_name_scripts_that_are_there():
    named = {shlex.split(command.removeprefix("python "))[0] for command in COMMANDS} - {"-m"}
    assert {"inpainting.py", "training_vqgan.py", "make_cats.py"} <= named
    assert all((ROOT / name).is_file() for name in named), named


def test_configs_that_are_named_are_there_and_load():
    named = {path for text in TEXTS.values() for path in re.findall(r"\bconfigs/[\w/]+\.yml", text)}
    assert named >= {"configs/cats64.yml", "configs/smoke.yml", "configs/lab.yml"}
    for path in named:
        root = sweep.SweepConfig if "sweeps" in path else config.Config
        config.load_config(ROOT / path, root=root)


def test_links_lead_somewhere():
    for page, text in zip(PAGES, TEXTS.values(), strict=True):
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("target", ["run", "test"])
def test_make_knows_the_targets(target):
    plan = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ("inpainting.py" if target == "run" else "pytest") in plan


def test_make_clean_leaves_results_and_checkpoints():
    plan = subprocess.run(["make", "--dry-run", "clean"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ".venv" in plan and "results" not in plan and "checkpoints" not in plan


def test_python_snippets_run_on_the_shipped_weights(monkeypatch, tmp_path):
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(block, names)
    filled, inputs = names["filled"], names["inputs"]
    known = ~inputs.hole.expand_as(inputs.images)
    assert (filled.images[known] == inputs.images[known]).all()
    assert (tmp_path / "filled.png").is_file()


def test_every_file_at_the_top_is_in_the_tree():
    tree = README[README.index("## What is where") :]
    files = {path.name for path in ROOT.glob("*.py")} | {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")}
    missing = [name for name in files if name not in tree]
    assert not missing, f"not in the README: {missing}"
    listed = re.findall(r"^([\w./ ]+?)  ", tree, flags=re.MULTILINE)
    assert len(listed) > 12 and all((ROOT / name).exists() for names in listed for name in names.split())


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 175
