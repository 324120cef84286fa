"""Runs untrusted programs, and the tests that decide whether they are right, where they can harm and reach nothing.

Each runs in its own sandbox of bubblewrap (`bwrap`): namespaces of its own, a read-only root with the interpreter and the
system's libraries, no privileges, a filter of system calls, limits on time and memory. The program holds neither its
tests nor its verdict: see `sandbox_runner`, and docs/evaluation.md for what this does not protect from.
"""

import ctypes
import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

from moa_peft.errors import RunError, UsageError
from moa_peft.evaluation.code_answers import CodeCheck

Verdict = Literal["passed", "failed", "timed out", "killed"]
"""How a program ended: it passed its tests; it did not; by its time; by another limit."""

_RUNNER = Path(__file__).with_name("sandbox_runner.py")
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store", "/gnu/store", "/etc/ld.so.cache")
"""What an interpreter may need of the system; what is missing is left out."""

_DENIED = {
    "EAGAIN": "clone clone3 fork vfork",
    "ENETUNREACH": "socket",
    "EPERM": (
        "ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp unshare setns mount mount_setattr "
        "umount2 move_mount open_tree fsopen fsmount fsconfig fspick pivot_root chroot shmget shmat shmctl msgget semget "
        "mq_open memfd_create memfd_secret keyctl add_key request_key bpf perf_event_open userfaultfd io_uring_setup "
        "io_uring_enter io_uring_register landlock_create_ruleset inotify_init inotify_init1 fanotify_init syslog "
        "name_to_handle_at open_by_handle_at"
    ),
}
"""The system calls that are refused, by the error that they return: processes and networks, what reaches into others or
into the kernel, and memory that no limit counts."""

_PROBE = """
import os, socket
assert os.getuid() != 0, "it runs as root"
assert not set(os.listdir("/")) - {shown!r}, "it sees " + ", ".join(os.listdir("/"))
assert len(os.environ) <= 4, "it has an environment"
for what, act in {{
    "has a network": socket.socket,
    "starts processes": os.fork,
    "writes files": lambda: os.mkdir("/probe"),
    "writes to /usr": lambda: os.mkdir("/usr/probe"),
    "writes to /dev": lambda: os.mkdir("/dev/probe"),
}}.items():
    try:
        act()
    except OSError:
        continue
    raise AssertionError("it " + what)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a program may use, and its tests as well."""

    cpu_seconds: int = 10
    """CPU time, seconds."""

    wall_seconds: float = 30.0
    """Time by the clock, seconds, its start included."""

    memory_mib: int = 512
    """Address space, 2**20 bytes."""

    open_files: int = 64
    """Files open at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a program ended."""

    verdict: Verdict
    """"passed" only where its tests ran to their end."""

    detail: str
    """What it raised or what ended it; "" for one that passed."""


def run_programs(
    programs: Sequence[tuple[str, CodeCheck]], limits: Limits | None = None, *, workers: int | None = None
) -> list[Outcome]:
    """Run several programs, a few at a time.

    Args:
        programs: Their texts, each with what it must pass.
        limits: For each; None for the defaults.
        workers: How many at a time; None for one a CPU core.

    Returns:
        One outcome a program, in the order given.

    Raises:
        UsageError: As `check_isolation` and `run_program`.
        RunError: As `run_program`.
    """
    if not programs:
        return []
    check_isolation()
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda one: run_program(*one, limits=limits), programs))


