"""An inspection as Python calls it: on any model, of one adapter or of two."""

import dataclasses

import pytest
import torch
from peft import get_peft_model
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from moa_peft import LoraExpert, MoAConfig, ParallelAdapterExpert, RouterConfig, mixture_layers
from moa_peft.data.row import Row
from moa_peft.data.templates import Template
from moa_peft.errors import RunError, UsageError
from moa_peft.inspection.agreement import AgreementSums
from moa_peft.inspection.figures import _figures
from moa_peft.inspection.forward_pass import TokenText
from moa_peft.inspection.gate_statistics import CLASSES
from moa_peft.inspection.inspection import inspect_model
from moa_peft.inspection.observer import Observed, Where
from moa_peft.inspection.prompts import Prompt, as_prompt, tokenise
from moa_peft.inspection.similarity import Change
from moa_peft.inspection.token_view import ShownTokens, encode_gates
from moa_peft.mixture.block_hooks import mixtures_of
from tiny import awaken, base_model, mixture_model
from tiny_lm import END, byte_tokenizer
from two_pass import keep_everything, texts


def written() -> list[TokenText]:
    return [dataclasses.replace(one, pieces=("x",) * len(one.ids)) for one in texts()]


def rows(number: int, size: int, seed: int) -> Tensor:
    return torch.randn(number, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("method", ["everything", "unipeft", "copies"])
def test_the_gates_shown_are_those_of_each_text_alone(method: str) -> None:
    model = mixture_model("llama", method)
    found = inspect_model(model, written(), batch_size=3)
    kept = keep_everything(model, texts())
    assert [one.number for one in found.prompts] == [1, 2, 3, 4, 5]
    for where in kept.gates:
        shown = torch.cat([one.gates[Where(*where)] for one in found.prompts])
        torch.testing.assert_close(shown.double(), kept.gates[where], atol=1e-4, rtol=1e-4)


def test_the_gates_of_official_pooling_are_those_of_each_text_alone_too() -> None:
    router = RouterConfig(granularity="instance", pooling="official")
    experts = [LoraExpert(targets=("q_proj", "v_proj"))]
    model = get_peft_model(base_model("llama"), MoAConfig(experts=experts, router=router))
    awaken(model)
    together, alone = (inspect_model(model, written(), batch_size=size) for size in (3, 1))
    for one, two in zip(together.prompts, alone.prompts, strict=True):
        for where, gates in one.gates.items():
            torch.testing.assert_close(gates, two.gates[where])


def test_a_threshold_that_no_step_has_moved_is_told_from_one_that_was_trained() -> None:
    fresh = mixture_model("llama", "sparse-moa", awake=False)
    awake = mixture_model("llama", "sparse-moa")
    for model, trained in ((fresh, False), (awake, True)):
        finding = inspect_model(model, written()).findings["default"]
        assert [one.threshold and one.threshold.trained for one in finding.routers] == [trained] * 2
    assert "did not move" in inspect_model(fresh, written()).findings["default"].sentences[1]


def test_what_is_no_mixture_is_refused() -> None:
    with pytest.raises(
        UsageError, match="the model has no mixture of adapters: give an adapter that was trained"
    ):
        inspect_model(base_model("llama"), written())
    with pytest.raises(UsageError, match="the adapter elsewhere is no mixture of adapters: give one that is"):
        inspect_model(mixture_model("llama", "soft-moa"), written(), {"b": {"adapter": "elsewhere"}})


def test_an_adapter_that_is_not_the_active_one_is_inspected_and_the_active_one_is_back() -> None:
    """Nothing was found of it, and "no router" was said of a mixture that has one."""
    model = mixture_model("llama", "soft-moa")
    model.add_adapter("other", MoAConfig.preset("sparse-moa"))
    found = inspect_model(model, written(), {"other": {}})
    assert len(found.findings["other"].routers) == len(mixture_layers(model))
    assert model.active_adapter == "default"


def test_a_change_that_is_not_finite_is_told() -> None:
    model = mixture_model("llama", "soft-moa").half()
    for name, one in model.named_parameters():
        if ".1.moa." in name and name.endswith("lora_down_proj.B"):
            one.data.fill_(6e4)
    with pytest.raises(RunError, match="the change of lora_down_proj in block 1 is not finite"):
        inspect_model(model, written())


def test_gates_that_are_not_finite_are_told() -> None:
    model = mixture_model("llama", "soft-moa")
    router = next(one for one in mixtures_of(model)).routers()[""]
    with torch.no_grad():
        next(router.parameters()).fill_(float("nan"))
    with pytest.raises(
        RunError, match="a gate in block 0 is not finite: load the model with another --dtype"
    ):
        inspect_model(model, written())


def test_two_adapters_read_the_same_tokens_and_each_stays_as_it_is_alone() -> None:
    model = mixture_model("llama", "soft-moa")
    alone = inspect_model(model, written()).findings["default"]
    model.add_adapter("other", MoAConfig.preset("sparse-moa"))
    done: list[int] = []
    found = inspect_model(model, written(), {"default": {}, "other": {}}, batch_size=2, progress=done.append)
    for one, other in zip(found.findings["default"].routers, alone.routers, strict=True):
        assert one.mean_gate == pytest.approx(other.mean_gate, abs=1e-6)
    assert done == [2, 2, 1]
    assert model.active_adapter == "default"
    (first, _) = found.agreement
    assert "prompt" not in first.names  # one alone has it
    assert first.change_cka[first.names.index("lora_q_proj")] is None  # the second adds nothing yet
    assert len(mixture_layers(model)) == len(found.agreement)


def test_agreement_equals_its_definitions_however_the_tokens_are_batched() -> None:
    a, b = rows(40, 3, 0).abs(), rows(40, 3, 1).abs()
    x, y = rows(40, 4, 2), rows(40, 6, 3)
    y[:, :2] += 2 * x[:, :2]
    sums = AgreementSums()
    one, other = Where("one", 3, ""), Where("other", 3, "")
    names = {one: ("p", "q", "r"), other: ("q", "r", "s")}
    for part in torch.arange(40).split([1, 15, 24]):
        length = torch.ones(len(part))
        sums.add(
            Observed(gates={one: a[part]}, changes={one: {"q": Change(coordinates=x[part], length=length)}}),
            Observed(
                gates={other: b[part]}, changes={other: {"q": Change(coordinates=y[part], length=length)}}
            ),
            names,
        )
    (found,) = sums.statistics()
    assert (found.layer, found.names) == (3, ("q", "r"))
    for place, (left, right) in enumerate(((1, 0), (2, 1))):
        pair = torch.stack([a[:, left], b[:, right]])
        assert found.gate_correlation[place] == pytest.approx(float(torch.corrcoef(pair)[0, 1]))
        assert found.gate_difference[place] == pytest.approx(float((pair[0] - pair[1]).abs().mean()))
    x, y = x - x.mean(0), y - y.mean(0)
    assert found.change_cka == (
        pytest.approx(float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))),
        None,
    )


