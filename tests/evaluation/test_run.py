import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moa_peft import RouterConfig
from moa_peft.data.row import Row
from moa_peft.errors import RunError, UsageError
from moa_peft.evaluation import run as run_module
from moa_peft.evaluation.options import EvaluationOptions
from moa_peft.evaluation.question_runner import GenerationExaminer, LikelihoodExaminer, TextExaminer
from moa_peft.evaluation.questions import Task, as_question, question_of
from moa_peft.evaluation.result_key import identify
from moa_peft.evaluation.results import ResultRow, paired_difference
from moa_peft.evaluation.run import TaskResult, evaluate
from moa_peft.json_lines import read_rows
from tiny_lm import byte_tokenizer, choice_rows, number_rows, tiny_llama, with_mixture

TOKENIZER = byte_tokenizer(chat=True)


def task(rows: list[Row], name: str = "mine") -> Task:
    return Task(name=name, source="here", split="test", questions=tuple(as_question(row) for row in rows))


def text_rows(count: int) -> list[Row]:
    """Questions whose choices have texts, of unequal length."""
    lead = "Please choose the correct answer to the question:"
    return [
        Row(
            instruction=f"{lead} Why{' oh' * (place % 4)} {place}?\n\nAnswer1: it is Answer2: so\n\nAnswer format: answer1/answer2",
            input="",
            output="the correct answer is answer1",
            answer=f"answer{1 + place % 2}",
        )
        for place in range(count)
    ]


def options(out: Path | None = None, **changes: Any) -> EvaluationOptions:
    return EvaluationOptions(out=out, progress=False, **changes)


def files(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def without(row: ResultRow, *names: str) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(row).items() if key not in names}


def test_likelihood_figures_are_those_of_the_examples(tmp_path: Path) -> None:
    model = with_mixture(tiny_llama())
    result = evaluate(model, TOKENIZER, task(choice_rows(24)), options(tmp_path))
    row, examples = result.row, result.examples
    assert [one["index"] for one in examples] == list(range(24))
    for one, asked in zip(examples, choice_rows(24), strict=True):
        values = one["log_likelihoods"]
        best = one["choices"][values.index(max(values))]
        assert one["extracted"]["sum"] == best
        assert one["correct"]["sum"] == (best == asked.answer)
        assert one["prompt"].endswith("### Response:\n")
    right = [one["correct"]["sum"] for one in examples]
    assert any(one["correct"]["sum"] and one["extracted"]["sum"] != one["choices"][0] for one in examples)
    assert 0 < sum(right) < 24, "the test says nothing when all answers are right or wrong"
    share = sum(right) / 24
    assert (row.mode, row.extraction, row.n, row.num_scored) == ("likelihood", "sum", 24, 24)
    assert row.accuracy == row.accuracies["sum"] == share
    assert row.standard_error == pytest.approx(math.sqrt(share * (1 - share) / 24))
    assert row.answer_loss == pytest.approx(sum(result.losses()) / 24)
    assert sum(result.correct()) == sum(right)
    assert read_rows(tmp_path / "results.jsonl") == [json.loads(json.dumps(dataclasses.asdict(row)))]
    assert set(files(tmp_path)) == {"results.jsonl", f"examples/mine-likelihood-{row.key[:12]}.jsonl"}
    assert result.examples_file is not None
    assert tuple(read_rows(result.examples_file)) == examples


def test_a_choice_that_begins_another_is_told_from_it_by_its_end() -> None:
    choices = "/".join(f"answer{number}" for number in range(1, 11))
    asked = Row(instruction=f"Q\n\nAnswer format: {choices}", input="", output="answer10", answer="answer10")
    (one,) = evaluate(tiny_llama(), TOKENIZER, task([asked]), options()).examples
    tokens = TOKENIZER("answer10")["input_ids"]
    with torch.no_grad():
        prompt = TOKENIZER(one["prompt"])["input_ids"]
        logits = tiny_llama()(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 :]
    found = logits.log_softmax(-1)[range(len(tokens) + 1), [*tokens, TOKENIZER.eos_token_id]]
    assert one["log_likelihoods"][9] == pytest.approx(float(found.sum()), abs=1e-4)


def test_the_answer_loss_of_choices_is_that_of_the_answer_alone() -> None:
    model, rows = with_mixture(tiny_llama()), choice_rows(6)
    with_choices = evaluate(model, TOKENIZER, task(rows), options()).losses()
    bare = [dataclasses.replace(row, instruction=row.instruction, answer="") for row in rows]
    alone = evaluate(model, TOKENIZER, task(bare), options())
    assert with_choices == pytest.approx(alone.losses(), abs=1e-5)
    assert (alone.row.accuracy, alone.row.num_scored, alone.row.standard_error) == (None, 0, None)


