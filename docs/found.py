"""Tables of the committed studies, from their rows in `docs/results`."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from writing import table

from moa_peft.cli.overrides import load_yaml
from moa_peft.evaluation.results import mean_and_standard_error
from moa_peft.study.config import FROZEN, studies_of
from moa_peft.study.estimates import Difference
from moa_peft.study.formatting import NONE, choice_cells, count, difference_cells, nats, percent
from moa_peft.study.report import read_summary
from moa_peft.study.rows import ROUTER_FIGURES
from moa_peft.study.statistics import MethodSummary, StudySummary

ROOT = Path(__file__).parent.parent

LOSS, OTHER_LOSS, FORGETTING = "loss", "other loss", "forgetting"
"""What is measured: the loss of the answers of the domain that is trained on, that of the other one's, and accuracy on other tasks."""
TESTS = {
    "math": {LOSS: "math_small", OTHER_LOSS: "codealpaca"},
    "code": {LOSS: "codealpaca", OTHER_LOSS: "math_small"},
}
NAMES = {"math_small": "mathematics", "codealpaca": "code", "commonsense_small": "commonsense"}
COPIES = ("molora-6x2-s4", "hydralora-8x3", "topk-6x2", "adamole-6x2-s4")
LARGE_COPIES = ("molora-8x8", "hydralora-8x8", "topk-8x8", "adamole-8x8")
SAME_LAYERS = (("soft-moa-s4", "lora-s4"), ("soft-moa-all-s4", "lora-all-s4"))
DEFAULT = "soft-lora-amplify"
"""What the preset `soft-lora` is called in the study."""
FINALISTS = {
    FROZEN: "frozen model",
    "lora-s4": "LoRA, the paper's layers",
    "lora-all-s4": "LoRA, all linear layers",
    DEFAULT: "`soft-lora` of rank 9, all linear layers",
    "soft-lora-rank1": "LoRA with a gate for each rank, all linear layers",
    "soft-moa": "Soft MoA, the paper's setting",
    "soft-moa-s4": "Soft MoA, LoRA's scale",
    "soft-moa-all-s4": "Soft MoA, all linear layers",
    "soft-lora-all-s4": "LoRA with gates, all linear layers",
    "sparse-moa-s4": "Sparse MoA",
    "molora-6x2-s4": "MoLoRA",
    "hydralora-8x3": "HydraLoRA",
    "topk-6x2": "top-k of LoRA",
    "adamole-6x2-s4": "AdaMoLE",
    "molora-8x8": "MoLoRA, the paper's size",
    "hydralora-8x8": "HydraLoRA, the paper's size",
    "topk-8x8": "top-k of LoRA, the paper's size",
    "adamole-8x8": "AdaMoLE, the paper's size",
}
"""The finalists and the ideas that went on, as the first page calls them."""
IDEAS = (DEFAULT, "soft-lora-rank1")
ON_ALL_LAYERS = ("soft-moa-all-s4", "soft-lora-all-s4", *IDEAS)
QUESTIONS = (
    ("Is Soft MoA better than LoRA on the same layers?", LOSS, (("soft-moa", "lora-s4"), *SAME_LAYERS)),
    ("Do gates alone lower LoRA's loss?", LOSS, (("soft-lora-all-s4", "lora-all-s4"),)),
    ("Is Soft MoA better than copies of LoRA?", LOSS, [("soft-moa-s4", one) for one in COPIES]),
    (
        "... than copies of the paper's size, with more parameters?",
        LOSS,
        [("soft-moa-s4", one) for one in LARGE_COPIES],
    ),
    ("Is Sparse MoA better than Soft MoA?", LOSS, (("sparse-moa-s4", "soft-moa-s4"),)),
    ("Does Soft MoA lose less of the other domain?", OTHER_LOSS, SAME_LAYERS),
    ("Does it forget less of other tasks, in points of accuracy?", FORGETTING, SAME_LAYERS),
)
"""What the study asks in each domain, named before its runs with three seeds: by which measure, and a method minus another."""
OF_THE_DEFAULT = (
    ("Is the default better than LoRA on the same layers?", LOSS, ((DEFAULT, "lora-all-s4"),)),
    ("Is the default better than the paper's setting?", LOSS, ((DEFAULT, "soft-moa"),)),
)
"""Asked before the runs on code and on several domains, not before those on mathematics."""
OF_LAYERS = (
    ("Is LoRA better on all linear layers than on the paper's?", LOSS, (("lora-all-s4", "lora-s4"),)),
)
"""Not asked beforehand."""
NOT_PLANNED = "†"
"""Marks the verdict of a comparison that was not named before its runs: seen, and not claimed."""


