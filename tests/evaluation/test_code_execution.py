"""Programs that do their worst, each in the sandbox: they score nothing and harm nothing."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from socket import create_server

import pytest

from moa_peft.errors import RunError, UsageError
from moa_peft.evaluation import code_execution as sandbox
from moa_peft.evaluation.code_execution import Limits, Outcome, check_isolation, run_program, run_programs

QUICK = Limits(cpu_seconds=1, wall_seconds=20)


@pytest.fixture(autouse=True, scope="module")
def isolated() -> None:
    try:
        check_isolation()
    except UsageError as error:
        pytest.skip(str(error))


def running(limits: Limits) -> list[str]:
    """The command lines of the processes that hold a program of these limits; give a test limits of its own."""
    lines: list[str] = []
    for one in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            lines.append(one.read_bytes().decode(errors="replace"))
    return [one for one in lines if "sandbox_stage.py" in one and f'"disk_mib": {limits.disk_mib},' in one]


def test_a_program_passes_only_when_it_runs_to_its_end() -> None:
    assert run_program("x = 1\nassert x == 1") == Outcome(verdict="passed", detail="")
    assert run_program("assert 1 == 2, 'no'") == Outcome(verdict="failed", detail="AssertionError: no")
    assert run_program("def f(:").detail.startswith("SyntaxError")
    assert run_program("x = '\ud800'").verdict == "passed"


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended with code 0 before its tests"),
        ("import os; os._exit(97)", "ended with code 97 before its tests"),
        ("import os; os._exit(200)", "ended with code 200 before its tests"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        (
            "import os\nfor fd in range(64):\n  try: os.write(fd, b'x')\n  except OSError: pass\nos._exit(0)",
            "code 0",
        ),
        ("class E(Exception):\n  def __str__(self): raise E\nraise E", "E"),
        ("raise Exception('x' * 10**6)", "Exception: xxx"),
        ("raise type('', (AssertionError,), {})('')", ""),
        ("import sys\nsys.modules['__main__'].describe = lambda error: ''\nraise ValueError", ""),
        (
            "import os\nown = os.write\nos.write = lambda file, text: own(file, text.replace(b'failed', b'passed'))\nx()",
            "NameError",
        ),
    ],
)
def test_a_program_that_ends_before_its_tests_have_run_is_wrong(program: str, detail: str) -> None:
    outcome = run_program(program)
    assert outcome.verdict == "failed"
    assert detail in outcome.detail
    assert len(outcome.detail) <= 200


@pytest.mark.parametrize(
    "program",
    ["import os\nos.abort()", "import ctypes\nctypes.string_at(0)", "def f(): return f()\nf()"],
    ids=["abort", "segfault", "recursion"],
)
def test_a_program_that_crashes_is_wrong(program: str) -> None:
    assert run_program(program).verdict in ("failed", "killed")


def test_a_program_that_never_ends_is_stopped_by_its_cpu_time_even_when_it_catches_the_signal() -> None:
    assert run_program("while True: pass", QUICK).verdict == "timed out"
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run_program(stubborn, QUICK) == Outcome(verdict="killed", detail="SIGKILL")


def test_a_program_that_sleeps_is_stopped_by_the_clock_and_leaves_no_process() -> None:
    start, limits = time.monotonic(), Limits(wall_seconds=1.0, disk_mib=11)
    outcome = run_program("import time\ntime.sleep(600)", limits)
    assert outcome == Outcome(verdict="timed out", detail="1 s by the clock")
    assert time.monotonic() - start < 8
    until(lambda: not running(limits))


def test_a_program_is_killed_with_the_process_that_started_it() -> None:
    limits = Limits(disk_mib=12)
    code = (
        "from moa_peft.evaluation.code_execution import Limits, run_program\n"
        "run_program('import time; time.sleep(600)', Limits(disk_mib=12))"
    )
    starter = subprocess.Popen([sys.executable, "-c", code])
    try:
        until(lambda: len(running(limits)) == 2)  # the outer process and the first one of the namespace
    finally:
        starter.kill()
        starter.wait()
    until(lambda: not running(limits))


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(4 * 2**30)",
        "x = []\nwhile True: x.append(bytearray(2**20))",
        "x = 'a'\nwhile True: x += x",
    ],
)
def test_a_program_that_eats_memory_gets_no_more_than_its_share(program: str) -> None:
    assert run_program(program).detail.startswith("MemoryError")


@pytest.mark.parametrize(
    "start",
    ["os.fork()", "threading.Thread(target=print).start()", "subprocess.run(['/usr/bin/env'])"],
)
def test_a_program_can_start_no_other(start: str) -> None:
    outcome = run_program(f"import os, threading, subprocess\n{start}")
    assert outcome.verdict == "failed"
    assert "temporarily unavailable" in outcome.detail or "can't start new thread" in outcome.detail


def test_a_fork_bomb_makes_no_process_and_is_stopped() -> None:
    bomb = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    limits = Limits(cpu_seconds=1, wall_seconds=20, disk_mib=13)
    assert run_program(bomb, limits).verdict == "timed out"
    until(lambda: not running(limits))


def test_a_program_that_deletes_or_overwrites_files_finds_none_of_ours(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("kept")
    tmp_path.chmod(0o777)
    mine.chmod(0o666)
    outcomes = run_programs(
        [
            f"import os\nos.remove({str(mine)!r})",
            f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
            f"open({str(mine)!r}, 'w').write('gone')",
            "import shutil\nshutil.rmtree('/', ignore_errors=True)\nopen('/usr/bin/env').close()\nraise SystemExit",
            "open('/etc/passwd').read()",
            "import os\nos.remove(os.__file__)",
            "open('/usr/bin/env', 'ab')",
        ]
    )
    assert [one.verdict for one in outcomes] == ["failed"] * 7
    assert "Read-only file system" in outcomes[-2].detail
    assert outcomes[3].detail.startswith("SystemExit")
    assert mine.read_text() == "kept"
    assert Path(os.__file__).exists()
    assert Path("/usr/bin/env").exists()


def test_a_program_reaches_no_network_not_even_this_machines_own() -> None:
    with create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        outcome = run_program(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)")
        assert outcome.verdict == "failed"
        assert "unreachable" in outcome.detail
        with pytest.raises(TimeoutError):
            server.accept()
    assert (
        "unreachable"
        in run_program("import urllib.request as u\nu.urlopen('http://192.0.2.1', timeout=2)").detail
    )


def test_a_program_sees_nothing_of_our_environment_and_our_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOA_TEST_SECRET", "secret")
    seen = run_program("import os\nraise Exception(sorted(os.environ))").detail
    assert seen.replace(" 'LC_CTYPE',", "") == "Exception: ['HOME', 'LANG', 'PYTHONHASHSEED', 'TMPDIR']"
    assert run_program("import os\nraise Exception(os.getpid(), os.getppid())").detail == "Exception: (2, 1)"
    assert run_program("import os\nos.kill(1, 9); os.kill(1, 15); os.kill(-1, 9)").verdict != "passed"
    assert run_program("import os\nassert os.getuid() and os.geteuid() and os.getgid()").verdict == "passed"
    assert run_program("import os\nos.setuid(0)").verdict == "failed"


def test_a_program_writes_small_files_in_an_empty_folder_that_is_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    assert run_program("import os\nassert os.listdir() == []\nopen('a', 'w').write('x')").verdict == "passed"
    assert run_program("import os\nassert os.listdir() == []").verdict == "passed"
    assert "File too large" in run_program("open('a', 'wb').write(bytes(2**21))").detail
    fill = "for place in range(40): open(str(place), 'wb').write(bytes(2**20))"
    assert "No space left" in run_program(fill).detail
    assert not list(tmp_path.iterdir())


def test_a_program_takes_sets_in_the_same_order_every_time() -> None:
    asks = "raise Exception(list({'a', 'b', 'c', 'd', 'e', 'f'}))"
    assert len({run_program(asks).detail for _ in range(3)}) == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_the_sandbox_holds_for_an_ordinary_user_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started as nobody, it isolates by a user namespace; with an interpreter that nobody can read."""
    python = Path("/usr/bin/python3")
    if not python.exists():
        pytest.skip("no interpreter here that another user can read")
    start = subprocess.Popen

    def as_nobody(*words: object, **options: object) -> object:
        return start(*words, **options, user=65534, group=65534, extra_groups=[])

    class Folder(sandbox.tempfile.TemporaryDirectory[str]):
        def __enter__(self) -> str:
            os.chown(self.name, 65534, 65534)
            return self.name

    monkeypatch.setattr(sandbox, "_python", lambda: str(python.resolve()))
    monkeypatch.setattr(sandbox.tempfile, "TemporaryDirectory", Folder)
    monkeypatch.setattr(sandbox.subprocess, "Popen", as_nobody)
    assert run_program("import os\nraise Exception(os.getuid())").detail == "Exception: 65534"
    check_isolation.__wrapped__()  # type: ignore[attr-defined]  # of functools.cache
    assert "temporarily unavailable" in run_program("import os\nos.fork()").detail
    assert run_program("open('/usr/bin/env', 'ab')").verdict == "failed"


