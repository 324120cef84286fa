"""What runs inside a sandbox: a program in one, the tests that decide whether it is right in another.

A script, given to a bare interpreter as text and never imported. The program's side does what the tests' side asks for
over a socket (load the program, call a function) and replies with plain values: numbers, strings and containers of these.
Any other object stays where it is, and a number stands for it. The tests, the answers they expect and the verdict are on
the tests' side, where no program reaches them: it compares plain values with plain values.
"""

import builtins
import os
import sys

TYPE_CHECKING = False  # to import it from typing, or to import json at all, would make each start much slower
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType
    from typing import Any, NoReturn, TextIO

_CONTAINERS: "dict[str, type]" = {
    one.__name__: one for one in (list, tuple, dict, set, frozenset, bytes, bytearray)
}
_ATOMS: "dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]]" = {
    "none": (type(None), lambda _: "", lambda _: None),
    "bool": (bool, lambda one: "1" * one, bool),
    "int": (int, hex, lambda text: int(text, 16)),
    "float": (float, float.hex, float.fromhex),
    "complex": (complex, complex.__repr__, complex),
    "range": (range, lambda one: str(one)[6:-1], lambda text: range(*map(int, text.split(",")))),
    "str": (
        str,
        lambda one: ascii(str.__str__(one))[1:-1],
        lambda text: text.encode().decode("unicode_escape"),
    ),
}
_NUMBERS = {"Fraction": "fractions", "Decimal": "decimal"}
"""Kinds of numbers that are written as text, by the modules that they come from."""


def encode(value: "Any", hold: "Callable[[Any], int]") -> str:
    """Write a value, a line for each part; ``hold`` gives the number of an object that stays on the program's side."""
    for name, (kind, write, _) in _ATOMS.items():
        if isinstance(value, kind):
            return f"{name} {write(value)}\n"
    for name, kind in _CONTAINERS.items():
        if isinstance(value, kind):
            parts = list(dict.items(value) if kind is dict else value)
            return f"{name} {len(parts)}\n" + "".join(encode(one, hold) for one in parts)
    name = type(value).__name__
    if _NUMBERS.get(name) == type(value).__module__:
        return f"{name} {value}\n"
    return f"held {hold(value)}\n"


def decode(lines: "TextIO", find: "Callable[[int], Any]") -> "Any":
    """Read a value; ``find`` gives the object of a number. Raises EOFError where the other side has ended."""
    line = lines.readline()
    if not line:
        raise EOFError
    name, _, text = line[:-1].partition(" ")
    if name in _CONTAINERS:
        return _CONTAINERS[name]([decode(lines, find) for _ in range(int(text))])
    if name in _NUMBERS:
        return getattr(__import__(_NUMBERS[name]), name)(text)
    return find(int(text)) if name == "held" else _ATOMS[name][2](text)


class Held:
    """An object of the program, on the tests' side: what is done with it is done over there. It equals only itself."""

    __slots__ = ("_ask", "_number")

    def __init__(self, ask: "Callable[..., Any]", number: int) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and other._number == self._number

    def __hash__(self) -> int:
        return self._number


def _asks(operation: str) -> "Callable[..., Any]":
    return lambda self, /, *args, **named: self._ask(operation, self, *args, **named)


for _operation in ("call", "getattr", "setattr", "getitem", "iter", "next", "len", "bool", "str"):
    setattr(Held, f"__{_operation}__", _asks(_operation))


def serve(lines: "TextIO", send: "Callable[[str], object]") -> "NoReturn":
    """Be the program's side: do what is asked for until killed."""
    names, held = namespace(), {}

    def hold(value: "Any") -> int:
        held[id(value)] = value
        return id(value)

    def load(code: str, wanted: "list[str]") -> "dict[str, Any]":
        exec(compile(code, "program.py", "exec"), names)
        return {one: names[one] for one in wanted if one in names}

    does: dict[str, Callable[..., Any]] = {
        **vars(builtins),
        "load": load,
        "call": lambda function, /, *args, **named: function(*args, **named),
        "getitem": lambda value, key: value[key],
    }
    send(encode("ready", hold))
    while True:
        operation, args, named = decode(lines, held.__getitem__)
        try:
            value = does[operation](*args, **named)
            reply = encode((True, value, [*args, *named.values()]), hold)
        except BaseException as error:  # noqa: BLE001  # SystemExit and KeyboardInterrupt of a program are failures like any other
            reply = encode((False, describe(error), []), hold)
        send(reply)


