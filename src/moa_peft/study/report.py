"""The report of a study: the same bytes from the same config and rows."""

from pathlib import Path

from moa_peft.errors import UsageError
from moa_peft.evaluation.tasks import task_names
from moa_peft.extras import check_installed
from moa_peft.study.config import FROZEN, StudyConfig
from moa_peft.study.document import Picture, Section, Table, as_html, as_markdown
from moa_peft.study.folder import check_same_study, read_study
from moa_peft.study.formatting import (
    NONE,
    chosen_by,
    claim,
    count,
    difference_cells,
    estimate_of,
    loss_cells,
    nats,
    percent,
    plain,
    run_name,
    score_cell,
    signed,
)
from moa_peft.study.one_run import COLUMNS
from moa_peft.study.plots import draw_plots
from moa_peft.study.rows import read_results
from moa_peft.study.schedule import rate_text, shared_settings
from moa_peft.study.statistics import MethodSummary, StudySummary, median_step_ms, summarise
from moa_peft.training.output_folder import write_text

MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"

ACCURACY_NOTE = (
    "Per cent of the questions answered rightly: mean over seeds ± standard error over seeds. For the frozen model, which "
    "has no seed, the error is that of the number of questions, sqrt(p (1 - p) / n) for each test."
)
DIFFERENCE_NOTES = (
    (
        "Points of the mean accuracy over tests, paired: the same seeds and the same questions. The standard error has two "
        "parts, from the choice of questions and from the choice of seeds, and is the root of the sum of their squares."
    ),
    (
        "The minimum detectable difference is the least one that a study of this size finds in 80 of 100 cases, at a level "
        "of 5 % for each comparison, two-sided, by Student's t with Satterthwaite's degrees of freedom. Nothing is claimed "
        "of a difference below it: not that it is there, and not that the methods are equal."
    ),
)
LOSS_NOTE = (
    "Nats a token of the reference answers: mean over seeds ± standard error over seeds; of the frozen model that of the "
    "questions."
)
FORGETTING_NOTE = (
    "Accuracy by the likelihood of the choices' texts, less the frozen model's, in points ± standard error, paired question "
    "by question; * where it reaches its minimum detectable difference. The mean over tasks is compared with the baseline's."
)
CHOICE_NOTE = (
    "The learning rate of each method with the loss of its validation answers, and the paired difference from the "
    "baseline with its own choice. These rows chose the rate, so the figures are no test."
)
COST_NOTE = (
    "Step: forward, backward and update of one optimiser step; the median over seeds of the medians, with the widest "
    "quartiles. Memory: the most held while training, on a GPU by torch, else by the whole process; the largest over seeds."
)


def read_summary(config: StudyConfig) -> StudySummary:
    """Sum up what lies in a study's folder; neither model nor data is needed.

    Args:
        config: The study.

    Raises:
        UsageError: If the folder holds no study or another one.
    """
    folder = Path(config.out)
    study = read_study(folder)
    if study is None:
        raise UsageError(
            f"{folder} holds no study: run it first, without --report-only, or give its folder with --out"
        )
    rows = read_results(folder)
    shared = shared_settings(config, study["settings"]["train_md5"], study["settings"]["validation_md5"])
    check_same_study(folder, config, shared, {}, rows)
    known = study["tests"]
    forgetting = task_names(config.forgetting_names(), known) if config.forgetting else []
    return summarise(config, shared, task_names(config.task_names(), known), rows, forgetting)


def write_report(config: StudyConfig) -> StudySummary:
    """Write the report of a study from what lies in its folder.

    Args:
        config: The study.

    Returns:
        What it says.

    Raises:
        UsageError: If the folder holds no study or another one, or a package for the report is missing.
    """
    check_installed("report")
    summary = read_summary(config)
    folder = Path(config.out)
    pictures = draw_plots(summary)
    for one in pictures:
        write_text(folder / one.file, one.svg)
    title = f"Methods on {Path(config.model).name}"
    sections = report_sections(summary, pictures)
    write_text(folder / MARKDOWN_FILE, as_markdown(title, sections))
    write_text(folder / HTML_FILE, as_html(title, sections))
    return summary


