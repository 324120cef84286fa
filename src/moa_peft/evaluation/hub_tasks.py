"""The paper's tasks on the hub: where they are, and how a row as it stands there becomes the official one."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moa_peft.data.row import Row
from moa_peft.errors import UsageError


class HubSource(NamedTuple):
    """Where a task is on the hub."""

    source: str
    """Name of the data set, and which part of it, as `load_records` takes them."""
    split: str
    """The split that the paper tests on; the test split has no answers in several."""


HUB: Mapping[str, HubSource] = {
    "boolq": HubSource("google/boolq", "validation"),
    "piqa": HubSource("ybisk/piqa", "validation"),
    "social_i_qa": HubSource("allenai/social_i_qa", "validation"),
    "hellaswag": HubSource("Rowan/hellaswag", "validation"),
    "winogrande": HubSource("allenai/winogrande:winogrande_xl", "validation"),
    "ARC-Easy": HubSource("allenai/ai2_arc:ARC-Easy", "test"),
    "ARC-Challenge": HubSource("allenai/ai2_arc:ARC-Challenge", "test"),
    "openbookqa": HubSource("allenai/openbookqa:main", "test"),
    "gsm8k": HubSource("openai/gsm8k:main", "test"),
    "humaneval": HubSource("openai/openai_humaneval", "test"),
    "mbpp": HubSource("google-research-datasets/mbpp:full", "test"),
}
"""The tasks that the hub has in a form that is known here, by the name they have here."""

Convert = Callable[[Mapping[str, Any]], tuple[str, str, str]]
"""Takes a record; gives instruction, reply and answer."""


def official_row(record: Any, where: str) -> Row | None:
    """Turn a record in the form of the hub into the official row; None where it is of no form that is known here.

    Args:
        record: One record of `datasets`, or of a file in the same form.
        where: Its place, for errors.

    Raises:
        UsageError: If it has the fields of a known form, but not what belongs in them, as a split without answers.
    """
    if not isinstance(record, Mapping) or {"instruction", "prompt", "messages"} & record.keys():
        return None
    for fields, convert in _FORMS.items():
        if all(name in record for name in fields) and not (
            convert is _gsm8k and "####" not in str(record["answer"])
        ):
            try:
                instruction, output, answer = convert(record)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise UsageError(
                    f"{where}: the fields {', '.join(fields)} do not hold a question with its answer ({error}); "
                    "test splits on the hub often have none: give --split validation"
                ) from error
            return Row(instruction=instruction, input="", output=output, answer=answer)
    return None


def _choice(
    question: str, word: str, choices: Sequence[str], right: int, apart: str = " "
) -> tuple[str, str, str]:
    """The official form of a question with choices: these numbered, then the words that an answer may be."""
    if not 0 <= right < len(choices):
        raise ValueError(f"the answer is choice {right + 1} of {len(choices)}")
    words = [f"{word}{number}" for number in range(1, len(choices) + 1)]
    listed = apart.join(f"{one.capitalize()}: {text}" for one, text in zip(words, choices, strict=True))
    instruction = f"{question}\n\n{listed}\n\nAnswer format: {'/'.join(words)}"
    return instruction, f"the correct answer is {words[right]}", words[right]


def _boolq(record: Mapping[str, Any]) -> tuple[str, str, str]:
    answer = {True: "true", False: "false"}[record["answer"]]
    question = f"Please answer the following question with true or false, question: {record['question']}?"
    return f"{question}\n\nAnswer format: true/false", f"the correct answer is {answer}", answer


def _piqa(record: Mapping[str, Any]) -> tuple[str, str, str]:
    question = f"Please choose the correct solution to the question: {record['goal']}"
    return _choice(question, "solution", [record["sol1"], record["sol2"]], int(record["label"]), apart="\n\n")


def _social_i_qa(record: Mapping[str, Any]) -> tuple[str, str, str]:
    question = f"Please choose the correct answer to the question: {record['context']} {record['question']}"
    choices = [record[f"answer{letter}"] for letter in "ABC"]
    return _choice(question, "answer", choices, int(record["label"]) - 1)


def _hellaswag(record: Mapping[str, Any]) -> tuple[str, str, str]:
    begun = f"{record['activity_label']}: {record['ctx']}"
    question = f"Please choose the correct ending to complete the given sentence: {begun}"
    return _choice(question, "ending", record["endings"], int(record["label"]))


def _winogrande(record: Mapping[str, Any]) -> tuple[str, str, str]:
    question = f"Please choose the correct answer to fill in the blank to complete the given sentence: {record['sentence']}"
    choices = [record["option1"], record["option2"]]
    instruction, output, answer = _choice(question, "option", choices, int(record["answer"]) - 1)
    # the official form has a space here where the others have a blank line
    return instruction.replace("\n\nAnswer format:", " Answer format:"), output, answer


def _lettered(record: Mapping[str, Any]) -> tuple[str, str, str]:
    """ARC and OpenBookQA, whose choices have letters, or figures in a few rows."""
    asked, choices = record["question" if "question" in record else "question_stem"], record["choices"]
    right = list(choices["label"]).index(record["answerKey"])
    question = f"Please choose the correct answer to the question: {asked}"
    return _choice(question, "answer", choices["text"], right)


def _gsm8k(record: Mapping[str, Any]) -> tuple[str, str, str]:
    """The solution without the marks of its calculator, closed as the official replies are."""
    solution, _, answer = str(record["answer"]).rpartition("####")
    number = answer.strip().replace(",", "")
    steps = re.sub(r"<<[^>]*>>", "", solution).strip()
    return record["question"], f"\nA: {steps} The answer is {number}.", number


_FORMS: Mapping[tuple[str, ...], Convert] = {
    ("question", "answer", "passage"): _boolq,
    ("goal", "sol1", "sol2", "label"): _piqa,
    ("context", "question", "answerA", "answerB", "answerC", "label"): _social_i_qa,
    ("activity_label", "ctx", "endings", "label"): _hellaswag,
    ("sentence", "option1", "option2", "answer"): _winogrande,
    ("question", "choices", "answerKey"): _lettered,
    ("question_stem", "choices", "answerKey"): _lettered,
    ("question", "answer"): _gsm8k,
}
"""The forms by their fields; the first that fits is taken. Rows of instruction data have none of these."""
