"""The fused path's own arithmetic, and what it keeps; that it computes a mixture is for the tests that run both paths."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from moa_peft import LoraExpert, MoAConfig, RouterConfig, mixture_layers
from moa_peft.bench.work import saved_bytes
from moa_peft.fused import PIECE, Into, Joined, add_rows, multiply_through, rows_of
from moa_peft.kept_weights import KeptWeights
from moa_peft.presets import PROJECTIONS
from moa_peft.tuner import MoALayer
from tiny import METHODS, awaken, base_model, mixture_model, tokens


@pytest.mark.parametrize("columns", [None, (2, 8)])
def test_output_and_every_gradient_equal_those_of_plain_products(columns: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    new = {"dtype": torch.float64, "requires_grad": True}
    x, down, up = torch.randn(2, 5, 7, **new), torch.randn(3, 7, **new), torch.randn(6, 3, **new)
    frozen = torch.randn(10 if columns else 6, 7, dtype=torch.float64)
    start = columns[0] if columns else 0

    own = F.linear(x, frozen)
    change = F.pad(x @ down.T @ up.T, (start, own.shape[-1] - start - 6))
    expected = own + change
    expected_gradients = torch.autograd.grad(expected.sin().sum(), [x, down, up])

    found = add_rows(F.linear(x, frozen), rows_of(x, down), up, columns)
    gradients = torch.autograd.grad(found.sin().sum(), [x, down, up])
    torch.testing.assert_close(found, expected)
    for one, two in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_an_input_given_by_its_factors_gets_the_same_gradients_and_is_not_kept() -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    kept: list[list[Any]] = [[], []]
    gradients: list[tuple[Tensor, ...]] = []
    for place, by_factors in enumerate((False, True)):
        x = first * second
        with torch.autograd.graph.saved_tensors_hooks(
            lambda one, n=place: kept[n].append(one) or one, lambda one: one
        ):
            into = Into((first, second) if by_factors else None)
            product = multiply_through(x, Joined(weight), into)[1]
        assert any(one.data_ptr() == x.data_ptr() for one in kept[place]) is not by_factors
        gradients.append(torch.autograd.grad(product.sin().sum(), [first, second, weight]))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_an_input_read_on_its_way_gets_the_same_gradients(in_place: bool, biased: bool) -> None:
    torch.manual_seed(0)
    new = {"dtype": torch.float64, "requires_grad": True}
    x, weight, bias = torch.randn(2, 5, 7, **new), torch.randn(3, 7, **new), torch.randn(3, 1, **new)
    frozen = torch.randn(4, 7, dtype=torch.float64)
    leaves = [x, weight, bias] if biased else [x, weight]
    found: list[tuple[Tensor, ...]] = []
    for on_its_way in (False, True):
        passed_on, product = x, rows_of(x, weight, bias if biased else None)
        if on_its_way:
            joined = Joined(weight, bias if biased else None)
            passed_on, product = multiply_through(x, joined, Into(in_place=in_place))
        loss = F.linear(passed_on, frozen).sin().sum() + product.sin().sum()
        found.append(torch.autograd.grad(loss, leaves))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    new = {"dtype": torch.float64, "requires_grad": True}
    x, down, up = torch.randn(2, 5, 7, **new), torch.randn(3, 7, **new), torch.randn(6, 3, **new)
    through, rows = multiply_through(x, Joined(down), Into())
    output = add_rows(F.linear(through, torch.randn(6, 7, dtype=torch.float64)), rows, up)
    for one in (down, up):
        (first,) = torch.autograd.grad(output.square().sum(), one, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.sum().backward()


def test_tokens_beyond_one_piece_are_made_again_too() -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(3, PIECE - 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    _, product = multiply_through(first * second, Joined(weight), Into((first, second)))
    [found] = torch.autograd.grad(product.sin().sum(), [weight])
    [expected] = torch.autograd.grad(rows_of(first * second, weight).sin().sum(), [weight])
    torch.testing.assert_close(found, expected)


def test_the_change_is_added_in_place_of_the_linear_layers_output() -> None:
    model = mixture_model("llama", "sparse-moa")
    made: dict[str, int] = {}
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    forward = layer.forward

    def noting(x: Tensor) -> Tensor:
        output = forward(x)
        made["address"] = output.data_ptr()
        return output

    layer.forward = noting
    layer.register_forward_hook(lambda module, args, output: made.update(after=output.data_ptr()))
    model(tokens())
    assert made["after"] == made["address"]


def test_a_mixture_keeps_less_for_the_backward_pass_than_lora() -> None:
    """What down_proj reads is made again from its factors, which the frozen model keeps anyway."""
    ids = tokens(4, 64)  # many, so that what is kept of each outweighs the weights
    base = base_model("llama").requires_grad_(False)

    def kept(model: nn.Module) -> int:
        return saved_bytes(model.train(), ids)

    frozen = kept(base)
    lora = LoraConfig(r=2, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    config = MoAConfig(experts=[LoraExpert(targets=PROJECTIONS, rank=2)], router=RouterConfig(kind="linear"))
    mixture = get_peft_model(base_model("llama"), config)
    fused = kept(mixture) - frozen
    for _, layer in mixture_layers(mixture):
        layer.fused = False
    assert fused < 0.8 * (kept(get_peft_model(base_model("llama"), lora)) - frozen)
    assert fused < 0.6 * (kept(mixture) - frozen)


def step(model: PeftModel, cache: Any, token: int) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([[token]] * 3), past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("method", [one for one in METHODS if one != "extra-kinds"])
def test_decoding_with_kept_weights_equals_the_plain_path(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture_model("qwen3", method)
    logits: list[Tensor] = []
    for fused in (True, False):
        monkeypatch.setattr(MoALayer, "fused", fused)
        with torch.no_grad():
            cache = model(tokens(), use_cache=True).past_key_values
        logits.append(torch.cat([step(model, cache, token) for token in (5, 6, 7)], dim=1))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_kept_weights_are_made_anew_for_a_prompt_and_when_torch_sees_a_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Held against the plain path, which keeps nothing."""
    model = mixture_model("llama", "soft-moa")
    trained = [one for one in model.parameters() if one.requires_grad]
    found: list[list[Tensor]] = []
    for fused in (True, False):
        monkeypatch.setattr(MoALayer, "fused", fused)
        awaken(model)
        steps: list[Tensor] = []
        with torch.no_grad():
            steps.append(step(model, model(tokens(), use_cache=True).past_key_values, 5))
            for one in trained:
                one.data.mul_(0.5)  # behind torch's back: no version is counted
            cache = model(tokens(), use_cache=True).past_key_values
            steps.append(step(model, cache, 5))
            for one in trained:
                one.mul_(1.5)
            steps.append(step(model, cache, 6))
        found.append(steps)
    for kept, anew in zip(*found, strict=True):
        torch.testing.assert_close(kept, anew, rtol=1e-4, atol=1e-4)


