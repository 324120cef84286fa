"""What a model makes of single questions: one record each, for the file of examples."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from moa_peft.data.templates import Template, render_completion, render_prompt
from moa_peft.data.tokenization import prompt_ids
from moa_peft.errors import RunError
from moa_peft.evaluation.answer_forms import same_answer
from moa_peft.evaluation.batching import rows_at_once
from moa_peft.evaluation.code_answers import has_ended
from moa_peft.evaluation.code_execution import run_programs
from moa_peft.evaluation.extraction_rules import RULES, stated
from moa_peft.evaluation.generation import as_generation, end_ids, generate_batch, plan_prompts
from moa_peft.evaluation.questions import Question, Task
from moa_peft.evaluation.scoring import (
    ChoiceScores,
    TokenQuestion,
    check_lengths,
    mean_loss,
    one_begins_another,
    plan,
    score_batch,
    token_question,
)
from moa_peft.evaluation.text_choices import text_questions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]
"""One line of a file of examples."""


class Examiner(Protocol):
    """Puts questions to a model, batch by batch."""

    def batches(self) -> list[list[int]]:
        """The places of the questions of each batch; the same at every call."""
        ...

    def examine(self, places: Sequence[int]) -> list[Record]:
        """Put one batch of questions to the model and record what it made of each."""
        ...


class _ScoringExaminer:
    """Scores completions of each question; what a record holds of them is each kind's own."""

    def __init__(
        self, model: Any, questions: Sequence[Question], tokens: Sequence[TokenQuestion], batch_size: int
    ) -> None:
        self._model, self._questions, self._tokens = model, questions, tokens
        self._batch_size = rows_at_once(model, batch_size)
        check_lengths(model, [one.num_tokens for one in tokens])

    def batches(self) -> list[list[int]]:
        """See `Examiner`."""
        return plan(self._tokens, self._batch_size)

    def examine(self, places: Sequence[int]) -> list[Record]:
        """See `Examiner`."""
        found = score_batch(self._model, [self._tokens[place] for place in places])
        return [self._record(place, scores) for place, scores in zip(places, found, strict=True)]

    def _record(self, place: int, scores: list[list[float]]) -> Record:
        raise NotImplementedError


class LikelihoodExaminer(_ScoringExaminer):
    """Compares the choices of each question, and takes the loss of its reference answer along."""

    def __init__(
        self,
        model: Any,
        tokenizer: "PreTrainedTokenizerBase",
        questions: Sequence[Question],
        *,
        template: Template,
        batch_size: int,
    ) -> None:
        """Tokenise the questions.

        Raises:
            UsageError: If a question is too long for the model, or the template does not fit the tokenizer.
        """
        self._prompts = [render_prompt(one.row, template, tokenizer) for one in questions]
        self._texts = [_scored_texts(one) for one in questions]
        tokens = [
            token_question(one.row, texts, tokenizer, template)
            for one, texts in zip(questions, self._texts, strict=True)
        ]
        super().__init__(model, questions, tokens, batch_size)

    def batches_of(self, places: Sequence[int]) -> list[list[int]]:
        """Plan the batches of some of the questions by themselves."""
        parts = plan([self._tokens[place] for place in places], self._batch_size)
        return [[places[one] for one in part] for part in parts]

    def _record(self, place: int, scores: list[list[float]]) -> Record:
        question, texts = self._questions[place], self._texts[place]
        record: Record = {
            "index": place,
            "prompt": self._prompts[place],
            "answer": question.row.answer,
            "extracted": {},
            "correct": {},
            "answer_loss": None,
        }
        if question.row.output:
            record["answer_loss"] = finite(
                mean_loss(scores[texts.index(render_completion(question.row))]), place
            )
        if question.completions:
            number = len(question.completions)
            with_end = one_begins_another(self._tokens[place].completions[:number])
            choices = ChoiceScores.of(scores[:number], with_end=with_end)
            best = {"sum": choices.best(), "per_token": choices.best(per_token=True)}
            record |= {
                "choices": list(question.form.choices),
                "log_likelihoods": [finite(one, place) for one in choices.sums],
                "log_likelihoods_per_token": list(choices.means),
                **_judged(question, best),
            }
        return record


class TextExaminer(_ScoringExaminer):
    """Compares the texts of the choices of each question, as the LM Evaluation Harness does."""

    def __init__(
        self, model: Any, tokenizer: "PreTrainedTokenizerBase", task: Task, *, batch_size: int
    ) -> None:
        """Read and tokenise the questions.

        Raises:
            UsageError: As `text_questions`; also if a question is too long for the model.
        """
        self._asked = text_questions(task)
        super().__init__(model, task.questions, [one.tokens(tokenizer) for one in self._asked], batch_size)

    def _record(self, place: int, scores: list[list[float]]) -> Record:
        question, asked = self._questions[place], self._asked[place]
        sums = [finite(sum(one), place) for one in scores]
        shares = [value / len(text) for value, text in zip(sums, asked.choices, strict=True)]
        return {
            "index": place,
            "prompt": asked.prompt,
            "answer": question.row.answer,
            "answer_loss": None,
            "choices": list(question.form.choices),
            "texts": list(asked.choices),
            "log_likelihoods": sums,
            "log_likelihoods_per_character": shares,
            **_judged(question, {"sum": sums.index(max(sums)), "per_character": shares.index(max(shares))}),
        }


