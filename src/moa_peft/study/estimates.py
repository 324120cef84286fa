"""The figures of a study's report: means over seeds, and paired differences with what they could have shown."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moa_peft.evaluation.results import mean_and_standard_error
from moa_peft.extras import is_installed

LEVEL, POWER = 0.05, 0.8
"""Of the two-sided t test that the minimum detectable difference is made for, by the usual formula."""

Values = Mapping[str, Sequence[float]]
"""By task one value a question: 1 where it is answered rightly and 0 elsewhere, or the loss of its answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean of independent values."""

    mean: float
    error: float | None
    """Its standard error from their spread; None for a single value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How much larger the values of one method are than another's, for the same questions and seeds."""

    mean: float
    """The mean over tasks, seeds and questions."""
    by_questions: float | None
    """Standard error from the choice of questions: from the spread of the seeds' mean differences over questions."""
    by_seeds: float | None
    """Standard error from the choice of seeds: from the spread of the questions' mean differences over seeds."""
    error: float | None
    """Both together, the root of the sum of their squares; None with a single seed."""
    p: float | None
    """Of the two-sided t test that there is no difference; None without an error or scipy."""
    detectable: float | None
    """The least difference that is claimed: t(0.975) + t(0.8) standard errors, with the degrees of freedom of ``error``;
    None without scipy. A test at 5 % finds a true one of this size in about 80 of 100 studies, in fewer with few seeds."""
    seeds: int
    """Seeds that both methods have."""
    seed_failed: bool
    """Whether one of the methods failed with a seed. Those left are no random choice, so that nothing is claimed."""

    @property
    def is_found(self) -> bool:
        """Whether the difference is at least the minimum detectable one; nothing is claimed of others."""
        reached = self.detectable is not None and abs(self.mean) >= self.detectable > 0
        return reached and not self.seed_failed


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values and its standard error."""
    mean, error = mean_and_standard_error(values)
    return Estimate(mean=mean, error=error)


def mean_value(values: Values) -> float:
    """The mean over tasks of the mean over questions."""
    return statistics.fmean(statistics.fmean(one) for one in values.values())


def difference(pairs: Sequence[tuple[Values, Values]], *, seed_failed: bool = False) -> Difference:
    """Compare two methods question by question.

    Questions and seeds are both drawn at random, so both spreads count. Each holds a part of what is left over of
    single answers, which therefore counts twice: the error is too large rather than too small. The degrees of freedom
    of the sum are Satterthwaite's.

    Args:
        pairs: For each seed the values of one method and of the other, of the same questions of the same tasks; at
            least one seed.
        seed_failed: Whether one of the methods failed with another seed.

    Returns:
        The mean over tasks of the first's values less the second's.
    """
    tasks = list(pairs[0][0])
    by_seed = [mean_value(first) - mean_value(second) for first, second in pairs]
    variances: list[tuple[float, int]] = []  # with their degrees of freedom
    for task in tasks:
        questions = len(pairs[0][0][task])
        means = [
            statistics.fmean(first[task][place] - second[task][place] for first, second in pairs)
            for place in range(questions)
        ]
        if questions < 2:
            variances = []
            break
        variances.append((statistics.variance(means) / questions / len(tasks) ** 2, questions - 1))
    of_questions = sum(one for one, _ in variances) if variances else None
    of_seeds = statistics.variance(by_seed) / len(by_seed) if len(by_seed) > 1 else None
    mean = statistics.fmean(by_seed)
    error = p = detectable = None
    if of_questions is not None and of_seeds is not None:
        variances.append((of_seeds, len(by_seed) - 1))
        error = math.sqrt(of_questions + of_seeds)
        p, detectable = _t_test(mean, error, variances)
    return Difference(
        mean=mean,
        by_questions=None if of_questions is None else math.sqrt(of_questions),
        by_seeds=None if of_seeds is None else math.sqrt(of_seeds),
        error=error,
        p=p,
        detectable=detectable,
        seeds=len(pairs),
        seed_failed=seed_failed,
    )


def _t_test(
    mean: float, error: float, variances: Sequence[tuple[float, int]]
) -> tuple[float | None, float | None]:
    """The p of a mean difference, and the least difference that is claimed."""
    if not is_installed("scipy"):  # nothing is claimed without it
        return None, None
    from scipy.stats import t

    spread = sum(variance**2 / freedom for variance, freedom in variances)
    if not spread:
        return None, 0.0
    freedom = error**4 / spread
    least = float(t.ppf(1 - LEVEL / 2, freedom) + t.ppf(POWER, freedom)) * error
    return float(2 * t.sf(abs(mean) / error, freedom)), least