@cache
def summary_of(domain: str, baseline: str = "lora-s4") -> StudySummary:
    """What the committed rows of a domain of the study say, with differences from one of its methods."""
    out = str(ROOT / "docs" / "results" / "study-cpu")
    flags = {"out": out, "baseline": baseline}
    (config,) = studies_of(load_yaml(ROOT / "studies" / "cpu.yaml"), flags, domain)
    return read_summary(config)


FIRST_PAGE = (FROZEN, "lora-s4", "lora-all-s4", DEFAULT, "soft-moa")


def first_page() -> str:
    """The rows of `finalists` that stand on the first page."""
    return finalists(FIRST_PAGE)


def finalists(labels: Sequence[str] = tuple(FINALISTS)) -> str:
    """One row a finalist or idea: losses, and the difference from LoRA on the same layers.

    Losses of code after training on it make a column once they are there.
    """
    learnt_code = {
        one.label: one.losses[TESTS["code"][LOSS]] for one in summary_of("code").methods if one.losses
    }
    rows = []
    for label in labels:
        name = FINALISTS[label]
        other = "lora-all-s4" if label in ON_ALL_LAYERS else "lora-s4"
        domain = "math-ideas" if label in IDEAS else "math-finals"
        (one,) = (method for method in summary_of(domain, other).methods if method.label == label)
        difference, detectable, told = NONE, NONE, NONE
        if label not in (FROZEN, other):
            difference, detectable, _, told = _comparison(LOSS, label, other, domain)
        size = NONE if label == FROZEN else count(one.rows[0].trainable_parameters)
        own, lost = (nats(one.losses[TESTS["math"][measure]]) for measure in (LOSS, OTHER_LOSS))
        learnt = (nats(learnt_code[label]) if label in learnt_code else NONE,) if learnt_code else ()
        rows.append((name, size, own, difference, detectable, told, lost, *learnt))
    head = ("method", "trained", "loss, mathematics", "minus LoRA", "detectable", "verdict", "loss, code")
    return table((*head, *(("loss, code, trained on it",) if learnt_code else ())), rows)


def answers() -> str:
    """One row a question: in each domain its differences, by their verdict."""
    rows = []
    for question, measure, pairs in (*OF_THE_DEFAULT, *OF_LAYERS, *QUESTIONS):
        mathematics = "math-ideas" if any(DEFAULT in pair for pair in pairs) else "math-finals"
        rows.append((question, *(_answer(measure, pairs, domain) for domain in (mathematics, "code"))))
    return table(("question", "trained on mathematics", "trained on code"), rows)


def _answer(measure: str, pairs: Sequence[tuple[str, str]], domain: str) -> str:
    told: dict[str, list[str]] = {}
    for label, other in _run(pairs, domain):
        value, _, _, verdict = _comparison(measure, label, other, domain)
        told.setdefault(verdict, []).append(value)
    return "; ".join(f"{verdict}: {', '.join(values)}" for verdict, values in told.items()) or NONE


def _run(pairs: Sequence[tuple[str, str]], domain: str) -> list[tuple[str, str]]:
    """Those whose methods a domain has."""
    labels = {one.label for one in summary_of(domain, "lora-all-s4").config.methods}
    return [pair for pair in pairs if labels.issuperset(pair)]


def claims(domain: str = "math-finals") -> str:
    """One row a planned comparison of a domain's methods; nothing is claimed before all seeds are run."""
    rows = []
    for question, measure, pairs in QUESTIONS:
        for place, (label, other) in enumerate(_run(pairs, domain)):
            told = _comparison(measure, label, other, domain)
            rows.append(("" if place else question, f"`{label}` minus `{other}`", *told))
    return table(("question", "methods", "difference", "detectable", "p", "verdict"), rows)


