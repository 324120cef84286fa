"""The parts of a study's report: its notes, and a table of each kind of figure."""

from collections.abc import Sequence

from moa_peft.study.config import FROZEN
from moa_peft.study.document import Picture, Section, Table
from moa_peft.study.formatting import (
    NONE,
    choice_cells,
    chosen_by,
    count,
    difference_cells,
    estimate_of,
    nats,
    percent,
    plain,
    run_name,
    score_cell,
    signed,
)
from moa_peft.study.rows import ROUTER_FIGURES
from moa_peft.study.schedule import rate_text
from moa_peft.study.statistics import MethodSummary, StudySummary, devices, median_step_ms

ACCURACY_NOTE = (
    "Per cent of the questions answered rightly: mean over seeds ± standard error over seeds. For the frozen model, which "
    "has no seed, the error is that of the number of questions, sqrt(p (1 - p) / n) for each test."
)
DIFFERENCE_NOTE = "Points of the mean accuracy over tests, paired: the same seeds and the same questions."
LOSS_DIFFERENCE_NOTE = "Nats a token, paired: the same seeds and the same answers; below 0 is better."
ERROR_NOTES = (
    (
        "The standard error has two parts, from the choice of questions and from the choice of seeds, and is the root of the "
        "sum of their squares."
    ),
    (
        "The minimum detectable difference is t(0.975) + t(0.8) standard errors, by Student's t with Satterthwaite's "
        "degrees of freedom: a two-sided test at 5 % finds a true one of this size in about 80 of 100 studies, in fewer "
        "with few seeds. Nothing is claimed of a difference below it: not that it is there, and not that the methods are "
        "equal. As the difference that was measured has to reach it, a true one of just this size is claimed in about half of studies."
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


def report_sections(summary: StudySummary, pictures: list[Picture]) -> list[Section]:
    """The parts of the report that have anything to show."""
    sections = [
        _head(summary),
        _accuracy(summary),
        _differences(summary),
        _differences_by_test(summary),
        _losses(summary),
        _loss_differences(summary),
        _forgetting(summary),
        _cost(summary),
        Section(title="Plots", pictures=pictures) if pictures else None,
        _choices(summary),
        _tuning(summary),
        _router(summary),
        _seeds(summary),
        Section(
            title="Failures",
            texts=() if summary.failures else ("No run is left failed.",),
            items=[f"{run_name(row)}: {row.failure}" for row in summary.failures],
        ),
        _origin(summary),
    ]
    return [one for one in sections if one is not None]


def _tabled(title: str, texts: Sequence[str], head: Sequence[str], rows: list[list[str]]) -> Section | None:
    """A part that is a table; None where it has no rows."""
    return Section(title=title, texts=texts, table=Table(head=head, rows=rows)) if rows else None


def _head(summary: StudySummary) -> Section:
    config = summary.config
    rates, seeds = ", ".join(map(rate_text, config.learning_rates)), ", ".join(map(str, config.seeds))
    done_rows = {
        row.stage: row for row in summary.rows if row.validation is not None and row.method != FROZEN
    }
    final, tried = done_rows.get("final"), done_rows.get("tuning")
    trained = (
        f"rows of {config.data}" if final is None else f"{final.train.rows:,} rows of {final.train.source}"
    )
    how = f"the learning rate {rates}"
    if config.has_tuning:
        more = (config.most_rates or 0) - len(config.learning_rates)
        added = f" and up to {more} more" if more > 0 else ""
        shorter = ""
        held_out = "validation rows"
        if tried is not None and tried.validation is not None:
            held_out = f"{tried.validation.n:,} validation rows"
            shorter = f" after {tried.train.rows:,} training rows" if config.short_rows else ""
        how = f"a learning rate chosen among {rates}{added} by {chosen_by(config)} on {held_out}{shorter}"
    done = summary.planned - len(summary.missing)
    failed = f"; {len(summary.failures)} failed" if summary.failures else ""
    texts = [
        f"Each method is trained on the same {trained}, with the same epochs and batches and {how}.",
        f"There is a run for each of the seeds {seeds}."
        if config.finalist_labels()
        else "No method is run with every seed or tested: the study has no finalists.",
        f"{done} of {summary.planned} runs are done, learning rates that were tried included{failed}. "
        + ("Missing:" if summary.missing else "Nothing is missing."),
    ]
    return Section(texts=texts, items=summary.missing)


def _accuracy(summary: StudySummary) -> Section | None:
    if not summary.scored or not summary.config.finalist_labels():
        return None
    rows = [
        [
            one.label,
            count(one.rows[0].trainable_parameters),
            NONE if one.label == FROZEN else str(len(one.rows)),
            *(percent(one.tests.get(name)) for name in summary.scored),
            percent(one.mean),
        ]
        for one in summary.methods
    ]
    questions = {
        name: row.tests[name].n
        for name in summary.scored
        for method in summary.methods
        for row in method.rows
        if name in row.tests
    }
    counts = ", ".join(f"{name} {number:,}" for name, number in questions.items())
    texts = [ACCURACY_NOTE, f"Questions: {counts}." if counts else "No test is done yet."]
    others = [name for name in summary.tests if name not in summary.scored]
    if others:
        texts.append(
            f"The mean is over {', '.join(summary.scored)}. Of {', '.join(others)} there is the loss alone."
        )
    head = ["method", "trained", "seeds", *summary.scored, "mean"]
    return _tabled("Accuracy", texts, head, rows) or Section(title="Accuracy", texts=texts)


def _differences(summary: StudySummary) -> Section | None:
    rows = [[one.label, *difference_cells(one.versus)] for one in summary.methods if one.versus is not None]
    head = ["method", "difference", "error", "of questions", "of seeds", "detectable", "seeds", "claim"]
    return _tabled(f"Difference from {summary.config.baseline}", [DIFFERENCE_NOTE, *ERROR_NOTES], head, rows)


def _differences_by_test(summary: StudySummary) -> Section | None:
    return _tabled(
        f"Difference from {summary.config.baseline}, test by test",
        ["Points, each with its standard error; * where it reaches its own minimum detectable difference."],
        ["method", *summary.scored],
        [
            [one.label, *(signed(one.versus_by_test.get(name)) for name in summary.scored)]
            for one in summary.methods
            if one.versus_by_test
        ],
    )


def _losses(summary: StudySummary) -> Section | None:
    rows = [
        [
            one.label,
            count(one.rows[0].trainable_parameters),
            NONE if one.label == FROZEN else str(len(one.rows)),
            *(nats(one.losses.get(name)) for name in summary.tests),
        ]
        for one in summary.methods
        if one.losses
    ]
    return _tabled("Loss of the answers", [LOSS_NOTE], ["method", "trained", "seeds", *summary.tests], rows)


def _loss_differences(summary: StudySummary) -> Section | None:
    are_told = any(one.versus is not None for one in summary.methods)  # beside the differences in accuracy
    errors = ["Errors as above."] if are_told else ERROR_NOTES
    return _tabled(
        f"Difference in loss from {summary.config.baseline}",
        [LOSS_DIFFERENCE_NOTE, *errors],
        ["method", "test", "difference", "error", "of answers", "of seeds", "detectable", "seeds", "claim"],
        [
            [one.label, name, *difference_cells(difference, is_loss=True)]
            for one in summary.methods
            for name, difference in one.losses_versus.items()
        ],
    )


def _forgetting(summary: StudySummary) -> Section | None:
    rows = [
        [
            one.label,
            *(signed(one.forgetting.get(name)) for name in summary.forgetting),
            signed(one.forgetting_mean),
            *(difference_cells(one.forgetting_versus)[place] for place in (0, 1, 4, 6)),
        ]
        for one in summary.methods
        if one.forgetting
    ]
    versus = [f"less {summary.config.baseline}", "error", "detectable", "claim"]
    return _tabled("Forgetting", [FORGETTING_NOTE], ["method", *summary.forgetting, "mean", *versus], rows)


def _choices(summary: StudySummary) -> Section | None:
    config = summary.config
    budget = config.most_rates or len(config.learning_rates)
    ends = [label for label, one in summary.choices.items() if not one.is_inside]
    added = [label for label, one in summary.choices.items() if len(one.rates) > len(config.learning_rates)]
    where = (
        f"The choice lies at an end for {', '.join(ends)}." if ends else "Every choice lies inside its rates."
    )
    more = f"Rates were added for {', '.join(added)}." if added else "No rate was added."
    told = f"Differences are from {config.baseline}. Each method may try {budget} rates. {more} {where}"
    rows = [
        [
            label,
            count(one.rows[0].trainable_parameters),
            f"{rate_text(one.rates[0])} to {rate_text(one.rates[-1])}, {len(one.rates)}",
            rate_text(one.rate) + ("" if one.is_inside else ", at an end"),
            nats(one.loss),
            *choice_cells(one.versus),
        ]
        for label, one in summary.choices.items()
    ]
    head = ["method", "trained", "rates tried", "chosen", "validation loss", "difference", "error"]
    return _tabled("Choices", [CHOICE_NOTE, told], head, rows)


def _cost(summary: StudySummary) -> Section | None:
    methods = [one for one in summary.methods if one.label != FROZEN]
    places = devices(methods)
    head = ["method", "trained", "of all", "step ms", "quartiles", "memory MiB"]
    texts = [COST_NOTE, f"Measured on: {'; '.join(places)}."]
    rows = [_cost_row(one) for one in methods]
    if len(places) > 1:
        head, rows = head[:3], [one[:3] for one in rows]
        texts = [
            f"Times and memory are left out: the runs were done on several devices ({'; '.join(places)})."
        ]
    return _tabled("Cost", texts, head, rows)


def _cost_row(method: MethodSummary) -> list[str]:
    row = method.rows[0]
    times = [one.step_ms for one in method.rows if one.step_ms is not None]
    step = median_step_ms(method)
    memory = [one.peak_mem_mib for one in method.rows if one.peak_mem_mib is not None]
    part = (row.trainable_parameters or 0) / (row.total_parameters or 1)
    return [
        method.label,
        count(row.trainable_parameters),
        f"{100 * part:.2f} %",
        NONE if step is None else f"{step:.0f}",
        f"{min(one.lower for one in times):.0f} to {max(one.upper for one in times):.0f}" if times else NONE,
        f"{max(memory):,.0f}" if memory else NONE,
    ]


def _tuning(summary: StudySummary) -> Section | None:
    config = summary.config
    rows = []
    for (label, rate), tried in summary.tuning.items():
        for seed, row in zip(config.tuning_seeds, tried, strict=True):
            scores = None if row is None else row.validation
            loss, accuracy = (None, None) if scores is None else (scores.answer_loss, scores.accuracy)
            error = None if scores is None else scores.standard_error
            fate = "chosen" if summary.chosen[label] == rate else ""
            if row is not None and row.failure is not None:
                fate = "failed"
            rows.append(
                [label, rate_text(rate), str(seed), plain(loss), percent(estimate_of(accuracy, error)), fate]
            )
    how = (
        f"All that were tried, on validation rows; chosen by {chosen_by(config)}, mean over the tuning seeds."
    )
    head = ["method", "learning rate", "seed", "validation loss", "validation accuracy", ""]
    return _tabled("Learning rates", [how], head, rows)


def _router(summary: StudySummary) -> Section | None:
    figures = [(run_name(row), row.router) for one in summary.methods for row in one.rows if row.router]
    known = [name for name in ROUTER_FIGURES if any(name in one for _, one in figures)]
    told = "Figures of the trained routers on validation prompts."
    rows = [[run, *(plain(one.get(name)) for name in known)] for run, one in figures]
    return _tabled("Routers", [told], ["run", *(ROUTER_FIGURES[name] for name in known)], rows)


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
    told = "Accuracies with the standard error of the number of questions; losses where a test has none."
    return _tabled("Every run", [told], ["run", "validation loss", *summary.tests], rows)


def _origin(summary: StudySummary) -> Section:
    rows = summary.rows
    commits = sorted(
        {f"{row.commit or 'an installed package'}{' (changed)' * bool(row.dirty)}" for row in rows}
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
        texts=[
            "Every row of results.jsonl names its commit, its configuration's hash, versions, seeds and data."
        ],
        items=[
            *(f"commit {one}" for one in commits),
            *(f"weights of the base model: {one}" for one in bases),
            *versions,
            *(f"MD5 of {name}: {one}" for name, one in files.items()),
        ],
    )
