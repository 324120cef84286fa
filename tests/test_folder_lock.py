"""One process at a time: a second one in the same folder of results is refused in one line."""

from pathlib import Path

import pytest
from filelock import FileLock

from moa_peft.errors import UsageError
from moa_peft.folder_lock import claimed


def test_a_second_process_is_refused_and_the_lock_leaves_no_file(tmp_path: Path) -> None:
    with claimed(tmp_path), claimed(tmp_path):
        assert [one.name for one in tmp_path.iterdir()] == [".lock"]
    assert list(tmp_path.iterdir()) == []
    with (
        FileLock(tmp_path / ".lock"),  # as another process has it
        pytest.raises(
            UsageError, match=r"another process works in .*: wait for it, or choose another folder"
        ),
        claimed(tmp_path),
    ):
        pass


def test_the_folder_is_held_until_the_last_claim_of_it_ends(tmp_path: Path) -> None:
    with claimed(tmp_path):
        with claimed(tmp_path):
            pass
        with pytest.raises(TimeoutError):
            FileLock(tmp_path / ".lock", timeout=0).acquire()


def test_a_new_folder_that_stays_empty_goes_again_and_an_old_one_stays(tmp_path: Path) -> None:
    new = tmp_path / "a" / "new"
    with claimed(new):
        pass
    assert not new.parent.exists()
    with claimed(new):
        (new / "file").write_text("x")
    assert [one.name for one in new.iterdir()] == ["file"]
    with claimed(tmp_path):
        pass
    assert tmp_path.exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="is not a folder: choose another one"), claimed(place):
            pass
