"""Weights that lie side by side: that they are joined without a copy, and what happens where they no longer lie so."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.utils import clean_state_dict_for_safetensors
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from moa_peft import MoAConfig, RouterConfig, ThresholdConfig, mixture_layers
from moa_peft.side_by_side import SideBySide
from tiny import awaken, base_model, mixture_model, tokens


def laid(model: nn.Module) -> list[SideBySide]:
    return [
        one
        for _, layer in mixture_layers(model)
        for mixture in layer.mixtures().values()
        for one in mixture.side_by_side.values()
    ]


def lying(model: nn.Module) -> int:
    return sum(one.lies() for one in laid(model))


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a training step and every gradient, which are taken off the parameters again."""
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def replaced_data(model: nn.Module) -> None:
    for one in model.parameters():
        if one.requires_grad:
            one.data = one.data.clone()


def replaced_parameters(model: nn.Module) -> None:
    for module in model.modules():
        for name, one in list(module._parameters.items()):
            if one is not None and one.requires_grad:
                module._parameters[name] = nn.Parameter(one.data)  # in the same place, though another


@pytest.mark.parametrize("method", ["soft-moa", "sparse-moa", "molora", "topk-moe-lora", "adamole"])
@pytest.mark.parametrize("replace", [replaced_data, replaced_parameters])
def test_losses_and_gradients_are_bit_equal_to_those_of_copied_weights(
    method: str, replace: Callable[[nn.Module], None]
) -> None:
    model = mixture_model("llama", method).train()
    assert lying(model)
    torch.manual_seed(0)
    loss, gradients = step(model)
    replace(model)
    assert not lying(model)
    torch.manual_seed(0)
    by_copies, other_gradients = step(model)
    assert torch.equal(loss, by_copies)
    assert gradients.keys() == other_gradients.keys()
    for name, one in gradients.items():
        assert torch.equal(one, other_gradients[name]), name


def test_no_weight_is_copied_to_be_joined() -> None:
    model = mixture_model("llama", "soft-moa").train()
    [one, *_] = laid(model)
    joined = one.joined()
    assert joined is not None
    before = one.sources.weights[0]().shape[0]
    assert joined.weight[before:].data_ptr() == one.sources.weights[1]().data_ptr()
    assert joined.bias[-len(one.sources.biases[-1]()) :].data_ptr() == one.sources.biases[-1]().data_ptr()


def test_evaluation_copies_no_weight_either_unless_other_layers_read() -> None:
    """Noise of a top-k router has a layer that reads in training alone."""
    router = RouterConfig(gate="top-k", keep=2, noise=True)
    plain, noisy = (
        get_peft_model(base_model("llama"), MoAConfig.preset("soft-moa", **options))
        for options in ({}, {"router": router})
    )
    for model, reads_alike in ((plain, True), (noisy, False)):
        with torch.no_grad():
            model.eval()(tokens())
        for _, layer in mixture_layers(model):
            mixture = layer.mixtures()["default"]
            whole = mixture.kept.made(("projections", torch.float32)).joined.weight
            first = mixture.side_by_side["projections"].sources.weights[0]()
            assert (whole.data_ptr() == first.data_ptr()) is reads_alike


def test_what_an_optimiser_changes_in_place_is_what_is_multiplied() -> None:
    model = mixture_model("llama", "soft-moa").train()
    before, _ = step(model)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.add_(0.1)
    assert lying(model)
    after, _ = step(model)
    replaced_data(model)
    assert not torch.equal(before, after)
    assert torch.equal(after, step(model)[0])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("site", ["projections", "down_proj"])
def test_weights_changed_between_forward_and_backward_are_refused(site: str, frozen: bool) -> None:
    """Also where nobody asks for a gradient of theirs: that of the embeddings would be as wrong."""
    model = mixture_model("llama", "molora").train()
    if frozen:
        for one in model.parameters():
            one.requires_grad_(False)
    embedded = model.get_input_embeddings()(tokens()).requires_grad_()
    loss = model(inputs_embeds=embedded, labels=tokens()).loss
    beside = mixture_layers(model)[0][1].mixtures()["default"].side_by_side[site]
    assert beside.lies()
    with torch.no_grad():
        beside.sources.weights[-1]().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, embedded)


@pytest.mark.parametrize("moved", [lambda one: one.double(), lambda one: one.to("cpu", torch.bfloat16)])
def test_weights_that_are_moved_or_cast_lie_side_by_side_again(
    moved: Callable[[nn.Module], nn.Module],
) -> None:
    model = mixture_model("llama", "soft-moa")
    count = lying(model)
    moved(model)
    assert lying(model) == count > 0
    step(model.train())


def test_a_moved_model_whose_weights_lay_elsewhere_is_left_alone() -> None:
    model = mixture_model("llama", "soft-moa")
    replaced_data(model)
    model.double()
    assert not lying(model)


