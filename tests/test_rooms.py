"""The plan of the house: which room may import which, and what may not be in which room.

A room is a package or a module at the root. docs/design.md shows the plan; this test holds the code to it.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("models", "maskgit", "evaluation", "photos", "training")
FILES = sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in ROOT.glob(f"{package}/*.py"))])

ALLOWED = {
    "utils": "",
    "files": "",
    "interrupts": "",
    "models": "files",
    "maskgit": "files models utils",
    "evaluation": "files maskgit models photos utils",
    "photos": "files maskgit utils",
    "config": "maskgit models utils",
    "training": "config evaluation files interrupts maskgit models utils",
    "benchmark": "config evaluation files interrupts maskgit models training utils",
    "demo": "config interrupts maskgit photos utils",
    "fid_score": "config evaluation files interrupts maskgit models utils",
    "inpainting": "config evaluation interrupts maskgit models photos utils",
    "make_cats": "interrupts maskgit utils",
    "make_masks": "interrupts maskgit utils",
    "sweep": "config evaluation interrupts maskgit utils",
    "training_transformer": "config interrupts models training utils",
    "training_vqgan": "config files interrupts models training utils",
}
MOST_ARROWS = 71
LONGEST = 360  # lines of a module


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


ROOMS = {room_of(path) for path in FILES}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(node: ast.AST) -> set[str]:
    """Modules that an import statement under `node` names."""
    found = set()
    for statement in ast.walk(node):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, f"line {statement.lineno}: relative import"
            found |= {statement.module} | {f"{statement.module}.{alias.name}" for alias in statement.names}
    return found


def rooms(node: ast.AST) -> set[str]:
    """Rooms that an import statement under `node` names."""
    return {name.partition(".")[0] for name in imports(node)} & ROOMS


ARROWS = {(room_of(path), other) for path in FILES for other in rooms(parsed(path)) if other != room_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_the_plan_allows(path):
    room = room_of(path)
    assert room in ALLOWED, f"{room} is not in the plan of tests/test_rooms.py"
    assert rooms(parsed(path)) <= {room, *ALLOWED[room].split()}


def test_the_plan_names_no_room_and_no_arrow_that_is_not_there():
    assert set(ALLOWED) == ROOMS
    assert {(room, other) for room, others in ALLOWED.items() for other in others.split()} == ARROWS


def test_the_plan_has_few_arrows_and_no_cycle():
    assert len(ARROWS) <= MOST_ARROWS
    left = dict.fromkeys(ROOMS)
    while left:
        free = [room for room in left if not any(one == room and other in left for one, other in ARROWS)]
        assert free, f"a cycle among {sorted(left)}"
        for room in free:
            del left[room]


def test_modules_of_a_package_import_each_other_in_no_circle():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    needs = {name: imports(parsed(path)) & set(names) - {name} for name, path in names.items()}
    while needs:
        free = [name for name, others in needs.items() if not others & set(needs)]
        assert free, f"a circle among {sorted(needs)}"
        for name in free:
            del needs[name]


def test_the_walk_sees_every_form_of_import():
    code = "import models.settings\nfrom models import vqgan\ndef f():\n    from maskgit.data import pair\n"
    code += "    import json, utils\n"
    assert rooms(ast.parse(code)) == {"models", "maskgit", "utils"}
    assert {"models.settings", "models.vqgan", "maskgit.data", "utils"} <= imports(ast.parse(code))


def test_scripts_do_not_import_each_other():
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"config", "files", "interrupts", "utils"}
    assert not [arrow for arrow in ARROWS if arrow[1] in scripts]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_attention_is_by_hand_and_nothing_is_left_to_do(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"MultiheadAttention|scaled_dot_product_attention", text)
    assert not re.findall(r"\b(?:TODO|FIXME|XXX|NotImplemented(?:Error)?)\b", text)
    assert "unittest" not in text, "mocks are for tests"
    assert text.count("\n") <= LONGEST, "is it still one idea?"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "models"], ids=lambda path: path.stem)
def test_networks_neither_print_nor_choose_devices_nor_optimize(path):
    nodes = list(ast.walk(parsed(path)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not names & {"print", "optim", "cuda", "tqdm"}
    assert not {module.split(".")[-1] for module in modules} & {"optim", "cuda", "logging", "tqdm"}
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [text for text in strings if re.fullmatch(r"cuda(:\d+)?", text)]
