"""Programs that do their worst, each in the sandbox: they score nothing and harm nothing."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from socket import create_server

import pytest

from moa_peft.errors import RunError, UsageError
from moa_peft.evaluation import code_execution as sandbox
from moa_peft.evaluation.code_answers import CodeCheck
from moa_peft.evaluation.code_execution import Limits, Outcome, check_isolation, run_program, run_programs

QUICK = Limits(cpu_seconds=1, wall_seconds=20)


@pytest.fixture(autouse=True, scope="module")
def isolated() -> None:
    try:
        check_isolation()
    except UsageError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def running(limits: Limits) -> list[Path]:
    """The processes that run under these limits; give a test a number of open files of its own."""
    found: list[Path] = []
    for one in Path("/proc").glob("[0-9]*/limits"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found += [one] if f"Max open files            {limits.open_files} " in one.read_text() else []
    return found


def verdict_of(code: str, tests: str, head: str) -> Outcome:
    """How a program that is to define f does in its tests."""
    return run_program(code, CodeCheck(entry_point="f", head=head, tests=tests))


def test_a_program_passes_only_when_it_runs_to_its_end() -> None:
    assert run_program("x = 1\nassert x == 1") == Outcome(verdict="passed", detail="")
    assert run_program("assert 1 == 2, 'no'") == Outcome(verdict="failed", detail="AssertionError: no")
    assert run_program("def f(:").detail.startswith("SyntaxError")
    assert run_program("x = '\ud800'").verdict == "passed"
    assert run_program("x = 1\n\0").verdict == "failed"


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
        ("import os\nos.closerange(3, 64)", "ended with code 1 before its tests"),
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
    assert run_program("while True: pass", limits=QUICK).verdict == "timed out"
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run_program(stubborn, limits=QUICK) == Outcome(verdict="killed", detail="SIGKILL")


def test_a_program_that_sleeps_is_stopped_by_the_clock_and_leaves_no_process() -> None:
    start, limits = time.monotonic(), Limits(wall_seconds=1.0, open_files=51)
    outcome = run_program("import time\ntime.sleep(600)", limits=limits)
    assert outcome == Outcome(verdict="timed out", detail="1 s by the clock")
    assert time.monotonic() - start < 8
    until(lambda: not running(limits))


@pytest.mark.slow
def test_a_program_is_killed_with_the_process_that_started_it() -> None:
    limits = Limits(open_files=52)
    code = (
        "from moa_peft.evaluation.code_execution import Limits, run_program\n"
        "run_program('import time; time.sleep(600)', limits=Limits(open_files=52))"
    )
    starter = subprocess.Popen([sys.executable, "-c", code])
    try:
        until(
            lambda: len(running(limits)) == 6
        )  # two sandboxes: bwrap, the first one inside, the interpreter
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
    limits = Limits(cpu_seconds=1, wall_seconds=20, open_files=53)
    assert run_program(bomb, limits=limits).verdict == "timed out"
    until(lambda: not running(limits))


def test_a_program_that_deletes_or_overwrites_files_finds_none_of_ours(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("kept")
    tmp_path.chmod(0o777)
    mine.chmod(0o666)
    programs = [
        f"import os\nos.remove({str(mine)!r})",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"open({str(mine)!r}, 'w').write('gone')",
        "import shutil\nshutil.rmtree('/', ignore_errors=True)\nopen('/usr/bin/env').close()\nraise SystemExit",
        "open('/etc/passwd').read()",
        "import os\nos.remove(os.__file__)",
        "open('/usr/bin/env', 'ab')",
    ]
    outcomes = run_programs([(one, CodeCheck()) for one in programs])
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
    assert seen.replace(" 'LC_CTYPE',", "") == "Exception: ['LANG', 'PWD', 'PYTHONHASHSEED']"
    assert run_program("import os\nraise Exception(os.getpid(), os.getppid())").detail == "Exception: (2, 1)"
    assert run_program("import os\nos.kill(1, 9); os.kill(1, 15); os.kill(-1, 9)").verdict != "passed"
    assert run_program("import os\nassert os.getuid() and os.geteuid() and os.getgid()").verdict == "passed"
    assert run_program("import os\nos.setuid(0)").verdict == "failed"


def test_a_program_writes_no_file_not_even_in_memory() -> None:
    """A file costs kernel memory that no limit counts: 10 seconds of making empty ones took 1.3 GB."""
    assert "Read-only file system" in run_program("open('a', 'w')").detail
    for place in ("/tmp/a", "/dev/a", "/dev/shm/a", "/usr/a"):
        assert run_program(f"open({place!r}, 'w')").verdict == "failed"
    assert "not permitted" in run_program("import os\nos.memfd_create('a')").detail


def test_a_program_takes_sets_in_the_same_order_every_time() -> None:
    asks = "raise Exception(list({'a', 'b', 'c', 'd', 'e', 'f'}))"
    assert len({run_program(asks).detail for _ in range(3)}) == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_the_sandbox_holds_for_an_ordinary_user_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started as nobody, with an interpreter that nobody can read."""
    python = Path("/usr/bin/python3")
    if not python.exists():
        pytest.skip("no interpreter here that another user can read")
    start = subprocess.Popen

    def as_nobody(*words: object, **options: object) -> object:
        return start(*words, **options, user=65534, group=65534, extra_groups=[])

    monkeypatch.setattr(sandbox, "_python", lambda: str(python.resolve()))
    monkeypatch.setattr(sandbox.sys, "base_prefix", "/usr")
    monkeypatch.setattr(sandbox.subprocess, "Popen", as_nobody)
    check_isolation.__wrapped__()  # type: ignore[attr-defined]  # of functools.cache
    assert "temporarily unavailable" in run_program("import os\nos.fork()").detail


