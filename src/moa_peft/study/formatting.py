"""Values as text for the cells of a report's tables: shares, losses, differences with their errors."""

from moa_peft.study.config import StudyConfig
from moa_peft.study.estimates import Difference, Estimate
from moa_peft.study.rows import RunRow
from moa_peft.study.schedule import rate_text

NONE = "-"
"""What stands for a value that is not there."""


def run_name(row: RunRow) -> str:
    """What a run is called in a table."""
    if row.learning_rate is None:
        return row.label
    stage = ", tried" if row.stage == "tuning" else ""
    return f"{row.label}, rate {rate_text(row.learning_rate)}, seed {row.seed}{stage}"


def score_cell(row: RunRow, name: str) -> str:
    """The accuracy of a run on a test with the error of its questions; where it has none, the loss of its answers."""
    one = row.tests.get(name)
    if one is None or one.accuracy is not None:
        return percent(None if one is None else estimate_of(one.accuracy, one.standard_error))
    return nats(estimate_of(one.answer_loss, one.answer_loss_standard_error))


def estimate_of(mean: float | None, error: float | None) -> Estimate | None:
    """An estimate, or None where there is no value."""
    return None if mean is None else Estimate(mean=mean, error=error)


def chosen_by(config: StudyConfig) -> str:
    """What chooses the learning rate, in words."""
    return "the lowest loss of the answers" if config.choose_by == "answer_loss" else "the highest accuracy"


def percent(one: Estimate | None) -> str:
    """A share in per cent with its error."""
    if one is None:
        return NONE
    return f"{100 * one.mean:.1f}" + ("" if one.error is None else f" ± {100 * one.error:.1f}")


def points(value: float | None) -> str:
    """A share in points."""
    return NONE if value is None else f"{100 * value:.1f}"


def difference_cells(one: Difference | None, *, is_loss: bool = False) -> list[str]:
    """The cells of a difference, in points or nats: itself, its errors, the least detectable one, seeds, the claim."""
    if one is None:
        return [*[NONE] * 6, "none"]
    write, mean = (plain, _with_sign(one.mean, 4)) if is_loss else (points, _with_sign(100 * one.mean, 1))
    errors = (one.error, one.by_questions, one.by_seeds, one.detectable)
    return [mean, *map(write, errors), str(one.seeds), claim(one, is_loss=is_loss)]


def choice_cells(one: Difference | None) -> list[str]:
    """The cells of a difference of validation losses: itself, and its error, with a single seed that of the answers."""
    if one is None:
        return [NONE, NONE]
    return [_with_sign(one.mean, 4), plain(one.by_questions if one.error is None else one.error)]


def nats(one: Estimate | None) -> str:
    """A loss with its error."""
    if one is None:
        return NONE
    return f"{one.mean:.4f}" + ("" if one.error is None else f" ± {one.error:.4f}")


def signed(one: Difference | None) -> str:
    """A difference in points with its error, marked where it is found."""
    if one is None:
        return NONE
    error = "" if one.error is None else f" ± {100 * one.error:.1f}"
    return f"{_with_sign(100 * one.mean, 1)}{error}{' *' if one.is_found else ''}"


def _with_sign(value: float, digits: int) -> str:
    """A number with its sign; +0.0 where it rounds to zero."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def claim(one: Difference, *, is_loss: bool = False) -> str:
    """What a study may say of a difference."""
    if one.seed_failed:
        return "none, a seed failed"
    if not one.is_found:
        return "none"
    return "better" if (one.mean < 0) == is_loss else "worse"


def plain(value: float | None) -> str:
    """A number with four decimals."""
    return NONE if value is None else f"{value:.4f}"


def count(value: int | None) -> str:
    """A whole number."""
    return NONE if value is None else f"{value:,}"
