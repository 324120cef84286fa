"""The tuner layer's own duties: whom it tells of its gates, and that nothing of one pass reaches the next."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from moa_peft import (
    ArchitectureConfig,
    ChangeRecord,
    GateRecord,
    LoraExpert,
    MoAConfig,
    RouterConfig,
    RunError,
    UsageError,
    mixture_layers,
)
from tiny import base_model, largest, mixture_model, tokens


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_an_observer_is_told_once_a_pass_and_block_also_with_checkpointing(reentrant: bool | None) -> None:
    model = mixture_model("llama", "everything").train()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    told: list[GateRecord] = []
    for _, layer in mixture_layers(model):
        layer.observer = told.append
    ids = tokens(2, 6)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert len(told) == 2
    for record, (_, layer) in zip(told, mixture_layers(model), strict=True):
        assert record.adapter == "default"
        assert record.names == layer.mixtures()["default"].names
        assert record.gates.shape == (2, 6, len(record.names))
        assert record.gates.dtype == torch.float32
        assert not record.gates.requires_grad
        assert record.threshold is not None
        assert record.threshold.shape == (2, 6, 1)
        assert not record.threshold.requires_grad
    assert not torch.equal(told[0].gates, told[1].gates)


def test_soft_moa_has_no_threshold_to_tell() -> None:
    model = mixture_model("llama", "soft-moa")
    told: list[GateRecord] = []
    [(_, layer), _] = mixture_layers(model)
    layer.observer = told.append
    model(tokens(1, 3))
    assert [record.threshold for record in told] == [None]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_change_observer_is_told_once_a_pass_and_expert_also_with_checkpointing(
    reentrant: bool | None,
) -> None:
    model = mixture_model("llama", "everything").train()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    told: list[ChangeRecord] = []
    for _, layer in mixture_layers(model):
        layer.change_observer = told.append
    ids = tokens(2, 6)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert not any(one.change.requires_grad or one.gate.requires_grad for one in told)
    expected = [
        (place.name, place.site.path)
        for _, layer in mixture_layers(model)
        for place in layer.mixtures()["default"].places
    ]
    assert sorted((one.expert, one.path) for one in told) == sorted(expected)


def test_the_changes_told_are_what_is_added_and_each_copy_can_be_had_alone() -> None:
    model = mixture_model("llama", "copies")
    [(_, layer), _] = mixture_layers(model)
    told: dict[str, ChangeRecord] = {}
    alone: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def observe(record: ChangeRecord) -> None:
        copies = record.gate.shape[-1]
        each = [record.under(record.gate * torch.eye(copies)[number]) for number in range(copies)]
        told[record.expert], alone[record.expert] = record, torch.stack(each).sum(0)

    def keep(path: str, args: tuple[Tensor, ...], output: Tensor, module: torch.nn.Module) -> None:
        outputs[path] = output - module.forward(args[0])  # past every hook: the frozen output

    layer.change_observer = observe
    for place in layer.mixtures()["default"].places:
        if isinstance(place.site.module, torch.nn.Linear):
            place.site.module.register_forward_hook(
                lambda module, args, output, path=place.site.path: keep(path, args, output, module)
            )
    with torch.no_grad():
        model(tokens(2, 6))
    assert told.keys() == set(layer.mixtures()["default"].names)
    assert sum(told[name].change.abs().max() > 0.1 for name in told if told[name].path in outputs) >= 2
    for name, record in told.items():
        assert record.gate.shape[-1] > 1
        torch.testing.assert_close(alone[name], record.change)
        if record.path in outputs:
            torch.testing.assert_close(record.change, outputs[record.path], atol=1e-5, rtol=1e-5)


def cut_off(model: PeftModel) -> None:
    """Break a forward pass off in the middle of the first block."""

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        model(tokens())
    handle.remove()


def test_a_pass_that_was_cut_off_changes_nothing_and_the_model_can_still_be_copied_and_pickled() -> None:
    model = mixture_model("llama", "everything")
    with torch.no_grad():
        expected: Tensor = model(tokens()).logits
    cut_off(model)
    with torch.no_grad():
        twin = copy.deepcopy(model)(tokens()).logits
        thawed = pickle.loads(pickle.dumps(model))(tokens()).logits
        again = model(tokens()).logits
    assert torch.equal(twin, expected)
    assert torch.equal(thawed, expected)
    assert torch.equal(again, expected)


def test_adapters_whose_routers_read_different_inputs_live_on_one_model(tmp_path: Path) -> None:
    expected: dict[str, Tensor] = {}
    for method in ("everything", "soft-moa"):  # the raw residual stream, and what q, k and v see
        model = mixture_model("llama", method)
        with torch.no_grad():
            expected[method] = model(tokens()).logits
        model.save_pretrained(tmp_path / method)
    model = PeftModel.from_pretrained(base_model("llama"), tmp_path / "everything", adapter_name="everything")
    model.load_adapter(tmp_path / "soft-moa", adapter_name="soft-moa")
    for name in ("soft-moa", "everything", "soft-moa"):
        model.set_adapter(name)
        with torch.no_grad():
            assert torch.equal(model.eval()(tokens()).logits, expected[name])


def test_threads_that_call_one_model_do_not_share_their_gates() -> None:
    """Of 60 calls 15 raised and 2 gave other numbers."""
    model = mixture_model("llama", "everything")
    given = [tokens(3, 11, seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(ids).logits for ids in given]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def call(place: int) -> float:
        with torch.no_grad():
            return max(largest(model(given[place]).logits, expected[place]) for _ in range(10))

    try:
        with ThreadPoolExecutor(4) as pool:
            assert max(pool.map(call, range(4))) < 1e-4
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("method", ["topk-moe-lora", "instance-moa"])
def test_a_copied_block_does_not_copy_the_model(method: str) -> None:
    """As when a model is grown by copies of its blocks; the copy could not be trained."""
    model = mixture_model("llama", method)
    blocks = model.get_base_model().model.layers
    [(_, layer), _] = mixture_layers(model)
    copied = copy.deepcopy(blocks[0])
    assert copied.moa is not layer
    assert copied.moa.watch is layer.watch
    whole = copy.deepcopy(model)
    assert mixture_layers(whole)[0][1].watch is not layer.watch


def test_a_layer_may_be_called_by_itself_where_no_adapter_is_at_work() -> None:
    """As calibration for quantisation calls it: rows of two dimensions ended in an error of shapes."""
    model = mixture_model("llama", "soft-moa")
    down = model.get_base_model().model.layers[0].mlp.down_proj
    rows = torch.randn(7, down.in_features)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(down(rows), torch.nn.functional.linear(rows, down.weight, down.bias))


def test_an_adapter_that_takes_the_place_of_the_only_one_keeps_the_observers() -> None:
    """As when adapters are swapped in a server."""
    model, told = mixture_model("llama", "soft-moa"), []
    for _, layer in mixture_layers(model):
        layer.observer = told.append
    model.delete_adapter("default")
    model.add_adapter("default", MoAConfig.preset("soft-lora"))
    model.set_adapter("default")
    model(tokens())
    assert len(told) == 2


def test_a_norm_that_runs_too_late_is_named() -> None:
    config = MoAConfig(
        experts=[LoraExpert(targets=["q_proj"])],
        architecture=ArchitectureConfig(norm="post_attention_layernorm"),
        router=RouterConfig(router_input="block"),
    )
    model = get_peft_model(base_model("llama"), config)
    with pytest.raises(
        UsageError, match=r"projections ran before the norm .* ArchitectureConfig\(norm=...\)"
    ):
        model(tokens())
    model.delete_adapter("default")
    model.add_adapter("default", MoAConfig.preset("sparse-moa"))
    model.set_adapter("default")
    assert model(tokens()).logits.isfinite().all(), "the blocks are those of the new adapter's architecture"


def test_a_block_that_runs_its_mlp_before_its_router_is_refused() -> None:
    model = mixture_model("llama", "soft-moa")
    mlp = model.get_base_model().model.layers[0].mlp
    with pytest.raises(RunError, match=r"layers\.0\.mlp\.down_proj ran before the router of its block"):
        mlp(torch.zeros(1, 1, 32))


def test_a_model_without_a_mixture_has_no_mixture_layers() -> None:
    assert mixture_layers(base_model("llama")) == []
