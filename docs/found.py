"""Tables of the committed studies, from their rows in `docs/results`."""

import statistics
from functools import cache
from pathlib import Path

from writing import table

from moa_peft.cli.overrides import load_yaml
from moa_peft.evaluation.results import mean_and_standard_error
from moa_peft.study.config import FROZEN, StudyConfig, studies_of
from moa_peft.study.formatting import NONE, count, difference_cells, nats, percent
from moa_peft.study.report import read_summary
from moa_peft.study.rows import ROUTER_FIGURES, RunRow
from moa_peft.study.statistics import MethodSummary, StudySummary

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "studies" / "cpu-small.yaml"
FOLDER = ROOT / "docs" / "results" / "study-cpu-small"

LOSS, OTHER_LOSS, FORGETTING = "math_small", "codealpaca", "forgetting"
COPIES = ("molora-6x2-s4", "hydralora-8x3", "topk-6x2", "adamole-6x2-s4")
LARGE_COPIES = ("molora-8x8", "hydralora-8x8", "topk-8x8", "adamole-8x8")
SAME_LAYERS = (("soft-moa-s4", "lora-s4"), ("soft-moa-all-s4", "lora-all-s4"))
DEFAULT = "soft-lora-amplify"
"""What the preset `soft-lora` is called in the study."""
FINALISTS = {
    FROZEN: "frozen model",
    "lora-s4": "LoRA, the paper's layers",
    "lora-all-s4": "LoRA, all linear layers",
    DEFAULT: "`soft-lora`, all linear layers",
    "soft-moa": "Soft MoA, the paper's setting",
    "soft-moa-s4": "Soft MoA, LoRA's scale",
    "soft-moa-all-s4": "Soft MoA, all linear layers",
    "soft-lora-all-s4": "LoRA with gates, all linear layers",
    "sparse-moa-s4": "Sparse MoA",
    "molora-6x2-s4": "MoLoRA",
    "hydralora-8x3": "HydraLoRA",
    "topk-6x2": "top-k of LoRA",
    "adamole-6x2-s4": "AdaMoLE",
}
"""The finalists of LoRA's size and the default, as the first page calls them."""
MEASURES = {
    LOSS: "loss, mathematics",
    OTHER_LOSS: "loss, code",
    FORGETTING: "accuracy on other tasks, points",
}
ON_ALL_LAYERS = ("soft-moa-all-s4", "soft-lora-all-s4", DEFAULT)
QUESTIONS = (
    ("Is Soft MoA's loss below LoRA's on the same layers?", LOSS, SAME_LAYERS),
    ("Is that of the paper's own setting?", LOSS, (("soft-moa", "lora-s4"),)),
    ("Does a router alone lower LoRA's loss?", LOSS, (("soft-lora-all-s4", "lora-all-s4"),)),
    ("Is Soft MoA's below that of copies of LoRA?", LOSS, [("soft-moa-s4", one) for one in COPIES]),
    (
        "Is it level with those at four times its parameters?",
        LOSS,
        [("soft-moa-s4", one) for one in LARGE_COPIES],
    ),
    ("What does Sparse MoA lose?", LOSS, (("sparse-moa-s4", "soft-moa-s4"),)),
    ("Does Soft MoA lose less of the other domain, in loss?", OTHER_LOSS, SAME_LAYERS),
    ("Does it forget less, in points of accuracy?", FORGETTING, SAME_LAYERS),
)
"""What the larger study asks in each domain, named before its runs with three seeds: by which measure, and a method less another."""


@cache
def found() -> StudySummary:
    """What the committed rows of the first study say."""
    return read_summary(StudyConfig.from_mapping({**load_yaml(CONFIG), "out": str(FOLDER)}))


@cache
def larger(domain: str, baseline: str = "lora-s4") -> StudySummary:
    """What the committed rows of a domain of the larger study say, with differences from one of its methods."""
    out = str(ROOT / "docs" / "results" / "study-cpu")
    flags = {"out": out, "baseline": baseline}
    (config,) = studies_of(load_yaml(ROOT / "studies" / "cpu.yaml"), flags, domain)
    return read_summary(config)


def finalists() -> str:
    """One row a finalist of LoRA's size, and the default: losses, and the difference from LoRA on the same layers."""
    asked = [pair for _, measure, pairs in QUESTIONS if measure == LOSS for pair in pairs]
    rows = []
    for label, name in FINALISTS.items():
        other = "lora-all-s4" if label in ON_ALL_LAYERS else "lora-s4"
        domain = "math-ideas" if label == DEFAULT else "math-finals"
        (one,) = (method for method in larger(domain, other).methods if method.label == label)
        difference, detectable, told = NONE, NONE, NONE
        if label not in (FROZEN, other):
            difference, detectable, _, told = _comparison(LOSS, label, other, domain)
            if (label, other) not in asked:
                told = "not asked"
        size = NONE if label == FROZEN else count(one.rows[0].trainable_parameters)
        rows.append(
            (name, size, nats(one.losses[LOSS]), difference, detectable, told, nats(one.losses[OTHER_LOSS]))
        )
    head = ("method", "trained", "loss, mathematics", "over LoRA", "detectable", "claim", "loss, code")
    return table(head, rows)