def run_program(code: str, check: CodeCheck | None = None, limits: Limits | None = None) -> Outcome:
    """Run one program through its tests, or to its limits.

    Args:
        code: Its text; whatever it prints is dropped.
        check: What it must pass; None for nothing but to be loaded.
        limits: What it may use; None for the defaults.

    Returns:
        How it ended. Never raises for what a program does.

    Raises:
        RunError: If it could not be isolated; it was not run then.
        UsageError: If its tests pass it something that is no plain value.
    """
    check, limits = check or CodeCheck(), limits or Limits()
    given = (check.entry_point, check.head, check.tests, f"{check.head}{code}\n")
    with ExitStack() as stack:
        enter = stack.enter_context
        link, complaint, report = (
            [enter(one) for one in socket.socketpair(type=kind)]
            for kind in (socket.SOCK_STREAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET)
        )
        order = enter(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
        order.write("\0".join(given).encode(errors="replace"))  # a program with a NUL is no Python, and fails
        order.seek(0)
        nothing, errors = subprocess.DEVNULL, complaint[1]
        program = enter(_started("program", limits, link[0], stdin=nothing, stdout=nothing, stderr=errors))
        tests = enter(_started("tests", limits, link[1], stdin=order, stdout=report[1], stderr=errors))
        for one in (*link, report[1], errors):
            one.close()
        deadline = time.monotonic() + limits.wall_seconds
        ready = _receive(report[0], deadline)
        if ready == "":
            reason = (_receive(complaint[0], 0) or "it did not start").splitlines()[0]
            raise RunError(f"a program could not be isolated and was not run: {reason}")
        said = ready and _receive(report[0], deadline)
        if said is None:
            return Outcome(verdict="timed out", detail=f"{limits.wall_seconds:g} s by the clock")
        verdict, _, detail = said.partition(" ")
        if verdict == "unfit":
            raise UsageError(
                f"the tests of {check.entry_point!r} pass a value of type {detail!r} to the program: only numbers, "
                "strings, containers of these, and the program's own objects can be passed; leave the task out"
            )
        if verdict == "lacking":
            raise UsageError(
                f"the tests of {check.entry_point!r} import {detail}, which is not in the sandbox: leave the task out"
            )
        if verdict in ("passed", "failed"):
            return Outcome(verdict=verdict, detail=detail)
        return _ended(program if verdict == "lost" else tests)


@cache
def check_isolation() -> None:
    """See by a program that looks around that the sandbox holds on this machine; once for a process.

    Raises:
        UsageError: If it cannot be had here, with what it needs.
    """
    needs = (
        "the sandbox needs Linux, bubblewrap and libseccomp (Debian: apt-get install bubblewrap libseccomp2), and leave to "
        "make user namespaces; in a container, start that with --privileged. Leave the code tasks out otherwise"
    )
    if sys.platform != "linux":
        raise UsageError(f"code cannot be run on {sys.platform}: {needs}")
    shown = {Path(one).parts[1] for one in (*_visible(), "/dev")}
    try:
        outcome = run_program(_PROBE.format(shown=shown))
    except (RunError, OSError) as error:
        raise UsageError(f"code cannot be run here: {error}: {needs}") from error
    if outcome.verdict != "passed":
        raise UsageError(f"code cannot be run here, the sandbox leaks: {outcome.detail}: {needs}")


@contextmanager
def _started(
    side: str, limits: Limits, link: socket.socket, **streams: Any
) -> "Iterator[subprocess.Popen[Any]]":
    """One side in its sandbox, killed at the end: the sandbox's first process takes all others with it."""
    with tempfile.TemporaryFile() as filtered:
        _write_filter(filtered)
        passed = (filtered.fileno(), link.fileno())
        process = subprocess.Popen(_command(side, limits, *passed), pass_fds=passed, **streams)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _command(side: str, limits: Limits, filtered: int, link: int) -> list[str]:
    """Limits, then namespaces without privileges in a root that is read-only, then the interpreter."""
    memory, seconds = limits.memory_mib * 2**20, limits.cpu_seconds
    isolated = (
        # a program could catch the first limit of CPU time; with files of 0 bytes it writes none, not even in memory
        f"prlimit --as={memory} --cpu={seconds}:{seconds + 1} --nofile={limits.open_files} --fsize=0 "
        "--core=0 --memlock=0 --sigpending=64 bwrap --unshare-all --die-with-parent --new-session --cap-drop ALL "
        # a fixed seed of hashes: the same program meets sets in the same order every time
        "--uid 60600 --gid 60600 --clearenv --setenv LANG C.UTF-8 --setenv PYTHONHASHSEED 0 --chdir / "
        f"--dev-bind /dev/null /dev/null --seccomp {filtered}"
    )
    shown = [word for path in _visible() for word in ("--ro-bind-try", path, path)]
    runner = (_python(), "-s", "-P", "-S", "-B", "-c", _RUNNER.read_text(encoding="utf-8"), side, str(link))
    return [*isolated.split(), *shown, "--remount-ro", "/", *runner]


def _write_filter(file: IO[bytes]) -> None:
    """Write the kernel's filter that refuses some system calls, and all of foreign architectures.

    Raises:
        OSError: If libseccomp is missing, or does not know one of the calls.
    """
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(library.seccomp_init(0x7FFF0000))  # SCMP_ACT_ALLOW
    not_unix = struct.pack("IIQQ", 0, 1, socket.AF_UNIX, 0)  # struct scmp_arg_cmp: argument 0 != AF_UNIX
    refused = [(name, error, None) for error, names in _DENIED.items() for name in names.split()]
    for name, error, condition in (*refused, ("socketpair", "EPERM", not_unix)):
        action, call = 0x50000 | getattr(errno, error), library.seccomp_syscall_resolve_name(name.encode())
        if library.seccomp_rule_add_array(rules, action, call, 1 if condition else 0, condition):
            raise OSError(f"libseccomp does not know the system call {name}: it is too old")
    library.seccomp_export_bpf(rules, file.fileno())
    library.seccomp_release(rules)
    file.seek(0)


def _receive(end: socket.socket, deadline: float) -> str | None:
    """The next message; "" where those who write have ended, None where none comes before the deadline."""
    end.settimeout(max(deadline - time.monotonic(), 0.001))
    with suppress(TimeoutError):
        return end.recv(4096).decode(errors="replace").strip()
    return None


def _ended(side: "subprocess.Popen[Any]") -> Outcome:
    """What became of a side that ended without a word."""
    try:
        code = side.wait(1)
    except subprocess.TimeoutExpired:
        return Outcome(verdict="failed", detail="its replies cannot be read")
    if code == 128 + signal.SIGXCPU:
        return Outcome(verdict="timed out", detail="its CPU time was used up")
    if code - 128 in set(signal.Signals):
        return Outcome(verdict="killed", detail=signal.Signals(code - 128).name)
    return Outcome(verdict="failed", detail=f"it ended with code {code} before its tests had run")


def _python() -> str:
    """The interpreter itself, not the one of a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _visible() -> list[str]:
    """What the program's root shows: the system's libraries and the interpreter's own folders."""
    return [*_SYSTEM, os.path.realpath(sys.base_prefix), str(Path(_python()).parent)]
