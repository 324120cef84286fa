import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moa_peft.json_lines import RESULTS_FILE, append_rows
from moa_peft.study.config import StudyConfig
from moa_peft.study.document import Section, Table, as_html, as_markdown
from moa_peft.study.estimates import Difference, Estimate
from moa_peft.study.one_run import Order, describe
from moa_peft.study.plots import draw_plots
from moa_peft.study.report import write_report
from moa_peft.study.rows import StepTime
from moa_peft.study.runner import Study, open_study, run_study
from moa_peft.study.statistics import StudySummary
from tiny_study import made_up_row, write_study

RIGHT = {
    ("frozen", None): "1000",
    ("soft-moa", 0): "1110",
    ("soft-moa", 1): "1111",
    ("lora", 0): "1100",
    ("lora", 1): "1000",
}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return open_study(StudyConfig.from_mapping(write_study(tmp_path)))


@pytest.fixture
def reported(study: Study) -> Callable[..., tuple[StudySummary, str]]:
    """Writes rows that were never run, and their report; ``change`` may replace a row or leave it out."""

    def write(change: Callable[[Order, Any], Any] = lambda order, row: row) -> tuple[StudySummary, str]:
        def pool(orders: Any) -> Any:
            for order in orders:
                run = order.job.run
                found: dict[str, Any] = {}
                if run.method is not None:
                    found = {"trainable_parameters": 1000, "total_parameters": 50_000, "peak_mem_mib": 700.4}
                    found |= {"step_ms": StepTime(lower=9, median=10 + run.seed, upper=14, steps=7)}
                found["base_fingerprint"] = "abc"
                row = change(order, made_up_row(order, RIGHT[run.label, run.seed], **found))
                if row is not None:
                    yield order, row

        run_study(study, pool=pool)
        summary = write_report(study.config)
        return summary, (study.folder / "report.md").read_text(encoding="utf-8")

    return write


def row_of(text: str, heading: str, first: str) -> list[str]:
    """The cells of one row of the table under a heading."""
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    found = re.search(rf"^\| {re.escape(first)} \| (.*) \|$", part, re.MULTILINE)
    assert found, part
    return found.group(1).split(" | ")


def test_the_tables_hold_the_means_their_errors_and_the_paired_differences(reported: Any) -> None:
    summary, text = reported()
    assert row_of(text, "Accuracy", "soft-moa") == ["1,000", "2", "87.5 ± 12.5", "87.5 ± 12.5", "87.5 ± 12.5"]
    assert row_of(text, "Accuracy", "frozen") == ["-", "-", "25.0 ± 21.7", "25.0 ± 21.7", "25.0 ± 15.3"]
    (soft,) = [one for one in summary.methods if one.label == "soft-moa"]
    assert soft.versus is not None
    assert row_of(text, "Difference from lora", "soft-moa")[0] == f"{100 * soft.versus.mean:+.1f}" == "+50.0"
    for label in (
        "soft-moa",
        "frozen",
    ):  # the frozen model, which has no seed, goes with each seed of the baseline
        assert row_of(text, "Difference from lora", label)[-2:] == ["2", "none"]
    assert "Nothing is claimed of a difference below it" in text
    assert row_of(text, "Cost", "lora") == ["1,000", "2.00 %", "10", "9 to 14", "700"]
    assert "10 of 9 runs" not in text
    assert "9 of 9 runs are done" in text
    assert "- weights of the base model: abc\n" in text
    assert "No run is left failed." in text


def test_every_rate_that_was_tried_and_every_seed_is_shown(reported: Any) -> None:
    _, text = reported()
    tried = text.split("## Learning rates\n")[1].split("\n## ")[0]
    assert [
        line.split(" | ")[:3] for line in tried.splitlines() if line.startswith(("| soft", "| lora"))
    ] == [
        ["| soft-moa", "0.003", "0"],
        ["| soft-moa", "0.03", "0"],
        ["| lora", "0.003", "0"],
        ["| lora", "0.03", "0"],
    ]
    assert tried.count("chosen |") == 2
    for label in ("soft-moa", "lora"):
        for seed in (0, 1):
            assert row_of(text, "Every run", f"{label}, rate 0.003, seed {seed}")


