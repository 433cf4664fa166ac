"""settings.py: strict settings, and YAML read as one means it."""

import datetime

import pydantic
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field

from models.settings import Settings, dump_yaml, parse_yaml, read_config, read_yaml


class NetConfig(Settings):
    width: int = Field(ge=1)
    shape: tuple[float, ...] = Field((1.0,), strict=False)


@pytest.mark.parametrize(
    ("options", "path"),
    [
        (dict(width=3, depth=1), "depth"),
        (dict(), "width"),
        (dict(width="3"), "width"),
        (dict(width=3.0), "width"),
        (dict(width=True), "width"),
        (dict(width=0), "width"),
        (dict(width=3, shape=(1.0, float("inf"))), r"shape\.1"),
        (dict(width=3, shape=(float("nan"),)), r"shape\.0"),
    ],
)
def test_settings_refuse_unknown_missing_mistyped_and_out_of_range_keys(options, path):
    with pytest.raises(pydantic.ValidationError, match=rf"(?m)^{path}$"):
        NetConfig.model_validate(options)


def test_settings_are_frozen():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        NetConfig(width=3).width = 4


# YAML


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".0001", "+1e-4", "10e-5"])
def test_every_way_of_writing_a_float_is_a_float(text):
    value = parse_yaml(text)
    assert type(value) is float and value == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-12", -12),
        ("0", 0),
        ('"1"', "1"),
        ("'1e-4'", "1e-4"),
        ("1.0.0", "1.0.0"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1e-4x", "1e-4x"),
        ("-", [None]),
        (".", "."),
        ("2024-01-02", datetime.date(2024, 1, 2)),
        ("true", True),
        ("null", None),
        ("-1e3", -1000.0),
        ("1.", 1.0),
        ("[1, 2e0, '3']", [1, 2.0, "3"]),
    ],
)
def test_other_values_stay_what_yaml_says(text, value):
    parsed = parse_yaml(text)
    assert parsed == value and type(parsed) is type(value)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_python_prints_is_read_back(value):
    assert parse_yaml(repr(value)) == value and type(parse_yaml(repr(value))) is float


@settings(deadline=None)
@given(st.integers())
def test_every_integer_stays_an_integer(value):
    assert parse_yaml(str(value)) == value and type(parse_yaml(str(value))) is int


def test_our_floats_do_not_change_pyyaml_for_others():
    assert yaml.safe_load("1e-4") == "1e-4"


def test_yaml_cannot_build_python_objects(tmp_path):
    file = tmp_path / "bad.yml"
    file.write_text(f"a: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    with pytest.raises(ValueError, match=r"bad\.yml: not valid YAML"):
        read_yaml(file)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "{x: {a: 1, a: 1}}", "- {b: 1, a: 2, 'a': 3}"])
def test_a_key_that_is_there_twice_is_named(tmp_path, text):
    with pytest.raises(yaml.YAMLError, match="key 'a' is there twice"):
        parse_yaml(text)
    (tmp_path / "twice.yml").write_text(text)
    with pytest.raises(ValueError, match=r"(?s)twice\.yml: not valid YAML: key 'a' is there twice.*line"):
        read_yaml(tmp_path / "twice.yml")


def test_a_merged_mapping_may_be_overridden():
    assert parse_yaml("base: &base {a: 1, b: 2}\nmore: {<<: *base, a: 3}")["more"] == {"a": 3, "b": 2}


def test_read_yaml_reads_a_mapping(tmp_path):
    (tmp_path / "good.yml").write_text("a: {b: 1e-4}\nname: Käthe\n", encoding="utf-8")
    assert read_yaml(str(tmp_path / "good.yml")) == {"a": {"b": 1e-4}, "name": "Käthe"}


def test_read_yaml_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yml: no such config file"):
        read_yaml(tmp_path / "none.yml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1, 2", "not valid YAML"),
        (b"a: 2024-13-45", "not valid YAML"),
        (b"a: !!bool x", "not valid YAML: a value that is not of its tag"),
        (b"a: !!float ''", "not valid YAML: a value that is not of its tag"),
        (b"? [a]\n: 1", "not valid YAML: while constructing a mapping"),
        (b"\xff\xfe\x00\x80", "not valid YAML"),
        (b"", "expected a mapping of options, found NoneType"),
        (b"- 1\n- 2", "expected a mapping of options, found list"),
    ],
)
def test_read_yaml_names_a_file_that_is_no_mapping(tmp_path, content, message):
    (tmp_path / "odd.yml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"odd\.yml: {message}"):
        read_yaml(tmp_path / "odd.yml")


# Writing


@pytest.mark.parametrize(
    ("text", "value"), [("010", 10), ("-007", -7), ("1:30", "1:30"), ("0x10", "0x10"), ("1_000", "1_000")]
)
def test_numbers_are_those_of_yaml_1_2_and_decimal(text, value):
    assert parse_yaml(text) == value and type(parse_yaml(text)) is type(value)


@settings(max_examples=200)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
@example("1e-4")
@example("010")
@example("1:30")
@example("null")
@example(["yes", "2.", "-.inf", "2026-11-26", ""])
def test_what_is_dumped_is_read_back(value):
    assert parse_yaml(dump_yaml(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [lol, lol]\n"
        + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30)),  # 2**30 of them
        "a: &a {inner: *a}",
        "a: &a [*a]",
    ],
)
def test_aliases_that_multiply_are_refused(tmp_path, text):
    (tmp_path / "laughs.yml").write_text(text)
    with pytest.raises(
        ValueError, match=r"laughs\.yml: not valid YAML: more than 100000 values, its aliases written out"
    ):
        read_yaml(tmp_path / "laughs.yml")
    assert parse_yaml("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}


def test_what_is_nested_too_deeply_and_names_that_are_too_long_are_named(tmp_path):
    (tmp_path / "deep.yml").write_text("a: " + "[" * 5000)
    with pytest.raises(ValueError, match=r"deep\.yml: not valid YAML: nested too deeply"):
        read_yaml(tmp_path / "deep.yml")
    (tmp_path / "long.yml").write_text(f"base: {'x' * 300}.yml")
    with pytest.raises(FileNotFoundError, match=r"long\.yml: base: no such file"):
        read_config(tmp_path / "long.yml", NetConfig)
    for number in range(20):
        (tmp_path / f"{number}.yml").write_text(f"base: {number + 1}.yml")
    with pytest.raises(ValueError, match=r"16\.yml: more than 16 bases upon each other"):
        read_config(tmp_path / "0.yml", NetConfig)
