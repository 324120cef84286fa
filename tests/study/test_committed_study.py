"""The studies that the documentation shows: their rows name where they come from, and give their reports byte for byte."""

import shutil
from pathlib import Path

import pytest

from moa_peft.cli.overrides import load_yaml
from moa_peft.data.base_model import resolve_model
from moa_peft.evaluation.result_key import identify
from moa_peft.study.config import FROZEN, StudyConfig, studies_of
from moa_peft.study.report import read_summary, write_report
from moa_peft.study.rows import read_results

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "results" / "study-cpu-small"
SETTINGS = load_yaml(ROOT / "studies" / "cpu-small.yaml")


def test_nothing_is_missing_and_no_run_is_left_out() -> None:
    summary = read_summary(StudyConfig.from_mapping({**SETTINGS, "out": str(FOLDER)}))
    assert not summary.missing
    assert not summary.failures
    assert len(summary.rows) == len(read_results(FOLDER)) == summary.planned
    assert summary.methods[0].label == FROZEN
    assert {len(one.rows) for one in summary.methods[1:]} == {3}


def test_every_row_names_commit_config_versions_seed_and_data() -> None:
    files = SETTINGS["data_md5"]
    for row in read_results(FOLDER):
        assert row.commit
        assert not row.dirty
        assert row.config_hash
        assert row.versions["torch"]
        assert row.train.file_md5 == files["train"]
        assert row.seed in (SETTINGS["seeds"] if row.label != FROZEN else [None])
        assert {name: one.file_md5 for name, one in row.tests.items()}.items() <= files.items()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("study", "dtype"), [("study-cpu-small", "float32"), ("study-cpu/math-finals", "bfloat16")]
)
def test_a_committed_study_can_go_on(study: str, dtype: str) -> None:
    """Its runs were of the weights that are fetched; how they are counted changed once, and every study was refused."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2"), dtype=dtype)
    rows = read_results(ROOT / "docs" / "results" / study)
    assert {row.base_fingerprint for row in rows} == {identify(model).base_fingerprint}


def test_a_report_of_losses_alone_says_what_a_claim_is() -> None:
    """It had "Errors as above" below no accuracies."""
    report = (ROOT / "docs/results/study-cpu/math-finals/report.md").read_text(encoding="utf-8")
    part = report.split("## Difference in loss")[1].split("\n## ")[0]
    assert "Nothing is claimed of a difference below it" in part


@pytest.mark.parametrize(
    ("study", "domain"),
    [("cpu-small", None), ("cpu", "math"), ("cpu", "math-finals"), ("cpu", "math-ideas")],
)
def test_the_report_comes_out_of_the_rows_byte_for_byte(
    study: str, domain: str | None, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra report")
    settings = load_yaml(ROOT / "studies" / f"{study}.yaml")
    (config,) = studies_of(settings, {"out": str(tmp_path)}, domain)
    folder, written = ROOT / "docs" / "results" / f"study-{study}" / (domain or ""), Path(config.out)
    written.mkdir(exist_ok=True)
    for name in ("results.jsonl", "study.json"):
        shutil.copy(folder / name, written)
    write_report(config)
    names = sorted(one.name for one in written.iterdir())
    assert names == sorted(one.name for one in folder.iterdir() if one.is_file())
    for name in names:
        assert (written / name).read_bytes() == (folder / name).read_bytes(), name