def test_a_study_that_is_not_finished_reports_what_is_there_and_what_is_missing(reported: Any) -> None:
    def first_ones(order: Order, row: Any) -> Any:
        return row if order.job.stage == "tuning" or order.job.run.seed != 1 else None

    summary, text = reported(first_ones)
    assert summary.missing == ("soft-moa-lr0.003-seed1", "lora-lr0.003-seed1")
    assert "7 of 9 runs are done, learning rates that were tried included. Missing:" in text
    assert "- lora-lr0.003-seed1\n" in text
    # of four questions one differs, in both tests: sqrt(2 * 0.25 / 4) / 2
    assert row_of(text, "Difference from lora", "soft-moa") == ["+25.0", "-", "17.7", "-", "-", "1", "none"]


def test_a_method_whose_rates_are_not_all_tried_is_missing_with_every_seed(reported: Any) -> None:
    def no_lora(order: Order, row: Any) -> Any:
        return None if order.job.run.label == "lora" and order.job.run.learning_rate == 0.03 else row

    summary, text = reported(no_lora)
    assert "lora, seed 1: no learning rate is chosen" in summary.missing
    assert "6 of 9 runs are done" in text
    assert "Difference from lora" not in text


def test_failures_are_listed_with_what_they_said(reported: Any) -> None:
    def breaks(order: Order, row: Any) -> Any:
        run = order.job.run
        if (run.label, run.seed, order.job.stage) == ("soft-moa", 1, "final"):
            return describe(order, {}, "RunError: loss is nan | <b> *")
        return row

    summary, text = reported(breaks)
    assert len(summary.failures) == 1
    assert (
        "9 of 9 runs are done, learning rates that were tried included; 1 failed. Nothing is missing." in text
    )
    assert "- soft-moa, rate 0.003, seed 1: RunError: loss is nan \\| \\<b> \\*\n" in text
    assert row_of(text, "Accuracy", "soft-moa")[1] == "1", "a failed run is not a seed that is averaged"


@pytest.mark.parametrize(
    ("failed", "claim"),
    [(None, "better"), ("soft-moa", "none, a seed failed"), ("lora", "none, a seed failed")],
)
def test_nothing_is_claimed_of_the_seeds_that_are_left_where_one_failed(
    failed: str | None, claim: str, study: Study
) -> None:
    """A method that diverged with one seed was called better by the others; the seed is not lost at random."""

    def pool(orders: Any) -> Any:
        for order in orders:
            run = order.job.run
            row = made_up_row(order, "01" * 20 + ("1" if run.label == "soft-moa" else "0") * 60)
            broke = (run.label, run.seed, order.job.stage) == (failed, 2, "final")
            yield order, describe(order, {}, "RunError: loss is nan") if broke else row

    study = dataclasses.replace(study, config=dataclasses.replace(study.config, seeds=(0, 1, 2, 3)))
    run_study(study, pool=pool)
    write_report(study.config)
    text = (study.folder / "report.md").read_text(encoding="utf-8")
    seeds = "4" if failed is None else "3"
    assert row_of(text, "Difference from lora", "soft-moa")[-2:] == [seeds, claim]
    (first, _) = row_of(text, "Difference from lora, test by test", "soft-moa")
    assert first.endswith("*") is (failed is None)


def test_times_of_several_machines_are_not_compared(reported: Any) -> None:
    _, text = reported(
        lambda _, row: dataclasses.replace(row, device="other") if row.label == "lora" else row
    )
    assert row_of(text, "Cost", "lora") == ["1,000", "2.00 %"]
    assert "the runs were done on several devices (" in text
    assert "step_time.svg" not in text


def test_an_error_over_seeds_stands_only_where_there_are_some(reported: Any) -> None:
    """With one seed that of the answers alone stood below a text that says it holds both."""

    def one_seed(order: Order, row: Any) -> Any:
        if order.job.stage == "final" and order.job.run.seed == 1:
            return None
        losses = [0.5, 0.25, 0.75, 0.5] if row.label == "lora" else [0.5, 0.5, 1.0, 0.25]
        tests = {name: dataclasses.replace(one, losses=losses) for name, one in row.tests.items()}
        return dataclasses.replace(row, tests=tests)

    _, text = reported(one_seed)
    assert row_of(text, "Loss of the answers", "soft-moa")[:2] == ["1,000", "1"]
    cells = row_of(text, "Difference in loss from lora", "soft-moa | first")
    assert cells[:2] == ["+0.0625", "-"]
    assert cells[2] != "-"


