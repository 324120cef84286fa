import errno
import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from moa_peft import json_lines
from moa_peft.errors import UsageError
from moa_peft.json_lines import append_rows, read_rows
from moa_peft.training import output_folder


def test_a_folder_with_anything_but_a_recipe_in_it_is_refused(tmp_path: Path) -> None:
    """A start that failed on a full disk left the recipe, and its own retry was refused."""
    for name in ("moa_recipe.json", ".lock"):
        (tmp_path / name).write_text("{}")
    output_folder.check_unused(tmp_path)
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(UsageError, match="exists and is not empty"):
        output_folder.check_unused(tmp_path)


def test_drafts_of_a_killed_run_are_swept_and_nothing_else(tmp_path: Path) -> None:
    """A kill during the last save left `.adapter-XXXX` for ever."""
    (tmp_path / ".adapter-ab12").mkdir()
    for name in (".adapter-ab12/adapter_model.safetensors", ".README.md.tmp", ".mine", "adapter_config.json"):
        (tmp_path / name).write_text("x")
    output_folder.sweep(tmp_path)
    assert {one.name for one in tmp_path.iterdir()} == {".mine", "adapter_config.json"}


def test_a_text_that_cannot_be_written_whole_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "card.md"
    output_folder.write_text(file, "old")

    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        output_folder.write_text(file, "new")
    monkeypatch.undo()
    assert file.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["card.md"]


def test_an_adapter_appears_whole_its_config_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text("old")
    moved: list[tuple[str, bool]] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        moved.append((target.name, (tmp_path / "adapter_config.json").exists()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    with output_folder.replacing(tmp_path) as draft:
        for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
            (draft / name).write_text("new")
        assert (tmp_path / "adapter_config.json").read_text() == "old"
    assert moved == [
        ("adapter_model.safetensors", False),
        ("tokenizer.json", False),
        ("adapter_config.json", False),
    ]
    assert all(one.read_text() == "new" for one in tmp_path.iterdir())


def test_a_folder_of_the_adapter_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    """A tokenizer's further chat templates lie in one; the second save failed, with the adapter's config gone."""
    for text in ("old", "new"):
        with output_folder.replacing(tmp_path) as draft:
            (draft / "templates").mkdir()
            (draft / "templates" / text).write_text(text)
            (draft / "adapter_config.json").write_text(text)
    assert [one.name for one in (tmp_path / "templates").iterdir()] == ["new"]
    assert (tmp_path / "adapter_config.json").read_text() == "new"


def test_an_error_while_an_adapter_is_written_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("old")

    def write_half() -> None:
        with output_folder.replacing(tmp_path) as draft:
            (draft / "adapter_model.safetensors").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_half()
    assert [one.name for one in tmp_path.iterdir()] == ["adapter_config.json"]
    assert (tmp_path / "adapter_config.json").read_text() == "old"


def test_rows_of_results_are_appended_a_line_each(tmp_path: Path) -> None:
    for number in range(3):
        append_rows(tmp_path / "results.jsonl", [{"n": number, "text": "a\nb"}])
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in lines] == [0, 1, 2]


def test_a_row_that_does_not_fit_on_the_disk_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_rows(tmp_path / "results.jsonl", [{"n": 0}])
    write_all = os.write
    monkeypatch.setattr(json_lines.os, "write", lambda handle, line: write_all(handle, line[:3]))
    with pytest.raises(OSError, match="No space left on device"):
        append_rows(tmp_path / "results.jsonl", [{"n": 1}])
    assert (tmp_path / "results.jsonl").read_text() == '{"n": 0}\n'


def test_a_row_without_its_line_end_is_whole_and_the_next_begins_a_line(tmp_path: Path) -> None:
    """An editor leaves the last line end out; the row was taken for one that a kill had cut off, and deleted."""
    file = tmp_path / "results.jsonl"
    file.write_text('{"n": 0}\n{"n": 1}')
    assert [row["n"] for row in read_rows(file)] == [0, 1]
    append_rows(file, [{"n": 2}])
    assert file.read_text() == '{"n": 0}\n{"n": 1}\n{"n": 2}\n'
    file.write_text('{"n": 0}\n{"n": 1')
    append_rows(file, [{"n": 2}])
    assert file.read_text() == '{"n": 0}\n{"n": 2}\n'


@pytest.mark.parametrize("content", ["a text of mine", '[{"instruction": "a"}]', '{"n": 0}\nmine'])
def test_a_file_of_something_else_is_refused_and_stays(tmp_path: Path, content: str) -> None:
    """`moa bench --out train.json` emptied the file."""
    file = tmp_path / "mine"
    file.write_text(content)
    with pytest.raises(UsageError, match=r"line \d: not a JSON object"):
        append_rows(file, [{"n": 1}])
    assert file.read_text() == content


def test_a_recipe_that_cannot_be_read_is_no_run_to_resume(tmp_path: Path) -> None:
    (tmp_path / "moa_recipe.json").write_text(json.dumps({"seed": 1}))
    assert output_folder.read_recipe(tmp_path) == {"seed": 1}
    for text in ("{", "[]"):
        (tmp_path / "moa_recipe.json").write_text(text)
        with pytest.raises(UsageError, match=r"holds no readable moa_recipe\.json"):
            output_folder.read_recipe(tmp_path)


def write(error: Exception, folder: Path) -> None:
    with output_folder.disk_errors_named(folder):
        raise error


def test_what_writers_of_weights_say_of_a_full_disk_becomes_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (SafetensorError, Exception):  # the latter is tokenizers'
        said = kind("Error while serializing: I/O error: Permission denied (os error 13)")
        with pytest.raises(OSError, match="Permission denied") as caught:
            write(said, tmp_path)
        assert (caught.value.errno, caught.value.filename) == (errno.EACCES, str(tmp_path))
    torchs = RuntimeError("basic_ios::clear: iostream error")
    with pytest.raises(RuntimeError, match="iostream"):  # the disk is not full: another matter
        write(torchs, tmp_path)
    monkeypatch.setattr(output_folder, "free_bytes", lambda folder: 0)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(torchs, tmp_path)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("error", [SafetensorError("header too large"), RuntimeError("shapes differ")])
def test_other_errors_of_writers_pass_as_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error), match=str(error)) as caught:
        write(error, tmp_path)
    assert caught.value is error
