"""The report of a study: the same bytes from the same config and rows."""

from pathlib import Path

from moa_peft.errors import UsageError
from moa_peft.evaluation.tasks import task_names
from moa_peft.extras import check_installed
from moa_peft.study.config import StudyConfig
from moa_peft.study.document import as_html, as_markdown
from moa_peft.study.folder import check_same_study, read_study
from moa_peft.study.plots import draw_plots
from moa_peft.study.rows import read_results
from moa_peft.study.schedule import shared_settings
from moa_peft.study.sections import report_sections
from moa_peft.study.statistics import StudySummary, summarise
from moa_peft.training.output_folder import write_text


def read_summary(config: StudyConfig) -> StudySummary:
    """Sum up what lies in a study's folder; neither model nor data is needed.

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
    tests = task_names(config.task_names(), study["tests"])
    forgetting = task_names(config.forgetting_names(), study["tests"]) if config.forgetting else []
    check_same_study(folder, config, shared, rows, tests=tests, forgetting=forgetting)
    return summarise(config, shared, tests, rows, forgetting)


def write_report(config: StudyConfig) -> StudySummary:
    """Write the report of a study from what lies in its folder, and give what it says.

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
    write_text(folder / "report.md", as_markdown(title, sections))
    write_text(folder / "report.html", as_html(title, sections))
    return summary