def test_a_reference_that_is_no_choice_has_its_own_loss() -> None:
    row = choice_rows(1)[0]
    model = tiny_llama()
    odd = dataclasses.replace(row, output="I would say that it is true, because.")
    bare = dataclasses.replace(odd, answer="")
    losses = [evaluate(model, TOKENIZER, task([one]), options()).losses() for one in (odd, bare)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_generation_figures_are_those_of_the_examples(tmp_path: Path) -> None:
    model = tiny_llama()
    result = evaluate(model, TOKENIZER, task(number_rows(5)), options(tmp_path, max_new_tokens=7))
    row = result.row
    assert (row.mode, row.extraction, row.max_new_tokens, row.num_scored) == ("generation", "stated", 7, 5)
    assert set(row.accuracies) == {"stated", "official"}
    assert row.num_cut_off == sum(one["stopped"] == "length" for one in result.examples)
    for one in result.examples:
        assert set(one["extracted"]) == {"stated", "official"}
        assert one["num_tokens"] <= 7
        assert isinstance(one["output"], str)
    official = evaluate(
        model, TOKENIZER, task(number_rows(5)), options(tmp_path, max_new_tokens=7, extraction="official")
    )
    assert (official.row.extraction, official.row.key, official.row.num_resumed) == ("official", row.key, 5)
    assert len(read_rows(tmp_path / "results.jsonl")) == 2
    assert len(files(tmp_path)) == 2, "both rules read the same examples"


def test_replies_are_scored_by_what_they_state(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {0: "It is 1. The answer is 1. Or 9", 1: "The answer is 5."}
    monkeypatch.setattr(
        "moa_peft.evaluation.question_runner.generate_batch",
        lambda model, prompts, **rest: [
            [*said[int(b"What is 1" in bytes(one))].encode(), 256] for one in prompts
        ],
    )
    monkeypatch.setattr(TOKENIZER, "decode", lambda ids, **rest: bytes(ids).decode())
    monkeypatch.setattr(
        "moa_peft.evaluation.question_runner.prompt_ids", lambda text, *rest: [*text.encode()]
    )
    result = evaluate(tiny_llama(), TOKENIZER, task(number_rows(2)), options())
    assert [one["correct"] for one in result.examples] == [
        {"stated": True, "official": False},
        {"stated": False, "official": False},
    ]
    assert result.row.accuracy == 0.5
    assert result.row.num_cut_off == 0


def test_the_mode_follows_the_task_unless_it_is_given() -> None:
    model = tiny_llama()
    assert evaluate(model, TOKENIZER, task(choice_rows(2)), options()).row.mode == "likelihood"
    chosen = evaluate(model, TOKENIZER, task(choice_rows(2)), options(mode="generation"))
    assert (chosen.row.mode, chosen.row.max_new_tokens) == ("generation", 32)
    assert evaluate(model, TOKENIZER, task(number_rows(2)), options(mode="likelihood")).row.accuracy is None
    mixed = evaluate(model, TOKENIZER, task([*choice_rows(2), *number_rows(1)]), options(max_new_tokens=3))
    assert mixed.row.mode == "generation"


@pytest.mark.parametrize("mode", ["likelihood", "generation"])
def test_results_do_not_depend_on_the_batch_size(tmp_path: Path, mode: Any) -> None:
    model, asked = with_mixture(tiny_llama()), task(choice_rows(9))
    few = {"max_new_tokens": 6} if mode == "generation" else {}
    alone, together = (
        evaluate(model, TOKENIZER, asked, options(tmp_path / str(size), mode=mode, batch_size=size, **few))
        for size in (1, 8)
    )
    assert alone.row.key == together.row.key
    assert alone.row.accuracies == together.row.accuracies
    assert alone.losses() == pytest.approx(together.losses(), abs=1e-5)
    for one, other in zip(alone.examples, together.examples, strict=True):
        assert one["extracted"] == other["extracted"]
        assert one.get("output") == other.get("output")


def test_a_second_call_with_the_same_settings_changes_nothing(tmp_path: Path) -> None:
    model, asked = tiny_llama(), task(choice_rows(5))
    first = evaluate(model, TOKENIZER, asked, options(tmp_path))
    before = files(tmp_path)
    second = evaluate(model, TOKENIZER, asked, options(tmp_path, batch_size=2))
    assert files(tmp_path) == before
    assert (first.reused, second.reused) == (False, True)
    assert second.row == first.row
    assert second.examples == first.examples


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"model": with_mixture(tiny_llama())},
        lambda: {"model": tiny_llama(seed=5)},
        lambda: {"model": tiny_llama().to(torch.bfloat16)},  # type: ignore[arg-type]  # stub of a wrapper
        lambda: {"rows": choice_rows(4)},
        lambda: {"rows": [dataclasses.replace(choice_rows(1)[0], answer="false"), *choice_rows(5)[1:]]},
        lambda: {"template": "chat"},
        lambda: {"mode": "generation"},
    ],
    ids=["adapter", "base", "dtype", "rows", "answer", "template", "mode"],
)
def test_whatever_decides_the_result_starts_afresh(
    tmp_path: Path, change: Callable[[], dict[str, Any]]
) -> None:
    evaluate(tiny_llama(), TOKENIZER, task(choice_rows(5)), options(tmp_path))
    changes = change()
    model, rows = changes.pop("model", None) or tiny_llama(), changes.pop("rows", choice_rows(5))
    again = evaluate(model, TOKENIZER, task(rows), options(tmp_path, **changes))
    assert (again.reused, again.row.num_resumed) == (False, 0)
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("mode", ["likelihood", "generation", "text"])
def test_a_run_killed_twice_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, name = (text_rows(10), "ARC-Easy") if mode == "text" else (choice_rows(10), "mine")
    model, asked = with_mixture(tiny_llama()), task(rows, name)
    settings = {"mode": mode, "batch_size": 3} | ({"max_new_tokens": 5} if mode == "generation" else {})
    whole = evaluate(model, TOKENIZER, asked, options(tmp_path / "whole", **settings))
    write, calls = run_module.append_rows, []

    def killed(file: Path, rows: list[Any]) -> None:
        write(file, rows)
        calls.append(file)
        if len(calls) >= 2:
            file.write_bytes(file.read_bytes()[:-9])  # the last line is cut off
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "append_rows", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, TOKENIZER, asked, options(tmp_path / "killed", **settings))
    monkeypatch.undo()
    assert not (tmp_path / "killed/results.jsonl").exists()
    resumed = evaluate(model, TOKENIZER, asked, options(tmp_path / "killed", **settings))
    assert resumed.row.num_resumed == 5
    assert whole.examples_file is not None
    assert resumed.examples_file is not None
    assert resumed.examples_file.read_bytes() == whole.examples_file.read_bytes()
    changing = ("seconds", "num_resumed", "taken_at")
    assert without(resumed.row, *changing) == without(whole.row, *changing)


