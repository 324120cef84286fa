"""Parameter groups: a learning rate and a weight decay for each role that a trained weight plays."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from moa_peft.errors import UsageError
from moa_peft.mixture.experts.base import AttentionExpert, LinearExpert
from moa_peft.mixture.router import Router

GROUPS = ("weights", "lora_b", "router", "undecayed")
"""Names of the groups: matrices of experts and whatever else is trained; B of LoRA; routers; what decay must not shrink."""


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    router_lr_factor: float = 1.0,
    lora_b_lr_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of a model for an optimizer of torch.

    Routers, biases, thresholds, prompts and scales are not decayed: a gate that decays drifts to its initial value
    whatever the data say. The optimizer is then built on the groups:

        torch.optim.AdamW(parameter_groups(model, learning_rate=1e-3, weight_decay=0.02, router_lr_factor=10))

    Under transformers' Trainer, pass it as ``optimizers=(optimizer, None)``, the scheduler keeps the ratios; where FSDP
    wraps the model first, override `Trainer.get_optimizer_cls_and_kwargs`, as `moa_peft.training.trainer` does.

    Args:
        model: The model with its mixture, wrapped or not; other trained parameters count as ``weights``.
        learning_rate: Of everything that no factor concerns.
        weight_decay: Of ``weights`` and ``lora_b``.
        router_lr_factor: Times the learning rate for routers with their gates' thresholds; above 0.
        lora_b_lr_factor: Times the learning rate for the B of LoRA and DoRA; above 0.

    Returns:
        The groups that hold parameters, in the order of `GROUPS`: ``name``, ``params`` (pairs of name and parameter),
        ``lr`` and ``weight_decay`` each. Every trainable parameter is in exactly one.

    Raises:
        UsageError: If a factor is not above 0.

    Source: LoRA+, arXiv 2402.12354, for the factor on B; no decay and a larger rate on gates: DISeL, arXiv 2605.19028.
    """
    for name, factor in (("router_lr_factor", router_lr_factor), ("lora_b_lr_factor", lora_b_lr_factor)):
        if not 0 < factor < float("inf"):
            raise UsageError(f"{name} is {factor}: give a number above 0, 1 for the learning rate itself")
    rates = {"lora_b": lora_b_lr_factor, "router": router_lr_factor}
    groups: dict[str, dict[str, Any]] = {
        name: {
            "name": name,
            "params": [],
            "lr": learning_rate * rates.get(name, 1.0),
            "weight_decay": weight_decay if name in ("weights", "lora_b") else 0.0,
        }
        for name in GROUPS
    }
    roles = dict(_roles(model))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = roles.get(id(parameter)) or ("undecayed" if _is_undecayed(name) else "weights")
        groups[role]["params"].append((name, parameter))
    return [one for one in groups.values() if one["params"]]


def _roles(model: nn.Module) -> Iterator[tuple[int, str]]:
    """The role of each parameter of experts and routers, by its identity."""
    for module in model.modules():
        if isinstance(module, Router):
            yield from ((id(one), "router") for one in module.parameters())
        elif isinstance(module, LinearExpert | AttentionExpert):
            for name, parameter in module.named_parameters():
                undecayed = name in module.undecayed or _is_undecayed(name)
                yield (
                    id(parameter),
                    "undecayed" if undecayed else "lora_b" if name in module.lora_b else "weights",
                )


def _is_undecayed(name: str) -> bool:
    """Whether weight decay passes over a parameter by its name, as transformers' Trainer has it: biases and norms."""
    return "bias" in name or "norm" in name