class GenerationExaminer:
    """Lets the model answer each question, reads the answer by every rule, and takes the reference answer's loss."""

    def __init__(
        self,
        model: Any,
        tokenizer: "PreTrainedTokenizerBase",
        questions: Sequence[Question],
        *,
        template: Template,
        batch_size: int,
        max_new_tokens: int,
    ) -> None:
        """Tokenise the questions.

        Raises:
            UsageError: As `LikelihoodExaminer`.
        """
        self._model, self._tokenizer, self._questions = model, tokenizer, questions
        self._batch_size, self._max_new_tokens = rows_at_once(model, batch_size), max_new_tokens
        rows = [one.row for one in questions]
        self._prompts = [
            prompt_ids(render_prompt(row, template, tokenizer), tokenizer, template) for row in rows
        ]
        check_lengths(model, [len(one) + max_new_tokens for one in self._prompts])
        bare = [dataclasses.replace(one, completions=()) for one in questions]
        self._losses = LikelihoodExaminer(model, tokenizer, bare, template=template, batch_size=batch_size)
        self._ends = end_ids(model, tokenizer, template)

    def batches(self) -> list[list[int]]:
        """See `Examiner`."""
        return plan_prompts(self._prompts, self._batch_size, self._max_new_tokens)

    def examine(self, places: Sequence[int]) -> list[Record]:
        """See `Examiner`."""
        replies = generate_batch(
            self._model,
            [self._prompts[place] for place in places],
            max_new_tokens=self._max_new_tokens,
            ends=self._ends,
            has_ended=lambda row, tokens: self._has_ended(places[row], tokens),
        )
        found = dict(zip(places, replies, strict=True))
        scored = (one for part in self._losses.batches_of(places) for one in self._losses.examine(part))
        records = [one | self._reply(found[one["index"]], one["index"]) for one in scored]
        return with_programs_run(records, self._questions)

    def _has_ended(self, place: int, tokens: list[int]) -> bool:
        """Whether a program is whole; looked at where the last tokens may have closed it."""
        form = self._questions[place].form
        if form.kind != "code":
            return False
        last = str(self._tokenizer.decode(tokens[-4:]))
        return ("`" in last or "#" in last) and has_ended(str(self._tokenizer.decode(tokens)), form)

    def _reply(self, tokens: Sequence[int], place: int) -> Record:
        reply, question = as_generation(tokens, self._ends, self._tokenizer), self._questions[place]
        rules = {} if question.form.kind == "none" else RULES
        extracted = {name: rule(reply.text, question.form) for name, rule in rules.items()}
        answer = question.row.answer
        if question.form.kind == "text":
            answer = stated(answer, question.form) or answer
        whole = question.code is not None and has_ended(reply.text, question.form)
        return {
            "output": reply.text,
            "num_tokens": reply.num_tokens,
            "stopped": "end" if whole else reply.stopped,
            "extracted": extracted,
            "correct": {name: same_answer(one, answer, question.form) for name, one in extracted.items()},
        }


def with_programs_run(records: Sequence[Record], questions: Sequence[Question]) -> list[Record]:
    """Score the records of replies that are programs by running these, each once; "outcome" says how each rule's ended.

    The records' indices are places in ``questions``.
    """
    checks = [questions[one["index"]].code for one in records]
    programs = dict.fromkeys(
        (code, check)
        for one, check in zip(records, checks, strict=True)
        for code in one["extracted"].values()
        if check is not None and code is not None
    )
    ended = dict(zip(programs, run_programs(list(programs)), strict=True))
    scored: list[Record] = []
    for one, check in zip(records, checks, strict=True):
        if check is not None:
            outcomes = {name: ended.get((code, check)) for name, code in one["extracted"].items()}
            one = one | {
                "correct": {
                    name: found is not None and found.verdict == "passed" for name, found in outcomes.items()
                },
                "outcome": {
                    name: ": ".join(filter(None, (found.verdict, found.detail))) if found else "no program"
                    for name, found in outcomes.items()
                },
            }
        scored.append(one)
    return scored


def finite(value: float, place: int) -> float:
    """Pass a number on.

    Raises:
        RunError: If it is not finite.
    """
    if not math.isfinite(value):
        raise RunError(
            f"row {place + 1}: the log-likelihood is {value}: the weights hold values that are not finite, or the "
            "model's dtype is too narrow; look at the training log, or give --dtype float32"
        )
    return value


def _judged(question: Question, best: Mapping[str, int]) -> Record:
    """What each rule takes for the answer, and whether that is right; the rules' likeliest choices by their places."""
    words = question.form.choices
    return {
        "extracted": {rule: words[one] for rule, one in best.items()},
        "correct": {rule: one == question.wanted for rule, one in best.items()},
    }


def _scored_texts(question: Question) -> list[str]:
    """The choices, and the reference answer where it is not one of them."""
    reference = render_completion(question.row)
    if reference in question.completions:
        return list(question.completions)
    return [*question.completions, reference]
