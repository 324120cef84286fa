"""The studies that the documentation shows: their rows name where they come from, and give their reports byte for byte."""

import os
import shutil
from pathlib import Path

import pytest

from moa_peft.cli.overrides import load_yaml
from moa_peft.data.base_model import resolve_model
from moa_peft.evaluation.result_key import identify
from moa_peft.study.config import FROZEN, studies_of
from moa_peft.study.data import load_data
from moa_peft.study.report import write_report
from moa_peft.study.rows import read_results

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "results" / "study-cpu"
SETTINGS = load_yaml(ROOT / "studies" / "cpu.yaml")
DOMAINS = sorted(one.name for one in FOLDER.iterdir())


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_row_names_commit_config_versions_seed_and_data(domain: str) -> None:
    (config,) = studies_of(SETTINGS, {}, domain)
    rows, files = read_results(FOLDER / domain), set(config.data_md5.values())
    assert rows
    for row in rows:
        assert row.commit
        assert not row.dirty
        assert row.config_hash
        assert row.versions["torch"]
        assert row.train.md5
        assert row.train.file_md5 or "," in row.train.source
        assert row.seed in (config.seeds if row.label != FROZEN else [None])
        told = {row.tests[name].file_md5 for name in config.tasks if name in row.tests}
        assert told <= files


@pytest.mark.slow
def test_the_committed_study_can_go_on() -> None:
    """Its runs were of the weights that are fetched; how they are counted changed once, and every study was refused."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2"), dtype="bfloat16")
    told = {row.base_fingerprint for domain in DOMAINS for row in read_results(FOLDER / domain)}
    assert told == {identify(model).base_fingerprint}


def test_a_report_of_losses_alone_says_what_a_claim_is() -> None:
    """It had "Errors as above" below no accuracies."""
    report = (FOLDER / "math-finals" / "report.md").read_text(encoding="utf-8")
    part = report.split("## Difference in loss")[1].split("\n## ")[0]
    assert "Nothing is claimed of a difference below it" in part


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_report_comes_out_of_the_rows_byte_for_byte(domain: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra report")
    (config,) = studies_of(SETTINGS, {"out": str(tmp_path)}, domain)
    folder, written = FOLDER / domain, Path(config.out)
    written.mkdir()
    for name in ("results.jsonl", "study.json"):
        shutil.copy(folder / name, written)
    write_report(config)
    names = sorted(one.name for one in written.iterdir())
    assert names == sorted(one.name for one in folder.iterdir() if one.is_file())
    for name in names:
        assert (written / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("study", ["cpu", "gpu"])
def test_the_rows_of_the_projects_studies_are_enough_for_validation_and_tests(study: str) -> None:
    """Of studies/gpu.yaml the validation rows were a whole file, and its test had none left."""
    data = ROOT.parent / "shared" / "data"
    if not data.is_dir() and not os.environ.get("CI"):
        pytest.skip("the rows of the studies are not here (../shared/data)")
    for config in studies_of(load_yaml(ROOT / "studies" / f"{study}.yaml"), {"data_root": str(data)}):
        found = load_data(config)
        assert len(found.validation.questions) == config.validation_limit
        assert all(len(one.questions) >= 199 for one in found.tests)
