from pathlib import Path

import pytest

from moa_peft.errors import UsageError
from moa_peft.training import checkpoints
from moa_peft.training.checkpoints import forget_later_checkpoints


def write(folder: Path, step: int, *, complete: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "global").mkdir(parents=True)
    (checkpoint / "adapter_model.safetensors").write_bytes(b"weights")
    (checkpoint / "global" / "shard.bin").write_bytes(b"shard")
    if complete:
        checkpoints.mark_complete(checkpoint)
    return checkpoint


def test_checkpoints_are_sorted_by_step_and_by_whether_they_are_whole(tmp_path: Path) -> None:
    for step, complete in ((100, True), (20, True), (3, False)):
        write(tmp_path, step, complete=complete)
    (tmp_path / "checkpoint-best").mkdir()
    found = checkpoints.find_checkpoints(tmp_path)
    assert [one.name for one in found.complete] == ["checkpoint-20", "checkpoint-100"]
    assert [one.name for one in found.incomplete] == ["checkpoint-3"]
    assert not checkpoints.find_checkpoints(tmp_path / "absent").complete


def test_a_checkpoint_with_a_file_missing_cut_or_no_manifest_is_not_complete(tmp_path: Path) -> None:
    missing, cut, torn = write(tmp_path, 1), write(tmp_path, 2), write(tmp_path, 3)
    assert all(checkpoints.is_complete(one) for one in (missing, cut, torn))
    (missing / "global" / "shard.bin").unlink()
    (cut / "adapter_model.safetensors").write_bytes(b"wei")
    (torn / checkpoints.MANIFEST).write_text('{"sizes": {')
    assert not any(checkpoints.is_complete(one) for one in (missing, cut, torn))


@pytest.mark.parametrize("content", ["[]", "{}", '{"sizes": {}}', '{"sizes": 3}', "null"])
def test_a_manifest_that_names_no_files_marks_nothing(content: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 1, complete=False)
    (checkpoint / checkpoints.MANIFEST).write_text(content)
    assert not checkpoints.is_complete(checkpoint)


def test_pruning_keeps_the_newest_complete_ones_and_the_best_and_drops_what_was_cut_off(
    tmp_path: Path,
) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    write(tmp_path, 35, complete=False)
    checkpoints.prune(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 5
    checkpoints.prune(tmp_path, 2, spare=str(tmp_path / "checkpoint-10"))
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "checkpoint-10",
        "checkpoint-30",
        "checkpoint-40",
    ]
    checkpoints.prune(tmp_path, 0)
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint-40"]


def test_a_checkpoint_cut_off_while_it_is_deleted_does_not_pass_as_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    for step in (1, 2):
        write(tmp_path, step)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.prune(tmp_path, 1)
    assert [one.name for one in checkpoints.find_checkpoints(tmp_path).complete] == ["checkpoint-2"]


def test_going_back_takes_the_mark_off_later_checkpoints_so_that_none_outlives_what_is_written_anew(
    tmp_path: Path,
) -> None:
    for step in (2, 10, 30):
        write(tmp_path, step)
    forget_later_checkpoints(tmp_path, None)
    assert len(checkpoints.find_checkpoints(tmp_path).complete) == 3
    forget_later_checkpoints(tmp_path, str(tmp_path / "checkpoint-10"))
    assert [one.name for one in checkpoints.find_checkpoints(tmp_path).complete] == [
        "checkpoint-2",
        "checkpoint-10",
    ]


def test_the_last_complete_checkpoint_is_chosen_or_the_one_named(tmp_path: Path) -> None:
    assert checkpoints.choose(tmp_path, True) is None
    with pytest.raises(
        UsageError, match=r"checkpoint-1 is not a complete checkpoint of the run in .*: it has none"
    ):
        checkpoints.choose(tmp_path, str(tmp_path / "checkpoint-1"))
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    assert checkpoints.choose(tmp_path, "checkpoint-1") == first
    write(tmp_path, 3, complete=False)
    assert checkpoints.choose(tmp_path, True) == second
    assert checkpoints.choose(tmp_path, str(first)) == first
