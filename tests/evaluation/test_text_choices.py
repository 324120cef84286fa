import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moa_peft import RouterConfig
from moa_peft.data.row import Row, as_row
from moa_peft.errors import UsageError
from moa_peft.evaluation.options import EvaluationOptions
from moa_peft.evaluation.questions import Task, as_question
from moa_peft.evaluation.run import TaskResult, evaluate
from moa_peft.evaluation.text_choices import TextQuestion, text_questions
from tiny_lm import END, byte_tokenizer, choice_rows, tiny_llama, with_mixture

DATA = Path(__file__).parents[2] / "../shared/data"
TASKS = ("ARC-Easy", "piqa", "hellaswag")
ASKED = "Please choose the correct answer to the question: "
SOLVED = "Please choose the correct solution to the question: "
ENDED = "Please choose the correct ending to complete the given sentence: "


def task(name: str, *rows: Row) -> Task:
    return Task(name=name, source="here", split="test", questions=tuple(as_question(one) for one in rows))


def options(**changes: Any) -> EvaluationOptions:
    return EvaluationOptions(mode="text", progress=False, **changes)


def row(instruction: str, answer: str) -> Row:
    return Row(instruction=instruction, input="", output=f"the correct answer is {answer}", answer=answer)


def arc(question: str, *choices: str, right: int = 1) -> Row:
    listed = " ".join(f"Answer{number}: {text}" for number, text in enumerate(choices, start=1))
    names = "/".join(f"answer{number}" for number in range(1, len(choices) + 1))
    return row(f"{ASKED}{question}\n\n{listed}\n\nAnswer format: {names}", f"answer{right}")


def ending(context: str, *choices: str) -> Row:
    listed = " ".join(f"Ending{number}: {text}" for number, text in enumerate(choices, start=1))
    names = "/".join(f"ending{number}" for number in range(1, len(choices) + 1))
    return row(f"{ENDED}{context}\n\n{listed}\n\nAnswer format: {names}", "ending1")


def arc_rows(count: int) -> list[Row]:
    words = ("salt", "a star", "iced", "wood", "silt")
    return [
        arc(
            f"What is {place}{' of it' * (place % 3)}?",
            *words[place % 2 : 4 + place % 2],
            right=1 + place % 4,
        )
        for place in range(count)
    ]


def asked(name: str, one: Row) -> tuple[str, tuple[str, ...]]:
    (found,) = text_questions(task(name, one))
    return found.prompt, found.choices


def test_questions_and_texts_are_read_out_of_rows() -> None:
    three = arc("Which?\n\nSay it.", "a stone", "Answer this", "an answer: none")
    texts = ("a stone", "Answer this", "an answer: none")
    assert asked("ARC-Easy", three) == ("Question: Which?\n\nSay it.\nAnswer:", texts)
    assert asked("ARC-Challenge", three) == asked("ARC-Easy", three)
    assert asked("openbookqa", three) == ("Which?\n\nSay it.", texts)
    assert asked("social_i_qa", three) == ("Q: Which?\n\nSay it.\nA:", texts)
    solved = row(
        f"{SOLVED}dresser\n\nSolution1: with  a pin \n\nSolution2: by hand\n\nAnswer format: solution1/solution2",
        "solution2",
    )
    assert asked("piqa", solved) == ("Question: dresser\nAnswer:", ("with  a pin ", "by hand"))