def test_a_change_is_noticed_beside_a_weight_that_counts_none() -> None:
    module = nn.Linear(2, 2)
    with torch.inference_mode():
        module.bias = nn.Parameter(torch.zeros(2))
    kept = KeptWeights()
    kept.begin(module, decoding=False)
    kept.keep("key", "made")
    kept.begin(module, decoding=True)
    assert kept.find("key") == "made"
    with torch.no_grad():
        module.weight.mul_(2)
    kept.begin(module, decoding=True)
    assert kept.find("key") is None


@pytest.mark.parametrize("method", ["soft-moa", "molora"])
def test_a_training_pass_finds_weights_that_were_replaced_and_those_of_a_copied_model(method: str) -> None:
    model = mixture_model("llama", method).train()
    model(tokens())
    twin = copy.deepcopy(model)
    names = [name for name, one in twin.named_parameters() if one.requires_grad]
    for name in names:
        module, _, last = name.rpartition(".")
        setattr(
            twin.get_submodule(module), last, nn.Parameter(torch.randn_like(twin.get_parameter(name)) * 0.3)
        )
    gradients: list[list[Tensor]] = []
    for fused in (True, False):
        for _, layer in mixture_layers(twin):
            layer.fused = fused
        twin(tokens()).logits.sin().sum().backward()
        gradients.append([twin.get_parameter(name).grad.clone() for name in names])
        twin.zero_grad()
    for name, one, two in zip(names, *gradients, strict=True):
        torch.testing.assert_close(
            one, two, rtol=1e-2, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_training_drops_what_was_kept() -> None:
    model = mixture_model("llama", "soft-moa")
    mixture = mixture_layers(model)[0][1].mixtures()["default"]
    with torch.no_grad():
        step(model, model(tokens(), use_cache=True).past_key_values, 5)
    assert mixture.kept._kept
    model.train()
    assert not mixture.kept._kept
    model(tokens()).logits.sum().backward()
    assert not mixture.kept._kept


def test_another_hook_on_a_factor_of_the_mlp_keeps_the_gradients_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody's hook may replace what an MLP's module gave after it was noted; the product is then kept instead."""
    found: list[dict[str, Tensor]] = []
    for fused in (True, False):
        monkeypatch.setattr(MoALayer, "fused", fused)
        model = mixture_model("llama", "lora").train()
        blocks: Any = model.base_model.model.model.layers
        for layer in blocks:
            layer.mlp.act_fn.register_forward_hook(lambda module, args, output: output * 3)
        model(tokens()).logits.square().mean().backward()
        found.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, one in found[0].items():
        torch.testing.assert_close(one, found[1][name], rtol=1e-3, atol=1e-5)


def test_a_module_that_runs_before_its_blocks_router_is_an_error() -> None:
    from moa_peft.errors import RunError

    model = mixture_model("llama", "soft-moa")
    with pytest.raises(RunError, match="ran before the router of its block"):
        model.base_model.model.model.layers[0].mlp.down_proj(torch.randn(1, 2, 44))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_prompt_is_trained_under_autocast(family: str) -> None:
    """A k-norm gives float32 there, whatever its input."""
    model = mixture_model(family, "soft-moa").train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    for name, one in model.named_parameters():
        if "prompt" in name:
            assert one.grad is not None, name
            assert one.grad.isfinite().all(), name


def test_a_router_put_in_evaluation_by_itself_has_no_noise() -> None:
    router = RouterConfig(kind="linear", gate="top-k", keep=2, noise=True)
    expert = LoraExpert(targets=["q_proj"], num_experts=4, router=router)
    model = get_peft_model(base_model("llama"), MoAConfig(experts=[expert], router=None))
    awaken(model)
    model.train()
    assert not torch.equal(model(tokens()).logits, model(tokens()).logits)
    for _, layer in mixture_layers(model):
        layer.mixtures()["default"].copy_routers.eval()
    assert torch.equal(model(tokens()).logits, model(tokens()).logits)
