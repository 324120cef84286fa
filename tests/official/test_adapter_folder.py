"""The folder that an import or an export writes: an adapter is there whole or not at all, and what is not part of one stays."""

import subprocess
import sys
from pathlib import Path

import pytest

from moa_peft import UsageError
from moa_peft.official.adapter_folder import adapter_folder

FILES = ("adapter_config.json", "adapter_model.safetensors")


def write(out: Path, text: str, *, overwrite: bool = False) -> None:
    with adapter_folder(out, overwrite=overwrite) as draft:
        for name in FILES:
            (draft / name).write_text(text)


def fail(out: Path) -> None:
    with adapter_folder(out, overwrite=True) as draft:
        (draft / FILES[1]).write_text("half")
        raise ZeroDivisionError


def contents(folder: Path) -> dict[str, str]:
    return {one.name: one.read_text() for one in folder.iterdir()}


def test_a_second_command_does_not_write_where_one_is_writing(tmp_path: Path) -> None:
    """It removed the draft of the first, which then removed the adapter of the second."""
    out = tmp_path / "new" / "out"
    code = f"from moa_peft.official.adapter_folder import *\nwith adapter_folder(Path({str(out)!r}), overwrite=True): pass"
    with adapter_folder(out, overwrite=False) as draft:
        for name in FILES:
            (draft / name).write_text("first")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "another process works in" in done.stderr
    assert contents(out) == dict.fromkeys(FILES, "first")


def test_after_an_error_a_new_folder_is_gone_and_an_old_one_as_before(tmp_path: Path) -> None:
    old = tmp_path / "old"
    write(old, "old")
    for out in (tmp_path / "new" / "out", old):
        with pytest.raises(ZeroDivisionError):
            fail(out)
    assert list(tmp_path.iterdir()) == [old]
    assert contents(old) == dict.fromkeys(FILES, "old")


def test_after_a_kill_between_two_files_the_folder_can_be_written_again(tmp_path: Path) -> None:
    (tmp_path / ".adapter-killed").mkdir()
    (tmp_path / ".adapter-killed" / FILES[0]).write_text("killed")
    (tmp_path / FILES[1]).write_text("killed")
    with pytest.raises(UsageError, match="add --overwrite"):
        write(tmp_path, "new")
    write(tmp_path, "new", overwrite=True)
    assert contents(tmp_path) == dict.fromkeys(FILES, "new")


def test_a_link_in_an_old_adapter_is_taken_off_and_what_it_names_stays(tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "templates"
    kept.mkdir()
    write(out, "old")
    (out / "additional_chat_templates").symlink_to(kept)
    write(out, "new", overwrite=True)
    assert contents(out) == dict.fromkeys(FILES, "new")
    assert kept.is_dir()
