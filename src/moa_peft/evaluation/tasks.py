"""Tasks by name: which there are, where their rows lie, and how they are read."""

import gzip
import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from moa_peft.data.loading import SUFFIXES, is_row_file, load_records, refuse_split_of_file, split_name
from moa_peft.errors import UsageError, expanded, unknown
from moa_peft.evaluation.hub_tasks import HUB
from moa_peft.evaluation.questions import Task, question_of

GROUPS: Mapping[str, tuple[str, ...]] = {
    "commonsense": (
        "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa",
    ),
    "math": ("AddSub", "AQuA", "gsm8k", "MultiArith", "SingleEq", "SVAMP"),
    "code": ("humaneval", "mbpp"),
}  # fmt: skip
"""The paper's tasks by group; each is a folder under the data root."""

ALIASES: Mapping[str, str] = {
    "siqa": "social_i_qa", "obqa": "openbookqa", "arce": "ARC-Easy", "arcc": "ARC-Challenge",
}  # fmt: skip
"""Short names of the paper's tasks, without dashes."""


def load_task(
    source: str, *, split: str | None = None, limit: int | None = None, name: str | None = None
) -> Task:
    """Read a task.

    Args:
        source: What `load_rows` reads: a folder, a file, "demo", or a name for `datasets`.
        split: Which split; None for "test", or "validation" where the source holds no test split.
        limit: Take only so many rows from the start.
        name: The task's name; None to take it from the source.

    Raises:
        UsageError: If the rows cannot be read, or a row's answer is not one of its choices.
    """
    folder = expanded(source)
    if folder.is_file() and not is_row_file(folder.name):
        raise UsageError(
            f"task file {source} is of an unknown kind: its name must end in {', '.join(SUFFIXES)}"
        )
    chosen = split or _held_out_split(source, folder)
    file = _file_of(folder, chosen)
    return Task(
        name=name or _name_of(source, folder),
        source=source,
        split=chosen if file is None else split_name(file),
        questions=tuple(
            question_of(record, where) for where, record in load_records(source, split=chosen, limit=limit)
        ),
        limit=limit,
        file_md5=None if file is None else _md5(file),
    )


def load_tasks(
    names: str, *, data_root: Path | None = None, split: str | None = None, limit: int | None = None
) -> list[Task]:
    """Read the tasks of a list such as "math,boolq,demo,my/rows.json".

    Args:
        names: Names of tasks and groups, files and folders, with commas between.
        data_root: Folder with a folder for each of the paper's tasks; None for the hub.
        split: As for `load_task`.
        limit: As for `load_task`, for each task.

    Returns:
        The tasks in the order given, each once.

    Raises:
        UsageError: If a name is unknown, the data root is missing, or a task cannot be read. Names come first: a
            mistake in the last of them is told before the first is read.
    """
    wanted = _listed(names)
    if not wanted:
        raise UsageError(
            "--tasks is empty: give names of tasks or groups, files or folders, with commas between"
        )
    sources: dict[str, str | None] = {}
    for one in wanted:
        sources |= _resolve(one, data_root)
    if split is not None:
        for source in sources:
            refuse_split_of_file(source, split)
    return [load_task(source, split=split, limit=limit, name=name) for source, name in sources.items()]


def task_names(names: str, known: Collection[str]) -> list[str]:
    """Name the tasks of a list such as `load_tasks` takes, each once, without their rows.

    ``known`` are names of tasks that were read before; one that a file or folder may have had goes before others.
    """
    found: list[str] = []
    for one in _listed(names):
        if one in GROUPS:
            found += GROUPS[one]
        elif _names_a_task(one):
            found.append(_known()[_bare(one)])
        else:
            path = expanded(one)
            guesses = (_name_of(one, path), one, path.name)
            found.append(next((guess for guess in guesses if guess in known), guesses[0]))
    return list(dict.fromkeys(found))


def _listed(names: str) -> list[str]:
    return [one.strip() for one in names.split(",") if one.strip()]


def _known() -> dict[str, str]:
    """The paper's tasks by their names and short names, as `_bare` writes them."""
    return {_bare(one): one for group in GROUPS.values() for one in group} | dict(ALIASES)


def _names_a_task(given: str) -> bool:
    """Whether letters name one of the paper's tasks, and are no path that is there."""
    return _bare(given) in _known() and not ("/" in given and expanded(given).exists())


def _resolve(given: str, data_root: Path | None) -> dict[str, str | None]:
    """The sources that a name stands for, with their tasks' names."""
    if given == "demo":
        return {"demo": "demo"}
    if given in GROUPS:
        return {_source_of(one, data_root): one for one in GROUPS[given]}
    if _names_a_task(given):
        name = _known()[_bare(given)]
        return {_source_of(name, data_root): name}
    if expanded(given).exists():
        return {given: None}
    if data_root is not None and "/" not in given and (data_root / given).is_dir():
        return {str(data_root / given): given}
    if is_row_file(given):
        raise UsageError(f"task file {given} does not exist: give a file, a folder or the name of a task")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", given):
        return {given: None}
    names = {"demo", *GROUPS, *_known().values(), *ALIASES}
    raise UsageError(
        f"{unknown('task', given, names)}; or give a file or folder of rows, or a name on the hub"
    )


def _source_of(name: str, data_root: Path | None) -> str:
    """Where one of the paper's tasks is read: under the data root, or without one on the hub."""
    if data_root is None:
        if name in HUB:
            return HUB[name].source
        raise UsageError(
            f"task {name!r} is not on the hub in a form that is known here; {', '.join(HUB)} are. Give --data-root "
            "FOLDER, a folder with a folder of rows for each task"
        )
    if not data_root.is_dir():
        raise UsageError(
            f"task {name!r}: the data root {data_root} is no folder: give --data-root FOLDER, a folder with a folder of rows "
            "for each task, or leave it out to load from the hub"
        )
    if not (data_root / name).is_dir():
        there = ", ".join(sorted(one.name for one in data_root.iterdir() if one.is_dir())) or "no folder"
        raise UsageError(
            f"task {name!r} is not under the data root {data_root}: it holds {there}; give another --data-root"
        )
    return str(data_root / name)


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _held_out_split(source: str, folder: Path) -> str:
    if source == "demo":
        return "validation"
    if folder.is_dir():
        splits = {split_name(one) for one in folder.iterdir() if is_row_file(one.name)}
        return "validation" if "test" not in splits and "validation" in splits else "test"
    return next((one.split for one in HUB.values() if one.source == source), "test")


def _file_of(folder: Path, split: str) -> Path | None:
    if folder.is_file():
        return folder
    if not folder.is_dir():
        return None
    files = {split_name(one): one for one in sorted(folder.iterdir()) if is_row_file(one.name)}
    return files.get(split)


def _name_of(source: str, path: Path) -> str:
    if path.is_dir():
        return path.resolve().name
    if path.is_file() or is_row_file(path.name):
        split = split_name(path)
        return path.resolve().parent.name if split in ("train", "validation", "test") else split
    return next((name for name, one in HUB.items() if one.source == source), source)


def _md5(file: Path) -> str:
    with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