def test_equal_weights_and_rows_under_other_names_are_rows_of_their_own(tmp_path: Path) -> None:
    model, rows = tiny_llama(), choice_rows(6)
    first = evaluate(model, TOKENIZER, task(rows, "one"), options(tmp_path))
    other_task = evaluate(model, TOKENIZER, task(rows, "two"), options(tmp_path))
    assert (other_task.reused, other_task.row.task) == (False, "two")
    named = identify(model, base_model="a copy elsewhere")
    other_model = evaluate(model, TOKENIZER, task(rows, "one"), options(tmp_path), identity=named)
    assert (other_model.reused, other_model.row.base_model) == (False, "a copy elsewhere")
    assert other_model.row.num_resumed == 6, "the examples are the same"
    assert other_model.row.accuracy == first.row.accuracy
    elsewhere = dataclasses.replace(task(rows, "two"), source="there")
    assert evaluate(model, TOKENIZER, elsewhere, options(tmp_path)).row.source == "there"
    assert evaluate(model, TOKENIZER, task(rows, "two"), options(tmp_path)).reused


def test_settings_beside_the_weights_start_afresh(tmp_path: Path) -> None:
    asked = task(choice_rows(4))
    first = evaluate(tiny_llama(), TOKENIZER, asked, options(tmp_path))
    other = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    assert identify(other).base_fingerprint == first.row.base_fingerprint
    changed = evaluate(other, TOKENIZER, asked, options(tmp_path))
    assert (changed.reused, changed.row.num_resumed) == (False, 0)
    ended = byte_tokenizer(chat=True)
    ended.eos_token = "!"
    changed = evaluate(tiny_llama(), ended, asked, options(tmp_path))
    assert (changed.reused, changed.row.num_resumed) == (False, 0)
    assert changed.row.answer_loss != first.row.answer_loss