def report_sections(summary: StudySummary, pictures: list[Picture]) -> list[Section]:
    """The parts of the report."""
    sections = [
        _head(summary),
        _accuracy(summary),
        _differences(summary),
        _differences_by_test(summary),
        _losses(summary),
        _loss_differences(summary),
        _forgetting(summary),
        _cost(summary),
        *([Section(title="Accuracy against cost", pictures=pictures)] if pictures else []),
        _choices(summary),
        _tuning(summary),
        _router(summary),
        _seeds(summary),
        Section(
            title="Failures",
            texts=() if summary.failures else ("No run failed.",),
            items=[f"{run_name(row)}: {row.failure}" for row in summary.failures],
        ),
        _origin(summary),
    ]
    return [one for one in sections if one is not None]


def _head(summary: StudySummary) -> Section:
    config = summary.config
    rates = ", ".join(map(rate_text, config.learning_rates))
    row = next((one for one in summary.rows if one.validation is not None), None)
    trained = f"{row.train.rows:,} rows of {row.train.source}" if row is not None else config.data
    held_out = (
        f"{row.validation.n:,} validation rows" if row is not None and row.validation else "validation rows"
    )
    seeds = ", ".join(map(str, config.seeds))
    how = f"the learning rate {rates}"
    if len(config.learning_rates) > 1:
        how = f"a learning rate chosen among {rates} on {held_out} by {chosen_by(config)}"
    done = summary.planned - len(summary.missing)
    texts = [
        f"Each method is trained on the same {trained}, with the same epochs and batches and {how}.",
        f"There is a run for each of the seeds {seeds}. No test question had a part in any choice.",
        f"{done} of {summary.planned} runs are done, learning rates that were tried included. "
        + ("Missing:" if summary.missing else "Nothing is missing."),
    ]
    return Section(texts=texts, items=summary.missing)


def _accuracy(summary: StudySummary) -> Section | None:
    if not any(one.tests for one in summary.methods) and any(one.losses for one in summary.methods):
        return None  # the tests are of losses alone
    head = ["method", "trained", "seeds", *summary.tests, "mean"]
    rows = [
        [
            one.label,
            count(one.rows[0].trainable_parameters),
            NONE if one.label == FROZEN else str(len(one.rows)),
            *(percent(one.tests.get(name)) for name in summary.tests),
            percent(one.mean),
        ]
        for one in summary.methods
    ]
    questions = {
        name: row.tests[name].n
        for name in summary.tests
        for method in summary.methods
        for row in method.rows
        if name in row.tests
    }
    counts = ", ".join(f"{name} {count:,}" for name, count in questions.items())
    return Section(
        title="Accuracy",
        texts=(
            ACCURACY_NOTE,
            f"Questions: {counts}." if counts else "No test is done yet.",
        ),
        table=Table(head=head, rows=rows) if rows else None,
    )


def _differences(summary: StudySummary) -> Section | None:
    rows = [
        [one.label, *difference_cells(one.versus), claim(one.versus)]
        for one in summary.methods
        if one.versus is not None
    ]
    if not rows:
        return None
    return Section(
        title=f"Difference from {summary.config.baseline}",
        texts=DIFFERENCE_NOTES,
        table=Table(
            head=[
                "method",
                "difference",
                "error",
                "of questions",
                "of seeds",
                "detectable",
                "seeds",
                "claim",
            ],
            rows=rows,
        ),
    )


