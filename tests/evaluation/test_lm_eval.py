import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from moa_peft import RouterConfig
from moa_peft.cli import app, register_verbs
from moa_peft.data.base_model import resolve_model
from moa_peft.data.cache import cache_root
from moa_peft.data.templates import render_prompt
from moa_peft.errors import RunError, UsageError
from moa_peft.evaluation.lm_eval import HarnessOptions, check_harness_tasks, run_harness
from moa_peft.evaluation.loading import load
from moa_peft.evaluation.options import EvaluationOptions
from moa_peft.evaluation.questions import Question, as_question
from moa_peft.evaluation.result_key import identify
from moa_peft.evaluation.run import evaluate
from moa_peft.evaluation.tasks import load_tasks
from moa_peft.json_lines import read_rows
from tiny_lm import byte_tokenizer, choice_rows, save_adapter, save_base, tiny_llama, with_mixture

lm_eval = pytest.importorskip("lm_eval", reason="the extra eval is not installed")

DATA = Path(__file__).parents[2] / "../shared/data"
QUESTIONS = [as_question(row) for row in choice_rows(24)]
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of lm-eval and what it brings along; ours show in the other tests
    pytest.mark.usefixtures("own_dataset_cache"),
]


@pytest.fixture
def own_dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write_task(folder: Path, name: str, questions: list[Question]) -> Path:
    """A task of lm-eval over local rows, with the prompts and replies that `moa evaluate` compares."""
    folder.mkdir(exist_ok=True)
    rows = [
        {
            "prompt": render_prompt(one.row, "paper", None),
            "replies": list(one.completions),
            "right": one.wanted,
        }
        for one in questions
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "replies",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 3},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return folder


def likelihoods(sample: dict[str, Any]) -> list[float]:
    return [float(one[0]) for one in sample["filtered_resps"]]