def test_without_isolation_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(UsageError, match="code cannot be run on darwin: the sandbox needs Linux"):
        check_isolation.__wrapped__()  # type: ignore[attr-defined]  # of functools.cache
    monkeypatch.undo()
    prlimit = shutil.which("prlimit")
    assert prlimit is not None
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"cannot be run here: .*prlimit.*apt-get install bubblewrap"):
        check_isolation.__wrapped__()  # type: ignore[attr-defined]
    (tmp_path / "prlimit").symlink_to(prlimit)
    with pytest.raises(
        RunError, match=r"could not be isolated and was not run: prlimit: .*bwrap: No such file"
    ):
        run_program("pass")
    with pytest.raises(UsageError, match=r"cannot be run here: .*bwrap: No such.*apt-get install bubblewrap"):
        check_isolation.__wrapped__()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("holds", "does_not", "leak"),
    [
        (("--uid", "60600"), ("--uid", "0"), "it runs as root"),
        (("--clearenv",), ("--setenv", "A", "", "--setenv", "B", ""), "it has an environment"),
        (("--remount-ro", "/"), ("--dir", "/home"), "it sees .*home"),
        (("--remount-ro", "/"), ("--dir", "/usr"), "it writes files"),
        (("--seccomp",), ("--sync-fd",), "it has a network"),
    ],
)
def test_a_sandbox_that_leaks_is_found_out(
    holds: tuple[str, ...], does_not: tuple[str, ...], leak: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe would be worth nothing if it passed whatever the sandbox does."""
    command = sandbox._command

    def leaky(*given: object) -> list[str]:
        joined = "\0".join(command(*given))
        assert "\0".join(holds) in joined
        return joined.replace("\0".join(holds), "\0".join(does_not)).split("\0")

    monkeypatch.setattr(sandbox, "_command", leaky)
    with pytest.raises(UsageError, match=f"the sandbox leaks: .*{leak}"):
        check_isolation.__wrapped__()  # type: ignore[attr-defined]  # of functools.cache


def test_programs_run_side_by_side_and_keep_their_order() -> None:
    programs = [(f"assert {place} % 3", CodeCheck()) for place in range(9)]
    outcomes = run_programs(programs, workers=3)
    assert [one.verdict == "passed" for one in outcomes] == [bool(place % 3) for place in range(9)]
    assert run_programs([]) == []


CALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    if getattr(libc, name)(*args) == -1: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""


@pytest.mark.parametrize(
    "call",
    [
        "call('ptrace', 0, 0, 0, 0)",
        "call('unshare', 0x10000000)",
        "call('setns', 0, 0)",
        "call('shmget', 0, 4096, 0o1600)",
        "call('msgget', 0, 0o1600)",
        "call('semget', 0, 1, 0o1600)",
        "call('syscall', 425, 8, 0)  # io_uring_setup",
        "call('syscall', 248, b'user', b'a', b'b', 1, -3)  # add_key",
        "call('syscall', 249, b'user', b'a', 0, 0)  # request_key",
        "call('syscall', 250, 0, -3, 0)  # keyctl",
        "call('syscall', 321, 0, 0, 0)  # bpf",
        "call('syscall', 323, 0)  # userfaultfd",
        "call('inotify_init')",
        "import socket; socket.socket(socket.AF_VSOCK)",
        "import socket; socket.socketpair(30)  # TIPC",
    ],
)
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="some calls are made by their numbers")
def test_a_program_reaches_no_key_no_other_process_and_no_memory_that_no_limit_counts(call: str) -> None:
    detail = run_program(CALLS + call).detail
    assert "not permitted" in detail or "unreachable" in detail


@pytest.mark.parametrize(
    "program",
    [
        CALLS + "try: call('ptrace', 0, 0, 0, 0)\nexcept OSError: pass\nos.kill(os.getpid(), 10)",
        "import os\nfor file in range(64):\n  try: os.write(file, b'noise')\n  except OSError: pass\nos.abort()",
        "import os, time\nos.closerange(0, 64)\ntime.sleep(9)",
    ],
    ids=["traced", "noise", "silence"],
)
def test_nothing_that_a_program_does_raises_in_the_evaluation(program: str) -> None:
    """A child that was stopped under ptrace, or noise on standard error, ended the whole evaluation."""
    outcome = run_program(program, limits=Limits(wall_seconds=2.0))
    assert outcome.verdict in ("failed", "killed", "timed out")


ALWAYS = "class Always(BASE):\n  def __eq__(self, other): return True\n  __hash__ = None\ndef f(x): return Always()"


@pytest.mark.parametrize(
    "code",
    [
        *(ALWAYS.replace("BASE", base) for base in ("object", "int", "str", "list", "dict", "set")),
        "abs = lambda _: 0\ndef f(x): return 0",
        "def helper(x): return 3\ndef f(x): return 0",
        "def f(x): raise StopIteration",
        "def f(x): return 0\n@lambda _: lambda *_: None",
        "import sys\ndef f(x):\n  frame = sys._getframe()\n  while frame:\n    for one in map(str, list(frame.f_locals.values())):\n      if 'f(1) =' '= ' in one: return int(one.split('f(1) =' '= ')[1].split()[0])\n    frame = frame.f_back",
        "import os\nfor file in range(64):\n  try: os.write(file, b'passed\\n')\n  except OSError: pass\ndef f(x): return 0",
        "import sys\nmain = sys.modules['__main__']\nown = main.encode\ndef f(x): return 0\ndef once(value, hold):\n  main.encode = own\n  return own((True, {'f': f, 'abs': f}, value[2]), hold)\nmain.encode = once",
    ],
)
def test_a_program_forges_no_pass(code: str) -> None:
    """The program shared a process with its tests: it could change how they compare, and read what they expect."""
    checks = (
        "assert f(1) == 7341",
        "assert abs(f(1) - 3) < 1e-6",
        "assert all(one == 3 for one in map(f, [1]))",
        "assert helper(f(1)) == 3",
        "def check(candidate): assert candidate(1) == 3\ncheck(f)",
    )
    outcomes = [verdict_of(code, one, "def helper(x): return x + 1\n") for one in checks]
    assert {one.verdict for one in outcomes} == {"failed"}, outcomes


def test_a_program_that_ends_itself_does_not_raise_the_error_that_a_test_expects() -> None:
    assert verdict_of("import os\ndef f(x): os._exit(0)", "try: f(1)\nexcept: pass", "").verdict == "failed"


def test_a_program_is_told_nothing_of_its_tests() -> None:
    """The whole memory of the program's process is searched for the answer that its test expects."""
    search = (
        "import gc, sys\ndef f(x):\n  seen = [sys.orig_argv, x, [vars(one) for one in sys.modules.values()], gc.get_objects()]\n"
        "  frame = sys._getframe()\n  while frame: seen.append(dict(frame.f_locals)); frame = frame.f_back\n"
        "  return ' '.join(['expected', 'answer']) in ascii(seen)"
    )
    assert verdict_of(search, "assert f(1) is False, 'expected answer'", "") == Outcome(
        verdict="passed", detail=""
    )


PLAIN = "[None, True, -(2**70), 1.5, 'a\\n\\'\\ud800\\U0001f600', (1, [2]), {'a': {1}}, b'\\x00', 1j, range(3), frozenset(), {}]"


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("def f(x): return x", f"import math\nassert f({PLAIN}) == {PLAIN}\nassert math.isnan(f(math.nan))"),
        ("def f(x): return x", "assert f(True) is True and type(f((1,))) is tuple and f(x={1: 2}) == {1: 2}"),
        (
            "from collections import *\ndef f(x): return Counter(x)",
            "assert f('aab') == {'a': 2, 'b': 1}",
        ),
        ("from fractions import Fraction\ndef f(x): return Fraction(x, 2)", "assert abs(f(1) - 0.5) < 1e-6"),
        ("def f(x): yield from x", "assert sorted(f([2, 1])) == [1, 2]\nassert next(f([3])) == 3"),
        ("def f(x): return x.keys()", "assert list(f({1: 2})) == [1]\nassert f({1: 2}) != [1]"),
        ("def f(x): x.sort()", "x = [2, 1]\nassert f(x) is None\nassert x == [1, 2]"),
        ("def f(x): x[1] = x.pop(0)", "x = {0: 2}\nf(x)\nassert x == {1: 2}"),
        (
            "class Node:\n  def __init__(self, v): self.v, self.next = v, None\ndef f(x): return x.v + f(x.next) if x else 0",
            "a = Node(1)\na.next = Node(2)\na.next.next = Node(3)\nassert f(a) == 6 and a.next.v == 2",
        ),
        ("import math\nlimit = 3\ndef f(x): return x", "assert math.isclose(f(limit), 3.0)"),
        ("def f(x): return lambda y: x + y", "assert f(1)(2) == 3"),
        ("def f(x): return [[]][x:]", "assert not f(1) and f(0)"),
        (
            "def f(x): raise type('Mine', (KeyError,), {})('no')",
            "try: f(1)\nexcept LookupError as error: assert str(error) == \"'no'\"\nelse: raise Exception",
        ),
        (
            "def f(x): return helper(x)",
            "assert f(2) == helper(2) == 4",
        ),
        ("def f(x): print(x); return input", "assert f(1)"),
    ],
)
def test_an_honest_program_meets_its_tests_as_if_they_were_in_one_process(code: str, tests: str) -> None:
    assert verdict_of(code, tests, "def helper(x): return 2 * x\n") == Outcome(verdict="passed", detail="")


