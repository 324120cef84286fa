"""Tasks: named sets of questions, each with the form of its answer and its choices."""

import gzip
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moa_peft.data.row_files import is_row_file, split_name
from moa_peft.data.rows import Row, load_rows
from moa_peft.errors import UsageError, unknown
from moa_peft.evaluate.answers import AnswerForm, parse_number

GROUPS: Mapping[str, tuple[str, ...]] = {
    "commonsense": (
        "boolq",
        "piqa",
        "social_i_qa",
        "hellaswag",
        "winogrande",
        "ARC-Easy",
        "ARC-Challenge",
        "openbookqa",
    ),
    "math": ("AddSub", "AQuA", "gsm8k", "MultiArith", "SingleEq", "SVAMP"),
}
"""The paper's tasks by group; each is a folder under the data root."""

ALIASES: Mapping[str, str] = {
    "siqa": "social_i_qa",
    "obqa": "openbookqa",
    "arce": "ARC-Easy",
    "arcc": "ARC-Challenge",
}
"""Short names of the paper's tasks, without dashes."""

DEFAULT_DATA_ROOT = Path("../shared/data")
"""Where the paper's tasks are looked for unless a data root is given."""

DEFAULT_LEAD = "the correct answer is "
"""How a reply to a question with choices begins, where the data does not say otherwise."""

