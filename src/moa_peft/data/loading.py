"""Rows of instruction data, from files, folders, the demo data and `datasets`."""

import dataclasses
import gzip
import itertools
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

from moa_peft.data.row import Row, as_row
from moa_peft.errors import UsageError, expanded, first_line, unknown


def load_rows(source: str, *, split: str = "train", limit: int | None = None) -> list[Row]:
    """Read rows of instruction data.

    Args:
        source: A .json, .json.gz, .jsonl or .jsonl.gz file; a folder that holds such a file for each split; "demo",
            the packaged demo data; or what `datasets.load_dataset` reads, a local folder or a name on the hub,
            written NAME or NAME:CONFIG. Several with commas between give one row each in turn.
        split: Which split to read. A single file is its own split, so this does not matter for one.
        limit: Read only so many rows from the start; none reads all.

    Returns:
        At least one row, in the order of the source.

    Raises:
        UsageError: If the source or the split does not exist, is empty, damaged or malformed, or a row lacks a field.
    """
    return [as_row(record, where) for where, record in load_records(source, split=split, limit=limit)]


def load_records(source: str, *, split: str = "train", limit: int | None = None) -> list[tuple[str, Any]]:
    """Read records of any form, each with the place it stands at, for errors.

    Args:
        source: As for `load_rows`.
        split: As for `load_rows`.
        limit: As for `load_rows`.

    Returns:
        At least one record, in the order of the source, not validated yet.

    Raises:
        UsageError: If the source or the split does not exist, is empty, damaged or malformed.
    """
    if limit is not None and not 1 <= limit <= sys.maxsize:
        raise UsageError(f"limit is {limit}: give at least 1, below 2**63, or leave it out to read all rows")
    return list(islice(_records(source, split), limit))


SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz")
"""How the name of a row file may end."""

_UNREADABLE = (ValueError, RecursionError)
"""What Python raises at JSON with a number of too many digits, or nested too deeply."""


def is_row_file(name: str) -> bool:
    """Tell whether a name ends as the name of a row file does."""
    return name.endswith(SUFFIXES)


def split_name(file: Path) -> str:
    """The split that a file in a folder holds: its name without the ending."""
    return next(file.name.removesuffix(end) for end in SUFFIXES if file.name.endswith(end))


def refuse_split_of_file(source: str, split: str) -> None:
    """Refuse a split that was asked for where the source is one file of another name, which has no splits.

    Raises:
        UsageError: If it is.
    """
    path = expanded(source)
    if path.is_file() and is_row_file(path.name) and split != split_name(path):
        raise UsageError(
            f"split {split!r} was asked for, and {source} is one file, which has no splits: leave --split out, or give a folder "
            "with a file for each split"
        )


def read_records(file: Path) -> Iterator[tuple[str, Any]]:
    """Read the records of a file one after the other.

    Args:
        file: A file whose name ends in one of `SUFFIXES`. A `.json` file holds one list, a `.jsonl` file one JSON
            value a line, where blank lines count for nothing.

    Yields:
        Where the record stands, such as "data.jsonl, line 3", and the record, not validated yet.

    Raises:
        UsageError: If the file is missing, empty, damaged or malformed; the message names the line.
    """
    if not file.is_file():
        raise UsageError(f"data file {file} does not exist" if not file.exists() else f"{file} is not a file")
    try:
        with _open_text(file) as text:
            lines = file.name.removesuffix(".gz").endswith(".jsonl")
            yield from _lines(file, text) if lines else _list(file, text)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"data file {file} is not UTF-8 text: {error.reason}"  # the place is one in a buffer
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"data file {file} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise UsageError(f"data file {file} cannot be read: {error.strerror or error}") from error


def _open_text(file: Path) -> TextIO:
    if file.name.endswith(".gz"):
        return cast("TextIO", gzip.open(file, "rt", encoding="utf-8-sig"))
    return file.open(encoding="utf-8-sig")


def _lines(file: Path, text: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
        except _UNREADABLE as error:
            raise UsageError(f"{where}: cannot be read: {error}") from error


def _list(file: Path, text: TextIO) -> Iterator[tuple[str, Any]]:
    content = text.read()
    if not content.strip():
        raise UsageError(f"data file {file} is empty")
    try:
        records = json.loads(content)
    except json.JSONDecodeError as error:
        hint = ""
        if content.lstrip().startswith("{"):
            hint = "; it should be one list [...]; if it is one object a line, let its name end in .jsonl"
        raise UsageError(
            f"{file}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}{hint}"
        ) from error
    except _UNREADABLE as error:
        raise UsageError(f"data file {file} cannot be read: {error}") from error
    if not isinstance(records, list):
        raise UsageError(
            f"data file {file} holds one {type(records).__name__}: it should be a list of rows [...]"
        )
    for number, record in enumerate(records, start=1):
        yield f"{file}, row {number}", record


def _records(source: str, split: str) -> Iterator[tuple[str, Any]]:
    """Read at least one record of a source; of several, with commas between, one of each in turn."""
    path = expanded(source)
    if "," in source and not path.exists():
        turns = itertools.zip_longest(*(_records(one.strip(), split) for one in source.split(",")))
        yield from (one for turn in turns for one in turn if one is not None)
        return
    are_none = True
    for record in _records_of_one(source, split):
        are_none = False
        yield record
    if are_none:
        raise UsageError(f"data {source!r} holds no rows (split {split!r})")


def _records_of_one(source: str, split: str) -> Iterable[tuple[str, Any]]:
    """Find out what the source is and read it."""
    if source == "demo":
        from moa_peft.data.demo import demo_rows

        rows = enumerate(demo_rows(split), start=1)
        return ((f"demo, row {place}", dataclasses.asdict(row)) for place, row in rows)
    path = expanded(source)
    if source and path.is_dir():
        names = [one for one in sorted(path.iterdir()) if not one.name.startswith(".")]
        found = [one for one in names if is_row_file(one.name) and one.is_file()]
        files = {split_name(one): one for one in found}
        same = [one.name for one in found if split_name(one) == split]
        if len(same) > 1:
            raise UsageError(
                f"the folder {path} holds {' and '.join(same)}, both the split {split!r}: keep one"
            )
        if split in files:
            return read_records(files[split])
        made_by_datasets = {"dataset_dict", "dataset_info", "dataset_infos", "state"} & files.keys()
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
        reason = first_line(error) or type(error).__name__
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
