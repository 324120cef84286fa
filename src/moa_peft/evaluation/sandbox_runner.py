"""What runs inside the sandbox: takes a program from standard input, runs it, and reports how it ended.

A script, given to a bare interpreter as text and never imported. The report bears a token that came with the program,
so that no output of a program is taken for one; a program that ends its process before its tests have run reports
nothing, which counts as wrong.
"""

import os
import sys


def main() -> None:
    """Run the program and report: the token, whether it passed, and what it raised."""
    write, leave = os.write, os._exit  # the program may put others in their place
    token = sys.stdin.readline()
    text = sys.stdin.read()
    report = os.dup(1)
    nowhere = os.open("/dev/null", os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    passed, error = run(text)
    write(report, f"{token}{'passed' if passed else 'failed'} {error}".encode(errors="replace"))
    leave(0)


def run(text: str) -> tuple[bool, str]:
    """Run a program as a module of its own; says whether it came to its end, and what it raised."""
    module = type(sys)("program")
    sys.modules["program"] = module
    try:
        exec(compile(text, "program.py", "exec"), module.__dict__)
    except BaseException as error:  # noqa: BLE001  # SystemExit and KeyboardInterrupt of a program are failures like any other
        return False, describe(error)
    return True, ""


def describe(error: BaseException) -> str:
    """The kind of an error and the first words of its message; a program's own errors may fail at saying it."""
    try:
        return f"{type(error).__name__}: {error}"[:200].rstrip(": ")
    except BaseException:  # noqa: BLE001  # as above
        return type(error).__name__[:200]


if __name__ == "__main__":
    main()
