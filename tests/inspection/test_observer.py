"""What is observed of a model is what its routers said and its experts added, for every method, whatever the padding."""

import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from moa_peft import LoraExpert, MoAConfig, RouterConfig, mixture_layers
from moa_peft.errors import UsageError
from moa_peft.inspection.forward_pass import TokenText, check_texts, read
from moa_peft.inspection.gate_statistics import gate_sums
from moa_peft.inspection.observer import Observer, Where
from tiny import METHODS, awaken, base_model, mixture_model
from two_pass import cka, keep_everything, rank, texts

CASES = [("llama", method) for method in METHODS] + [("phi3", "soft-moa"), ("gpt_neox", "everything")]


def observed(model: Any, chosen: list[TokenText] | None = None, batch_size: int = 3) -> Observer:
    observer = Observer(model)
    read(model, observer, texts() if chosen is None else chosen, batch_size=batch_size)
    return observer


def assert_same(one: Observer, other: Observer) -> None:
    """Equal up to the rounding that another shape of a product brings."""
    assert one.gates.keys() == other.gates.keys()
    assert one.groups.keys() == other.groups.keys()
    for where, sums in one.gates.items():
        for name, value in vars(sums).items():
            if name != "threshold_bins":  # rounding may move a token into the next bin
                torch.testing.assert_close(value, getattr(other.gates[where], name), rtol=1e-4, atol=1e-4)
    for where, group in one.groups.items():
        a, b = group.statistics(), other.groups[where].statistics()
        for field in ("cka", "cosine"):
            for row, other_row in zip(getattr(a, field), getattr(b, field), strict=True):
                assert row == near(other_row)
        for field in ("norm", "norm_share", "effective_rank"):
            assert getattr(a, field) == near(getattr(b, field))


