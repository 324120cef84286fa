"""Rows of instruction data, from files, folders, the demo data and `datasets`."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from moa_peft.data.row_files import is_row_file, read_records, split_name
from moa_peft.errors import UsageError, unknown
from moa_peft.paths import expanded

NEEDED = (
    "a row needs instruction and output (input and answer may be added), or prompt and completion, or messages that "
    "end with the assistant's turn"
)


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


def load_rows(source: str, *, split: str = "train", limit: int | None = None) -> list[Row]:
    """Read rows of instruction data.

    Args:
        source: A .json, .json.gz, .jsonl or .jsonl.gz file; a folder that holds such a file for each split; "demo",
            the packaged demo data; or what `datasets.load_dataset` reads, a local folder or a name on the hub,
            written NAME or NAME:CONFIG.
        split: Which split to read. A single file is its own split, so this does not matter for one.
        limit: Read only so many rows from the start; none reads all.

    Returns:
        At least one row, in the order of the source.

    Raises:
        UsageError: If the source or the split does not exist, is empty, damaged or malformed, or a row lacks a field.
    """
    if source == "demo":
        from moa_peft.data.demo import demo_rows

        _check_limit(limit)
        return demo_rows(split)[:limit]
    return [as_row(record, where) for where, record in load_records(source, split=split, limit=limit)]


def load_records(source: str, *, split: str = "train", limit: int | None = None) -> list[tuple[str, Any]]:
    """Read records of any form, each with the place it stands at, for errors.

    Args:
        source: As for `load_rows`, without "demo".
        split: As for `load_rows`.
        limit: As for `load_rows`.

    Returns:
        At least one record, in the order of the source, not yet looked at.

    Raises:
        UsageError: If the source or the split does not exist, is empty, damaged or malformed.
    """
    _check_limit(limit)
    records = list(islice(_records(source, split), limit))
    if not records:
        raise UsageError(f"data {source!r} holds no rows (split {split!r})")
    return records


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}: give at least 1, or leave it out to read all rows")


def as_row(record: Any, where: str) -> Row:
    """Turn one record of a file or of `datasets` into a row.

    Args:
        record: A mapping with instruction and output, or prompt and completion, or messages; input and answer may be
            added, and other fields count for nothing.
        where: The place of the record, for errors.

    Returns:
        The row, its texts unchanged.

    Raises:
        UsageError: If a field is missing or is not text.
    """
    if not isinstance(record, Mapping):
        raise UsageError(f"{where}: is a {type(record).__name__}, not an object with fields: {NEEDED}")
    extra = {name: _text(record, name, where, optional=True) for name in ("input", "answer")}
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
    given = ", ".join(str(name) for name in record) or "no field at all"
    raise UsageError(f"{where}: has {given}: {NEEDED}")


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
    """See that a text holds no half of a character, as a JSON escape can make one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: {name} holds half of a character ({text[error.start]!r}): write it whole"
        ) from error
    return text


def _from_messages(messages: Any, extra: Mapping[str, str], where: str) -> Row:
    """Map one question and its reply; a system turn goes before the question, a blank line between them."""
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
    said = [_whole(turn["content"], "messages", where) for turn in messages]
    return Row(instruction="\n\n".join(filter(None, said[:-1])), output=said[-1], **extra)


def _records(source: str, split: str) -> Iterable[tuple[str, Any]]:
    """Find out what the source is and read it."""
    path = expanded(source)
    if source and path.is_dir():
        found = [one for one in sorted(path.iterdir()) if is_row_file(one.name) and one.is_file()]
        files = {split_name(one): one for one in found}
        same = [one.name for one in found if split_name(one) == split]
        if len(same) > 1:
            raise UsageError(
                f"the folder {path} holds {' and '.join(same)}, both the split {split!r}: keep one"
            )
        if split in files:
            return read_records(files[split])
        made_by_datasets = {"dataset_dict", "dataset_info", "state"} & files.keys()
        if files and not made_by_datasets:
            raise UsageError(f"{unknown('split', split, files)} (in the folder {path})")
        return _from_datasets(str(path), None, split)
    if is_row_file(source) or path.is_file():
        if not is_row_file(source):
            raise UsageError(
                f"data file {path} is of an unknown kind: its name must end in .json, .jsonl (or .gz of them)"
            )
        return read_records(path)
    if source.startswith(("/", ".", "~")) or source.count("/") > 1 or not source:
        raise UsageError(
            f"data {source!r} does not exist: give a file, a folder, 'demo' or the name of a dataset"
        )
    name, _, config = source.partition(":")
    return _from_datasets(name, config or None, split)


def _from_datasets(name: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        if Path(name).is_dir() and {"dataset_dict.json", "state.json"} & {
            one.name for one in Path(name).iterdir()
        }:
            found = datasets.load_from_disk(name)
        else:
            found = _load_dataset(name, config)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"data {name!r} is no file or folder, and `datasets` cannot load it: {reason}"
            if not Path(name).is_dir()
            else f"the folder {name} holds no row files, and `datasets` cannot load it: {reason}"
        ) from error
    if isinstance(found, Mapping):
        if split not in found:
            raise UsageError(f"{unknown('split', split, [str(one) for one in found])} (in {name!r})")
        found = found[split]
    for number, record in enumerate(found, start=1):
        yield f"{name}, split {split}, row {number}", record


def _load_dataset(name: str, config: str | None) -> Any:
    """Load a data set; of one that comes as a program, which is not run, the tables that the hub keeps of it."""
    import datasets

    try:
        return datasets.load_dataset(name, config)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        return datasets.load_dataset(name, config, revision="refs/convert/parquet")


def rows_md5(rows: Sequence[Row]) -> str:
    """Identify rows by their contents and order, whatever file they came from."""
    digest = hashlib.md5(usedforsecurity=False)
    for row in rows:
        digest.update(json.dumps(dataclasses.asdict(row), sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
