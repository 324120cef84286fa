"""Likelihoods and greedy answers in batches, on every structure of blocks: attention of any kind, recurrent states, both."""

import pytest
import torch
from torch import Tensor

from moa_peft.evaluation.batching import rows_at_once
from moa_peft.evaluation.generation import generate_batch
from moa_peft.evaluation.scoring import TokenQuestion, score_batch
from structures import TEXT, text_model
from tiny import tokens

PROMPTS = [tuple(one[:length]) for one, length in zip(tokens(4, 12).tolist(), (3, 12, 7, 5), strict=True)]


def logits(model: torch.nn.Module, ids: tuple[int, ...]) -> Tensor:
    """Of one sequence by itself, without a cache: [T, V]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def log_likelihoods(
    model: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]
) -> list[float]:
    found = logits(model, (*prompt, *completion)).log_softmax(-1)
    return [found[len(prompt) - 1 + place, token].item() for place, token in enumerate(completion)]


@pytest.mark.parametrize("name", TEXT)
def test_the_choices_of_a_batch_are_scored_as_each_by_itself(name: str) -> None:
    """Models with a recurrent state could not be evaluated at all: their caches cannot keep rows the way attention's can."""
    model = text_model(name).eval()
    asked = [TokenQuestion(prompt=one, completions=((7, 5, 2), (7, 9, 11, 4, 2), (8, 2))) for one in PROMPTS]
    for question, scores in zip(asked, score_batch(model, asked), strict=True):
        for completion, found in zip(question.completions, scores, strict=True):
            expected = log_likelihoods(model, question.prompt, completion)
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TEXT)
def test_the_answers_of_a_batch_are_those_of_each_row_by_itself(name: str) -> None:
    model = text_model(name).eval()
    expected: list[list[int]] = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(logits(model, tuple(ids))[-1].argmax()))
        expected.append(ids[len(prompt) :])
    ends = {expected[0][1], expected[1][3]}  # rows end at different steps

    def until_end(reply: list[int]) -> list[int]:
        return next((reply[: place + 1] for place, one in enumerate(reply) if one in ends), reply)

    found: list[list[int]] = []
    for start in range(0, len(PROMPTS), size := rows_at_once(model, len(PROMPTS))):
        found += generate_batch(model, PROMPTS[start : start + size], max_new_tokens=6, ends=ends)
    assert found == [until_end(one) for one in expected]