def near(values: Any) -> Any:
    """Equal up to rounding, and None where it is None."""
    return tuple(None if one is None else pytest.approx(one, rel=1e-3, abs=1e-4) for one in values)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_one_pass_equals_the_definitions_over_all_tokens_kept(family: str, method: str) -> None:
    model = mixture_model(family, method)
    observer, kept = observed(model), keep_everything(model, texts())
    assert observer.gates.keys() == kept.gates.keys()
    places = torch.cat([torch.arange(len(one.ids)) for one in texts()])
    classes = torch.cat([torch.tensor(one.classes) for one in texts()])
    for where, sums in observer.gates.items():
        gates = kept.gates[where]
        a_token = len(gates) == len(places)
        assert a_token or len(gates) == len(texts())  # the same for a whole instance
        expected = gate_sums(
            gates,
            threshold=kept.thresholds.get(where),
            positions=places if a_token else None,
            classes=classes if a_token else None,
        )
        for name in ("tokens", "gate", "square", "active", "entropy", "position", "token_class", "threshold"):
            torch.testing.assert_close(getattr(sums, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    labels = {(*where, name) for where, group in observer.groups.items() for name in group.outputs}
    assert labels == kept.changes.keys()
    for where, group in observer.groups.items():
        found = group.statistics()
        changes = [kept.changes[*where, name] for name in found.names]
        for (i, a), (j, b) in combinations(enumerate(changes), 2):
            assert found.cka[i][j] == (
                None if 0 in (a.norm(), b.norm()) else pytest.approx(cka(a, b), abs=1e-4)
            )
            if found.cosine[i][j] is not None:
                both = (a.norm(dim=1) > 0) & (b.norm(dim=1) > 0)
                cosine = torch.cosine_similarity(a[both], b[both]).mean()
                assert found.cosine[i][j] == pytest.approx(float(cosine), abs=1e-4)
        norms = [float(one.norm(dim=1).mean()) for one in changes]
        assert found.norm == pytest.approx(norms, rel=1e-4)
        assert found.captured == pytest.approx([1.0] * len(norms))
        for place, one in enumerate(changes):
            if norms[place] > 0:
                assert found.effective_rank[place] == pytest.approx(rank(one), rel=1e-3)


def test_cosines_are_taken_of_changes_to_the_same_output_alone() -> None:
    group = observed(mixture_model("llama", "soft-moa")).groups[Where("default", 0, "")].statistics()
    pairs = {
        (group.names[i], group.names[j])
        for i, j in combinations(range(7), 2)
        if group.cosine[i][j] is not None
    }
    assert pairs == {("lora_down_proj", "parallel_adapter")}  # both give the MLP's output
    fused = observed(mixture_model("phi3", "soft-moa")).groups[Where("default", 0, "")].statistics()
    assert fused.cosine == tuple(
        tuple(None if one is None else pytest.approx(one, abs=2) for one in row) for row in group.cosine
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["everything", "instance-moa", "unipeft", "topk-moe-lora", "copies"])
def test_nothing_depends_on_padding_batch_size_order_or_checkpointing(method: str) -> None:
    model = mixture_model("llama", method)
    expected = observed(model, batch_size=1)
    assert_same(observed(model, batch_size=2), expected)
    assert_same(observed(model, batch_size=5), expected)
    assert_same(observed(model, texts()[::-1], batch_size=2), expected)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(observed(model.train()), expected)
    assert model.training


def test_a_model_in_training_is_read_without_dropout() -> None:
    experts = [LoraExpert(targets=["q_proj", "v_proj"], dropout=0.5)]
    model = get_peft_model(base_model("llama"), MoAConfig(experts=experts, router=RouterConfig()))
    awaken(model)
    expected = observed(model.eval())
    assert_same(observed(model.train()), expected)


def test_two_adapters_on_one_model_are_heard_apart() -> None:
    alone = observed(mixture_model("llama", "everything"))
    model = mixture_model("llama", "everything")
    model.add_adapter("other", MoAConfig.preset("molora"))
    found = observed(model)
    assert_same(found, alone)
    model.base_model.set_adapter(["default", "other"])
    both = observed(model)
    assert {where.adapter for where in both.gates} == {"default", "other"}
    assert {where.router for where in both.gates if where.adapter == "default"} == {""}


def test_a_model_that_transformers_loaded_alone_is_heard_the_same(tmp_path: Path) -> None:
    base_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel(base, MoAConfig.preset("soft-moa")).eval()
    awaken(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert not isinstance(native, PeftModel)
    assert_same(observed(native), observed(model))


def test_the_observers_that_were_there_are_there_again_also_after_an_error() -> None:
    model = mixture_model("llama", "soft-moa")
    told: list[object] = []
    layers = [layer for _, layer in mixture_layers(model)]
    for layer in layers:
        layer.observer = told.append
    observed(model)
    broken = model.get_base_model().model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        observed(model)
    broken.remove()
    assert told == []
    assert all(layer.observer == told.append and layer.change_observer is None for layer in layers)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([], "no text to look at: give at least one prompt"),
        ([TokenText(ids=(1,)), TokenText(ids=())], "prompt 2 has no tokens"),
        ([TokenText(ids=(5,) * 65)], "prompt 1 takes 65 tokens, the model reads 64"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(given: list[TokenText], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        check_texts(mixture_model("llama", "soft-moa"), given)


MEMORY = """
import resource, sys
from two_pass import texts
from tiny import mixture_model
from moa_peft.inspection.observer import Observer
from moa_peft.inspection.forward_pass import read
model, count = mixture_model("llama", "everything"), int(sys.argv[1])
observer = Observer(model)
read(model, observer, texts((20,) * 60), batch_size=60)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read(model, observer, texts((20,) * count), batch_size=60)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_prompts() -> None:
    """Keeping the changes of 1,000 prompts would take 20,000 tokens x 520 numbers x 4 bytes = 42 MB."""
    path = [str(Path(__file__).parents[1]), *sys.path]
    grown = {
        count: int(
            subprocess.run(
                [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{MEMORY}", str(count)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for count in (10, 1000)
    }
    assert grown[1000] < grown[10] + 16 * 1024, grown  # KiB