def default() -> str:
    """One row a domain and measure: what the default of `moa train` gives over the paper's setting, and over LoRA on the same layers."""
    rows = []
    for domain, folder in (("math", "math-ideas"), ("code", "code")):
        for label, other in ((DEFAULT, "soft-moa"), (DEFAULT, "lora-all-s4"), ("lora-all-s4", "soft-moa")):
            named = (NAMES[TESTS[domain][LOSS]], f"`{label}` minus `{other}`")
            chosen = summary_of(folder, other).choices
            if label in chosen and chosen[label].versus is not None:
                mean, error = choice_cells(chosen[label].versus)
                rows.append((*named, "validation loss, one seed", f"{mean} ± {error}", *(NONE,) * 3))
            for measure in (LOSS, OTHER_LOSS, FORGETTING):
                test = TESTS[domain].get(measure)
                what = "accuracy on other tasks, points" if test is None else f"loss, {NAMES[test]}"
                rows.append((*named, what, *_comparison(measure, label, other, folder)))
    head = ("trained on", "methods", "measure", "difference", "detectable", "p", "verdict")
    return table(head, rows)


def several() -> str:
    """One row a method trained on several domains: the loss on each, and the accuracy of the choices of commonsense questions."""
    rows = []
    for one in summary_of("mixture").methods:
        right = one.tests.get("commonsense_small")
        rows.append((FINALISTS[one.label], *(nats(one.losses.get(test)) for test in NAMES), percent(right)))
    return table(("method", *(f"loss, {name}" for name in NAMES.values()), "accuracy, commonsense"), rows)


def several_claims() -> str:
    """One row a comparison of methods trained on several domains, on each; all were planned."""
    rows = [
        (f"`{label}` minus `{other}`", name, *_comparison(test, label, other, "mixture"))
        for label, other in (SAME_LAYERS[0], (DEFAULT, "lora-all-s4"))
        for test, name in NAMES.items()
    ]
    return table(("methods", "loss", "difference", "detectable", "p", "verdict"), rows)


def _comparison(measure: str, label: str, other: str, domain: str) -> tuple[str, str, str, str]:
    """The difference with its error, the detectable one, the p of one comparison, and the verdict.

    ``measure`` is what the study measures, or the name of a test whose loss is meant.
    """
    summary = summary_of(domain, other)
    method = next((one for one in summary.methods if one.label == label), None)
    one = None
    if method is not None:
        test = TESTS.get(domain.partition("-")[0], {}).get(measure, measure)
        one = method.forgetting_versus if measure == FORGETTING else method.losses_versus.get(test)
    mean, error, _, _, detectable, seeds, verdict = difference_cells(one, is_loss=measure != FORGETTING)
    if one is None or one.seeds < len(summary.config.seeds):
        return NONE, NONE, NONE, f"under way, {seeds} seeds" if one else "under way"
    planned = any(measure == asked and (label, other) in pairs for _, asked, pairs in QUESTIONS)
    if not one.is_found:
        verdict = "undecided"
    elif not planned and domain != "mixture" and (domain, label) != ("code", DEFAULT):
        verdict += NOT_PLANNED
    return f"{mean} ± {error}", detectable, _p(one), verdict


def _p(one: Difference | None) -> str:
    """The p of a comparison; below a hundredth three seeds cannot tell how small it is."""
    if one is None or one.p is None:
        return NONE
    return "<0.01" if one.p < 0.01 else f"{one.p:.1g}"


def final_routers() -> str:
    """One row a finalist or idea with a router: its figures, means over seeds."""
    tried = (*summary_of("math-finals").methods, *summary_of("math-ideas", "lora-all-s4").methods)
    methods = {one.label: one for one in tried if one.label in FINALISTS and one.rows and one.rows[0].router}
    rows = [
        (f"`{label}`", *(_router_cell(one, name) for name in ROUTER_FIGURES))
        for label, one in methods.items()
    ]
    return table(("method", *ROUTER_FIGURES.values()), rows)


def choices() -> str:
    """One row a method: the learning rate that was chosen in stage 1, and how the validation answers did."""
    rows = [
        (
            f"`{label}`",
            count(one.rows[0].trainable_parameters),
            ", ".join(f"{rate:g}" for rate in one.rates),
            f"{one.rate:g}" + ("" if one.is_inside else ", at an end"),
            nats(one.loss),
            *choice_cells(one.versus),
        )
        for label, one in summary_of("math").choices.items()
    ]
    over = f"minus `{summary_of('math').config.baseline}`"
    return table(("method", "trained", "rates tried", "chosen", "validation loss", over, "error"), rows)


def _router_cell(method: MethodSummary, name: str) -> str:
    values = [value for row in method.rows if row.router and (value := row.router.get(name)) is not None]
    return _with_error(values, digits=3) if values else NONE


def _with_error(values: list[float], digits: int = 4) -> str:
    mean, error = mean_and_standard_error(values)
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