def number_of(value: "Any", operation: str, leave: "Callable[[str], NoReturn]") -> int:
    """The number of an object of the program; anything else that the tests give it ends them, or is an error of theirs."""
    if isinstance(value, Held):
        return value._number
    if operation == "call":
        leave(f"unfit {type(value).__name__}")
    raise TypeError(f"an object of the program takes no {type(value).__name__}")  # as a slice of a deque


def judge(
    lines: "TextIO", send: "Callable[[str], object]", report: "Callable[[str], object]", order: str
) -> None:
    """Be the tests' side: load the program over there, test it, and report that it is there and how it did."""

    def leave(word: str) -> "NoReturn":  # raises nothing, as a test may expect an error
        report(word)
        os._exit(0)

    def ask(operation: str, /, *args: "Any", **named: "Any") -> "Any":
        request = encode((operation, args, named), lambda one: number_of(one, operation, leave))
        try:
            send(request)
            done, value, after = decode(lines, lambda number: Held(ask, number))
        except (EOFError, OSError, LookupError, TypeError, ValueError):
            leave("lost")
        if not done:
            name, base, text = value
            if base == "StopIteration" and operation != "next":
                base = "RuntimeError"  # it would end a loop of the tests
            own = {"__init__": lambda *_: None, "__str__": lambda _: text}
            raise type(name, (getattr(builtins, base),), own)
        for given, now in zip([*args, *named.values()], after, strict=True):
            if isinstance(given, list | dict | set) and given != now:  # changed in place over there
                given.clear()
                (given.extend if isinstance(given, list) else given.update)(now)
        return value

    report(decode(lines, int))  # "ready"
    try:
        examine(ask, *order.split("\0"))
    except BaseException as error:  # noqa: BLE001  # as in serve
        name, _, text = describe(error)
        is_own = type(error) is ModuleNotFoundError  # one of the program comes as a class of its own
        leave(f"lacking {error.name}" if is_own else f"failed {name}: {text}"[:200].rstrip(": "))
    leave("passed")


def examine(ask: "Callable[..., Any]", entry_point: str, head: str, tests: str, code: str) -> None:
    """Load a program and run its tests, with the functions of its head, and what else they mention from the program."""
    names = namespace()
    try:
        exec(compile(head, "head.py", "exec"), names)
    except SyntaxError:
        head = ""  # only its answer completes it
    names.pop(entry_point, None)
    test = compile(tests, "tests.py", "exec")
    wanted = mentioned(test).difference(names, dir(builtins)) | {entry_point}
    given = ask("load", code, list(wanted))
    exec(test, names | {one: given[one] for one in wanted.intersection(given)})  # nothing else in its place


def namespace() -> "dict[str, Any]":
    """The names of a new module "program"."""
    sys.modules["program"] = type(sys)("program")
    return vars(sys.modules["program"])


def mentioned(code: "CodeType") -> set[str]:
    """All names in code, of functions in it too."""
    return {*code.co_names}.union(*(mentioned(one) for one in code.co_consts if isinstance(one, type(code))))


def describe(error: BaseException) -> "tuple[str, str, str]":
    """An error's kind, the built-in kind that it belongs to, and its message; a program's own may fail at saying it."""
    kind = type(error)
    base = next(one for one in kind.__mro__ if one.__module__ == "builtins")
    try:
        return kind.__name__, base.__name__, str(error)[:200]
    except BaseException:  # noqa: BLE001  # as in serve
        return kind.__name__, base.__name__, ""


def main() -> None:
    """Give up the standard streams and be one side or the other."""
    side, link = sys.argv[1], int(sys.argv[2])
    order, answer = sys.stdin.read(), os.dup(1)
    nowhere = os.open("/dev/null", os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    with open(link, encoding="ascii", closefd=False) as lines, open(link, "w", encoding="ascii") as out:

        def send(text: str) -> None:
            print(text, end="", file=out, flush=True)

        if side == "program":
            serve(lines, send)
        judge(lines, send, lambda text: os.write(answer, text.encode(errors="replace")), order)


if __name__ == "__main__":
    main()