_FORMAT = re.compile(r"answer format:[ \t]*([^\s/]+(?:/[^\s/]+)+)", re.IGNORECASE)
_LETTERS = re.compile(r"\(([A-Z])\)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question of a task."""

    row: Row
    """The row it comes from."""

    form: AnswerForm
    """What kind of answer it wants."""

    completions: tuple[str, ...] = ()
    """The replies whose likelihoods are compared, one for each word of the form; empty for other kinds."""

    @property
    def wanted(self) -> int | None:
        """The place of the right choice; None for other kinds."""
        return self.form.choices.index(self.row.answer) if self.completions else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A named set of questions."""

    name: str
    """The task's name in tables and results."""

    source: str
    """Where the rows come from, as it was given."""

    split: str
    """Which split of the source."""

    questions: tuple[Question, ...]
    """At least one."""

    limit: int | None = None
    """Only so many rows from the start of the source were taken; None for all."""

    file_md5: str | None = None
    """MD5 of the file of rows, unzipped; None where the rows are not in one file."""

    @property
    def has_choices(self) -> bool:
        """Whether every question has choices to compare by likelihood."""
        return all(one.completions for one in self.questions)

    @property
    def has_answers(self) -> bool:
        """Whether any question has an answer that a reply is scored on."""
        return any(one.form.kind != "none" for one in self.questions)


def as_question(row: Row, where: str = "row") -> Question:
    """Find out what kind of answer a row wants.

    Args:
        row: The row. An instruction with a line "Answer format: a/b/c" has the choices a, b and c; one that lists
            "(A) ... (B) ..." has letters, where the answer is one; otherwise the answer decides.
        where: The place of the row, for errors.

    Returns:
        The question. Its completions are the row's own output with each choice in the place of the answer.

    Raises:
        UsageError: If the answer is not one of the choices.
    """
    stated = _FORMAT.findall(row.instruction)
    if stated and row.answer:
        choices = tuple(stated[-1].split("/"))
        if row.answer not in choices:
            raise UsageError(
                f"{where}: the answer is {row.answer!r}, its answer format allows {', '.join(choices)}"
            )
        lead = row.output.removesuffix(row.answer) if row.output.endswith(row.answer) else DEFAULT_LEAD
        return Question(
            row=row,
            form=AnswerForm(kind="choice", choices=choices),
            completions=tuple(lead + one for one in choices),
        )
    letters = tuple(dict.fromkeys(_LETTERS.findall(row.instruction)))
    if row.answer in letters and len(letters) > 1:
        return Question(row=row, form=AnswerForm(kind="letter", choices=letters))
    if not row.answer:
        return Question(row=row, form=AnswerForm(kind="none"))
    return Question(row=row, form=AnswerForm(kind="text" if parse_number(row.answer) is None else "number"))


def load_task(
    source: str, *, split: str | None = None, limit: int | None = None, name: str | None = None
) -> Task:
    """Read a task.

    Args:
        source: What `load_rows` reads: a folder, a file, "demo", or a name for `datasets`.
        split: Which split; None for "test", or "validation" where the source holds no test split.
        limit: Take only so many rows from the start.
        name: The task's name; None to take it from the source.

    Returns:
        The task.

    Raises:
        UsageError: If the rows cannot be read, or a row's answer is not one of its choices.
    """
    folder = Path(source).expanduser()
    chosen = split or _held_out_split(source, folder)
    rows = load_rows(source, split=chosen, limit=limit)
    file = _file_of(folder, chosen)
    questions = (as_question(row, f"{source}, row {place}") for place, row in enumerate(rows, start=1))
    return Task(
        name=name or _name_of(source, folder),
        source=source,
        split=chosen if file is None else split_name(file),
        questions=tuple(questions),
        limit=limit,
        file_md5=None if file is None else _md5(file),
    )


def load_tasks(
    names: str, *, data_root: Path | None = None, split: str | None = None, limit: int | None = None
) -> list[Task]:
    """Read the tasks of a list such as "math,boolq,demo,my/rows.json".

    Args:
        names: Names of tasks and groups, files and folders, with commas between.
        data_root: Folder with a folder for each of the paper's tasks; None for `DEFAULT_DATA_ROOT`.
        split: As for `load_task`.
        limit: As for `load_task`, for each task.

    Returns:
        The tasks in the order given, each once.

    Raises:
        UsageError: If a name is unknown, the data root is missing, or a task cannot be read. Names come first: a
            mistake in the last of them is told before the first is read.
    """
    wanted = [one.strip() for one in names.split(",") if one.strip()]
    if not wanted:
        raise UsageError(
            "--tasks is empty: give names of tasks or groups, files or folders, with commas between"
        )
    sources: dict[str, str | None] = {}
    for one in wanted:
        sources |= _resolve(one, data_root)
    return [load_task(source, split=split, limit=limit, name=name) for source, name in sources.items()]


def _resolve(given: str, data_root: Path | None) -> dict[str, str | None]:
    """The sources that a name stands for, with their tasks' names."""
    if given == "demo":
        return {"demo": "demo"}
    if given in GROUPS:
        root = _root(given, data_root)
        return {str(_task_folder(root, one)): one for one in GROUPS[given]}
    known = {_bare(one): one for group in GROUPS.values() for one in group} | dict(ALIASES)
    if _bare(given) in known:
        name = known[_bare(given)]
        return {str(_task_folder(_root(given, data_root), name)): name}
    if Path(given).expanduser().exists():
        return {given: None}
    root = data_root or DEFAULT_DATA_ROOT
    if "/" not in given and (root / given).is_dir():
        return {str(root / given): given}
    if is_row_file(given):
        raise UsageError(f"task file {given} does not exist: give a file, a folder or the name of a task")
    names = {"demo", *GROUPS, *known.values(), *ALIASES}
    raise UsageError(f"{unknown('task', given, names)}; or give a file or folder of rows")


def _root(name: str, data_root: Path | None) -> Path:
    root = data_root or DEFAULT_DATA_ROOT
    if not root.is_dir():
        raise UsageError(
            f"task {name!r}: the data root {root} is no folder: give --data-root FOLDER, a folder with a folder of rows "
            "for each task; loading these tasks by their names on the hub is not supported yet"
        )
    return root


def _task_folder(root: Path, name: str) -> Path:
    folder = root / name
    if not folder.is_dir():
        there = ", ".join(sorted(one.name for one in root.iterdir() if one.is_dir())) or "no folder"
        raise UsageError(
            f"task {name!r} is not under the data root {root}: it holds {there}; give another --data-root"
        )
    return folder


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _held_out_split(source: str, folder: Path) -> str:
    if source == "demo":
        return "validation"
    if folder.is_dir():
        splits = {split_name(one) for one in folder.iterdir() if is_row_file(one.name)}
        return "validation" if "test" not in splits and "validation" in splits else "test"
    return "test"


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
    if path.is_file():
        split = split_name(path)
        return path.resolve().parent.name if split in ("train", "validation", "test") else split
    return source


def _md5(file: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as content:
        while piece := content.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
