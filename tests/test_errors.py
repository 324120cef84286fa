"""Whose an error is: what a library raises for a setting is one line, a fault of ours keeps its traceback."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from moa_peft import cli
from moa_peft.errors import LibraryError, UsageError, library_errors
from moa_peft.mixture.gate_functions import sigmoid_gates


def of_a_library() -> None:
    GenerationConfig.from_dict({"max_new_tokens": -1}).validate(strict=True)


def of_a_library_by_way_of_python() -> None:
    from transformers.trainer_pt_utils import AcceleratorConfig

    AcceleratorConfig.from_json_file(__file__)  # json's error, for a file that transformers was given


def of_ours() -> None:
    sigmoid_gates(None, None)  # type: ignore[arg-type]  # fails in there


def without_memory() -> None:
    torch.empty(2**50)


@pytest.mark.parametrize("fails", [of_a_library, of_a_library_by_way_of_python, without_memory])
def test_an_error_of_a_library_becomes_one_line_with_its_kind_and_itself_as_the_cause(
    fails: Callable[[], None],
) -> None:
    with (
        pytest.raises(LibraryError, match=r"^no way: [A-Za-z]+Error: [^\n]+$") as caught,
        library_errors("no way"),
    ):
        fails()
    assert not isinstance(caught.value.__cause__, UsageError)


def test_a_fault_of_ours_passes_as_it_is() -> None:
    with pytest.raises((TypeError, AttributeError)) as caught, library_errors():
        of_ours()
    assert not isinstance(caught.value, UsageError)


@pytest.mark.parametrize("error", [UsageError("told"), OSError(28, "No space left on device", "x")])
def test_what_is_told_already_passes_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, library_errors():
        raise error
    assert caught.value is error


def test_a_message_that_echoes_a_long_value_keeps_its_beginning_and_its_end() -> None:
    said = str(UsageError(f"seed is {'9' * 100_000}: give a whole number"))
    assert len(said) < 2100
    assert said.startswith("seed is 999")
    assert "characters ...]" in said
    assert said.endswith("give a whole number")


def ended(fails: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of a command line whose verb fails so."""
    monkeypatch.setattr(cli, "app", fails)
    monkeypatch.setattr(cli, "register_verbs", lambda: None)
    monkeypatch.setattr(sys, "argv", ["moa"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back afterwards
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_the_command_names_a_file_with_the_whole_traceback_of_a_librarys_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    assert ended(of_a_library_by_way_of_python, monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    found = re.fullmatch(
        r"moa: error: transformers refuses this: JSONDecodeError: .* \(whole traceback: (.+)\)", line
    )
    assert found, line
    written = Path(found[1]).read_text()
    assert written.startswith("Traceback")
    assert json.JSONDecodeError.__name__ in written
    assert "from_json_file" in written


def test_the_command_leaves_a_fault_of_ours_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", of_ours)
    monkeypatch.setattr(cli, "register_verbs", lambda: None)
    monkeypatch.setattr(sys, "argv", ["moa"])
    with pytest.raises((TypeError, AttributeError)):
        cli.main()


def test_an_argument_that_is_no_text_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "register_verbs", lambda: None)
    monkeypatch.setattr(sys, "argv", ["moa", "train", "--output_dir", "run\udcff"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err.startswith(r"moa: error: the argument 'run\udcff' is not text in UTF-8")