def test_only_as_many_gates_are_kept_as_there_is_room_for() -> None:
    shown = ShownTokens(written(), gates_a_token=10, values=10 * 12)  # of texts of 5, 11, 1, 8 and 3 tokens
    where = Where("default", 0, "")
    lengths = [5, 11, 1, 8, 3]
    for places in ([1, 3], [0, 4, 2]):
        number = sum(lengths[place] for place in places)
        shown.keep(places, Observed(gates={where: torch.arange(number * 10.0).view(number, 10)}))
    prompts = shown.prompts()
    assert [(one.number, len(one.text.ids), one.gates[where].shape[0]) for one in prompts] == [
        (1, 5, 5),
        (2, 7, 7),
    ]
    assert prompts[0].gates[where][0, 0] == 0
    assert prompts[1].gates[where][-1, -1] == 69


def test_gates_are_written_as_two_letters_each() -> None:
    assert encode_gates(torch.tensor([[0.0, 1.0, 1 / 4095]])) == "AA//AB"
    assert encode_gates(torch.tensor([[-3.0], [2.0]])) == "AA//"


@pytest.mark.parametrize("template", ["paper", "chat"])
@pytest.mark.parametrize("question", ["task", "a", " Instruct "])
def test_a_question_is_found_where_it_stands_and_not_in_the_words_of_the_template(
    template: Template, question: str
) -> None:
    prompt = as_prompt(
        Row(instruction=question, input="a", output="", answer=""), template, byte_tokenizer(chat=True)
    )
    (start, end), (second, last) = prompt.own
    assert prompt.text[start:end] == question
    assert prompt.text[second:last] == "a"
    before = {"paper": "### Instruction:\n", "chat": "<user>"}[template]
    assert prompt.text[:start].endswith(before)
    assert second > end


