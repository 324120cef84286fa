import pytest
import torch
from peft import LoraConfig, get_peft_model

from moa_peft.data.row import Row
from moa_peft.evaluation.options import EvaluationOptions
from moa_peft.evaluation.questions import Task, as_question
from moa_peft.evaluation.result_key import evaluation_key, fingerprint, identify
from tiny_lm import byte_tokenizer, tiny_llama, with_mixture


def test_the_base_is_the_same_with_an_adapter_and_without() -> None:
    bare = identify(tiny_llama())
    mixed = identify(with_mixture(tiny_llama()), method="soft-moa", seed=3)
    lora = identify(
        get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    )  # type: ignore[arg-type]  # a PreTrainedModel
    assert bare.base_fingerprint == mixed.base_fingerprint == lora.base_fingerprint
    assert bare.base_fingerprint != identify(tiny_llama(seed=1)).base_fingerprint
    assert (bare.method, bare.adapter_fingerprint) == ("frozen", None)
    assert (mixed.method, mixed.seed) == ("soft-moa", 3)
    assert (identify(with_mixture(tiny_llama())).method, lora.method) == ("moa", "lora")


def test_an_adapter_switched_off_is_the_frozen_model() -> None:
    model = with_mixture(tiny_llama())
    on = identify(model)
    with model.disable_adapter():
        off = identify(model, base_model="named")
    assert on.adapter_fingerprint is not None
    assert (off.method, off.adapter_fingerprint, off.base_model) == ("frozen", None, "named")
    assert identify(model) == on


def test_a_change_of_one_entry_changes_the_adapter_and_not_the_base() -> None:
    model = with_mixture(tiny_llama())
    before = identify(model)
    chosen = next(one for one in model.parameters() if one.requires_grad)
    with torch.no_grad():
        chosen.view(-1)[-1] += 1e-3
    after = identify(model)
    assert after.adapter_fingerprint != before.adapter_fingerprint
    assert after.base_fingerprint == before.base_fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_a_fingerprint_sees_every_entry_of_a_large_tensor_its_name_dtype_and_shape(
    dtype: torch.dtype,
) -> None:
    tensor = torch.zeros(9001, 2, dtype=dtype)
    changed = tensor.clone()
    changed[4567, 1] = 1
    prints = {
        fingerprint([("a", tensor)]),
        fingerprint([("a", changed)]),
        fingerprint([("b", tensor)]),
        fingerprint([("a", tensor.reshape(2, -1))]),
        fingerprint([("a", tensor.to(torch.float16))]),
        fingerprint([("a", tensor[:0])]),
    }
    assert len(prints) == 6
    both = [("a", tensor), ("b", changed)]
    assert fingerprint(both) == fingerprint(both[::-1])
    assert fingerprint([("a", changed)]) == fingerprint([("a", changed.t().contiguous().t())])


def test_saved_buffers_are_part_of_the_base() -> None:
    """Some quantised layers keep their weights there, and one model's stored result was given for another."""
    model, other = tiny_llama(), tiny_llama()
    for one, value in ((model, 1.0), (other, 2.0)):
        one.lm_head.register_buffer("scales", torch.full((3,), value))
        one.lm_head.register_buffer("not_saved", torch.full((3,), value), persistent=False)
    assert identify(model).base_fingerprint != identify(other).base_fingerprint
    other.lm_head.scales.fill_(1.0)
    assert identify(model).base_fingerprint == identify(other).base_fingerprint


def test_the_whole_tokenizer_decides_and_not_its_tokens_of_the_first_rows() -> None:
    task = Task(
        name="t",
        source="s",
        split="test",
        questions=tuple(
            as_question(Row(instruction=text, input="", output="x", answer="x"))
            for text in [*"ab" * 9, "new"]
        ),
    )
    model, identity = tiny_llama(), identify(tiny_llama())
    keys: set[str] = set()
    for more in ([], ["new"]):
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(more)
        keys.add(evaluation_key(model, tokenizer, task, EvaluationOptions(), identity))
    assert len(keys) == 2
    for of_system in ("", "[{{ message.content }}]"):  # rows beyond the first may have a system turn
        tokenizer.chat_template = (
            "{% for message in messages %}{% if message.role == 'system' %}" + of_system + "{% else %}"
            "{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
        )
        keys.add(evaluation_key(model, tokenizer, task, EvaluationOptions(template="chat"), identity))
    assert len(keys) == 4