def claims() -> str:
    """One row a question of the larger study, a line in it for each comparison; nothing is claimed before all seeds are run."""
    rows = []
    for question, measure, pairs in QUESTIONS:
        lines = []
        for label, other in pairs:
            difference, detectable, p, told = _comparison(measure, label, other)
            figures = "" if difference == NONE else f" {difference} ({detectable}; {p}),"
            lines.append(f"`{label}` less `{other}`:{figures} {told}")
        rows.append((question, "<br>".join(lines)))
    return table(("question", "difference ± standard error (detectable; p)"), rows)


def default() -> str:
    """One row a measure: what the default of `moa train` gives over the paper's setting, and over LoRA on the same layers."""
    rows = []
    for other in ("soft-moa", "lora-all-s4"):
        chosen = larger("math-ideas", other).choices
        losses = (nats(chosen[DEFAULT].loss), nats(chosen[other].loss))
        rows.append(
            (FINALISTS[other], "validation loss, one seed: {} against {}".format(*losses), *(NONE,) * 4)
        )
        for measure, name in MEASURES.items():
            difference, detectable, p, told = _comparison(measure, DEFAULT, other, "math-ideas")
            rows.append((FINALISTS[other], name, difference, detectable, p, told))
    return table(("`soft-lora` less", "measure", "difference", "detectable", "p", "claim"), rows)


def _comparison(
    measure: str, label: str, other: str, domain: str = "math-finals"
) -> tuple[str, str, str, str]:
    """The difference with its error, the detectable one, the p of one comparison, and what is claimed."""
    summary = larger(domain, other)
    method = next((one for one in summary.methods if one.label == label), None)
    one = None
    if method is not None:
        one = method.forgetting_versus if measure == FORGETTING else method.losses_versus.get(measure)
    mean, error, _, _, detectable, seeds, claim = difference_cells(one, is_loss=measure != FORGETTING)
    if one is None or one.seeds < len(summary.config.seeds):
        claim = f"under way, {seeds} seeds" if one else "under way"
    elif not one.is_found:
        claim = "not decided"
    p = NONE if one is None or one.p is None else f"{one.p:.1g}"
    return f"{mean} ± {error}" if one else NONE, detectable, p, claim


def final_routers() -> str:
    """One row a method of the larger study with a router: its figures, means over seeds."""
    return _routers(larger("math-finals"))


def choices() -> str:
    """One row a method: the learning rate that was chosen in stage 1, and how the validation answers did."""
    rows = [
        (
            f"`{label}`",
            count(one.rows[0].trainable_parameters),
            ", ".join(f"{rate:g}" for rate in one.rates),
            f"{one.rate:g}" + ("" if one.is_inside else ", at an end"),
            nats(one.loss),
            *difference_cells(one.versus, is_loss=True)[:2],
        )
        for label, one in larger("math").choices.items()
    ]
    over = f"less `{larger('math').config.baseline}`"
    return table(("method", "trained", "rates tried", "chosen", "validation loss", over, "error"), rows)


def accuracies() -> str:
    """One row a method: parameters, mean accuracy, difference from the baseline, and what may be claimed."""
    summary = found()
    rows = []
    for one in summary.methods:
        difference, _, _, _, detectable, _, claim = difference_cells(one.versus)
        rows.append(
            (
                f"`{one.label}`",
                NONE if one.label == FROZEN else count(one.rows[0].trainable_parameters),
                percent(one.mean),
                difference,
                detectable,
                NONE if one.versus is None else claim,
            )
        )
    head = (
        "method",
        "trained",
        "mean accuracy, %",
        f"over `{summary.config.baseline}`, points",
        "detectable",
        "claim",
    )
    return table(head, rows)


def losses() -> str:
    """One row a method: the loss of the right answers, mean over the tests."""
    return table(
        ("method", "learning rate", "answer loss of the tests", "of each seed"),
        [
            (
                f"`{one.label}`",
                NONE if one.label == FROZEN else f"{found().chosen[one.label]:g}",
                _with_error([_answer_loss(row) for row in one.rows]),
                ", ".join(f"{_answer_loss(row):.4f}" for row in one.rows),
            )
            for one in found().methods
        ],
    )


def routers() -> str:
    """One row a method with a router: its figures, means over seeds."""
    return _routers(found())


def _routers(summary: StudySummary) -> str:
    methods = [one for one in summary.methods if one.rows[0].router]
    known = [
        name
        for name in ROUTER_FIGURES
        if any(name in (row.router or {}) for one in methods for row in one.rows)
    ]
    rows = [(f"`{one.label}`", *(_router_cell(one, name) for name in known)) for one in methods]
    return table(("method", *(ROUTER_FIGURES[name] for name in known)), rows)


def _answer_loss(row: RunRow) -> float:
    return statistics.fmean(one.answer_loss for one in row.tests.values() if one.answer_loss is not None)


def _router_cell(method: MethodSummary, name: str) -> str:
    values = [value for row in method.rows if row.router and (value := row.router.get(name)) is not None]
    return _with_error(values, digits=3) if values else NONE


def _with_error(values: list[float], digits: int = 4) -> str:
    mean, error = mean_and_standard_error(values)
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