def test_a_head_without_a_body_and_a_name_of_a_builtin_are_no_hindrance() -> None:
    assert verdict_of("  return 2 * x", "assert f(2) == 4", "def f(x):\n").verdict == "passed"
    assert verdict_of("del f", "assert f(2) is None", "def f(x): 'Double.'\n").verdict == "failed"
    check = CodeCheck(entry_point="sum", tests="assert sum(2) == 4")
    assert run_program("def sum(x): return 2 * x", check).verdict == "passed"


def test_tests_that_import_what_the_sandbox_lacks_are_refused_and_a_program_that_does_fails() -> None:
    """A right program failed, without a word, where its tests import numpy."""
    with pytest.raises(UsageError, match="the tests of 'f' import numpy, which is not in the sandbox"):
        verdict_of("def f(x): return x", "import numpy\nassert f(2) == 2", "")
    assert verdict_of("import numpy\ndef f(x): return x", "assert f(2) == 2", "").verdict == "failed"


def test_a_result_that_takes_no_slice_is_a_failure_of_one_program() -> None:
    """It ended the whole evaluation."""
    code = "from collections import deque\ndef f(x): return deque([x])"
    assert verdict_of(code, "assert f(2)[:1] == [2]", "").detail.startswith(
        "TypeError: an object of the program"
    )


def test_tests_that_pass_the_program_a_function_of_their_own_are_refused() -> None:
    with pytest.raises(UsageError, match=r"the tests of 'f' pass a value of type 'function' to the program"):
        verdict_of("def f(x): return x(1)", "assert f(lambda x: x) == 1", "")
