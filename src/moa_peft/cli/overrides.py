"""Settings from a YAML file and from flags: ``--any.field value``, ``--any.field=value`` and switches.

YAML is read with the scalars of its version 1.2: ``1e-4`` is a number, and ``no``, ``off`` and ``yes`` are words.
"""

import dataclasses
import json
import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from moa_peft.errors import UsageError, unknown
from moa_peft.training.trainer_settings import field_docs


class _Loader(yaml.SafeLoader):
    """A safe loader with the scalars of YAML 1.2 that refuses a key given twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # PyYAML's own shape

    def construct_scalar(self, node: Any) -> Any:
        """Read a scalar; half of a character, as an escape can make one, is an error with its line.

        JSON writes a character beyond the first 65,536 as two halves, which belong together.
        """
        text = super().construct_scalar(node)
        try:
            return str(text).encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError as error:
            raise yaml.constructor.ConstructorError(
                None, None, f"{text!r} holds half of a character: write it whole", node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; a key given twice is an error with its line."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, dict | list):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a list or a mapping: give a name", key_node.start_mark
                )
            if str(key) in seen:  # 0 and "0" are one key
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice: keep one of them", key_node.start_mark
                )
            seen.add(str(key))
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What PyYAML lets through of values with a wrong tag, too many digits or too deep a nesting."""

_MOST_BYTES, _MOST_VALUES = 2**20, 100_000
"""The largest file of settings, and the most values in it, each alias counted with all that it stands for."""


def _load(text: str) -> Any:
    """Read YAML, its aliases bounded: a few lines of them can stand for more values than fit into the memory.

    Raises:
        yaml.YAMLError: If it is no YAML, stands for too much, or lacks a space after a colon. Also one of `_UNREADABLE`.
    """
    value = yaml.load(text, Loader=_Loader)  # a SafeLoader
    left, count = [value], 0
    while left:
        one = left.pop()
        count += 1
        if count > _MOST_VALUES:
            problem = f"more than {_MOST_VALUES:,} values, or one that holds itself: write it without aliases"
            raise yaml.MarkedYAMLError(problem=problem)
        left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        for key in one if isinstance(one, dict) else ():
            if one[key] is None and isinstance(key, str) and ":" in key:  # YAML's reading of {a:b}
                problem = f"the key {key!r} has no value: write a space after the colon"
                raise yaml.MarkedYAMLError(problem=problem)
    return value


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML (or JSON) file whose top level is a mapping.

    Args:
        path: The file.

    Returns:
        Its settings; empty for an empty file.

    Raises:
        UsageError: If there is no such file, or it is not YAML, gives a key twice or holds no mapping; the message
            names the file and the line.
    """
    if not path.is_file():  # nor a device or a pipe, which have no end
        raise UsageError(f"no configuration file at {path}: give the path of a YAML file with --config")
    if path.stat().st_size > _MOST_BYTES:
        raise UsageError(
            f"{path} is larger than {_MOST_BYTES:,} bytes: give a YAML file of settings with --config"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file in UTF-8: give a YAML file with --config") from error
    try:
        settings = _load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, *_UNREADABLE) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UsageError(
            f"{path} holds {_kind(settings)} at its top level: write lines of the form 'name: value'"
        )
    wrong = [key for key in settings if not isinstance(key, str)]
    if wrong:
        raise UsageError(f"{path}: the key {wrong[0]!r} is not a name: write lines of the form 'name: value'")
    return settings


def parse_flags(
    arguments: Sequence[str],
    switches: Collection[str] = (),
    check_keys: Callable[[Collection[str]], None] = lambda _: None,
) -> dict[str, Any]:
    """Read ``--any.field value`` and ``--any.field=value`` into a nested mapping.

    Dashes and underscores are the same in a name. Nothing may be abbreviated. A value is a YAML scalar, whole: a # in
    it starts no comment; one that starts with a bracket, a brace or a quote is read as YAML.

    Args:
        arguments: What the command line holds.
        switches: Names that may stand without a value, which then is true.
        check_keys: Refuses unknown keys; asked before a missing value is.

    Returns:
        The settings.

    Raises:
        UsageError: If a value is missing, a flag is given twice, two flags contradict each other, or an argument is
            not a flag.
    """
    settings: dict[str, Any] = {}
    given: set[str] = set()
    position = 0
    while position < len(arguments):
        token = arguments[position]
        position += 1
        name, has_value, value = _split(token)
        if not has_value and position < len(arguments) and not arguments[position].startswith("--"):
            has_value, value = True, arguments[position]
            position += 1
        if not has_value and name not in switches:
            check_keys([name.partition(".")[0]])
            raise UsageError(f"{token} has no value: give {token} VALUE")
        if name in given:
            raise UsageError(f"--{name} is given twice: give it once")
        given.add(name)
        _put(settings, name, parse_value(token, value) if has_value else True)
    return settings


def parse_value(flag: str, text: str) -> Any:
    """Read one value as YAML reads a scalar, or a list or mapping in brackets, or a text in quotes.

    Args:
        flag: The flag it belongs to, for an error.
        text: The value as typed.

    Returns:
        The value; text that YAML reads as nothing else stays text.

    Raises:
        UsageError: If brackets do not close.
    """
    try:
        if text.startswith(("[", "{", "'", '"')):
            return _load(text)
        loader = _Loader("")
        tag = loader.resolve(yaml.ScalarNode, text.strip(), (True, False))
        return text if tag.endswith(":str") else loader.construct_object(yaml.ScalarNode(tag, text.strip()))
    except (yaml.YAMLError, *_UNREADABLE) as error:
        if text.startswith(("[", "{")):
            problem = getattr(error, "problem", None) or "not YAML"
            raise UsageError(f"{flag.partition('=')[0]} is {text!r}: {problem}") from error
        return text


def _split(token: str) -> tuple[str, bool, str]:
    head, equals, value = token.partition("=")
    name = head[2:].replace("-", "_")
    if not head.startswith("--") or not all(name.split(".")):
        raise UsageError(
            f"unexpected argument {token!r}: settings are given as --name value or --name.part value"
        )
    return name, bool(equals), value


def _put(settings: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    inner: Any = settings
    for part in path:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UsageError(
                f"--{name} contradicts another flag that sets {part!r} as a whole: give one of them"
            )
    if last in inner:
        raise UsageError(f"--{name} contradicts another flag that sets a part of it: give one of them")
    inner[last] = value


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else f"a single value ({value!r})"


ChatTemplate = Annotated[
    str | None,
    typer.Option(
        help="chat or paper. Default: the one the adapter was trained with, else the model's chat template."
    ),
]
"""The option of the verbs that hold conversations."""

Adapter = Annotated[
    str | None, typer.Option(help="Adapter folder, or its name on the hub. Default: none, the bare model.")
]
"""The option of the verbs that work without an adapter too."""

Model = Annotated[
    str | None,
    typer.Option(
        help='Base model: folder, hub name or "smollm2". Default: the adapter\'s own; without an adapter smollm2.'
    ),
]
"""The option of every verb that loads a base model."""

ModelInitKwargs = Annotated[
    str | None,
    typer.Option(
        "--model-init-kwargs",
        "--model_init_kwargs",
        help='How the base model is loaded, as moa train takes it: arguments of from_pretrained, as in \'{"revision": "v1"}\'. '
        "They override the adapter's own; null removes one.",
    ),
]
"""Likewise, of how it is loaded; `parse_mapping` reads it."""

Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of the base model: float32, bfloat16, float16. Default: the one that the adapter was trained with; of a bare "
        "model float32 on a CPU, its own on a GPU."
    ),
]
"""Likewise, of its dtype alone."""


def parse_mapping(flag: str, text: str | None) -> dict[str, Any]:
    """Read the value of a flag that takes a mapping.

    Raises:
        UsageError: If it is none.
    """
    value = {} if text is None else parse_value(flag, text)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UsageError(f'{flag} is {text!r}: give a mapping, as in \'{{"revision": "v1"}}\'')
    return value


FLAGS_ONLY = ("config", "help", "allow_code_execution")
"""What a file may not set: leave to run a model's programs is given by a person, for one call."""