def _differences_by_test(summary: StudySummary) -> Section | None:
    methods = [one for one in summary.methods if one.versus_by_test]
    if not methods:
        return None
    return Section(
        title=f"Difference from {summary.config.baseline}, test by test",
        texts=(
            "Points, each with its standard error; * where it reaches its own minimum detectable difference.",
        ),
        table=Table(
            head=["method", *summary.tests],
            rows=[
                [one.label, *(signed(one.versus_by_test.get(name)) for name in summary.tests)]
                for one in methods
            ],
        ),
    )


def _losses(summary: StudySummary) -> Section | None:
    rows = [
        [
            one.label,
            count(one.rows[0].trainable_parameters),
            *(nats(one.losses.get(name)) for name in summary.tests),
        ]
        for one in summary.methods
        if one.losses
    ]
    if not rows:
        return None
    return Section(
        title="Loss of the answers",
        texts=(LOSS_NOTE,),
        table=Table(head=["method", "trained", *summary.tests], rows=rows),
    )


def _loss_differences(summary: StudySummary) -> Section | None:
    rows = [
        [one.label, name, *loss_cells(difference)]
        for one in summary.methods
        for name, difference in one.losses_versus.items()
    ]
    if not rows:
        return None
    return Section(
        title=f"Difference in loss from {summary.config.baseline}",
        texts=(
            "Nats a token, paired: the same seeds and the same answers; below 0 is better. Errors as above.",
        ),
        table=Table(
            head=[
                "method",
                "test",
                "difference",
                "error",
                "of answers",
                "of seeds",
                "detectable",
                "seeds",
                "claim",
            ],
            rows=rows,
        ),
    )


def _forgetting(summary: StudySummary) -> Section | None:
    rows = [
        [
            one.label,
            *(signed(one.forgetting.get(name)) for name in summary.forgetting),
            signed(one.forgetting_mean),
            *(difference_cells(one.forgetting_versus)[place] for place in (0, 1, 4)),
            claim(one.forgetting_versus),
        ]
        for one in summary.methods
        if one.forgetting
    ]
    if not rows:
        return None
    head = [
        "method",
        *summary.forgetting,
        "mean",
        f"less {summary.config.baseline}",
        "error",
        "detectable",
        "claim",
    ]
    return Section(title="Forgetting", texts=(FORGETTING_NOTE,), table=Table(head=head, rows=rows))


def _choices(summary: StudySummary) -> Section | None:
    if not summary.choices:
        return None
    config = summary.config
    budget = config.most_rates or len(config.learning_rates)
    ends = [label for label, one in summary.choices.items() if not one.is_inside]
    added = [label for label, one in summary.choices.items() if len(one.rates) > len(config.learning_rates)]
    where = (
        f"The choice lies at an end for {', '.join(ends)}." if ends else "Every choice lies inside its rates."
    )
    more = f"Rates were added for {', '.join(added)}." if added else "No rate was added."
    texts = [
        CHOICE_NOTE,
        f"Differences are from {config.baseline}. Each method may try {budget} rates. {more} {where}",
    ]
    rows = [
        [
            label,
            count(one.rows[0].trainable_parameters),
            f"{rate_text(one.rates[0])} to {rate_text(one.rates[-1])}, {len(one.rates)}",
            rate_text(one.rate) + ("" if one.is_inside else ", at an end"),
            nats(one.loss),
            *loss_cells(one.versus)[:2],
        ]
        for label, one in summary.choices.items()
    ]
    head = ["method", "trained", "rates tried", "chosen", "validation loss", "difference", "error"]
    return Section(title="Choices", texts=texts, table=Table(head=head, rows=rows))


def _cost(summary: StudySummary) -> Section | None:
    methods = [one for one in summary.methods if one.label != FROZEN]
    if not methods:
        return None
    devices = sorted({f"{row.device}, {row.threads} threads" for one in methods for row in one.rows})
    return Section(
        title="Cost",
        texts=(
            COST_NOTE,
            f"Measured on: {'; '.join(devices)}.",
        ),
        table=Table(
            head=["method", "trained", "of all", "step ms", "quartiles", "memory MiB", "training s"],
            rows=[_cost_row(one) for one in methods],
        ),
    )


