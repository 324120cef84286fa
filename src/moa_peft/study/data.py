"""The rows of a study: read, drawn, identified, and checked against each other before the first run."""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moa_peft.data.loading import load_rows
from moa_peft.data.row import Row, rows_md5
from moa_peft.errors import UsageError, unknown
from moa_peft.evaluation.options import EvaluationOptions
from moa_peft.evaluation.tasks import GROUPS, Task, load_task, load_tasks
from moa_peft.study.config import StudyConfig

VALIDATION = "validation"


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSet:
    """Which rows were used."""

    source: str
    """Where they come from, as the study names it."""
    rows: int
    """How many."""
    md5: str
    """MD5 of the rows used, their contents and order."""
    file_md5: str | None
    """MD5 of the whole file, unzipped; None where there is not one file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyData:
    """The rows of a study."""

    train: RowSet
    """The training rows, which each run reads for itself."""
    short: RowSet
    """Those of them that learning rates are tried with; all of them unless the study says fewer."""
    validation: Task
    """The rows that the learning rate is chosen on."""
    tests: tuple[Task, ...]
    """The tests, drawn."""
    forgetting: tuple[Task, ...] = ()
    """The tasks that tell what training took away, drawn; no test has the name of one."""


def load_data(config: StudyConfig) -> StudyData:
    """Read the rows of a study and check them.

    Raises:
        UsageError: If rows cannot be read, a file is not the one of ``data_md5``, a training or validation row is in a test or in
            both, or a task cannot be scored as the study asks.
    """
    source = source_of(config, config.data)
    train = load_task(source, split="train", limit=config.train_limit, name="train")
    short = dataclasses.replace(train, questions=train.questions[: config.short_rows])
    load_rows(source, limit=1)  # training reads fewer forms of rows than evaluation
    held_out = load_task(
        source if config.validation is None else source_of(config, config.validation),
        split=VALIDATION,
        name=VALIDATION,
    )
    root = None if config.data_root is None else Path(config.data_root)
    whole = load_tasks(config.task_names(), data_root=root)
    kept = load_tasks(config.forgetting_names(), data_root=root) if config.forgetting else []
    names = [VALIDATION, *(one.name for one in (*whole, *kept))]
    twice = sorted({one for one in names if names.count(one) > 1})
    if twice:
        raise UsageError(
            f"tasks and forgetting have {', '.join(twice)} twice (the validation rows are {VALIDATION}): take one of them out, or "
            "rename its file or folder"
        )
    check_scoring(config, held_out, whole, kept)
    check_files([train, held_out, *whole, *kept], config)
    validation = draw(held_out, config.validation_limit, config.draw_seed)
    parts = held_out.source.split(",")
    chosen = [load_task(one, split=VALIDATION) for one in parts] if len(parts) > 1 else [held_out]
    whole = [
        rest_of(one, validation) if any(_same_file(one, part) for part in chosen) else one for one in whole
    ]
    check_apart(train, validation, [*whole, *kept])
    return StudyData(
        train=row_set(train, config.data),
        short=row_set(short, config.data),
        validation=validation,
        tests=tuple(draw(one, config.test_limit, config.draw_seed) for one in whole),
        forgetting=tuple(draw(one, config.forgetting_limit, config.draw_seed) for one in kept),
    )


def scoring_options(config: StudyConfig) -> tuple[EvaluationOptions, EvaluationOptions]:
    """How validation rows and tests are scored, and how the tasks that tell what was forgotten are."""
    options = EvaluationOptions(mode=config.mode, template=config.template, batch_size=config.batch_size)
    return options, dataclasses.replace(options, mode="text")


def check_scoring(
    config: StudyConfig, validation: Task, tests: Sequence[Task], forgetting: Sequence[Task]
) -> None:
    """Check that every task can be scored as the study asks, and the validation rows by what chooses the learning rate.

    Raises:
        UsageError: If one cannot be.
    """
    options, texts = scoring_options(config)
    for task, how in (
        *((one, options) for one in (validation, *tests)),
        *((one, texts) for one in forgetting),
    ):
        if task.runs_code and how.mode_for(task) == "generation":
            raise UsageError(
                f"the task {task.name} runs the programs that a model writes, which no study does: leave it out, or give mode: "
                "likelihood for the loss of its answers"
            )
        how.check_needs(task)
    by_likelihood = options.mode_for(validation) == "likelihood"
    scored = any(one.completions for one in validation.questions) if by_likelihood else validation.has_answers
    if config.has_tuning and config.choose_by == "accuracy" and not scored:
        raise UsageError(
            "choose_by is accuracy, but the validation rows have no choices to compare by likelihood: give choose_by: answer_loss"
            + (", or mode: generation" if by_likelihood and validation.has_answers else "")
        )


def source_of(config: StudyConfig, name: str) -> str:
    """The source that a name of data stands for: the folder of that name under the data root, or the name itself.

    Of several names, with commas between, that of each.
    """
    if name == "demo":
        return name
    if config.data_root is not None and (folder := Path(config.data_root) / name).exists():
        return str(folder)
    return ",".join(source_of(config, one.strip()) for one in name.split(",")) if "," in name else name


def row_set(task: Task, source: str) -> RowSet:
    """Say which rows a task holds, and where they come from as a study names it."""
    return RowSet(source=source, rows=len(task.questions), md5=questions_md5(task), file_md5=task.file_md5)


def questions_md5(task: Task) -> str:
    """MD5 of a task's rows, their contents and order."""
    return rows_md5([one.row for one in task.questions])