def test_router_figures_are_columns_where_there_are_any(reported: Any) -> None:
    _, without = reported()
    assert "## Routers" not in without


def test_router_figures_of_a_run_are_shown(reported: Any) -> None:
    def routed(order: Order, row: Any) -> Any:
        figures: dict[str, Any] = {"load_variation": 0.25, "mean_cka": None, "active_experts": 3.5}
        if row.seed == 1:  # rows of before lack it
            figures["gate_deviation"] = 0.125
        return dataclasses.replace(row, router=figures if row.label == "soft-moa" else None)

    _, text = reported(routed)
    assert row_of(text, "Routers", "soft-moa, rate 0.003, seed 1") == ["3.5000", "0.2500", "-", "0.1250"]
    assert row_of(text, "Routers", "soft-moa, rate 0.003, seed 0") == ["3.5000", "0.2500", "-", "-"]
    assert "lora" not in text.split("## Routers\n")[1].split("\n## ")[0]


def test_the_page_needs_no_other_file_and_its_plots_name_every_method(reported: Any, study: Study) -> None:
    reported()
    page = (study.folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<(link|script|img)\b", page)
    assert not re.search(r"(src|href)=\"(?!#)", page)
    drawings = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    assert len(drawings) == 2
    for one, file in zip(drawings, ("accuracy_parameters.svg", "accuracy_step_time.svg"), strict=True):
        assert (study.folder / file).read_text(encoding="utf-8").strip() == one
        words = [text.text for text in ElementTree.fromstring(one).iter() if (text.text or "").strip()]
        assert [label for label in ("soft-moa", "lora", "frozen") if label not in words] == []


def test_tests_with_losses_alone_are_drawn_against_parameters_and_forgetting(reported: Any) -> None:
    summary, _ = reported()

    def drawn(error: float) -> dict[str, str]:
        forgotten = Difference(
            mean=-0.02,
            by_questions=error,
            by_seeds=0.0,
            error=error,
            p=0.5,
            detectable=0.1,
            seeds=2,
            seed_failed=False,
        )
        methods = [
            dataclasses.replace(
                one,
                tests={},
                mean=None,
                losses={"org/first": Estimate(mean=0.5, error=0.1)},
                forgetting_mean=forgotten,
            )
            for one in summary.methods
        ]
        some = dataclasses.replace(summary, methods=tuple(methods), tests=("org/first",), scored=())
        return {one.file: one.svg for one in draw_plots(some)}

    plots = drawn(0.01)
    assert list(plots) == ["loss_org_first_parameters.svg", "loss_org_first_forgetting.svg"]
    for svg in plots.values():
        words = [text.text for text in ElementTree.fromstring(svg).iter()]
        assert "soft-moa" in words
        assert "lora" in words
        assert "frozen" not in words, "its loss is too high to be shown beside the others'"
    other = drawn(0.02)
    assert [plots[name] == other[name] for name in plots] == [True, False]


def first_plot(summary: StudySummary, labels: list[str], *, most: int = 2, frozen: float = 0.5) -> str:
    """A plot of accuracies from 50 % to 60 %, of up to so many times 1000 parameters."""
    model, method, _ = summary.methods
    methods = [
        dataclasses.replace(
            method,
            label=label,
            mean=Estimate(mean=0.5 + 0.1 * place / len(labels), error=None),
            rows=(dataclasses.replace(method.rows[0], trainable_parameters=1000 * (most if place else 1)),),
        )
        for place, label in enumerate(labels)
    ]
    model = dataclasses.replace(model, mean=Estimate(mean=frozen, error=None))
    return draw_plots(dataclasses.replace(summary, methods=(model, *methods)))[0].svg


def words_of(svg: str) -> set[str | None]:
    return {one.text for one in ElementTree.fromstring(svg).iter()}


def test_a_plot_has_room_for_many_methods_and_long_labels(reported: Any) -> None:
    """From the 22nd method on the legend was cut off, and a label of 80 letters left the axes no width."""
    summary, _ = reported()
    svg = first_plot(summary, ["x" * 80, *(f"method-{place}" for place in range(35))])
    height = float(re.findall(r'viewBox="0 0 \S+ (\S+)"', svg)[0])
    places = [float(one) for one in re.findall(r' y="(\S+?)"[^>]*>method-\d+<', svg)]
    assert len(places) == 35
    assert max(places) < height
    left, right = re.findall(r'id="patch_2">\s*<path d="M (\S+) \S+ \s*L (\S+) ', svg)[0]
    assert float(right) - float(left) > 300


def test_a_frozen_model_that_is_far_away_is_named_and_leaves_the_methods_their_room(reported: Any) -> None:
    summary, _ = reported()
    near, below, above = (words_of(first_plot(summary, ["a", "b"], frozen=one)) for one in (0.48, 0.1, 0.9))
    assert "frozen" in near
    assert {"frozen: 10.0", "50", "52"} <= below
    assert {"frozen: 90.0", "50", "52"} <= above


@pytest.mark.parametrize(("most", "is_log"), [(2, False), (3, True)])
def test_an_axis_is_logarithmic_from_a_factor_of_three_on(most: int, is_log: bool, reported: Any) -> None:
    """Its labels below were of the kind of 2.74 times a power of ten."""
    summary, _ = reported()
    assert ("10^{3}" in first_plot(summary, ["a", "b"], most=most)) is is_log


def test_a_test_without_an_accuracy_leaves_the_mean_of_the_others_and_its_own_losses(reported: Any) -> None:
    """It took the mean, the difference and every plot away, without a word."""

    def by_loss(_: Order, row: Any) -> Any:
        tests = {
            name: dataclasses.replace(one, accuracy=None, standard_error=None, correct="", losses=[0.5, 0.7])
            if name == "first"
            else one
            for name, one in row.tests.items()
        }
        return dataclasses.replace(row, tests=tests)

    summary, text = reported(by_loss)
    assert summary.scored == ("second",)
    assert row_of(text, "Accuracy", "soft-moa") == ["1,000", "2", "87.5 ± 12.5", "87.5 ± 12.5"]
    assert "The mean is over second. Of first there is the loss alone." in text
    assert row_of(text, "Difference from lora", "soft-moa")[0] == "+50.0"
    assert row_of(text, "Loss of the answers", "soft-moa")[2:] == ["0.6000 ± 0.0000", "-"]
    assert re.findall(r"\((.*)\.svg\)", text) == [
        "accuracy_parameters", "accuracy_step_time", "loss_first_parameters",
    ]  # fmt: skip


def test_rows_of_runs_that_the_config_does_not_name_are_left_out(reported: Any, study: Study) -> None:
    _, before = reported()
    (order,) = study.orders(
        [job for job in study.jobs("final", []) if job.run.method is None], progress=False
    )
    row = dataclasses.replace(made_up_row(order, "1111"), config_hash="of another run", label="x")
    append_rows(study.folder / RESULTS_FILE, [dataclasses.asdict(row)])
    write_report(study.config)
    assert (study.folder / "report.md").read_text(encoding="utf-8") == before


def test_a_baseline_of_before_losses_were_kept_leaves_validation_losses_uncompared(reported: Any) -> None:
    """It was a traceback, after a method had been added to an old folder."""

    def old(order: Order, row: Any) -> Any:
        losses = [] if row.label == "lora" else [0.9, 1.1]
        return dataclasses.replace(row, validation=dataclasses.replace(row.validation, losses=losses))

    summary, _ = reported(old)
    assert list(summary.choices) == ["soft-moa"]
    assert summary.choices["soft-moa"].versus is None


def test_a_label_that_was_changed_is_the_new_one_everywhere(reported: Any, study: Study) -> None:
    """Every run, routers and failures still had the old one, which stands in the rows."""
    reported()
    soft, lora = study.config.methods
    write_report(
        dataclasses.replace(study.config, methods=(dataclasses.replace(soft, label="renamed"), lora))
    )
    text = (study.folder / "report.md").read_text(encoding="utf-8")
    assert row_of(text, "Every run", "renamed, rate 0.003, seed 1")
    assert "soft-moa" not in text


def test_the_tasks_of_the_config_alone_are_reported_in_its_order(reported: Any, study: Study) -> None:
    """A task that was taken out of the config stayed in tables, means and what is missing."""
    _, text = reported()
    assert text.count("second") > text.count("| second |") > 0
    turned = write_report(dataclasses.replace(study.config, tasks=["second", "first"]))
    assert turned.tests == ("second", "first")
    one = write_report(dataclasses.replace(study.config, tasks="first"))
    assert (one.tests, one.missing) == (("first",), ())
    text = (study.folder / "report.md").read_text(encoding="utf-8")
    assert "second" not in text
    assert row_of(text, "Accuracy", "soft-moa") == ["1,000", "2", "87.5 ± 12.5", "87.5 ± 12.5"]
    more = write_report(dataclasses.replace(study.config, tasks="first,third"))
    assert "frozen: third" in more.missing


def test_markup_in_words_is_shown_as_it_is() -> None:
    section = Section(title="T", texts=["a * b"], items=["<i>"], table=Table(head=["x|y"], rows=[["`z`"]]))
    assert as_markdown("D", [section]) == (
        "# D\n\n## T\n\na \\* b\n\n- \\<i>\n\n| x\\|y |\n| --- |\n| \\`z\\` |\n"
    )
    page = as_html("D", [section])
    assert "<li>&lt;i&gt;</li>" in page
    assert "<th>x|y</th>" in page


def test_the_rows_say_all_that_is_needed_to_repeat_them(reported: Any, study: Study) -> None:
    reported()
    rows = [json.loads(line) for line in (study.folder / "results.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["commit"] is None or re.fullmatch("[0-9a-f]{40}", row["commit"])
        assert re.fullmatch("[0-9a-f]{16}", row["config_hash"])
        assert row["versions"]["torch"]
        assert row["train"] == dataclasses.asdict(study.data.train)
        assert row["train"]["source"] == "mix", "no path of this machine"
    finals = [row for row in rows if row["stage"] == "final"]
    assert {name: one["md5"] for name, one in finals[0]["tests"].items()} == study.tests
    assert [row["seed"] for row in finals] == [None, 0, 0, 1, 1]


def test_losses_are_paired_answer_by_answer_and_a_rate_at_an_end_is_named(study: Study) -> None:
    """The choice of soft-moa lies inside after one more rate, that of lora stays at the end of its budget."""
    tuning = {"soft-moa": {0.003: 0.9, 0.03: 0.8, 0.06: 0.85}, "lora": {0.003: 0.7, 0.03: 0.6, 0.06: 0.5}}
    growing = dataclasses.replace(study.config, most_rates=3)
    study = dataclasses.replace(study, config=growing)

    def pool(orders: Any) -> Any:
        for order in orders:
            run = order.job.run
            row = made_up_row(order, "10", base_fingerprint="abc")
            mean = 2.0 if run.method is None else tuning[run.label][run.learning_rate]
            spread = 0.1 if run.label == "lora" else 0.3
            losses = [mean - spread, mean + spread]
            scores = dataclasses.replace(row.validation, losses=losses, answer_loss=mean)
            tests = {name: dataclasses.replace(scores, md5=one.md5) for name, one in row.tests.items()}
            yield order, dataclasses.replace(row, validation=scores, tests=tests)

    run_study(study, pool=pool)
    summary = write_report(growing)
    text = (study.folder / "report.md").read_text(encoding="utf-8")
    assert dict(summary.chosen) == {"soft-moa": 0.03, "lora": 0.06}
    assert row_of(text, "Choices", "soft-moa")[1:] == [
        "0.003 to 0.06, 3", "0.03", "0.8000 ± 0.1000", "+0.3000", "0.2000",
    ]  # fmt: skip
    assert row_of(text, "Choices", "lora")[1:3] == ["0.003 to 0.06, 3", "0.06, at an end"]
    assert "Rates were added for soft-moa, lora. The choice lies at an end for lora." in text
    assert row_of(text, "Loss of the answers", "soft-moa")[2] == "0.8000 ± 0.0000"
    assert row_of(text, "Difference in loss from lora", "soft-moa") == [
        "first", "+0.3000", "0.2000", "0.2000", "0.0000", *row_of(text, "Difference in loss from lora", "soft-moa")[5:],
    ]  # fmt: skip
