"""Runs untrusted programs, each in a separate process that can harm nothing and reach nothing.

What holds a program: its own mount, process, network and IPC namespaces; a root that shows the interpreter and the
system's libraries, read-only, and one empty folder that is thrown away; an unused user without privileges; limits on
CPU time, memory, processes, and the size and number of its files; an empty environment; an end by the clock. What does
not: the kernel is shared, so a program that knows of a hole in it gets out. See docs/evaluation.md.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from moa_peft.errors import RunError, UsageError

Verdict = Literal["passed", "failed", "timed out", "killed"]
"""How a program ended: through to its end; by an error or before its tests had run; by its time; by another limit."""

_STAGE = Path(__file__).with_name("sandbox_stage.py")
_RUNNER = Path(__file__).with_name("sandbox_runner.py")
_SYSTEM = (
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/bin",
    "/nix/store",
    "/gnu/store",
    "/etc/ld.so.cache",
)
"""What an interpreter may need of the system; what is missing is left out."""

_PROBE = """
import os, socket
assert os.getuid() != 0, "it runs as root"
assert not set(os.listdir("/")) - {shown!r}, "it sees " + ", ".join(os.listdir("/"))
assert [name for _, name in socket.if_nameindex()] == ["lo"], "it has a network"
assert len(os.environ) <= 5, "it has an environment"
for path in ("/probe", "/usr/probe", "/dev/probe"):
    try:
        open(path, "w")
    except OSError:
        continue
    raise AssertionError("it writes to " + path)
try:
    os.fork()
except OSError:
    pass
else:
    raise AssertionError("it starts processes")
open("probe", "w").close()
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a program may use."""

    cpu_seconds: int = 10
    """CPU time, seconds."""

    wall_seconds: float = 30.0
    """Time by the clock, seconds, its start included."""

    memory_mib: int = 512
    """Address space, 2**20 bytes."""

    processes: int = 1
    """Processes and threads, itself included."""

    file_mib: int = 1
    """The largest file it may write, 2**20 bytes."""

    disk_mib: int = 16
    """All files of its folder together, 2**20 bytes."""

    open_files: int = 64
    """Files open at once."""

    def for_the_kernel(self) -> dict[str, tuple[int, int]]:
        """Soft and hard values by the names of `resource`."""
        mib = 2**20
        single = {
            "RLIMIT_AS": self.memory_mib * mib,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_FSIZE": self.file_mib * mib,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
        }
        # at the first a program could still catch the signal, at the second it is killed
        return {name: (value, value) for name, value in single.items()} | {
            "RLIMIT_CPU": (self.cpu_seconds, self.cpu_seconds + 1)
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a program ended."""

    verdict: Verdict
    """"passed" only where it ran to its end."""

    detail: str
    """What it raised or what ended it; "" for one that passed."""


def run_programs(
    programs: Sequence[str], limits: Limits | None = None, *, workers: int | None = None
) -> list[Outcome]:
    """Run several programs, a few at a time.

    Args:
        programs: Their texts.
        limits: For each; None for the defaults.
        workers: How many at a time; None for one a CPU core.

    Returns:
        One outcome a program, in the order given.

    Raises:
        UsageError: As `check_isolation`.
        RunError: As `run_program`.
    """
    if not programs:
        return []
    check_isolation()
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda one: run_program(one, limits), programs))


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Run one program to its end, or to its limits.

    Args:
        program: Its text; whatever it prints is dropped.
        limits: What it may use; None for the defaults.

    Returns:
        How it ended. Never raises for what a program does.

    Raises:
        RunError: If it could not be isolated; it was not run then.
    """
    limits, token = limits or Limits(), secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="moa_sandbox_") as root,
        tempfile.TemporaryFile() as text,
        tempfile.TemporaryFile() as report,
        tempfile.TemporaryFile() as complaint,
    ):
        text.write(f"{token}\n{program}".encode(errors="replace"))
        text.seek(0)
        stage = subprocess.Popen(
            [_python(), "-I", "-S", "-B", str(_STAGE), json.dumps(_order(root, limits))],
            stdin=text, stdout=report, stderr=complaint, cwd="/", env={}, start_new_session=True,
        )  # fmt: skip
        try:
            code = stage.wait(limits.wall_seconds)
        except subprocess.TimeoutExpired:
            return Outcome(verdict="timed out", detail=f"{limits.wall_seconds:g} s by the clock")
        finally:
            _end(stage)
        complaint.seek(0)
        if reason := _text(complaint, 500):  # the program itself cannot write there
            raise RunError(f"a program could not be isolated and was not run: {reason}")
        report.seek(0)
        return _outcome(_text(report, 4096), code, token)


@cache
def check_isolation() -> None:
    """See by a program that looks around that the sandbox holds on this machine; once for a process.

    Raises:
        UsageError: If it cannot be had here, with what it needs.
    """
    needs = (
        "the sandbox needs Linux 5.12 or newer, and root with CAP_SYS_ADMIN or leave for ordinary users to make user "
        "namespaces; in a container, start that with --privileged. Leave the code tasks out otherwise"
    )
    if sys.platform != "linux":
        raise UsageError(f"code cannot be run on {sys.platform}: {needs}")
    shown = {Path(one).parts[1] for one in (*_visible(), "/dev", "/work")}
    try:
        outcome = run_program(_PROBE.format(shown=shown))
    except RunError as error:
        raise UsageError(f"code cannot be run here: {error}: {needs}") from error
    if outcome.verdict != "passed":
        raise UsageError(f"code cannot be run here, the sandbox leaks: {outcome.detail}: {needs}")


def _order(root: str, limits: Limits) -> dict[str, Any]:
    return {
        "root": root,
        "python": _python(),
        "runner": _RUNNER.read_text(encoding="utf-8"),
        "visible": _visible(),
        "disk_mib": limits.disk_mib,
        "limits": limits.for_the_kernel(),
        # a fixed seed of hashes: the same program meets sets in the same order every time
        "environment": {"HOME": "/work", "TMPDIR": "/work", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
    }


def _python() -> str:
    """The interpreter itself, not the one of a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _visible() -> list[str]:
    """What the program's root shows: the system's libraries and the interpreter's own folders, each once."""
    found: list[str] = []
    for path in (*_SYSTEM, os.path.realpath(sys.base_prefix), str(Path(_python()).parent)):
        if not any(path == one or path.startswith(f"{one}/") for one in found):
            found.append(path)
    return found


def _end(stage: "subprocess.Popen[bytes]") -> None:
    """Kill whatever is left; the namespace's first process takes all others with it."""
    if stage.poll() is None:
        os.killpg(stage.pid, signal.SIGKILL)
        stage.wait()


def _text(file: Any, most: int) -> str:
    return file.read(most).decode(errors="replace").strip()


def _outcome(report: str, code: int, token: str) -> Outcome:
    """Read a program's report and exit code; what does not begin with the token is no report."""
    if report.startswith(token):
        said, _, error = report.removeprefix(token).strip().partition(" ")
        return Outcome(verdict="passed" if said == "passed" else "failed", detail=error)
    if code == 128 + signal.SIGXCPU:
        return Outcome(verdict="timed out", detail="its CPU time was used up")
    if code - 128 in set(signal.Signals):
        return Outcome(verdict="killed", detail=signal.Signals(code - 128).name)
    return Outcome(verdict="failed", detail=f"it ended with code {code} before its tests had run")