def draw(task: Task, limit: int | None, seed: int) -> Task:
    """Draw so many of a task's questions, all for None, in their order; the same on every machine, fewer part of more."""
    places = range(len(task.questions))
    if limit is None or limit >= len(places):
        return task
    order = sorted(places, key=lambda place: hashlib.sha256(f"{seed}:{place}".encode()).digest())
    return dataclasses.replace(
        task, questions=tuple(task.questions[place] for place in sorted(order[:limit]))
    )


def rest_of(test: Task, validation: Task) -> Task:
    """What a test of the validation rows' own file has beside the rows drawn for validation.

    Raises:
        UsageError: If nothing is left.
    """
    chosen = {row_key(one.row) for one in validation.questions}
    rest = tuple(one for one in test.questions if row_key(one.row) not in chosen)
    if not rest:
        raise UsageError(
            f"the test {test.name} is the file of the validation rows, and all of them are used for validation: give a "
            "validation_limit below their number, or leave the test out"
        )
    return dataclasses.replace(test, questions=rest)


def _same_file(one: Task, other: Task) -> bool:
    if one.file_md5 is None:
        return (one.source, one.split) == (other.source, other.split)
    return one.file_md5 == other.file_md5


def check_files(tasks: Sequence[Task], config: StudyConfig) -> None:
    """Check that the files are those of the config's ``data_md5``.

    Raises:
        UsageError: If one is not, or the config names a task that the study does not have.
    """
    names = {one.name for one in tasks}.union(*GROUPS.values())  # those of other tests do no harm
    wrong = [unknown("task", name, names) for name in config.data_md5 if name not in names]
    for one in tasks:
        wanted = config.data_md5.get(one.name)
        if wanted is not None and wanted != one.file_md5:
            wrong.append(f"the rows of {one.name} ({one.source}) have MD5 {one.file_md5}, not {wanted}")
    if wrong:
        raise UsageError(
            f"data_md5: {'; '.join(wrong)}: get the file that was meant, or take the entry out of data_md5"
        )


def check_apart(train: Task, validation: Task, tests: Sequence[Task]) -> None:
    """Check that no row trained or chosen on is in a test, and none trained on is chosen on.

    Rows are the same when their instructions and inputs are, apart from case, punctuation and spaces. Tests count
    whole, not only the rows drawn.

    Raises:
        UsageError: If one is; the message names how many and the first.
    """
    seen = {
        one.name: {row_key(asked.row): asked.row for asked in one.questions} for one in (train, validation)
    }
    wrong: list[str] = []
    for name, rows in seen.items():
        for test in tests:
            shared = [asked.row for asked in test.questions if row_key(asked.row) in rows]
            if shared:
                what = f"{len(shared)} rows of the test {test.name} are {name} rows too"
                wrong.append(f"{what}, such as {_begin(shared[0])}")
    shared = [row for key, row in seen[validation.name].items() if key in seen[train.name]]
    if shared and train.file_md5 is not None and train.file_md5 == validation.file_md5:
        raise UsageError(
            "the validation rows are the training rows: give --validation FILE, or as --data a folder with a validation split"
        )
    if shared:
        wrong.append(f"{len(shared)} validation rows are training rows too, such as {_begin(shared[0])}")
    if wrong:
        raise UsageError(f"{'; '.join(wrong)}: take these rows out of the training or validation file")


def row_key(row: Row) -> str:
    """What makes two rows one question: instruction and input in small letters; of the signs only those of sums."""
    return re.sub(r"[^\w+\-*/=<>%]+", " ", f"{row.instruction} {row.input}".lower()).strip()


def _begin(row: Row) -> str:
    return repr(row.instruction if len(row.instruction) <= 80 else f"{row.instruction[:80]}...")