def test_an_example_without_its_place_is_named(tmp_path: Path) -> None:
    asked = task(choice_rows(3))
    file = evaluate(tiny_llama(), TOKENIZER, asked, options(tmp_path)).examples_file
    assert file is not None
    file.write_text(file.read_text().replace('"index": 1', '"place": 1'))
    with pytest.raises(
        UsageError, match=r"jsonl, line 2: it has no index: delete the file, or mend the line"
    ):
        evaluate(tiny_llama(), TOKENIZER, asked, options(tmp_path))


def test_examples_left_in_the_order_of_batches_are_put_in_that_of_the_task(tmp_path: Path) -> None:
    asked = task(choice_rows(6))
    file = evaluate(tiny_llama(), TOKENIZER, asked, options(tmp_path)).examples_file
    assert file is not None
    whole = file.read_bytes()
    file.write_bytes(b"".join(reversed(whole.splitlines(keepends=True))))
    evaluate(tiny_llama(), TOKENIZER, asked, options(tmp_path))
    assert file.read_bytes() == whole


def test_a_row_killed_after_its_examples_is_written_at_the_next_call(tmp_path: Path) -> None:
    model, asked = tiny_llama(), task(choice_rows(4))
    evaluate(model, TOKENIZER, asked, options(tmp_path))
    results = tmp_path / "results.jsonl"
    results.write_bytes(results.read_bytes()[:-20])
    again = evaluate(model, TOKENIZER, asked, options(tmp_path))
    assert (again.reused, again.row.num_resumed) == (False, 4)
    assert len(read_rows(results)) == 1


def test_the_row_says_how_to_repeat_it() -> None:
    model = with_mixture(tiny_llama())
    known = identify(model, base_model="smollm2", adapter="runs/a", method="soft-moa", seed=7)
    asked = dataclasses.replace(task(choice_rows(3)), file_md5="0f", limit=3)
    row = evaluate(model, TOKENIZER, asked, options(template="chat"), identity=known).row
    assert (row.base_model, row.adapter, row.method, row.seed) == ("smollm2", "runs/a", "soft-moa", 7)
    assert (row.template, row.prompt_form) == ("chat", "<user>{instruction}<|end|><assistant>")
    assert (row.dtype, row.file_md5, row.limit, row.source, row.split) == ("float32", "0f", 3, "here", "test")
    assert {"python", "torch", "transformers", "peft", "moa-peft"} <= set(row.versions)
    assert row.taken_at.endswith("+00:00")
    assert row.command


def test_frozen_against_tuned_is_paired_question_by_question() -> None:
    model, asked = with_mixture(tiny_llama()), task(choice_rows(8))
    tuned = evaluate(model, TOKENIZER, asked, options())
    with model.disable_adapter():
        frozen = evaluate(model, TOKENIZER, asked, options())
    bare = evaluate(tiny_llama(), TOKENIZER, asked, options())
    assert frozen.row.key == bare.row.key != tuned.row.key
    assert (frozen.row.method, tuned.row.method) == ("frozen", "moa")
    assert frozen.losses() == bare.losses() != tuned.losses()
    mean, error = paired_difference(frozen.losses(), tuned.losses())
    assert mean == pytest.approx(frozen.row.answer_loss - tuned.row.answer_loss)  # type: ignore[operator]  # not None
    assert error is not None


def test_the_training_mode_is_put_back() -> None:
    model = with_mixture(tiny_llama()).train()
    evaluate(model, TOKENIZER, task(choice_rows(2)), options())
    assert model.training


def test_rows_without_an_output_have_no_loss_but_an_accuracy() -> None:
    rows = [dataclasses.replace(row, output="") for row in number_rows(2)]
    row = evaluate(tiny_llama(), TOKENIZER, task(rows), options(max_new_tokens=3)).row
    assert (row.answer_loss, row.answer_loss_standard_error, row.num_scored) == (None, None, 2)


def test_a_log_likelihood_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(
        RunError, match="row 1: the log-likelihood is nan: the weights hold values that are not finite"
    ):
        evaluate(model, TOKENIZER, task(choice_rows(1)), options(tmp_path))
    assert not (tmp_path / "results.jsonl").exists()