@pytest.mark.parametrize(
    ("context", "prompt"),
    [
        ("Sailing: A man stands. the man in Rome", "Sailing: A man stands. The man in rome"),
        ("Sailing: A man stands. He waves.", "Sailing: A man stands. He waves."),
        ("Sailing: a man in Rome", "Sailing: a man in Rome"),
        (
            "Home: [header] How to sail [title] Take it. [step] Row  on.",
            "Home: How to sail. Take it. Row on.",
        ),
    ],
)
def test_contexts_of_hellaswag_are_prepared_as_lm_eval_does(context: str, prompt: str) -> None:
    found = asked("hellaswag", ending(context, " waves. [substeps] Twice.", "rows [title] Rest"))
    assert found == (prompt, ("waves. Twice.", "rows. Rest"))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("ARC-Easy", arc("Which?", "a", "so Answer2: b", "c")),
        ("ARC-Easy", arc("Which, Answer1: or not?", "a", "b")),
        ("ARC-Easy", arc("Which?", "a", "")),
        ("ARC-Easy", row(arc("Which?", "a", "b").instruction.replace(" Answer2", "\nAnswer2"), "answer1")),
        ("ARC-Easy", Row(instruction=arc("Which?", "a", "b").instruction, input="So.", output="", answer="answer1")),
        ("ARC-Easy", row(f"{ASKED}Is it?\n\nAnswer format: true/false", "true")),
        ("ARC-Easy", row(f"{ASKED}How many?", "7")),
        ("piqa", arc("Which?", "a", "b")),
        ("hellaswag", ending("A: B.", "c", "[step]")),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_in_one_way_is_named(name: str, wrong: Row) -> None:
    right = {"hellaswag": ending("A: B.", "c", "d")}.get(name, arc("Which?", "a", "b"))
    found = task(name, *([] if name == "piqa" else [right]), wrong)
    message = rf"task '{name}', row {len(found.questions)}: .*cannot be told apart.*Please choose.*leave the row out"
    with pytest.raises(UsageError, match=message):
        EvaluationOptions(mode="text").check_needs(found)


def test_a_task_without_texts_is_named_with_those_that_have_them() -> None:
    found = task("boolq", *choice_rows(1))
    EvaluationOptions(mode="likelihood").check_needs(found)
    with pytest.raises(
        UsageError, match=r"task 'boolq' has no choices .* takes piqa, social_i_qa, hellaswag, ARC"
    ):
        EvaluationOptions(mode="text").check_needs(found)


def spanning_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Its tokens reach over spaces, so over the end of a prompt too; a token of its own stands in front."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # untyped setter
    letters = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", END]
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, special_tokens=special)
    )
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=END)


def test_a_text_is_cut_after_the_tokens_of_its_bare_prompt() -> None:
    tokenizer = spanning_tokenizer(["so: it is"] * 9)
    spanned = tokenizer("so: it is")["input_ids"]
    assert len(spanned) == 2, "the test says nothing where no token reaches over the end of the prompt"
    one = TextQuestion(where="row 1", prompt="so: ", choices=("it was", "it"))
    prompt = tokenizer("so:")["input_ids"]
    wholes = [tokenizer(f"so:  {text}")["input_ids"] for text in one.choices]
    found = one.tokens(tokenizer)
    assert found.prompt == tuple(prompt)
    assert found.completions == tuple(tuple(whole[len(prompt) :]) for whole in wholes)
    assert END not in tokenizer.convert_ids_to_tokens([token for each in found.completions for token in each])
    swallowed = TextQuestion(where="task 'x', row 4", prompt="so:", choices=("it is", "no"))
    with pytest.raises(
        UsageError, match="task 'x', row 4: this tokenizer gives the question or a choice no token"
    ):
        swallowed.tokens(tokenizer)


