import json
import os
from pathlib import Path
from typing import Any

import pytest

from moa_peft.cli.overrides import load_yaml, parse_flags, parse_value
from moa_peft.errors import UsageError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-7.5E+2", -750.0),
        (".5", 0.5),
        ("3", 3),
        ("-1", -1),
        ("007", "007"),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("off", "off"),
        ("none", "none"),
        ("null", None),
        ("1:30", "1:30"),
        ("2026-01-02", "2026-01-02"),
        ("a: b", "a: b"),
        ("- x", "- x"),
        ("*.json", "*.json"),
        ("out #2", "out #2"),
        ("#x", "#x"),
        ("&a b", "&a b"),
        ("9" * 5000, "9" * 5000),
        ('"3"', "3"),
        ("it's", "it's"),
        ("", None),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("{use_reentrant: false}", {"use_reentrant": False}),
    ],
)
def test_a_value_is_what_yaml_1_2_says_it_is(text: str, value: Any) -> None:
    assert parse_value("--x", text) == value
    assert type(parse_value("--x", text)) is type(value)


def test_a_colon_without_a_space_is_not_a_key_without_a_value(tmp_path: Path) -> None:
    """`--model-init-kwargs {dtype:bfloat16}` was float32."""
    message = "the key 'dtype:bfloat16' has no value: write a space after the colon"
    with pytest.raises(UsageError, match=message):
        parse_value("--x", "{dtype:bfloat16}")
    file = tmp_path / "recipe.yaml"
    file.write_text("model_init_kwargs: {dtype:bfloat16}\n")
    with pytest.raises(UsageError, match=message):
        load_yaml(file)


def test_flags_become_a_nested_mapping() -> None:
    flags = [
        "--a.b",
        "1",
        "--a.c=x=y",
        "--packing",
        "--learning-rate",
        "-2e-4",
        "--resume",
        "runs/x",
        "--empty=",
    ]
    assert parse_flags(flags, switches=["packing", "resume"]) == {
        "a": {"b": 1, "c": "x=y"},
        "packing": True,
        "learning_rate": -2e-4,
        "resume": "runs/x",
        "empty": None,
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate"], "--learning_rate has no value: give --learning_rate VALUE"),
        (["--learning_rate", "--seed", "1"], "--learning_rate has no value"),
        (["--pack"], "--pack has no value"),
        (["--seed", "1", "--seed=2"], "--seed is given twice: give it once"),
        (["--max-length", "1", "--max_length", "2"], "--max_length is given twice"),
        (["soft-moa"], "unexpected argument 'soft-moa': settings are given as --name value"),
        (["-s", "1"], "unexpected argument '-s'"),
        (["--", "1"], "unexpected argument '--'"),
        (["--a..b", "1"], "unexpected argument '--a..b'"),
        (["--a", "1", "--a.b", "2"], "--a.b contradicts another flag that sets 'a' as a whole"),
        (["--a.b", "2", "--a", "1"], "--a contradicts another flag that sets a part of it"),
        (["--a", "[1, 2"], r"--a is '\[1, 2': expected ',' or '\]'"),
        (["--a", "{{ run }}"], "--a is .*: a key is a list or a mapping: give a name"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_flags(flags, switches=["packing"])


def test_an_alias_stands_for_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &experts [1, 2]\nb: *experts\n")
    assert load_yaml(tmp_path / "a.yaml") == {"a": [1, 2], "b": [1, 2]}
    with pytest.raises(UsageError, match=r"--a is .*: more than 100,000 values, or one that holds itself"):
        parse_flags(["--a", "[&a [*a]]"])


def test_a_yaml_file_is_read_with_the_same_scalars(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("learning_rate: 1e-4\nsave_strategy: no\nmixture:\n  router: {kind: linear}\n")
    assert load_yaml(file) == {
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "mixture": {"router": {"kind": "linear"}},
    }
    file.write_text("# nothing\n")
    assert load_yaml(file) == {}
    file.write_text(json.dumps({"data": "🦊.jsonl"}))  # as JSON escapes it, in two halves
    assert load_yaml(file) == {"data": "🦊.jsonl"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\n", r"recipe.yaml, line 3: expected ',' or '\]'"),
        ("a: 1\n\tb: 2\n", "recipe.yaml, line 2: "),
        ("seed: 1\ndata: x\nseed: 2\n", "recipe.yaml, line 3: 'seed' is given twice"),
        ('a:\n  0: 1\n  "0": 2\n', "recipe.yaml, line 3: '0' is given twice"),
        ("- a\n- b\n", "recipe.yaml holds a list at its top level: write lines of the form 'name: value'"),
        ("just words\n", r"recipe.yaml holds a single value \('just words'\)"),
        ("1: 2\n", "the key 1 is not a name"),
        ("a: 1\nout: {{ run }}\n", "recipe.yaml, line 2: a key is a list or a mapping: give a name"),
        ("a: !!int abc\n", "recipe.yaml is not YAML: "),
        ("a: !!bool maybe\n", "recipe.yaml is not YAML: "),
        ("a: " + "[" * 5000, "recipe.yaml is not YAML: "),
        ("a: !!python/object/apply:os.getcwd []\n", "recipe.yaml, line 1: could not determine a constructor"),
        ("a: \x01\n", "recipe.yaml is not YAML: "),
        ('a: 1\nb: "\\uD800"\n', r"recipe.yaml, line 2: .*holds half of a character: write it whole"),
        ("a: &a [1, *a]\n", "recipe.yaml: more than 100,000 values, or one that holds itself"),
        (
            "a0: &a0 [1]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)),
            "recipe.yaml: more than 100,000 values",
        ),
        (f"# {'x' * 2**20}", "recipe.yaml is larger than 1,048,576 bytes"),
    ],
)
def test_a_damaged_yaml_file_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_yaml(file)


def test_a_yaml_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no configuration file at .*absent\.yaml"):
        load_yaml(tmp_path / "absent.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    for endless in (tmp_path, tmp_path / "pipe.yaml", Path("/dev/zero")):
        with pytest.raises(UsageError, match="no configuration file at"):
            load_yaml(endless)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"binary.yaml is not a text file in UTF-8"):
        load_yaml(tmp_path / "binary.yaml")
