"""Models that turn positions by other frequencies beyond some length (longrope): Phi-3, Phi-3.5, Phi-4-mini."""

import pytest
import torch
from peft import get_peft_model
from transformers import Phi3Config, Phi3ForCausalLM

from moa_peft import MoAConfig
from moa_peft.evaluation.batching import rotary_switch
from moa_peft.evaluation.generation import generate_batch
from moa_peft.evaluation.scoring import TokenQuestion, score_batch
from moa_peft.serving.engines import OneByOne
from moa_peft.serving.served import make_engine
from tiny import SIZES, awaken, tokens
from tiny_lm import tiny_llama

SWITCH = 16


def longrope_model(preset: str) -> torch.nn.Module:
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        **SIZES | {"max_position_embeddings": 64},
        original_max_position_embeddings=SWITCH,
        rope_parameters=rope | {"original_max_position_embeddings": SWITCH},
    )  # type: ignore[arg-type]  # sizes are numbers
    model = get_peft_model(Phi3ForCausalLM(config), MoAConfig.preset(preset))
    awaken(model)
    return model.eval()


def log_likelihoods(model: torch.nn.Module, question: TokenQuestion) -> list[list[float]]:
    """Each completion read by itself, without a cache."""
    found: list[list[float]] = []
    for one in question.completions:
        ids = torch.tensor([[*question.prompt, *one]])
        logits = model(
            input_ids=ids, prompt_length=torch.tensor([len(question.prompt)]), use_cache=False
        ).logits[0]
        scores = logits.log_softmax(-1)[len(question.prompt) - 1 : -1]
        found.append(scores[range(len(one)), list(one)].tolist())
    return found


@pytest.mark.parametrize("preset", ["soft-lora", "instance-moa"])
def test_replies_across_the_switch_are_those_without_a_cache_and_alone(preset: str) -> None:
    model = longrope_model(preset)
    prompts = [tokens(1, length)[0].tolist() for length in (5, 12, 20)]
    expected: list[list[int]] = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(8):
            call = {"prompt_length": torch.tensor([len(prompt)]), "use_cache": False}
            ids.append(int(model(input_ids=torch.tensor([ids]), **call).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert generate_batch(model, prompts, max_new_tokens=8, ends={-1}) == expected
    whole = generate_batch(
        model, prompts, max_new_tokens=8, ends={-1}, has_ended=lambda row, reply: len(reply) == row + 2
    )
    assert whole == [one[: row + 2] for row, one in enumerate(expected)]


def test_choices_across_the_switch_are_scored_as_each_by_itself() -> None:
    model = longrope_model("soft-lora")
    asked = [
        TokenQuestion(
            prompt=tuple(tokens(1, length)[0].tolist()), completions=((7, 5, 2), (7, 9, 11, 4, 8, 2))
        )
        for length in (5, 12, 20)
    ]
    for found, question in zip(score_batch(model, asked), asked, strict=True):
        for scores, expected in zip(found, log_likelihoods(model, question), strict=True):
            torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


def test_such_a_model_is_served_one_request_after_another() -> None:
    engine, why = make_engine(longrope_model("soft-lora"), 64, [2])
    assert isinstance(engine, OneByOne)
    assert "rotary frequencies depend on the longest request" in str(why)
    engine.close()


def test_the_switch_is_found_where_layers_of_a_kind_have_their_own() -> None:
    model = tiny_llama()
    assert rotary_switch(model) is None
    model.config.rope_parameters = {
        "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 24},
        "sliding_attention": {"rope_type": "default"},
    }
    assert rotary_switch(model) == 24
