"""What the tests of single kinds of experts share: sites to put them at, and models that carry nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from moa_peft import ExpertConfig, MoAConfig, RouterConfig, mixture_layers
from moa_peft.mixture.sites import LinearSite, Slot
from tiny import awaken, base_model, tokens

LAYERS = ("linear", "unbiased", "conv1d")


def layer(kind: str, inputs: int, outputs: int) -> nn.Module:
    """A frozen layer with random weights and, but for "unbiased", a random bias."""
    if kind == "conv1d":
        module: nn.Module = Conv1D(outputs, inputs)
        nn.init.normal_(module.bias)
    else:
        module = nn.Linear(inputs, outputs, bias=kind == "linear")
    return module.requires_grad_(False)


def matrix(module: Any) -> Tensor:
    """The layer's weight [D_out, D_in], float64."""
    return (module.weight.T if isinstance(module, Conv1D) else module.weight).double()


def site(module: nn.Module, inputs: int, outputs: int, name: str = "q_proj", slot: Slot | None = None) -> LinearSite:  # fmt: skip
    return LinearSite(
        name=name, module=module, path=f"x.{name}", in_features=inputs, out_features=outputs, slot=slot
    )


def randomise(module: nn.Module, seed: int = 3) -> None:
    """Give every trainable parameter a random value."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def inputs(rows: int, length: int, size: int, seed: int = 4) -> Tensor:
    return torch.randn(rows, length, size, generator=torch.Generator().manual_seed(seed))


def gates(rows: int, length: int, seed: int = 5) -> Tensor:
    return torch.rand(rows, length, 1, generator=torch.Generator().manual_seed(seed))


def model_with(
    experts: Sequence[ExpertConfig],
    *,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    router: RouterConfig | None = None,
    awake: bool = False,
    autocast: bool = True,
) -> PeftModel:
    """A tiny model that carries these experts, without a router unless one is given."""
    base, config = base_model(family, dtype), MoAConfig(experts=list(experts), router=router)
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast)
    assert isinstance(model, PeftModel)
    if awake:
        awaken(model)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(tokens()).logits


def experts_of(model: nn.Module) -> dict[str, Any]:
    """Every expert of a model by block and name."""
    return {
        f"{index}.{name}": expert
        for index, (_, tuned) in enumerate(mixture_layers(model))
        for name, expert in tuned.mixtures()["default"].experts.items()
    }


def by_path(model: nn.Module) -> dict[str, Any]:
    """Every expert by the path of the module it works at; for models with one expert a module."""
    return {
        place.site.path: tuned.mixtures()["default"].experts[place.name]
        for _, tuned in mixture_layers(model)
        for place in tuned.mixtures()["default"].places
    }


def parameters_that_never_moved(experts: Sequence[ExpertConfig], family: str = "llama") -> list[str]:
    """Train a fresh model under a router for three steps and name what stayed."""
    model = model_with(experts, family=family, router=RouterConfig(kind="linear"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = tokens()
    for _ in range(3):
        optimiser.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    assert all(p.isfinite().all() for p in model.parameters())
    return [n for n, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[n])]


def ways_of_loading_that_differ(experts: Sequence[ExpertConfig], folder: Path) -> list[str]:
    """Save a model and load it in every way there is; name the ways whose logits are not bit-equal."""
    base_model("llama").save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, MoAConfig(experts=list(experts), router=RouterConfig(kind="linear")))
    awaken(model)
    expected = logits(model)
    model.save_pretrained(folder / "adapter")
    loaded: dict[str, nn.Module] = {"transformers": AutoModelForCausalLM.from_pretrained(folder / "adapter")}
    for low in (False, True):
        loaded[f"low_cpu_mem_usage={low}"] = PeftModel.from_pretrained(
            base_model("llama"), folder / "adapter", adapter_name="other", low_cpu_mem_usage=low
        )
    return [way for way, again in loaded.items() if not torch.equal(logits(again), expected)]


class Scaled8Bit(nn.Module):
    """A layer that keeps whole numbers and a scale, as quantised ones do, and hides its weight from those who do not ask."""

    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = module.in_features, module.out_features, module.bias
        self.scale = module.weight.abs().max() / 127
        self.W_q = (module.weight / self.scale).round().to(torch.int8)  # the name by which PEFT knows HQQ

    def dequantize(self) -> Tensor:
        return self.W_q * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantize(), self.bias)
