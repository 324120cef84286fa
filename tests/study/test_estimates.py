import math
import random
import statistics

import pytest
from scipy.stats import nct, t

from moa_peft import extras
from moa_peft.study.estimates import Values, difference, estimate, mean_value


def right(**answers: str) -> Values:
    """Answers by task: a 1 for each right one, a 0 for each other."""
    return {name: tuple(map(int, one)) for name, one in answers.items()}


def test_a_mean_over_seeds_has_the_error_of_their_spread() -> None:
    found = estimate([0.4, 0.5, 0.6])
    assert (found.mean, found.error) == (pytest.approx(0.5), pytest.approx(0.1 / math.sqrt(3)))
    assert estimate([0.4]).error is None


def test_every_test_counts_the_same_however_many_questions_it_has() -> None:
    assert mean_value(right(small="10", large="1111")) == 0.75


PAIRS: list[tuple[Values, Values]] = [
    (right(a="1101", b="10"), right(a="1000", b="11")),
    (right(a="1111", b="01"), right(a="0011", b="00")),
]


def test_the_parts_of_a_paired_difference_are_those_of_its_definition() -> None:
    found = difference(PAIRS)
    a = [(1 - 1 + 1 - 0) / 2, (1 - 0 + 1 - 0) / 2, (0 - 0 + 1 - 1) / 2, (1 - 0 + 1 - 1) / 2]
    b = [(1 - 1 + 0 - 0) / 2, (0 - 1 + 1 - 0) / 2]
    by_seed = [(2 / 4 - 1 / 2) / 2, (2 / 4 + 1 / 2) / 2]
    questions = (statistics.variance(a) / 4 + statistics.variance(b) / 2) / 4
    seeds = statistics.variance(by_seed) / 2
    assert (
        found.mean
        == pytest.approx(statistics.fmean(by_seed))
        == pytest.approx(statistics.fmean([*a, *b, *b]))
    )
    assert found.by_questions == pytest.approx(math.sqrt(questions))
    assert found.by_seeds == pytest.approx(math.sqrt(seeds))
    assert found.error == pytest.approx(math.sqrt(questions + seeds))
    parts = (statistics.variance(a) / 16, 3), (statistics.variance(b) / 8, 1), (seeds, 1)
    freedom = (questions + seeds) ** 2 / sum(one**2 / free for one, free in parts)
    assert found.detectable == pytest.approx((t.ppf(0.975, freedom) + t.ppf(0.8, freedom)) * found.error)
    assert found.p == pytest.approx(2 * t.sf(found.mean / found.error, freedom))
    assert found.seeds == 2


def test_a_single_seed_finds_nothing() -> None:
    found = difference([(right(a="1111"), right(a="0000"))])
    assert (found.mean, found.error, found.p, found.detectable) == (1.0, None, None, None)
    assert not found.is_found


def test_without_scipy_a_difference_has_its_error_and_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    found = difference([(right(a="1" * 60 + "01" * 20), right(a="0" * 60 + "10" * 20))] * 3)
    assert (found.error is not None, found.detectable, found.is_found) == (True, None, False)


def test_a_difference_is_found_from_the_detectable_one_on() -> None:
    same = difference([(right(a="10" * 50), right(a="10" * 50))] * 3)
    assert (same.mean, same.detectable, same.is_found) == (0, 0, False)
    far = difference([(right(a="1" * 60 + "01" * 20), right(a="0" * 60 + "10" * 20))] * 3)
    assert far.detectable is not None
    assert 0 < far.detectable < far.mean
    assert far.is_found
    assert difference([(right(a="1101"), right(a="1000"))] * 2).is_found is False


def drawn(luck: random.Random, gain: float, seeds: int, questions: int) -> list[tuple[Values, Values]]:
    """Two methods whose answers depend on the question, on the seed and on chance."""
    hardness = [luck.gauss(0, 0.25) for _ in range(questions)]
    liking = [luck.gauss(0, 0.15) for _ in range(questions)]  # of a question for one of the methods
    pairs: list[tuple[Values, Values]] = []
    for _ in range(seeds):
        shifts = luck.gauss(0, 0.04), luck.gauss(0, 0.04)
        first, second = (
            "".join(
                str(int(luck.random() < 0.5 + hard + sign * like + shift + sign * gain / 2))
                for hard, like in zip(hardness, liking, strict=True)
            )
            for sign, shift in ((1, shifts[0]), (-1, shifts[1]))
        )
        pairs.append((right(a=first), right(a=second)))
    return pairs


def test_the_error_is_not_smaller_than_the_spread_of_studies_that_draw_questions_and_seeds_anew() -> None:
    luck = random.Random(0)
    found = [difference(drawn(luck, 0.0, seeds=3, questions=80)) for _ in range(400)]
    spread = statistics.stdev(one.mean for one in found)
    stated = math.sqrt(statistics.fmean((one.error or 0) ** 2 for one in found))
    assert 0.95 * spread < stated < 1.35 * spread
    only_questions = math.sqrt(statistics.fmean((one.by_questions or 0) ** 2 for one in found))
    assert only_questions < 0.9 * spread, "seeds must count: without them the error is too small"


def test_the_detectable_difference_is_found_in_about_80_of_100_studies_and_none_in_few() -> None:
    freedom, error = 30, 1.0
    detectable = (t.ppf(0.975, freedom) + t.ppf(0.8, freedom)) * error
    power = 1 - nct.cdf(t.ppf(0.975, freedom), freedom, detectable / error)
    assert power == pytest.approx(0.8, abs=0.01)
    luck = random.Random(1)
    claims = [difference(drawn(luck, 0.0, seeds=3, questions=80)).is_found for _ in range(400)]
    assert sum(claims) / 400 < 0.05