def test_without_isolation_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(UsageError, match="code cannot be run on darwin: the sandbox needs Linux"):
        check_isolation.__wrapped__()  # type: ignore[attr-defined]  # of functools.cache
    monkeypatch.undo()
    stage = Path(sandbox.__file__).with_name("sandbox_stage.py").read_text()
    refused = tmp_path / "stage.py"
    refused.write_text(
        stage.replace('call("unshare", _LIBC.unshare, flags)', 'call("unshare", lambda *_: -1)')
    )
    monkeypatch.setattr(sandbox, "_STAGE", refused)
    with pytest.raises(RunError, match="could not be isolated and was not run: unshare: "):
        run_program("pass")
    with pytest.raises(UsageError, match=r"code cannot be run here: .*unshare.*--privileged"):
        check_isolation.__wrapped__()  # type: ignore[attr-defined]  # of functools.cache


@pytest.mark.parametrize(
    ("holds", "does_not", "leak"),
    [
        ('"net": 0x40000000', '"net": 0', "it has a network"),
        ("os.setresuid(", "(lambda *_: 0)(", "it runs as root"),
        ("resource.setrlimit(getattr(resource, name), (soft, hard))", "pass", "it starts processes"),
        ('show("/dev/null"', 'os.mkdir(f"{root}/home"); show("/dev/null"', "it sees .*home"),
    ],
)
@pytest.mark.skipif(os.getuid() != 0, reason="what leaks differs for another user")
def test_a_sandbox_that_leaks_is_found_out(
    holds: str, does_not: str, leak: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The probe would be worth nothing if it passed whatever the sandbox does."""
    stage = Path(sandbox.__file__).with_name("sandbox_stage.py").read_text()
    assert holds in stage
    leaky = tmp_path / "stage.py"
    leaky.write_text(stage.replace(holds, does_not))
    monkeypatch.setattr(sandbox, "_STAGE", leaky)
    with pytest.raises(UsageError, match=f"the sandbox leaks: .*{leak}"):
        check_isolation.__wrapped__()  # type: ignore[attr-defined]  # of functools.cache


def test_programs_run_side_by_side_and_keep_their_order() -> None:
    programs = [f"assert {place} % 3" for place in range(9)]
    outcomes = run_programs(programs, workers=3)
    assert [one.verdict == "passed" for one in outcomes] == [bool(place % 3) for place in range(9)]
    assert run_programs([]) == []
