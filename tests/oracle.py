"""The definition of a mixture, one token and one expert at a time. Slow, and obviously right.

It knows the families only from the table in `tiny`, shares no arithmetic with the package, and runs in any dtype.
"""

import math
import sys
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from moa_peft import MoAConfig, RouterConfig, mixture_layers
from moa_peft.architecture import Block
from tiny import FAMILIES, TinyFamily, base_model


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


class BlockOracle:
    """One block of the definition."""

    def __init__(
        self, weights: dict[str, Tensor], names: tuple[str, ...], config: MoAConfig, tiny: TinyFamily
    ) -> None:
        self.weights = weights
        self.names = names
        self.config = config
        self.tiny = tiny
        self.gates: Tensor = torch.empty(0)

    def route(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        self.gates = x.new_zeros(*x.shape[:2], len(self.names))
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                self.gates[b, t] = self.gate(x[b, t])

    def gate(self, x: Tensor) -> Tensor:
        w, router = self.weights, self.config.router
        assert isinstance(router, RouterConfig)
        if router.kind == "linear":
            logits = w["router.logits.linear.weight"] @ x + w["router.logits.linear.bias"]
        else:
            a = w["router.logits.w1.weight"] @ x + w["router.logits.w1.bias"]
            b = w["router.logits.w3.weight"] @ x + w["router.logits.w3.bias"]
            logits = w["router.logits.w2.weight"] @ (silu(a) * b) + w["router.logits.w2.bias"]
        scores = sigmoid(logits)
        if router.threshold is None:
            return scores
        assert router.threshold.maximum is not None
        gamma = router.threshold.maximum * sigmoid(
            w["router.threshold.weight"][0] @ x + w["router.threshold.bias"][0]
        )
        best = int(scores.argmax())
        kept = [s if s >= gamma or i == best else torch.zeros_like(s) for i, s in enumerate(scores)]
        return torch.stack(kept)

    def column(self, b: int, t: int, name: str) -> Tensor:
        return self.gates[b, t, self.names.index(name)]

    def add_lora(self, path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, output = args[0], output.clone()
        for target, where in self.tiny.paths.items():
            name = f"lora_{target}"
            if where != path or name not in self.names:
                continue
            rows = self.rows(target, path, output.shape[-1])
            a, b_weight = self.weights[f"experts.{name}.A"], self.weights[f"experts.{name}.B"]
            expert = next(e for e in self.config.experts if target in getattr(e, "targets", ()))
            scale = expert.alpha / expert.rank
            for b in range(x.shape[0]):
                for t in range(x.shape[1]):
                    output[b, t, rows] += self.column(b, t, name) * scale * (b_weight @ (a @ x[b, t]))
        return output

    def rows(self, target: str, path: str, outputs: int) -> list[int]:
        """The rows of the layer's output that belong to one projection."""
        order = self.tiny.fused.get(path, (target,))
        heads = 4
        share = {"k_proj": self.tiny.settings.get("num_key_value_heads", heads)}
        share["v_proj"] = share["k_proj"]
        sizes = [int(share.get(name, heads)) for name in order]
        if self.tiny.per_head:
            size = outputs // heads // 3
            start = order.index(target) * size
            if path in self.tiny.fused:
                return [h * 3 * size + start + i for h in range(heads) for i in range(size)]
        unit = outputs // sum(sizes)
        start = unit * sum(sizes[: order.index(target)])
        return list(range(start, start + unit * sizes[order.index(target)]))

    def add_adapter(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, output, w = args[0], output.clone(), self.weights
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                inner = silu(
                    w["experts.parallel_adapter.down.weight"] @ x[b, t]
                    + w["experts.parallel_adapter.down.bias"]
                )
                up = w["experts.parallel_adapter.up.weight"] @ inner + w["experts.parallel_adapter.up.bias"]
                output[b, t] += self.column(b, t, "parallel_adapter") * up
        return output

    def add_prompt(
        self, block: nn.Module, attention: nn.Module, query: Tensor, scaling: float, out: Tensor
    ) -> Tensor:
        """query [B, H, T, D], out [B, T, H, D]."""
        vectors = self.weights["experts.prompt.vectors"]
        size = query.shape[-1]
        kv: dict[str, Tensor] = {}
        for target in ("k_proj", "v_proj"):
            layer = block.get_submodule(self.tiny.paths[target])
            whole = layer.forward(vectors)
            kv[target] = whole[:, self.rows(target, self.tiny.paths[target], whole.shape[-1])]
        norm = getattr(attention, "k_norm", None)
        if norm is not None:
            per_head = norm.weight.numel() == size
            keys = kv["k_proj"].view(len(vectors), -1, size) if per_head else kv["k_proj"]
            kv["k_proj"] = norm(keys).reshape(len(vectors), -1)
        heads_per_key = query.shape[1] * size // kv["k_proj"].shape[1]
        out = out.clone()
        for b in range(query.shape[0]):
            for h in range(query.shape[1]):
                columns = slice(h // heads_per_key * size, (h // heads_per_key + 1) * size)
                keys, values = kv["k_proj"][:, columns], kv["v_proj"][:, columns]
                for t in range(query.shape[2]):
                    weight = torch.exp(keys @ query[b, h, t] * scaling)
                    attended = values.T @ (weight / weight.sum())
                    out[b, t, h] += (
                        self.column(b, t, "prompt") * self.weights["experts.prompt.head_scale"][h] * attended
                    )
        return out


def oracle_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    eager = sys.modules[type(module).__module__].eager_attention_forward
    out, weights = eager(module, query, key, value, mask, **kwargs)
    hold = module.__dict__.get("oracle")
    if hold is not None:
        scaling = kwargs.get("scaling") or 1 / math.sqrt(query.shape[-1])
        out = hold[0].add_prompt(hold[1], module, query, scaling, out)
    return out, weights


AttentionInterface.register("oracle", oracle_attention)
AttentionMaskInterface.register("oracle", eager_mask)


@torch.no_grad()
def oracle_run(
    family: str, model: PeftModel, ids: Tensor, dtype: torch.dtype, base: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """What the definition says: the logits, and which experts are on in each block [B, T, E].

    Weights have ``base`` precision, the arithmetic is in ``dtype``.
    """
    blocks: list[BlockOracle] = []
    tiny = FAMILIES[family]
    plain = base_model(family, base, attention="oracle")
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(dtype)
    config = model.peft_config["default"]
    assert isinstance(config, MoAConfig)
    assert isinstance(config.router, RouterConfig)
    for _, layer in mixture_layers(model):
        block_info: Block = layer.block
        mixture = layer.mixtures()["default"]
        weights = {name: p.detach().to(dtype) for name, p in mixture.named_parameters()}
        one = BlockOracle(weights, mixture.names, config, tiny)
        blocks.append(one)
        block = plain.get_submodule(block_info.path)
        entry = tiny.paths["q_proj"] if config.router.router_input == "projection" else tiny.block_norm
        block.get_submodule(entry or tiny.paths["q_proj"]).register_forward_pre_hook(one.route)
        for path in dict.fromkeys(tiny.paths.values()):
            block.get_submodule(path).register_forward_hook(partial(one.add_lora, path))
        if "parallel_adapter" in one.names:
            block.get_submodule("mlp").register_forward_hook(one.add_adapter)
        if "prompt" in one.names:
            block.get_submodule(tiny.attention).__dict__["oracle"] = (one, block)
    return plain(ids).logits, [one.gates > 0 for one in blocks]
