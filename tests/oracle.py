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
from moa_peft.mixture.sites import Block
from tiny import FAMILIES, TinyFamily, base_model


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def softmax(logits: Tensor) -> Tensor:
    shares = torch.exp(logits - logits.max())
    return shares / shares.sum()


def sparsegen(logits: Tensor, concentration: Tensor) -> Tensor:
    """The weights whose experts' logits lie above tau: the largest set that is consistent with its own tau."""
    order = sorted(range(len(logits)), key=lambda i: -float(logits[i]))
    tau = logits[order[0]]
    for size in range(len(logits), 0, -1):
        tau = (sum(logits[i] for i in order[:size]) - (1 - concentration)) / size
        if logits[order[size - 1]] > tau:
            break
    return torch.stack([torch.clamp((one - tau) / (1 - concentration), min=0) for one in logits])


class RouterOracle:
    """One router of the definition, for one token."""

    def __init__(self, weights: dict[str, Tensor], prefix: str, config: RouterConfig) -> None:
        self.weights = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
        self.config = config

    def product(self, name: str, x: Tensor) -> Tensor:
        out = self.weights[f"{name}_weight"] @ x
        return out + self.weights[f"{name}_bias"] if f"{name}_bias" in self.weights else out

    def logits(self, x: Tensor) -> Tensor:
        if self.config.kind == "linear":
            return self.product("logits.linear", x)
        return self.product("logits.w2", silu(self.product("logits.w1", x)) * self.product("logits.w3", x))

    def gate(self, x: Tensor) -> Tensor:
        logits = self.logits(x)
        match self.config.gate:
            case "sigmoid":
                return self.sigmoid_gates(sigmoid(logits), x)
            case "softmax":
                return softmax(logits)
            case "top-k":
                best = sorted(range(len(logits)), key=lambda i: -float(logits[i]))[: self.config.keep]
                shares = softmax(logits[best])
                return torch.stack(
                    [
                        shares[best.index(i)] if i in best else torch.zeros_like(shares[0])
                        for i in range(len(logits))
                    ]
                )
            case "threshold":
                threshold = sigmoid(self.product("gate.threshold", x)[0]) / len(logits)
                above = torch.clamp(softmax(logits) - threshold, min=0)
                return above / above.sum()
            case "sparsegen":
                shifted = self.product("gate.concentration", x)[0] + math.log(math.exp(0.9) - 1)
                return sparsegen(logits, 0.9 - torch.log(1 + torch.exp(shifted)))
        raise AssertionError(f"no definition of gate {self.config.gate}")

    def sigmoid_gates(self, scores: Tensor, x: Tensor) -> Tensor:
        threshold = self.config.threshold
        if threshold is None:
            return scores
        assert threshold.maximum is not None
        gamma = threshold.maximum * sigmoid(self.product("gate.threshold", x)[0])
        best = int(scores.argmax())
        kept = [s if s >= gamma or i == best else torch.zeros_like(s) for i, s in enumerate(scores)]
        return torch.stack(kept)


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
        self.projection_input: Tensor = torch.empty(0)
        self.active: set[tuple[str, int, int, int]] = set()  # router, row, token, expert

    def saw(self, router: str, b: int, t: int, gates: Tensor) -> Tensor:
        """Note which experts are on."""
        self.active |= {(router, b, t, e) for e, one in enumerate(gates) if one > 0}
        return gates

    def expert(self, name: str) -> Any:
        """The config of the expert of that name."""
        kind = "lora" if name.startswith("lora_") else name
        return next(
            e
            for e in self.config.experts
            if e.kind == kind and (kind != "lora" or name.removeprefix("lora_") in e.targets)
        )

    def note(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.projection_input = args[0]

    def route(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, router = args[0], self.config.router
        if router is None:
            return
        assert isinstance(router, RouterConfig)
        one = RouterOracle(self.weights, "router.", router)
        rows = []
        for b in range(x.shape[0]):
            mean = sum(x[b, t] for t in range(x.shape[1])) / x.shape[1]
            instance = router.granularity == "instance"
            gates = [one.gate(mean if instance else x[b, t]) for t in range(x.shape[1])]
            rows.append(torch.stack([self.saw("", b, t, gate) for t, gate in enumerate(gates)]))
        self.gates = torch.stack(rows)

    def column(self, b: int, t: int, name: str) -> Tensor:
        router = self.config.router
        if router is None:
            return torch.ones((), dtype=self.weights[next(iter(self.weights))].dtype)
        assert isinstance(router, RouterConfig)
        if router.gate_of == "expert":
            return self.gates[b, t, self.names.index(name)]
        kinds = list(dict.fromkeys(one.kind for one in self.config.experts))
        return self.gates[b, t, kinds.index(self.expert(name).kind)]

    def copies(self, b: int, t: int, name: str, x: Tensor) -> list[Tensor]:
        """The gate of each copy of one expert: the block's times the copy's own."""
        router, gate = self.expert(name).router, self.column(b, t, name)
        if router is None:
            return [gate]
        weights = RouterOracle(self.weights, f"copy_routers.{name}.", router).gate(x)
        return [gate * one for one in self.saw(name, b, t, weights)]

    def add_lora(self, path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, output = args[0], output.clone()
        for target, where in self.tiny.paths.items():
            name = f"lora_{target}"
            if where != path or name not in self.names:
                continue
            rows = self.rows(target, path, output.shape[-1])
            a, b_weight = self.weights[f"experts.{name}.A"], self.weights[f"experts.{name}.B"]
            expert = self.expert(name)
            scale, rank = expert.alpha / expert.rank, expert.rank
            for b in range(x.shape[0]):
                for t in range(x.shape[1]):
                    for n, gate in enumerate(self.copies(b, t, name, x[b, t])):
                        own = slice(n * rank, (n + 1) * rank)
                        down = a if expert.shared else a[own]
                        output[b, t, rows] += gate * scale * (b_weight[:, own] @ (down @ x[b, t]))
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
        x, output = args[0], output.clone()
        w = {k.removeprefix("experts.parallel_adapter."): one for k, one in self.weights.items()}
        expert = self.expert("parallel_adapter")
        size, copies = expert.size, expert.num_experts
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                for n, gate in enumerate(self.copies(b, t, "parallel_adapter", x[b, t])):
                    own = slice(n * size, (n + 1) * size)
                    read = slice(0, size) if expert.shared else own
                    inner = silu(w["down_weight"][read] @ x[b, t] + w["down_bias"][read])
                    output[b, t] += gate * (w["up_weight"][:, own] @ inner + w["up_bias"][n::copies])
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
                    share = softmax(keys @ query[b, h, t] * scaling)
                    length = self.expert("prompt").length
                    head_scale = self.weights["experts.prompt.head_scale"][h]
                    for n, gate in enumerate(self.copies(b, t, "prompt", self.projection_input[b, t])):
                        own = slice(n * length, (n + 1) * length)
                        out[b, t, h] += gate * head_scale * (values[own].T @ share[own])
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
) -> tuple[Tensor, list[set[tuple[str, int, int, int]]]]:
    """What the definition says: the logits, and for each block which experts are on (router, row, token, expert).

    Weights have ``base`` precision, the arithmetic is in ``dtype``.
    """
    blocks: list[BlockOracle] = []
    tiny = FAMILIES[family]
    plain = base_model(family, base, attention="oracle")
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(dtype)
    config = model.peft_config["default"]
    assert isinstance(config, MoAConfig)
    router = config.router or RouterConfig()
    assert isinstance(router, RouterConfig)
    for _, layer in mixture_layers(model):
        block_info: Block = layer.block
        mixture = layer.mixtures()["default"]
        weights = {name: p.detach().to(dtype) for name, p in mixture.named_parameters()}
        one = BlockOracle(weights, mixture.names, config, tiny)
        blocks.append(one)
        block = plain.get_submodule(block_info.path)
        block.get_submodule(tiny.paths["q_proj"]).register_forward_pre_hook(one.note)
        entry = tiny.paths["q_proj"] if router.router_input == "projection" else tiny.block_norm
        block.get_submodule(entry or tiny.paths["q_proj"]).register_forward_pre_hook(one.route)
        for path in dict.fromkeys(tiny.paths.values()):
            block.get_submodule(path).register_forward_hook(partial(one.add_lora, path))
        if "parallel_adapter" in one.names:
            block.get_submodule("mlp").register_forward_hook(one.add_adapter)
        if "prompt" in one.names:
            block.get_submodule(tiny.attention).__dict__["oracle"] = (one, block)
    return plain(ids).logits, [one.active for one in blocks]