def test_weights_put_into_shared_memory_stay_there() -> None:
    model = mixture_model("llama", "soft-moa")
    model.share_memory()
    assert all(one.is_shared() for one in model.parameters())
    step(model.train())


def test_a_copy_has_weights_of_its_own() -> None:
    model = mixture_model("llama", "soft-moa").train()
    twin = copy.deepcopy(model)
    assert not lying(twin)
    assert all(one._laid is None for one in laid(twin))  # it carries no dead weights
    before, _ = step(model)
    with torch.no_grad():
        for one in twin.parameters():
            one.zero_()
    assert torch.equal(step(model)[0], before)


def test_a_second_adapter_leaves_the_first_ones_weights_where_they_are() -> None:
    model = mixture_model("llama", "soft-moa").train()
    before, _ = step(model)
    places = [one.data_ptr() for one in model.parameters()]
    with torch.inference_mode():
        model.add_adapter("second", MoAConfig.preset("sparse-moa"))
        model.delete_adapter("second")
    model.add_adapter("third", MoAConfig.preset("sparse-moa"))
    model.set_adapter("default")
    assert all(one.lies() for one in laid(model) if len(one.sources.weights) > 1)
    assert set(places) <= {one.data_ptr() for one in model.parameters()}
    assert torch.equal(step(model)[0], before)


def test_one_parameter_read_twice_is_copied() -> None:
    """It cannot lie in two places."""
    model = mixture_model("llama", "soft-moa").train()
    for _, layer in mixture_layers(model):
        mixture = layer.mixtures()["default"]
        mixture.experts["lora_v_proj"].A = mixture.experts["lora_k_proj"].A
        mixture.side_by_side.clear()
        layer.connect()
    assert not lying(model)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.add_(0.1)
    after, _ = step(model)
    replaced_data(model)
    assert torch.equal(after, step(model)[0])


def test_weights_that_no_longer_lie_hold_no_memory() -> None:
    model = mixture_model("llama", "soft-moa").train()
    replaced_data(model)
    step(model)
    assert all(one._laid is None for one in laid(model))


def test_a_pruned_layer_can_be_moved_and_hooked_again() -> None:
    model = mixture_model("llama", "soft-moa")
    for _, layer in mixture_layers(model):
        mixture = layer.mixtures()["default"]
        prune.identity(mixture.router.linears()[0], "weight")  # takes the parameter's name
        mixture.side_by_side.clear()
        layer.connect()
        layer.fused = False
    model.double()
    model(tokens())


def test_files_hold_each_weight_alone(tmp_path: Path) -> None:
    model = mixture_model("llama", "soft-moa")
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(base_model("llama"), str(tmp_path / "adapter"), is_trainable=True)
    assert lying(loaded) == lying(model)  # a load copies into their places
    ours = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    theirs = dict(loaded.named_parameters())
    assert all(torch.equal(one, theirs[name]) for name, one in ours.items())
    save_file(ours, tmp_path / "plain.safetensors")  # refuses tensors that overlap
    again = load_file(tmp_path / "plain.safetensors")
    assert all(torch.equal(one, again[name]) for name, one in ours.items())


def test_accelerate_and_torch_save_every_weight_and_nothing_beside_it(tmp_path: Path) -> None:
    """accelerate drops all but one of the tensors that share a storage; torch writes the whole of it."""
    model = mixture_model("llama", "soft-moa")
    assert clean_state_dict_for_safetensors(model.state_dict()).keys() == model.state_dict().keys()
    [one, *_] = [one for one in laid(model) if one.lies()]
    weight = one.sources.weights[1]()
    torch.save(weight, tmp_path / "one.pt")
    torch.save(weight.detach().clone(), tmp_path / "like.pt")
    assert (tmp_path / "one.pt").stat().st_size < (tmp_path / "like.pt").stat().st_size + 1000
    assert torch.equal(torch.load(tmp_path / "one.pt"), weight)


def test_an_adapter_loaded_in_place_of_empty_weights_lies_side_by_side_too(tmp_path: Path) -> None:
    model = mixture_model("llama", "soft-moa").train()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(
        base_model("llama"), str(tmp_path), is_trainable=True, low_cpu_mem_usage=True
    )
    assert torch.equal(step(loaded.train())[0], step(model)[0])
    assert lying(loaded) == lying(model)


def test_trained_and_frozen_weights_can_lie_side_by_side() -> None:
    """The official code's dead threshold is not trained."""
    router = RouterConfig(threshold=ThresholdConfig(maximum=0.5, gradient="none"))
    model = get_peft_model(base_model("llama"), MoAConfig.preset("sparse-moa", router=router)).train()
    awaken(model)
    assert lying(model)
    loss, gradients = step(model)
    replaced_data(model)
    by_copies, others = step(model)
    assert torch.equal(loss, by_copies)
    assert all(torch.equal(one, others[name]) for name, one in gradients.items())