def test_tokens_of_one_character_are_of_its_class() -> None:
    (text,) = tokenise([Prompt(text="漢字7", own=((0, 3),))], byte_tokenizer())
    assert [CLASSES[one] for one in text.classes] == ["word"] * 6 + ["number"]


def test_the_pieces_are_the_text_and_the_words_around_a_question_are_template() -> None:
    row = Row(instruction="Is 7 odd? é", input="Say 1.", output="", answer="")
    tokenizer = byte_tokenizer(chat=True)
    for template, around in (("paper", "### Response:\n"), ("chat", "<assistant>"), (None, "")):
        prompt = as_prompt(row, template, tokenizer)
        (text,) = tokenise([prompt], tokenizer)
        assert "".join(text.pieces) == prompt.text
        assert prompt.text.endswith(around)
        by_class = {
            name: "".join(p for p, k in zip(text.pieces, text.classes, strict=True) if CLASSES[k] == name)
            for name in CLASSES
        }
        assert by_class["number"] == "71"
        assert by_class["word"].startswith("Isoddé")
        assert ("Instruction" in by_class["template"]) == (template == "paper")
        assert by_class["special"] == ("<|end|>" if template == "chat" else "")


def test_a_tokenizer_that_does_not_know_its_places_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UsageError, match="Slow does not say where in a text its tokens stand"):
        tokenise([Prompt(text="a", own=())], Slow())


def test_an_end_token_that_the_tokenizer_adds_is_not_looked_at() -> None:
    """Training and evaluation take it off a prompt, so the model has never read it there."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.eos_token_id)]
    )
    assert tokenizer("ab")["input_ids"][-1] == tokenizer.eos_token_id
    (found,) = tokenise([Prompt(text="ab", own=((0, 2),))], tokenizer)
    assert (found.pieces, len(found.ids), len(found.classes)) == (("a", "b"), 2, 2)


def test_heat_maps_are_drawn_by_the_names_of_experts_that_not_every_layer_has() -> None:
    experts = [
        LoraExpert(targets=["q_proj"], layers=[1]),
        ParallelAdapterExpert(layers=[0]),
        LoraExpert(targets=["o_proj"]),
    ]
    model = get_peft_model(base_model("llama"), MoAConfig(experts=experts, router=RouterConfig()))
    awaken(model)
    finding = inspect_model(model, written()).findings["default"]
    drawn = dict(_figures(finding, ""))
    for kind in ("gates", "changes"):
        axes = drawn[kind].axes[0]
        assert sorted(one.get_text() for one in axes.get_yticklabels()) == [
            "lora_o_proj",
            "lora_q_proj",
            "parallel_adapter",
        ]
        shown = dict(
            zip([one.get_text() for one in axes.get_yticklabels()], axes.images[0].get_array(), strict=True)
        )
        known = {name: [value == value for value in row.filled(float("nan"))] for name, row in shown.items()}
        assert known == {
            "lora_o_proj": [True, True],
            "lora_q_proj": [False, True],
            "parallel_adapter": [True, False],
        }
    first = next(one for one in finding.routers if one.layer == 0)
    values = dict(zip(first.names, first.mean_gate, strict=True))
    axes = drawn["gates"].axes[0]
    names = [one.get_text() for one in axes.get_yticklabels()]
    assert axes.images[0].get_array()[names.index("parallel_adapter")][0] == values["parallel_adapter"]
