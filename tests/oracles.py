"""Whole data sets scored and answered by the pieces that an evaluation is made of, without its files."""

from collections.abc import Sequence
from typing import Any

from moa_peft.data.row import Row
from moa_peft.data.templates import render_completion
from moa_peft.evaluation.batching import rows_at_once
from moa_peft.evaluation.generation import Generation, as_generation, end_ids, generate_batch, plan_prompts
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


def score_all(
    model: Any, questions: Sequence[TokenQuestion], batch_size: int = 16
) -> list[list[list[float]]]:
    """Nats by question, completion and token, in the order given."""
    scores: dict[int, list[list[float]]] = {}
    for batch in plan(questions, rows_at_once(model, batch_size)):
        scores |= dict(zip(batch, score_batch(model, [questions[place] for place in batch]), strict=True))
    return [scores[place] for place in range(len(questions))]


def score_choices(
    model: Any, questions: Sequence[TokenQuestion], *, batch_size: int = 16
) -> list[ChoiceScores]:
    """The scores of each question's choices."""
    found = score_all(model, questions, batch_size)
    return [
        ChoiceScores.of(scores, with_end=one_begins_another(one.completions))
        for one, scores in zip(questions, found, strict=True)
    ]


def answer_losses(model: Any, tokenizer: Any, rows: Sequence[Row], *, batch_size: int = 16) -> list[float]:
    """The loss of each row's reference answer, as training counts it, nats a token."""
    questions = [token_question(row, [render_completion(row)], tokenizer, "paper") for row in rows]
    check_lengths(model, [one.num_tokens for one in questions])
    return [mean_loss(one[0]) for one in score_all(model, questions, batch_size)]


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int = 16
) -> list[Generation]:
    """A greedy answer to each prompt."""
    ends = end_ids(model, tokenizer)
    found: dict[int, Generation] = {}
    for batch in plan_prompts(prompts, batch_size, max_new_tokens):
        chosen = [prompts[place] for place in batch]
        for place, tokens in zip(
            batch, generate_batch(model, chosen, max_new_tokens=max_new_tokens, ends=ends), strict=True
        ):
            found[place] = as_generation(tokens, ends, tokenizer)
    return [found[place] for place in range(len(prompts))]