def test_a_rule_of_the_other_mode_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"extraction 'official' does not go with mode likelihood.*--mode generation"
    ):
        evaluate(tiny_llama(), TOKENIZER, task(choice_rows(1)), options(extraction="official"))
    for rule, mode, other in (("per_token", "text", "likelihood"), ("per_character", "generation", "text")):
        with pytest.raises(
            UsageError, match=f"extraction '{rule}' does not go with mode {mode}.*--mode {other}"
        ):
            options(extraction=rule).rule_for(mode)
    by_token = evaluate(tiny_llama(), TOKENIZER, task(choice_rows(3)), options(extraction="per_token")).row
    assert by_token.accuracy == by_token.accuracies["per_token"]


def test_every_wrong_setting_is_told_at_once() -> None:
    wrong: dict[str, Any] = {"mode": "likelyhood", "extraction": "oficial", "template": "papr"}
    wrong |= {"batch_size": 0, "max_new_tokens": 0}
    with pytest.raises(UsageError) as caught:
        EvaluationOptions(**wrong)
    for part in ("did you mean 'likelihood'", "did you mean 'official'", "did you mean 'paper'"):
        assert part in str(caught.value)
    for part in ("batch_size is 0", "max_new_tokens is 0"):
        assert part in str(caught.value)
    with pytest.raises(UsageError, match="max_new_tokens has no meaning in mode likelihood"):
        EvaluationOptions(mode="likelihood", max_new_tokens=5)
    with pytest.raises(UsageError, match="max_new_tokens has no meaning in mode text"):
        EvaluationOptions(mode="text", max_new_tokens=5)


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"row 1 takes \d+ tokens, the model reads 1024.*lower max_new_tokens"
    ):
        evaluate(tiny_llama(), TOKENIZER, task(number_rows(1)), options(max_new_tokens=1000))


def test_batches_of_some_questions_are_those_questions() -> None:
    asked = task(choice_rows(6)).questions
    examiner = LikelihoodExaminer(tiny_llama(), TOKENIZER, asked, template="paper", batch_size=2)
    assert sorted(place for part in examiner.batches_of([5, 1, 3]) for place in part) == [1, 3, 5]


def test_an_adapter_that_pools_officially_is_asked_one_question_at_a_time() -> None:
    """Its gates are means over a batch's padding too."""
    router = RouterConfig(granularity="instance", pooling="official")
    asked = {"template": "paper", "batch_size": 3}
    for pooling, longest in ((router, 1), (dataclasses.replace(router, pooling="prompt"), 3)):
        model, questions = with_mixture(tiny_llama(), router=pooling), task(choice_rows(6)).questions
        by_likelihood = LikelihoodExaminer(model, TOKENIZER, questions, **asked)
        by_generation = GenerationExaminer(model, TOKENIZER, questions, **asked, max_new_tokens=4)
        by_text = TextExaminer(model, TOKENIZER, task(text_rows(6), "ARC-Easy"), batch_size=3)
        for examiner in (by_likelihood, by_generation, by_text):
            assert max(map(len, examiner.batches())) == longest


def test_a_result_kept_in_memory_names_no_file() -> None:
    result: TaskResult = evaluate(tiny_llama(), TOKENIZER, task(choice_rows(2)), options())
    assert (result.examples_file, result.results_file, result.reused) == (None, None, False)


def code_task() -> Task:
    """Two functions to write: one the model is right about, one not."""
    records = [
        {
            "prompt": f'def f{place}(x):\n    """Same."""\n',
            "canonical_solution": "    return x",
            "entry_point": f"f{place}",
            "test": f"def check(f):\n    assert f({place}) == {place}",
        }
        for place in range(3)
    ]
    return Task(
        name="coded",
        source="here",
        split="test",
        questions=tuple(question_of(one, f"row {place}") for place, one in enumerate(records, start=1)),
    )


def test_a_reply_that_is_the_text_wanted_is_right_whatever_it_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = ["The answer is Paris", "The answer is: 'tea, milk'.", "It is so."]
    rows = [
        Row(instruction=f"row {place}", input="", output=one, answer=one) for place, one in enumerate(said)
    ]
    monkeypatch.setattr(
        "moa_peft.evaluation.question_runner.generate_batch",
        lambda model, prompts, **rest: [
            [*next(one for n, one in enumerate(said) if f"row {n}".encode() in bytes(ids)).encode(), 256]
            for ids in prompts
        ],
    )
    monkeypatch.setattr(TOKENIZER, "decode", lambda ids, **rest: bytes(ids).decode())
    monkeypatch.setattr(
        "moa_peft.evaluation.question_runner.prompt_ids", lambda text, *rest: [*text.encode()]
    )
    assert evaluate(tiny_llama(), TOKENIZER, task(rows), options(tmp_path)).row.accuracy == 1