def _cost_row(method: MethodSummary) -> list[str]:
    row = method.rows[0]
    times = [one.step_ms for one in method.rows if one.step_ms is not None]
    step = median_step_ms(method)
    memory = [one.peak_mem_mib for one in method.rows if one.peak_mem_mib is not None]
    seconds = [one.train_s for one in method.rows if one.train_s is not None]
    part = (row.trainable_parameters or 0) / (row.total_parameters or 1)
    return [
        method.label,
        count(row.trainable_parameters),
        f"{100 * part:.2f} %",
        NONE if step is None else f"{step:.0f}",
        f"{min(one.lower for one in times):.0f} to {max(one.upper for one in times):.0f}" if times else NONE,
        f"{max(memory):,.0f}" if memory else NONE,
        f"{max(seconds):,.0f}" if seconds else NONE,
    ]


def _tuning(summary: StudySummary) -> Section | None:
    if not summary.tuning:
        return None
    config = summary.config
    rows = []
    for (label, rate), tried in summary.tuning.items():
        for seed, row in zip(config.tuning_seeds, tried, strict=True):
            scores = None if row is None else row.validation
            chosen = "chosen" if summary.chosen[label] == rate else ""
            failed = row is not None and row.failure is not None
            rows.append(
                [
                    label,
                    rate_text(rate),
                    str(seed),
                    plain(None if scores is None else scores.answer_loss),
                    percent(None if scores is None else estimate_of(scores.accuracy, scores.standard_error)),
                    "failed" if failed else chosen,
                ]
            )
    return Section(
        title="Learning rates",
        texts=(
            f"All that were tried, on validation rows; chosen by {chosen_by(config)}, mean over the tuning seeds.",
        ),
        table=Table(
            head=["method", "learning rate", "seed", "validation loss", "validation accuracy", ""], rows=rows
        ),
    )


def _router(summary: StudySummary) -> Section | None:
    rows = [
        [run_name(row), *(plain(row.router.get(name)) for name in COLUMNS)]
        for one in summary.methods
        for row in one.rows
        if row.router
    ]
    if not rows:
        return None
    return Section(
        title="Routers",
        texts=("Figures of the trained routers on validation prompts.",),
        table=Table(head=["run", *COLUMNS.values()], rows=rows),
    )


def _seeds(summary: StudySummary) -> Section | None:
    rows = [
        [
            run_name(row),
            plain(None if row.validation is None else row.validation.answer_loss),
            *(score_cell(row, name) for name in summary.tests),
        ]
        for one in summary.methods
        for row in one.rows
    ]
    if not rows:
        return None
    return Section(
        title="Every run",
        texts=(
            "Accuracies with the standard error of the number of questions; losses where a test has none.",
        ),
        table=Table(head=["run", "validation loss", *summary.tests], rows=rows),
    )


def _origin(summary: StudySummary) -> Section:
    rows = summary.rows
    commits = sorted(
        {f"{row.commit or 'an installed package'}{' (changed)' if row.dirty else ''}" for row in rows}
    )
    versions = sorted({", ".join(f"{name} {one}" for name, one in row.versions.items()) for row in rows})
    bases = sorted({row.base_fingerprint for row in rows if row.base_fingerprint is not None})
    files = {
        name: one.file_md5 or one.md5
        for row in rows
        for name, one in {"train": row.train, **row.tests}.items()
        if name in ("train", *summary.tests)
    }
    return Section(
        title="How it was made",
        texts=(
            "Every row of results.jsonl names its commit, its configuration's hash, versions, seeds and data.",
        ),
        items=[
            *(f"commit {one}" for one in commits),
            *(f"weights of the base model: {one}" for one in bases),
            *versions,
            *(f"MD5 of {name}: {one}" for name, one in files.items()),
        ],
    )