def rows_of(name: str, count: int) -> list[Row]:
    """Rows spread over a task's test file: HellaSwag has those of one source first, then those of the other."""
    if not DATA.is_dir() and not os.environ.get("CI"):
        pytest.skip(f"the data folder {DATA} is not beside the checkout")
    file = DATA / name / "test.json"
    content = file.read_text() if file.is_file() else gzip.decompress(Path(f"{file}.gz").read_bytes())
    rows = json.loads(content)
    return [as_row(one, name) for one in rows[:: len(rows) // count][:count]]


def original(name: str, one: Row) -> dict[str, Any]:
    """A row in the form of the original data set, read without the code under test."""
    text, right = one.instruction, int(one.answer[-1]) - 1
    if name == "piqa":
        found = re.fullmatch(
            rf"{SOLVED}(.*)\n\nSolution1: (.*)\n\nSolution2: (.*)\n\nAnswer format.*", text, re.S
        )
        assert found is not None
        return {"goal": found[1], "sol1": found[2], "sol2": found[3], "label": right}
    body, _ = text.rsplit("\n\nAnswer format", 1)
    question, *choices = re.split(r"(?:\n\n| )(?:Answer|Ending)\d: ", body)
    question = question.split(": ", 1)[1]
    if name == "ARC-Easy":
        letters = "ABCDE"[: len(choices)]
        listed = {"text": choices, "label": list(letters)}
        return {"question": question, "choices": listed, "answerKey": letters[right]}
    label, context = question.split(": ", 1)
    parts = re.fullmatch(r"(.*\.) ([^.]*)", context, re.S)
    whole, begun = parts.groups() if parts else (context, "")
    return {"activity_label": label, "ctx_a": whole, "ctx_b": begun, "endings": choices, "label": str(right)}


def of_lm_eval(
    model: Any, tokenizer: Any, rows: dict[str, list[Row]], folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval's own `hf` model makes of its own tasks on these questions, by task and question."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    own = {"ARC-Easy": "arc/arc_easy", "piqa": "piqa/piqa", "hellaswag": "hellaswag/hellaswag"}
    for name in rows:
        documents = folder / f"{name}.jsonl"
        documents.write_text("".join(json.dumps(original(name, one)) + "\n" for one in rows[name]))
        settings = {
            "include": str(Path(lm_eval.__file__).parent / f"tasks/{own[name]}.yaml"),
            "task": f"own_{name}",
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(documents)}},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    found: Any = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=[f"own_{name}" for name in rows],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return {name: sorted(found["samples"][f"own_{name}"], key=lambda one: one["doc_id"]) for name in rows}


def agrees(ours: TaskResult, theirs: list[dict[str, Any]]) -> None:
    """See that lm-eval judges each question alike; both accuracies are then equal."""
    for one, other in zip(ours.examples, theirs, strict=True):
        values = [float(each[0]) for each in other["filtered_resps"]]
        assert one["log_likelihoods"] == pytest.approx(values, abs=1e-4), one["index"]
    for rule, metric in (("sum", "acc"), ("per_character", "acc_norm")):
        right = [bool(one[metric]) for one in theirs]
        assert [one["correct"][rule] for one in ours.examples] == right
        assert ours.row.accuracies[rule] == sum(right) / len(right)


@pytest.fixture
def lm_eval_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of lm-eval and what it brings along
@pytest.mark.usefixtures("lm_eval_offline")
def test_texts_are_judged_as_lm_evals_own_model_judges_them_on_its_own_tasks(tmp_path: Path) -> None:
    rows = {name: rows_of(name, 100) for name in TASKS}
    tokenizer = spanning_tokenizer([one.instruction for name in TASKS for one in rows[name]])
    model = tiny_llama(vocab_size=400, eos_token_id=1).double()  # float32 rounds sums of 2,000 nats to 1e-4
    theirs = of_lm_eval(model, tokenizer, rows, tmp_path)
    for name in TASKS:
        ours = evaluate(model, tokenizer, task(name, *rows[name]), options())
        agrees(ours, theirs[name])
        for rule in ("sum", "per_character"):
            assert 0 < sum(one["correct"][rule] for one in ours.examples) < 100
    contexts = [one["doc"]["query"].rpartition(". ")[2] for one in theirs["hellaswag"]]
    assert {one.endswith(".") for one in contexts} == {True, False}, (
        "both sources of HellaSwag are among the rows"
    )


@pytest.mark.parametrize("granularity", ["token", "instance"])
def test_each_text_has_the_scores_that_it_has_alone_behind_its_prompt(granularity: Any) -> None:
    """Gates of whole instances are told how long the prompt is, so that the text that is scored is not in their mean."""
    model = with_mixture(tiny_llama(), router=RouterConfig(granularity=granularity))
    read, tokenizer = text_questions(task("ARC-Easy", *arc_rows(7))), byte_tokenizer()
    result = evaluate(model, tokenizer, task("ARC-Easy", *arc_rows(7)), options(batch_size=3))
    for found, asked in zip(result.examples, read, strict=True):
        assert (found["prompt"], found["texts"]) == (asked.prompt, list(asked.choices))
        tokens = asked.tokens(tokenizer)
        start = len(tokens.prompt)
        for value, rest in zip(found["log_likelihoods"], tokens.completions, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([[*tokens.prompt, *rest]]), prompt_length=start).logits[0]
            wanted = logits[start - 1 : -1].log_softmax(-1)[range(len(rest)), list(rest)].sum()
            assert value == pytest.approx(float(wanted), abs=1e-4)


def test_figures_are_those_of_the_examples_and_the_row_says_how_to_repeat_them() -> None:
    asked = task("ARC-Easy", *arc_rows(24))
    result = evaluate(tiny_llama(), byte_tokenizer(), asked, options(extraction="per_character"))
    row, right = result.row, {"sum": [], "per_character": []}
    for found, one in zip(result.examples, asked.questions, strict=True):
        sums, texts = found["log_likelihoods"], found["texts"]
        shares = [value / len(text) for value, text in zip(sums, texts, strict=True)]
        assert found["log_likelihoods_per_character"] == shares
        for rule, values in (("sum", sums), ("per_character", shares)):
            best = found["choices"][values.index(max(values))]
            right[rule].append(best == one.row.answer)
            assert (found["extracted"][rule], found["correct"][rule]) == (best, right[rule][-1])
    assert right["sum"] != right["per_character"], "the test says nothing when both rules agree everywhere"
    assert row.accuracies == {rule: sum(each) / 24 for rule, each in right.items()}
    assert (row.accuracy, row.extraction) == (row.accuracies["per_character"], "per_character")
    assert result.correct() == [float(one) for one in right["per_character"]]
    assert (row.mode, row.num_scored, row.answer_loss, row.num_cut_off) == ("text", 24, None, None)
    assert (row.template, row.prompt_form) == ("none", "Question: {question}\nAnswer:")


def test_no_result_depends_on_the_batch_or_the_template_but_on_the_mode_and_the_prompt_form(
    tmp_path: Path,
) -> None:
    model, tokenizer, asked = tiny_llama(), byte_tokenizer(chat=True), task("ARC-Easy", *arc_rows(9))
    alone = evaluate(model, tokenizer, asked, options(out=tmp_path, batch_size=1))
    together = evaluate(model, tokenizer, asked, options(out=tmp_path / "other", batch_size=8))
    assert alone.row.key == together.row.key
    for one, other in zip(alone.examples, together.examples, strict=True):
        assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-4)
    again = evaluate(model, tokenizer, asked, options(out=tmp_path, template="chat"))
    assert again.reused
    by_name = evaluate(model, tokenizer, asked, EvaluationOptions(out=tmp_path, progress=False))
    other_form = evaluate(model, tokenizer, task("openbookqa", *arc_rows(9)), options(out=tmp_path))
    assert len({alone.row.key, by_name.row.key, other_form.row.key}) == 3
    assert (by_name.row.num_resumed, other_form.row.num_resumed) == (0, 0)
    assert other_form.examples != alone.examples


def test_a_question_that_is_too_long_for_the_model_is_named() -> None:
    rows = (*arc_rows(1), arc("why " * 300, "a", "b"))
    with pytest.raises(UsageError, match=r"row 2 takes 1\d{3} tokens, the model reads 1024"):
        evaluate(tiny_llama(), byte_tokenizer(), task("ARC-Easy", *rows), options())
