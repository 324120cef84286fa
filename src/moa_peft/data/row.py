"""One row of instruction data: its fields, how a record of a file becomes one, and a fingerprint of a list of rows."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moa_peft.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One question and its answer."""

    instruction: str
    """What is asked."""

    input: str
    """What the instruction is about, or "" where the instruction holds it all."""

    output: str
    """The reply in full; training learns it."""

    answer: str
    """The bare answer that a reply is scored on, or "" where the data has none."""

    system: str = ""
    """What a system turn tells the model before the question, or ""."""


_MEDIA = ("image", "images", "video", "videos", "audio")
"""Fields of what is no text, as TRL names them."""
_UNREAD = ("tools", "functions", "tool_calls", "function_call", "thinking", "reasoning", "reasoning_content")
"""Fields of a row, or of a turn of messages, that would be trained on without what they hold."""

NEEDED = (
    "a row needs instruction and output (input and answer may be added), or prompt and completion, or messages of one "
    "exchange: user and assistant, with a system turn before them or without; system may be added to each"
)


def as_row(record: Any, where: str) -> Row:
    """Turn one record of a file or of `datasets` into a row.

    Args:
        record: A mapping with instruction and output, or prompt and completion, or messages; input, answer and system may be
            added, and other fields count for nothing.
        where: The place of the record, for errors.

    Returns:
        The row, its texts unchanged.

    Raises:
        UsageError: If a field is missing or is not text.
    """
    if not isinstance(record, Mapping):
        raise UsageError(f"{where}: is a {type(record).__name__}, not an object with fields: {NEEDED}")
    media = [name for name in _MEDIA if record.get(name)]
    if media:
        raise UsageError(
            f"{where}: has {media[0]}, and moa reads text alone: train with pictures in Python, by TRL's SFTTrainer with the model's "
            "processor and peft_config=MoAConfig.preset(...), as docs/quickstart.md shows"
        )
    _refuse_unread(record, where)
    if isinstance(record.get("history"), list):
        _refuse_unread(record, where, ("history",))
    extra = {name: _text(record, name, where, optional=True) for name in ("input", "answer", "system")}
    if record.get("instruction") is not None and record.get("output") is not None:
        return Row(
            instruction=_text(record, "instruction", where), output=_text(record, "output", where), **extra
        )
    if record.get("prompt") is not None and record.get("completion") is not None:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _from_messages([*prompt, *completion], extra, where)
        return Row(
            instruction=_text(record, "prompt", where), output=_text(record, "completion", where), **extra
        )
    if record.get("messages") is not None:
        return _from_messages(record["messages"], extra, where)
    given = ", ".join(f"{name} (null)" if one is None else str(name) for name, one in record.items())
    raise UsageError(f"{where}: has {given or 'no field at all'}: {NEEDED}")


def _refuse_unread(fields: Mapping[str, Any], where: str, names: Sequence[str] = _UNREAD) -> None:
    nothing = ("", "[]", "{}", "null", "none")
    unread = [
        name for name in names if (value := fields.get(name)) and str(value).strip().lower() not in nothing
    ]
    if unread:
        raise UsageError(
            f"{where}: has {unread[0]}, which moa does not read: a row holds one question and its reply as text. Write what the model "
            "is to see and to say into them, or take the field out"
        )


def _text(record: Mapping[str, Any], name: str, where: str, *, optional: bool = False) -> str:
    value = record.get(name)
    if value is None and optional:
        return ""
    if name == "answer" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UsageError(f"{where}: {name} is {value!r}: it must be text")
    return _whole(value, name, where)


def _whole(text: str, name: str, where: str) -> str:
    """Check that a text holds no half of a character, as a JSON escape can make one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: {name} holds half of a character ({text[error.start]!r}): write it whole"
        ) from error
    return text


def _from_messages(messages: Any, extra: Mapping[str, str], where: str) -> Row:
    """Map one question and its reply, with the system turn before them if there is one."""
    for turn in messages if isinstance(messages, list) else ():
        if isinstance(turn, Mapping):
            _refuse_unread(turn, where)
    well_formed = isinstance(messages, list) and all(
        isinstance(turn, Mapping)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in messages
    )
    if not well_formed:
        raise UsageError(
            f"{where}: messages must be a list of turns, each with a role and its content as text"
        )
    roles = [turn["role"] for turn in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise UsageError(
            f"{where}: messages has the turns {', '.join(roles) or '(none)'}: a row holds one question and its reply, "
            "so give (system,) user, assistant"
        )
    *system, question, reply = [_whole(turn["content"], "messages", where) for turn in messages]
    told = [one for one in (*system, extra["system"]) if one.strip()]
    if len({one.strip() for one in told}) > 1:
        raise UsageError(f"{where}: has a system turn, and another text in system: keep one")
    return Row(**{**extra, "instruction": question, "output": reply, "system": told[0] if told else ""})


def rows_md5(rows: Sequence[Row]) -> str:
    """Identify rows by their contents and order, whatever file they came from."""
    digest = hashlib.md5(usedforsecurity=False)
    for row in rows:
        fields = dataclasses.asdict(row)
        if not row.system:  # so that rows without one keep the MD5 that earlier recipes state
            del fields["system"]
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
