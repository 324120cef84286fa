"""A mixture beside what others hang on the frozen model's modules, or do to them."""

import copy
import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from moa_peft import MoAConfig, PromptExpert, RunError, mixture_layers
from moa_peft.bench.subjects import one_by_one
from moa_peft.mixture.block_hooks import MoALayer
from tiny import awaken, base_model, cached, mixture_model, tokens

Hang = Callable[[Any], object]


def training_step(method: str, hang: Hang, *, apart: bool = False) -> dict[str, Tensor]:
    """The logits and every gradient of a training step.

    Args:
        method: A method of the family.
        hang: Does something to the frozen model before it gets its mixture.
        apart: Whether every expert is asked for its own change, instead of joining those that read one input.
    """
    base = base_model("llama")
    hang(base)
    model = get_peft_model(base, MoAConfig.preset(method))
    awaken(model)
    with one_by_one(model) if apart else nullcontext():
        logits = model.train()(tokens()).logits
    logits.square().mean().backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {"logits": logits.detach(), **gradients}


def doubled_input(model: Any) -> None:
    for block in model.model.layers:
        block.mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def doubled_product(model: Any) -> None:
    for block in model.model.layers:
        mlp = block.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) * 2)


def tripled_factor(model: Any) -> None:
    for block in model.model.layers:
        block.mlp.act_fn.register_forward_hook(lambda module, args, output: output * 3)


@pytest.mark.parametrize("hang", [doubled_input, doubled_product, tripled_factor])
def test_what_others_do_to_the_input_of_down_proj_is_in_its_gradients(hang: Hang) -> None:
    joined, apart = (training_step("lora", hang, apart=one) for one in (False, True))
    plain = training_step("lora", lambda model: None)
    assert joined.keys() == apart.keys()
    assert not torch.allclose(joined["logits"], plain["logits"], atol=1e-2)
    for name, one in joined.items():
        torch.testing.assert_close(one, apart[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "soft-moa"])
def test_a_gradient_that_is_kept_inside_a_patched_forward_stays_as_it_was(method: str) -> None:
    """The gradient of down_proj's input was once overwritten with the sum of the mixture's and the frozen layer's."""
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(gradient: Tensor) -> None:
        kept.append((gradient, gradient.clone()))

    def watched(model: Any) -> None:
        for block in model.model.layers:
            down = block.mlp.down_proj

            def forward(x: Tensor, down: Any = down) -> Tensor:
                x.register_hook(keep)
                output = nn.functional.linear(x, down.weight)
                output.register_hook(keep)
                return output

            down.forward = forward

    training_step(method, watched)
    assert len(kept) == 4
    assert all(torch.equal(gradient, then) for gradient, then in kept)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
def test_an_output_that_another_hook_has_kept_stays_as_it_was(training: bool, everywhere: bool) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear) and isinstance(output, Tensor):
            kept.append((output, output.detach().clone()))

    base = base_model("llama")
    handles = [one.register_forward_hook(keep) for one in base.modules() if isinstance(one, nn.Linear)]
    model = get_peft_model(base, MoAConfig.preset("soft-moa"))
    awaken(model)
    if everywhere:
        for one in handles:
            one.remove()
        handles = [nn.modules.module.register_module_forward_hook(keep)]
    try:
        with torch.set_grad_enabled(training):
            before = model.train(training)(tokens(), use_cache=not training)
            if not training:
                model(tokens(length=1), **cached(before))
    finally:
        for one in handles:
            one.remove()
    assert len(kept) > 10
    assert all(torch.equal(output, then) for output, then in kept)


def layers_alive() -> int:
    gc.collect()
    return sum(type(one) is MoALayer for one in gc.get_objects())


@pytest.mark.parametrize("saved", ["up_proj", "k_proj"])
def test_a_module_that_peft_copies_to_train_it_takes_no_layer_with_it(saved: str) -> None:
    before = layers_alive()
    model = get_peft_model(base_model("llama"), MoAConfig.preset("soft-moa", modules_to_save=[saved]))
    model.train()(tokens()).logits.sum().backward()
    assert layers_alive() - before == len(mixture_layers(model))
    wrapped = [one for name, one in model.named_parameters() if "modules_to_save" in name]
    assert wrapped
    assert all(one.grad is not None for one in wrapped)


def strange(hook: object, model: nn.Module) -> bool:
    """Whether a hook is that of a layer which the model does not have."""
    bound = getattr(hook, "func", hook)
    owner = getattr(bound, "__self__", None)
    return isinstance(owner, MoALayer) and all(owner is not layer for _, layer in mixture_layers(model))


def test_an_adapter_trains_a_copy_of_a_layer_that_another_has_an_expert_on() -> None:
    model = mixture_model("llama", "soft-moa")
    model.add_adapter("other", MoAConfig.preset("soft-moa", modules_to_save=["k_proj"]))
    model.set_adapter("other")
    assert model(tokens()).logits.isfinite().all()
    model.set_adapter("default")
    twin = mixture_model("llama", "soft-moa")
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens()).logits, twin(tokens()).logits)


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("method", ["lora", "molora", "soft-moa"])
def test_a_layer_that_is_replaced_after_wrapping_is_refused_by_name(method: str, path: str) -> None:
    """fp8 training of accelerate, and torchao's QAT, put other layers in: its experts were silent, and the loss fell all the same."""
    model = mixture_model("llama", method)
    block = model.get_base_model().model.layers[1]
    old = block.get_submodule(path)
    new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
    new.load_state_dict(old.state_dict())
    block.set_submodule(path, new)
    with torch.no_grad(), model.disable_adapter():
        model(tokens())
    with pytest.raises(RunError, match=rf"layers\.1\.{path} was replaced after the adapter was put on"):
        model(tokens())


def test_an_mlp_that_runs_in_tiles_of_the_sequence_is_refused() -> None:
    model = mixture_model("llama", "lora")
    mlp = model.get_base_model().model.layers[0].mlp
    whole = mlp.forward
    mlp.forward = lambda x: torch.cat([whole(part) for part in x.split(4, dim=1)], dim=1)
    with pytest.raises(RunError, match=r"mlp\.down_proj was given .* must not run it in parts"):
        model(tokens())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_keys_of_a_prompt_are_the_frozen_ones_whichever_adapter_was_added_first() -> None:
    """LoRA's layer around k_proj gave its own keys, so the order of adding them changed the logits."""

    def logits(order: str) -> Tensor:
        model = base_model("llama")
        for name in order:
            torch.manual_seed(5)
            lora = LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
            model.add_adapter(lora if name == "l" else MoAConfig(experts=[PromptExpert()]), name)
        torch.manual_seed(6)
        for name, one in model.named_parameters():
            if "moa_mixture" in name:
                one.data = torch.randn_like(one)
        model.set_adapter(["l", "m"])
        with torch.no_grad():
            return model.eval()(tokens()).logits

    torch.testing.assert_close(logits("lm"), logits("ml"), rtol=1e-5, atol=1e-5)


def test_a_copied_model_has_hooks_of_its_own() -> None:
    model = mixture_model("llama", "soft-moa")
    twin = copy.deepcopy(model)
    assert not {layer for _, layer in mixture_layers(twin)} & {layer for _, layer in mixture_layers(model)}
    assert not [hook for one in twin.modules() for hook in one._forward_hooks.values() if strange(hook, twin)]
    assert not [
        hook for one in twin.modules() for hook in one._forward_pre_hooks.values() if strange(hook, twin)
    ]