def test_answers_of_several_paragraphs_have_a_loss_and_no_accuracy() -> None:
    asked = task([Row(instruction="Why?", input="", output="a\n\nb", answer="a\n\nb")])
    with pytest.raises(UsageError, match="task 'mine' has answers of several paragraphs"):
        evaluate(tiny_llama(), TOKENIZER, asked, options())
    assert evaluate(tiny_llama(), TOKENIZER, asked, options(mode="likelihood")).row.answer_loss is not None


def test_programs_are_run_only_when_that_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"task 'coded' runs the programs .*--allow-code-execution"):
        evaluate(tiny_llama(), TOKENIZER, code_task(), options(tmp_path))
    assert not files(tmp_path)
    likely = evaluate(tiny_llama(), TOKENIZER, code_task(), options(mode="likelihood")).row
    assert (likely.accuracy, likely.num_scored) == (None, 0)
    assert likely.answer_loss is not None


def test_a_program_is_right_when_it_passes_its_tests_in_the_sandbox(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    allowed = options(tmp_path, allow_code_execution=True)
    try:
        allowed.check_needs(code_task())
    except UsageError as error:
        pytest.skip(str(error))
    said = ["```python\ndef f0(x):\n    return x\n```", "    return x + 1", ""]
    monkeypatch.setattr(
        "moa_peft.evaluation.question_runner.generate_batch",
        lambda model, prompts, **rest: [
            [*next(said[n] for n in range(3) if f"f{n}(".encode() in bytes(one)).encode(), 256]
            for one in prompts
        ],
    )
    monkeypatch.setattr(TOKENIZER, "decode", lambda ids, **rest: bytes(ids).decode())
    monkeypatch.setattr(
        "moa_peft.evaluation.question_runner.prompt_ids", lambda text, *rest: [*text.encode()]
    )
    result = evaluate(tiny_llama(), TOKENIZER, code_task(), allowed)
    assert (result.row.mode, result.row.max_new_tokens, result.row.num_scored) == ("generation", 512, 3)
    assert [one["extracted"]["stated"] for one in result.examples] == [
        "def f0(x):\n    return x",
        "    return x + 1",
        None,
    ]
    assert [one["correct"] for one in result.examples] == [
        {"stated": True, "official": False},
        {"stated": False, "official": False},
        {"stated": False, "official": False},
    ]
    assert [one["outcome"]["stated"] for one in result.examples] == [
        "passed",
        "failed: AssertionError",
        "no program",
    ]
    assert result.examples[0]["outcome"]["official"].startswith("failed: SyntaxError")
    assert result.row.accuracy == pytest.approx(1 / 3)
    assert evaluate(tiny_llama(), TOKENIZER, code_task(), allowed).reused
    changed = dataclasses.replace(code_task().questions[0].code, tests="pass")  # type: ignore[type-var]  # not None
    other = dataclasses.replace(code_task().questions[0], code=changed)
    again = evaluate(
        tiny_llama(),
        TOKENIZER,
        dataclasses.replace(code_task(), questions=(other, *code_task().questions[1:])),
        allowed,
    )
    assert not again.reused, "other tests are another task"


def test_generation_of_a_program_stops_when_its_fence_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    examiner = GenerationExaminer(
        tiny_llama(), TOKENIZER, code_task().questions, template="paper", batch_size=4, max_new_tokens=8
    )
    text = "```python\ndef f1(x):\n    return x\n```"
    tokens = TOKENIZER(text)["input_ids"]
    ended = [examiner._has_ended(1, tokens[:end]) for end in range(1, len(tokens) + 1)]
    assert ended == [False] * (len(tokens) - 1) + [True]
    assert not examiner._has_ended(0, tokens), "another function than the one that was asked for"


def test_numbers_are_read_out_of_replies_only_where_math_verify_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Were it asked for only when an expression turns up, a score would depend on what is installed."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(
        UsageError, match=r"numbers of task 'mine' .* needs math_verify.*pip install .*'.\[eval\]'"
    ):
        evaluate(tiny_llama(), TOKENIZER, task(number_rows(1)), options(tmp_path, max_new_tokens=2))
    assert not files(tmp_path)
    assert evaluate(tiny_llama(), TOKENIZER, task(number_rows(1)), options(mode="likelihood")).row.n == 1
    assert evaluate(tiny_llama(), TOKENIZER, task(choice_rows(1)), options(mode="generation")).row.n == 1
