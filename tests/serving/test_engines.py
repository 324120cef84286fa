import asyncio
from typing import Any

import pytest
import torch
from peft import get_peft_model

from moa_peft import MoAConfig
from moa_peft.errors import RunError
from moa_peft.serving.batching import Batched
from moa_peft.serving.engines import OneByOne, Sampling
from moa_peft.serving.served import make_engine
from structures import text_model
from tiny import awaken, mixture_model, tokens


async def ask(engine: Any, prompt: list[int], **changes: Any) -> list[int]:
    sampling = Sampling(**({"max_new_tokens": 6, "temperature": 0.0, "top_p": 1.0} | changes))
    return [one async for ids in engine.stream(prompt, sampling) for one in ids]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gptj", "its attention is not transformers' attention interface"),
        ("diffllama", "answers given together differ from those given alone"),
        ("lfm2", "Invalid layer type: conv"),
    ],
)
def test_a_model_that_batching_gets_wrong_is_asked_one_by_one(name: str, reason: str) -> None:
    """transformers batches some of these without an error, and with other tokens than `generate`."""
    model = get_peft_model(text_model(name), MoAConfig.preset("lora"))
    awaken(model)
    engine, why = make_engine(model.eval(), 64, [2])
    assert isinstance(engine, OneByOne)
    assert reason in str(why)
    ids = tokens(1, 5)
    expected = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
    )
    assert asyncio.run(ask(engine, ids[0].tolist())) == expected[0, 5:].tolist()
    assert engine.close()


@pytest.mark.parametrize("kind", [Batched, OneByOne])
def test_after_a_request_that_fails_the_next_is_answered(kind: Any) -> None:
    model = mixture_model("llama", "soft-moa")
    engine, prompt = kind(model, 64, [2]), tokens(1, 5)[0].tolist()
    expected = asyncio.run(ask(engine, prompt))

    def fail(*inputs: Any) -> None:
        raise ValueError("out of luck")

    handle = model.get_base_model().register_forward_pre_hook(fail)
    with pytest.raises(RunError, match="out of luck"):
        asyncio.run(ask(engine, prompt))
    handle.remove()
    assert asyncio.run(ask(engine, prompt)) == expected
    assert engine.close()


def test_requests_that_are_given_up_leave_nothing_behind() -> None:
    """Each left an output with its whole prompt in a queue that nobody reads."""
    engine = Batched(mixture_model("llama", "soft-moa"), 64, [2])

    async def give_up() -> None:
        stream = engine.stream(
            tokens(1, 5)[0].tolist(), Sampling(max_new_tokens=40, temperature=1.0, top_p=1.0)
        )
        await anext(stream)
        await stream.aclose()

    for _ in range(8):
        asyncio.run(give_up())
    assert engine._manager.output_router.output_queue.qsize() <= 1
    assert engine.close()


def test_gates_of_whole_prompts_are_asked_one_by_one() -> None:
    engine, why = make_engine(mixture_model("llama", "unipeft"), 64, [2])
    assert isinstance(engine, OneByOne)
    assert "gates are made of whole prompts" in str(why)