def options_from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take a verb's options from a file; the callback of an eager option ``--config``.

    Args:
        context: The verb's, whose defaults become those of the file.
        path: The file; its keys are the options' names, with dashes or underscores. A list stands for its entries with
            commas between, a mapping for its JSON.

    Returns:
        The path.

    Raises:
        UsageError: If the file cannot be read, or a key is no option of the verb.
    """
    if path is None or context.resilient_parsing:
        return path
    settings = {name.replace("-", "_"): value for name, value in load_yaml(path).items()}
    by_flag = {one.opts[0].removeprefix("--").replace("-", "_"): one for one in context.command.params}
    for name, value in settings.items():
        if name in FLAGS_ONLY:
            raise UsageError(f"{path}: {name} cannot stand in a file: give it on the command line")
        if name not in by_flag:
            raise UsageError(f"{path}: {unknown('option', name, set(by_flag) - set(FLAGS_ONLY))}")
        if isinstance(value, bool) and not getattr(by_flag[name], "is_flag", False):
            raise UsageError(f"{path}: {name} is {str(value).lower()}: give a value, as on the command line")
    context.default_map = {str(by_flag[name].name): _flag_value(value) for name, value in settings.items()}
    return path


def _flag_value(value: object) -> object:
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(str(one) for one in value) if isinstance(value, list) else value


def refuse_given(options: Mapping[str, object], why: str) -> None:
    """Refuse options that mean nothing where they are given.

    Args:
        options: Their values by name; None for one that was not given.
        why: What is wrong with them, and what to do.

    Raises:
        UsageError: If any was given.
    """
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)} {why}")


def key_lines(config_class: Any, leave_out: Collection[str] = (), dashes: str = "--") -> list[str]:
    """Lines of a command's help: each field of a config, as a flag with dashes, with its doc line and its default."""
    docs, layout = (
        field_docs(config_class),
        textwrap.TextWrapper(92, subsequent_indent=" " * 6, break_on_hyphens=False),
    )
    return [
        layout.fill(f"{dashes}{one.name}  {docs[one.name]}{_default(one)}")
        for one in dataclasses.fields(config_class)
        if one.name not in leave_out
    ]


def _default(field: Any) -> str:
    if field.default is dataclasses.MISSING:
        return " (required)" if field.default_factory is dataclasses.MISSING else ""
    return "" if field.default in (None, "", False) else f" (default: {field.default})"
