"""Strict, frozen settings and the YAML that they are read from."""

import re
from pathlib import Path
from typing import get_args

import pydantic
import yaml


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


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats and no key twice: in PyYAML `1e-4` without a dot is a string, and the last of two keys wins."""

    def construct_mapping(self, node, deep=False):
        seen = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *base, whose keys may be overridden
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str):
    """`text` as plain Python values; `1e-4` is a float. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path) -> dict:
    """The mapping in the YAML file `path`. Raises FileNotFoundError, or ValueError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an impossible date
        raise ValueError(f"{path}: not valid YAML: {error}") from error
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
    ground = path.parent / base
    if not ground.is_file():
        raise FileNotFoundError(f"{path}: base: no such file {ground}")
    return _merged(read_config(ground, root, (*above, path.resolve())), values, root)


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
