"""`lora` through the mixture is PEFT's LoRA."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from moa_peft import LoraExpert, MoAConfig, mixture_layers
from moa_peft.mixture.presets import PAPER_TARGETS
from tiny import base_model, tokens

Weights = dict[tuple[int, str, str], nn.Parameter]


def ours(family: str, *, rslora: bool) -> tuple[PeftModel, Weights]:
    experts = [LoraExpert(targets=PAPER_TARGETS, rank=16, alpha=16, rslora=rslora)]
    model = get_peft_model(base_model(family), MoAConfig.preset("lora", experts=experts))
    assert isinstance(model, PeftModel)
    found: Weights = {}
    for _, layer in mixture_layers(model):
        for name, parameter in layer.mixtures()["default"].named_parameters():
            _, expert, letter = name.split(".")
            found[layer.block.index, expert.removeprefix("lora_"), letter] = parameter
    return model, found


def theirs(family: str, *, rslora: bool) -> tuple[PeftModel, Weights]:
    config = LoraConfig(
        r=16, lora_alpha=16, target_modules=list(PAPER_TARGETS), task_type="CAUSAL_LM", use_rslora=rslora
    )
    model = get_peft_model(base_model(family), config)
    assert isinstance(model, PeftModel)
    found: Weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            block = int(parts[parts.index("layers") + 1])
            letter = parts[-3].removeprefix("lora_")
            found[block, parts[-4], letter] = parameter
    return model, found


def train(model: nn.Module, optimiser: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    model.train()
    for ids in batches:
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()


@pytest.mark.parametrize(
    ("family", "rslora", "optimiser", "rate", "limit"),
    [
        ("llama", False, torch.optim.SGD, 0.1, 1e-6),
        ("qwen3", False, torch.optim.SGD, 0.1, 1e-6),
        ("llama", False, torch.optim.AdamW, 1e-3, 1e-5),
        ("qwen3", False, torch.optim.AdamW, 1e-3, 1e-5),
        (
            "llama",
            True,
            torch.optim.SGD,
            0.1 / 16,
            1e-6,
        ),  # its gradients are 4 times as large, and so their effect
    ],
)
def test_after_twenty_steps_the_weights_are_those_of_pefts_lora(
    family: str, rslora: bool, optimiser: type[torch.optim.Optimizer], rate: float, limit: float
) -> None:
    (model, mixed), (reference, plain) = ours(family, rslora=rslora), theirs(family, rslora=rslora)
    assert mixed.keys() == plain.keys()
    with torch.no_grad():
        for place, parameter in plain.items():
            mixed[place].copy_(parameter)
    start = {place: parameter.detach().clone() for place, parameter in plain.items()}
    batches = [tokens(4, 12, seed=seed) for seed in range(20)]
    for one in (model, reference):
        trained = [p for p in one.parameters() if p.requires_grad]
        train(one, optimiser(trained, lr=rate), batches)
    moved = max((plain[place] - start[place]).abs().max().item() for place in plain)
    apart = max((plain[place] - mixed[place]).abs().max().item() for place in plain)
    assert moved > 1e-2
    assert apart <= limit
