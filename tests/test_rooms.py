"""The plan of the house: who imports whom in the repository, and what may not be in which room."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("models/*.py")])

ALLOWED = {  # "models" allows every file of the folder
    "benchmark": "config data inpainter inpainting inputs masks models training_transformer training_vqgan utils",
    "classical": "data inputs",
    "config": "decoding models",
    "data": "models.base",
    "decoding": "masks models.base",
    "demo": "config data decoding filling inpainter inputs masks photos pictures utils",
    "drawing": "data decoding inputs utils",
    "fid_score": "config data metrics models.base utils",
    "filling": "data decoding drawing inpainter masks photos utils",
    "inpainter": "classical config data decoding inputs masks models utils",
    "inpainting": "config data decoding drawing inpainter inputs masks models photos tally utils zoo",
    "inputs": "data masks",
    "judge": "data metrics models.base models.perceptual",
    "masks": "data",
    "metrics": "models.base models.perceptual",
    "photos": "data decoding inpainter pictures squares utils",
    "pictures": "data",
    "report": "judge models.base utils",
    "rows": "classical config decoding inpainter inputs masks models.base models.vqgan utils",
    "squares": "",
    "sweep": "config data drawing inputs judge masks metrics models.base report rows utils",
    "tally": "data metrics",
    "training": "config data models.base models.processes utils",
    "training_transformer": "config data inpainter inputs masks models training utils",
    "training_vqgan": "classical config data decoding masks metrics models training utils",
    "utils": "",
    "zoo": "config inpainter",
}
LAZY = {"masks": {"data"}}  # only inside a function: importing the room must not load these


def name_of(path: Path) -> str:
    """The module a file is: `data`, `models.base`, `models` for its __init__."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


ROOMS = {name_of(path) for path in FILES}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(node: ast.AST) -> set[str]:
    """Modules of the repository that an import statement under `node` names."""
    found = set()
    for statement in ast.walk(node):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, f"line {statement.lineno}: relative import"
            inside = {f"{statement.module}.{alias.name}" for alias in statement.names} & ROOMS
            found |= inside or {statement.module}  # `from models import base` is models.base
    return found & ROOMS


def lazy_imports(path: Path) -> set[str]:
    """Those of `imports` that are made inside functions alone."""
    tree = parsed(path)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {statement for function in functions for statement in ast.walk(function)}
    outside = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and node not in inside]
    return imports(tree) - set().union(*map(imports, outside))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_only_what_the_plan_allows(path):
    room = name_of(path)
    if room.partition(".")[0] == "models":
        allowed = {other for other in ROOMS if other.startswith("models")}
    else:
        assert room in ALLOWED, f"{room}.py is not in the plan of tests/test_rooms.py"
        allowed = {other for other in ROOMS if {other, other.partition(".")[0]} & set(ALLOWED[room].split())}
    assert imports(parsed(path)) <= allowed
    assert lazy_imports(path) >= LAZY.get(room, set()) & imports(parsed(path))


def test_the_walk_sees_every_form_of_import():
    code = "import models.base\nfrom models import vqgan\ndef f():\n    from data import pair\n    import json, masks\n"
    assert imports(ast.parse(code)) == {"models.base", "models.vqgan", "data", "masks"}
    assert lazy_imports(ROOT / "masks.py") == {"data"} and not lazy_imports(ROOT / "decoding.py")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_attention_is_by_hand_and_nothing_is_left_to_do(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"MultiheadAttention|scaled_dot_product_attention", text)
    assert not re.findall(r"\b(?:TODO|FIXME|XXX|NotImplemented(?:Error)?)\b", text)


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "models"], ids=name_of)
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
