"""Folders of the cache: made once, whole or not at all, and made again when they are not."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import moa_peft
from moa_peft.data.cache import MANIFEST, cache_root, cached_folder, draft_folder, locked
from moa_peft.errors import UsageError

SOURCE = {"from": "here"}


def build(folder: Path) -> None:
    (folder / "part").mkdir()
    (folder / "a.txt").write_text("alpha")
    (folder / "part" / "b.txt").write_text("beta")


def make(source: dict[str, str] = SOURCE, builder: Callable[[Path], None] = build) -> Path:
    return cached_folder("thing", source=source, build=builder, needs_bytes=10)


def forbidden(folder: Path) -> None:
    raise AssertionError("built a second time")


def test_the_cache_lies_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOA_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("MOA_CACHE")
    assert cache_root() == tmp_path / "xdg" / "moa-peft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "moa-peft"


def test_a_whole_folder_is_made_once_and_silently_used_again(capsys: pytest.CaptureFixture[str]) -> None:
    folder = make()
    assert make(builder=forbidden) == folder
    assert (folder / "part" / "b.txt").read_text() == "beta"
    assert capsys.readouterr().err == ""


def test_a_folder_that_can_be_read_but_not_written_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make()
    monkeypatch.setattr("moa_peft.data.cache.locked", forbidden)
    assert make(builder=forbidden) == folder


def lose_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def tear_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])


def empty_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{}")


def lose_file(folder: Path) -> None:
    (folder / "part" / "b.txt").unlink()


def cut_file(folder: Path) -> None:
    (folder / "a.txt").write_text("alp")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lose_manifest, "moa_manifest.json is missing or unreadable"),
        (tear_manifest, "moa_manifest.json is missing or unreadable"),
        (empty_manifest, "moa_manifest.json is missing or unreadable"),
        (lose_file, "part/b.txt is missing"),
        (cut_file, "a.txt has 3 bytes, not 5"),
    ],
)
def test_a_damaged_folder_is_made_again_with_one_line_that_says_so(
    damage: Callable[[Path], None], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make()
    damage(folder)
    assert make() == folder
    assert (
        capsys.readouterr().err == f"moa: the cached folder {folder} is not whole ({says}): making it again\n"
    )
    assert make(builder=forbidden) == folder
    assert sorted(one.name for one in cache_root().iterdir()) == [".locks", "thing"]


def test_a_folder_made_from_something_else_is_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    make({"from": "elsewhere"})
    make()
    assert "it was made from something else" in capsys.readouterr().err
    make(builder=forbidden)


def test_a_build_that_fails_leaves_nothing_behind_and_keeps_what_was_there() -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        make(builder=fail)
    assert [one.name for one in cache_root().iterdir()] == [".locks"]
    folder = make()
    with pytest.raises(RuntimeError, match="half way"):
        make({"from": "elsewhere"}, fail)
    assert make(builder=forbidden) == folder


def test_what_a_killed_process_left_is_removed() -> None:
    left = cache_root() / ".draft-thing-old"
    left.mkdir(parents=True)
    (left / "big").write_text("x")
    make()
    assert not left.exists()


def test_the_manifest_states_the_source_and_every_file() -> None:
    folder = make()
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["source"] == SOURCE
    assert {name: one["size"] for name, one in manifest["files"].items()} == {"a.txt": 5, "part/b.txt": 4}


class Usage(NamedTuple):
    free: int


def test_a_disk_without_room_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=3_000_000))
    with (
        pytest.raises(
            UsageError, match=r"preparing thing takes 5 MB and the disk of the cache folder .* has 3 MB free"
        ),
        locked("thing"),
        draft_folder("thing", needs_bytes=5_000_000),
    ):
        pass


def test_a_cache_that_is_a_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("MOA_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        UsageError, match=r"the cache folder .*file cannot be written to \(.*\): set MOA_CACHE to"
    ):
        make()


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
def test_a_disk_error_while_building_names_the_cache(number: int) -> None:
    def fail(folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    with pytest.raises(UsageError, match=rf"cannot be written to \({os.strerror(number)}\): set MOA_CACHE"):
        make(builder=fail)


def test_an_error_that_is_not_of_the_disk_passes() -> None:
    def fail(folder: Path) -> None:
        raise OSError("no such model")

    with pytest.raises(OSError, match="no such model"):
        make(builder=fail)


BUILDS_SLOWLY = """
import sys, time, types
package = types.ModuleType("moa_peft")  # stands in for the real one, whose import takes seconds
package.__path__ = [sys.argv[2]]
sys.modules["moa_peft"] = package
from moa_peft.data.cache import cached_folder

def slow(folder):
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    time.sleep(3)
    (folder / "a.txt").write_text("alpha")

print("ready", flush=True)
sys.stdin.readline()
cached_folder("thing", source={"from": "here"}, build=slow, needs_bytes=10)
"""


def test_of_two_processes_at_once_one_builds_and_the_other_says_that_it_waits(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", BUILDS_SLOWLY, str(log), str(Path(moa_peft.__file__).parent)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    workers = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    said = [worker.communicate(timeout=60)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert log.read_text() == "built\n"
    assert sorted(said) == ["", "moa: another process is preparing thing: waiting for it\n"]