def of_their_own_model(
    folder: Path, name: str, limit: int | None = None, **arguments: str
) -> list[dict[str, Any]]:
    """What lm-eval's own `hf` model makes of a task, question by question."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found: Any = lm_eval.simple_evaluate(
        "hf",
        {"dtype": "float32", **arguments},
        tasks=[name],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=8,
        device="cpu",
        limit=limit,
        bootstrap_iters=0,
    )
    assert found is not None
    return sorted(found["samples"][name], key=lambda one: one["doc_id"])


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapter"])
def test_the_harness_gives_the_same_on_a_model_of_ours_as_on_its_own_and_agrees_with_our_likelihoods(
    adapted: bool, tmp_path: Path
) -> None:
    folder = write_task(tmp_path / "tasks", "mine", QUESTIONS)
    base = save_base(tmp_path / "base")
    peft = {"peft": str(save_adapter(tmp_path / "run", base))} if adapted else {}
    theirs = of_their_own_model(folder, "mine", pretrained=str(base), **peft)
    model = with_mixture(tiny_llama()) if adapted else tiny_llama()
    known = identify(model)
    options = HarnessOptions(tasks=("mine",), task_folder=folder, batch_size=8, out=tmp_path / "out")
    (result,) = run_harness(model, byte_tokenizer(), options, identity=known)
    ours = sorted(result.samples, key=lambda one: one["doc_id"])
    assert [likelihoods(one) for one in ours] == [likelihoods(one) for one in theirs]
    own = [
        evaluate(
            model, byte_tokenizer(), task_of(QUESTIONS), EvaluationOptions(progress=False), identity=known
        )
    ][0]
    assert [bool(one["acc"]) for one in ours] == [one["correct"]["sum"] for one in own.examples]
    assert result.row.metrics["acc,none"] == own.row.accuracy
    assert 0 < sum(one["acc"] for one in ours) < 24, "the test says nothing when all are right or wrong"
    for one, other in zip(ours, own.examples, strict=True):
        shift = [a - b for a, b in zip(likelihoods(one), other["log_likelihoods"], strict=True)]
        assert max(shift) - min(shift) < 1e-3, (
            "they differ by the line break before the reply, which lm-eval counts to the reply"
        )


def test_gates_of_whole_instances_see_the_prompt_alone_in_the_harness_too(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "mine", QUESTIONS[:4])
    model = with_mixture(tiny_llama(), router=RouterConfig(granularity="instance"))
    tokenizer = byte_tokenizer()
    options = HarnessOptions(tasks=("mine",), task_folder=folder, batch_size=8)
    (result,) = run_harness(model, tokenizer, options, identity=identify(model))
    assert result.row.batch_size == 1
    for sample, question in zip(result.samples, QUESTIONS[:4], strict=True):
        text = render_prompt(question.row, "paper", None)
        prompt = tokenizer(text.rstrip())["input_ids"]  # lm-eval counts the last line break to the reply
        for found, reply in zip(likelihoods(sample), question.completions, strict=True):
            rest = tokenizer(text[len(text.rstrip()) :] + reply)["input_ids"]
            ids = torch.tensor([[*prompt, *rest]])
            with torch.no_grad():
                logits = model(ids[:, :-1], prompt_length=len(prompt)).logits[0, len(prompt) - 1 :]
            wanted = logits.log_softmax(-1)[range(len(rest)), rest].sum()
            assert found == pytest.approx(float(wanted), abs=1e-4)


def task_of(questions: list[Question]) -> Any:
    from moa_peft.evaluation.questions import Task

    return Task(name="mine", source="here", split="test", questions=tuple(questions))


def test_a_row_of_the_harness_lies_with_the_others_and_says_how_to_repeat_it(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "mine", QUESTIONS)
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "run", base, model=str(base), method="soft-moa", seed=3)
    register_verbs_once()
    words = ["evaluate", "--adapter", adapter, "--lm-eval", "mine", "--lm-eval-path", folder, "--limit", 5]
    done = CliRunner().invoke(app, [str(one) for one in words], catch_exceptions=False)
    assert done.exit_code == 0
    (row,) = read_rows(adapter / "evaluation/results.jsonl")
    assert (row["kind"], row["task"], row["task_version"], row["n"]) == ("lm-eval", "mine", "3", 5)
    assert (row["method"], row["seed"], row["adapter"], row["limit"]) == ("soft-moa", 3, str(adapter), 5)
    assert json.loads(row["task_config"])["doc_to_choice"] == "replies"
    assert row["lm_eval_version"]
    assert f"{row['metrics']['acc,none']:.4f} ± {row['metrics']['acc_stderr,none']:.4f}" in done.stdout
    (examples,) = (adapter / "evaluation/examples").iterdir()
    assert len(read_rows(examples)) == 5
    own = ["evaluate", "--adapter", adapter, "--tasks", tmp_path / "rows.json", "--limit", 1]
    (tmp_path / "rows.json").write_text(json.dumps([vars_of(QUESTIONS[0])]))
    assert CliRunner().invoke(app, [str(one) for one in own], catch_exceptions=False).exit_code == 0
    assert [one["kind"] for one in read_rows(adapter / "evaluation/results.jsonl")] == [
        "lm-eval",
        "evaluation",
    ]


def vars_of(question: Question) -> dict[str, str]:
    return {name: getattr(question.row, name) for name in ("instruction", "input", "output", "answer")}


def register_verbs_once() -> None:
    if not app.registered_commands:
        register_verbs()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            ["--lm-eval", "arc_easi"],
            "unknown task of lm-eval 'arc_easi': did you mean 'arc_easy'",
            marks=pytest.mark.slow,
        ),
        (["--lm-eval", ","], "lm_eval is empty"),
        (["--lm-eval", "mine", "--lm-eval-path", "nowhere"], "lm_eval_path nowhere is no folder"),
        (
            ["--lm-eval", "mine", "--batch-size", "0", "--num-fewshot", "-1"],
            "num_fewshot is -1.*batch_size is 0",
        ),
        (
            ["--lm-eval", "mine", "--tasks", "demo", "--split", "x"],
            "--tasks, --split has no meaning with --lm-eval",
        ),
        (["--num-fewshot", "2"], "--num-fewshot has no meaning without --lm-eval"),
        (["--lm-eval", "mine", "--template", "paper"], "unknown template 'paper'"),
    ],
)
def test_a_mistake_about_the_harness_is_one_clear_error(words: list[str], message: str) -> None:
    register_verbs_once()
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(app, ["evaluate", *words], catch_exceptions=False)


def test_a_task_whose_data_cannot_be_had_is_a_users_mistake(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "mine", QUESTIONS)
    (folder / "mine.jsonl").unlink()
    options = HarnessOptions(tasks=("mine",), task_folder=folder)
    model = tiny_llama()
    with pytest.raises(UsageError, match=r"lm-eval: .*mine\.jsonl"):
        run_harness(model, byte_tokenizer(), options, identity=identify(model))


def test_a_figure_that_is_no_number_does_not_cost_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = write_task(tmp_path / "tasks", "mine", QUESTIONS)
    simple_evaluate = lm_eval.simple_evaluate

    def with_nan(*words: Any, **options: Any) -> Any:
        found = simple_evaluate(*words, **options)
        found["results"]["mine"]["mean,none"] = math.nan
        return found

    monkeypatch.setattr("lm_eval.simple_evaluate", with_nan)
    model = tiny_llama()
    options = HarnessOptions(tasks=("mine",), task_folder=folder, out=tmp_path / "out")
    (result,) = run_harness(model, byte_tokenizer(), options, identity=identify(model))
    assert result.row.metrics["mean,none"] is None
    assert result.row.metrics["acc,none"] is not None


def test_a_harness_that_gives_nothing_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "mine", QUESTIONS)
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda *words, **options: None)
    model = tiny_llama()
    with pytest.raises(RunError, match="lm-eval gave no result for mine"):
        run_harness(
            model,
            byte_tokenizer(),
            HarnessOptions(tasks=("mine",), task_folder=folder),
            identity=identify(model),
        )


def test_without_the_extra_the_error_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [one for one in sys.modules if one.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        UsageError, match=r"--lm-eval needs lm_eval.*, which is not installed: .*pip install .*'.\[eval\]'"
    ):
        check_harness_tasks(HarnessOptions(tasks=("arc_easy",)))


@pytest.mark.slow
def test_lm_evals_own_command_loads_an_adapter_under_moa_exec(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "mine", QUESTIONS)
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "run", base)
    command = [sys.executable, "-c", "from moa_peft.cli import main; main()", "exec", "--", "lm_eval"]
    command += ["--model", "hf", "--model_args", f"pretrained={base},peft={adapter},dtype=float32"]
    command += ["--tasks", "mine", "--include_path", str(folder), "--device", "cpu", "--batch_size", "8"]
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out.json"), "--log_samples"],
        capture_output=True, text=True, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = tmp_path.rglob("samples_mine*.jsonl")
    theirs = sorted(read_rows(samples), key=lambda one: one["doc_id"])
    (result,) = run_harness(
        with_mixture(tiny_llama()),
        byte_tokenizer(),
        HarnessOptions(tasks=("mine",), task_folder=folder, batch_size=8),
        identity=identify(with_mixture(tiny_llama())),
    )
    ours = sorted(result.samples, key=lambda one: one["doc_id"])
    for one, other in zip(ours, theirs, strict=True):
        assert likelihoods(one) == pytest.approx(likelihoods(other), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ARC-Easy", "openbookqa"])
def test_the_frozen_smollm2_is_judged_as_lm_evals_own_model_judges_it(name: str, tmp_path: Path) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"the data folder with {name} is not beside the checkout")
    if not os.environ.get("CI") and not (cache_root() / "smollm2").is_dir():
        pytest.skip("smollm2 is not in the cache: make fetch")
    (task,) = load_tasks(name, data_root=DATA, limit=6)
    folder = write_task(tmp_path / "tasks", "real", list(task.questions))
    theirs = of_their_own_model(folder, "real", pretrained=str(resolve_model("smollm2")))
    loaded = load("smollm2", dtype="float32")
    ours = evaluate(loaded.model, loaded.tokenizer, task, EvaluationOptions(progress=False))
    assert [bool(one["acc"]) for one in theirs] == [one["correct"]["sum"] for one in ours.examples]
    assert ours.row.accuracy == sum(one["acc"] for one in theirs) / len(theirs)
    for one, other in zip(theirs, ours.examples, strict=True):
        differences = [a - b for a, b in zip(likelihoods(one), other["log_likelihoods"], strict=True)]
        assert max(differences) - min(differences) < 2e-3
