"""Strict, frozen settings and the YAML that they are read from."""

import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import get_args

import pydantic
import yaml

MOST_VALUES = 100_000  # of a YAML file, aliases written out
MOST_BASES = 16  # of a config, one upon the other


class Settings(pydantic.BaseModel):
    """A frozen group of options: an unknown, missing, mistyped or out-of-range key is an error that names its path."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def explain(error: pydantic.ValidationError, root: type[Settings]) -> list[str]:
    """A validation error of `root` as a line a key: its path, what was expected and what was found."""
    lines = []
    for item in error.errors():
        where, told = ".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            section = root
            for name in item["loc"][:-1]:
                section = section.model_fields[name].annotation if isinstance(name, str) else get_args(section)[0]
            told = f"unknown key, known are: {', '.join(section.model_fields)}"
        elif item["type"] != "missing" and not isinstance(item["input"], dict):
            told += f", found {item['input']!r:.60}"
        lines.append(f"{where}: {told}" if where else told)
    return lines


_NUMBERS = {  # YAML 1.2: in PyYAML `1e-4` is a string, 010 is 8 and 1:30 is 90
    "tag:yaml.org,2002:int": re.compile(r"^[-+]?[0-9]+$"),
    "tag:yaml.org,2002:float": re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|nan)$"),
}
_RESOLVERS = {
    first: [(tag, pattern) for tag, pattern in known if tag not in _NUMBERS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _first in "-+.0123456789":
    _RESOLVERS[_first] = [*_RESOLVERS.get(_first, []), *_NUMBERS.items()]


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers and no key twice: in PyYAML the last of two keys wins."""

    yaml_implicit_resolvers = _RESOLVERS

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *base, whose keys may be overridden
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):  # which PyYAML names
                continue
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for something else."""

    yaml_implicit_resolvers = _RESOLVERS


def parse_yaml(text: str):
    """`text` as plain Python values; `1e-4` is a float. Raises yaml.YAMLError."""
    try:
        value = yaml.load(text, Loader=_Loader)
        if _values(value, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES} values, its aliases written out")
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    except (LookupError, AttributeError, TypeError, ValueError) as error:  # of PyYAML, for `!!bool x` and its kin
        raise yaml.YAMLError(f"a value that is not of its tag ({error})") from error
    return value


def _values(value, counted: dict[int, float]) -> float:
    """How many plain values there are in `value`, one in two places twice; infinitely many where it contains itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in counted:
        counted[id(value)] = math.inf
        inner = [*value.values()] if isinstance(value, dict) else value
        counted[id(value)] = 1 + sum(_values(item, counted) for item in inner)
    return counted[id(value)]


def dump_yaml(value: object) -> str:
    """Plain values in one line, which `parse_yaml` reads back."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def read_yaml(path) -> dict:
    """The mapping in the YAML file `path`. Raises FileNotFoundError, or ValueError naming the file."""
    path = Path(path)
    if not _is_file(path):
        raise FileNotFoundError(f"{path}: no such config file")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an impossible date
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of options, found {type(values).__name__}")
    return values


def read_config(path, root: type[Settings], above: tuple[Path, ...] = ()) -> dict:
    """The values for `root` in the YAML file `path` upon those of its `base`, if it names one.

    Sections merge key by key; lists, and mappings of free keys such as `hiding`, replace. Raises FileNotFoundError, or
    ValueError naming the files: a base that is missing, or that leads back to the file.
    """
    path = Path(path)
    if path.resolve() in above:
        raise ValueError(f"{path}: its base leads back to itself: {' -> '.join(other.name for other in above)}")
    values = read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ValueError(f"{path}: base: expected the name of a file, found {base!r}")
    if len(above) >= MOST_BASES:
        raise ValueError(f"{path}: more than {MOST_BASES} bases upon each other")
    ground = path.parent / base
    if not _is_file(ground):
        raise FileNotFoundError(f"{path}: base: no such file {ground}")
    return _merged(read_config(ground, root, (*above, path.resolve())), values, root)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        return False


def _merged(ground: dict, own: dict, section: type[Settings]) -> dict:
    merged = dict(ground)
    for key, value in own.items():
        field = section.model_fields.get(key)
        inner = field.annotation if field and isinstance(field.annotation, type) else None
        nested = inner and issubclass(inner, Settings) and isinstance(value, dict) and isinstance(ground.get(key), dict)
        merged[key] = _merged(ground[key], value, inner) if nested else value
    return merged


def in_brief(problems: list[str], most: int = 3) -> str:
    """The first `most` problems in one line, and how many more there are."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more
