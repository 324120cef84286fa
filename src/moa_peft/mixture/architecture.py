"""Where a decoder block keeps its mixer, its MLP and their projections: read from the model, not copied from it.

A block is a mixer (attention, linear attention, a state space, a convolution), an MLP (dense or routed), or both. Layers
are found by the names of `moa_peft.mixture.families` or those that `ArchitectureConfig` gives.
"""

import dis
import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from moa_peft.errors import UsageError
from moa_peft.mixture.config import ArchitectureConfig
from moa_peft.mixture.families import (
    FUSED_ATTENTION,
    FUSED_MLP_LAYERS,
    MLP_LAYERS,
    OUTPUTS,
    POST_NORM_FAMILIES,
    PRE_NORMS,
    QKV,
    RECURRENCES,
    SHARED_EXPERTS,
    Fused,
    Recurrence,
)
from moa_peft.mixture.sites import (
    KEY_NORMS,
    MIXER_INPUT,
    MLP_INPUT,
    VALUE_NORMS,
    AttentionSite,
    Block,
    LatentAttentionSite,
    LinearSite,
    Site,
    Slot,
)

_QUERY_NORMS = ("q_norm", "q_layernorm", "query_layernorm")
_OTHER_NORMS = ("attn_sub_norm", "q_a_layernorm", "kv_a_layernorm")
"""Norms of attention that do not touch the keys that a prompt brings."""


def find_blocks(model: nn.Module, named: ArchitectureConfig | None = None) -> list[Block]:
    """Find the decoder blocks of a model and their parts.

    Args:
        model: The base model, with a transformers config; of a multimodal one the language model's blocks are found.
        named: Paths that are given rather than found; they go before the tables.

    Returns:
        One `Block` each, in order, without those that have neither a known mixer nor an MLP.

    Raises:
        UsageError: If there are no such blocks, with what to name in the config, or a part that is named is not there or has
            another size than its name says.
    """
    named = named or ArchitectureConfig()
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UsageError(
            f"{type(model).__name__} has no transformers config: give a model loaded with transformers"
        )
    is_decoder = config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(
        config, "is_decoder", 0
    )
    if config.is_encoder_decoder or not is_decoder:
        raise UsageError(
            f"{config.model_type} is an encoder, or has one beside its decoder: a mixture is for models with a decoder alone"
        )
    text = config.get_text_config()
    path = named.blocks or _blocks_path(model, text)
    blocks = dict(model.named_modules()).get(path)
    if not isinstance(blocks, nn.ModuleList):
        raise UsageError(
            f"blocks is {path!r}: the model has no list of modules of that path; it has {_lists(model)}"
        )
    if len(set(blocks)) < len(blocks):
        raise UsageError(
            f"{path} holds a block twice: a mixture is of one place in the model, and its file could not be loaded again. "
            "Give each place a block of its own, such as a copy"
        )
    _check_names(path, blocks, named)
    read = [_BlockReader(one, f"{path}.{i}", i, named, model, text).read() for i, one in enumerate(blocks)]
    known = [one for one in read if one is not None]
    if not known:
        raise UsageError(
            f"the blocks of {text.model_type} ({type(blocks[0]).__name__}) have no mixer and no MLP with known names: "
            f"{_NAME_THEM}; their parts are {', '.join(name for name, _ in blocks[0].named_children())}"
        )
    return known


def _check_names(path: str, blocks: nn.ModuleList, named: ArchitectureConfig) -> None:
    """Refuse a path that no block has; some blocks of a hybrid may lack it."""
    given = {"attention": named.attention, "mlp": named.mlp, "norm": named.norm, **named.projections}
    for name, where in {**given, **{layer: layer for layer in named.fused}}.items():
        if where is not None and all(_child(one, where) is None for one in blocks):
            parts = ", ".join(part for part, _ in blocks[0].named_children())
            raise UsageError(
                f"{name} is {where!r}: no block of {path} has a module of that path; the first has {parts}"
            )


_NAME_THEM = (
    "give MoAConfig(architecture=ArchitectureConfig(blocks=..., attention=..., mlp=..., projections={'q_proj': "
    "'path.in.block', ...}))"
)


def _lists(model: nn.Module) -> str:
    return ", ".join(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)) or "none at all"


def _blocks_path(model: nn.Module, text: Any) -> str:
    """The list of blocks of the decoder, which is the part that the model itself names; never a tower of the same depth."""
    decoder = getattr(model, "get_decoder", lambda: model)() or model
    start = next((name for name, one in model.named_modules() if one is decoder), "")
    lists = [
        f"{start}.{name}".strip(".")
        for name, one in decoder.named_modules()
        if isinstance(one, nn.ModuleList) and len(one) == getattr(text, "num_hidden_layers", None)
    ]
    if not lists:
        raise UsageError(
            f"no decoder blocks were found in {text.model_type}: {_NAME_THEM}; the model's lists are {_lists(model)}"
        )
    return min(lists, key=lambda path: path.count("."))


def _child(module: nn.Module, path: str | None) -> nn.Module | None:
    for name in path.split(".") if path else []:
        found = getattr(module, name, None)
        if not isinstance(found, nn.Module):
            return None
        module = found
    return module if path else None


@dataclass(slots=True)
class _BlockReader:
    """Finds the parts of one block; paths within the block are called ``where``."""

    block: nn.Module
    path: str
    index: int
    named: ArchitectureConfig
    model: nn.Module
    text: Any
    """The config of the language model."""

    kinds: list[str] = field(default_factory=list)
    sites: dict[str, Site] = field(default_factory=dict)
    stand_ins: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    attention: nn.Module | None = None
    reader: LinearSite | None = None
    """The first layer that reads the mixer's input."""

    def read(self) -> Block | None:
        """The block; None for one without a known part."""
        self._find_mlp(beside=self._find_mixers())
        self._take_named()
        if "attention" not in self.sites:
            self.missing.setdefault("attention", "it has no softmax attention")
        linear = (one for one in self.sites.values() if isinstance(one, LinearSite) and one.name != "mlp")
        reader = self.reader or next(linear, None)
        if reader is None:
            return None
        norm = self.named.norm or next(
            (name for name in PRE_NORMS if _child(self.block, name) is not None), None
        )
        plain = norm is None and self.text.model_type in POST_NORM_FAMILIES
        return Block(
            index=self.index,
            path=self.path,
            module=self.block,
            family=self.text.model_type,
            kind=", ".join(self.kinds) or "named parts",
            hidden_size=reader.in_features,
            attention=self.attention,
            projection_input=reader.module,
            projection_input_path=reader.path,
            block_input=reader.module if plain else _child(self.block, norm),
            block_input_path=reader.path if plain else f"{self.path}.{norm}",
            sites=self.sites,
            stand_ins={target: tuple(names) for target, names in self.stand_ins.items()},
            missing={target: why for target, why in self.missing.items() if target not in self.sites},
        )

    def _find_mixers(self) -> list[str]:
        """Find what mixes tokens; several read the block's input one after the other (Falcon-H1). Gives their names."""
        mixers: list[str] = []
        given = self.named.attention
        children = dict(self.block.named_children()) if not given else {given: _child(self.block, given)}
        for where, child in children.items():
            if child is None or (mixers and ("cross" in where or "encoder" in where)):
                continue  # beside a block's own attention, one to an encoder's tokens, which no decoder alone has
            reads = where if mixers else MIXER_INPUT
            layers = dict(child.named_children())
            fused = self._fused_layer(where, layers)
            recurrence = next((one for one in RECURRENCES if layers.keys() >= set(one.known_by)), None)
            if "kv_a_proj_with_mqa" in layers:
                self._add_latent_attention(where, child, reads)
            elif recurrence is not None and "q_proj" not in layers and not fused:
                self._add_recurrence(where, reads, recurrence)
            elif "q_proj" in layers or fused:
                self._add_attention(where, child, reads, fused)
            elif given:
                self.kinds.append("attention")
                self.attention = child
            else:
                continue
            mixers.append(where)
        return mixers

    def _fused_layer(self, attention: str, layers: Collection[str]) -> tuple[str, Fused] | None:
        """The layer that holds an attention's queries among others, and its order: as it is named, or as the family has it."""
        for layer in layers:
            order = self.named.fused.get(f"{attention}.{layer}", ())
            if "q_proj" in order:
                return layer, Fused(order=tuple(order), groups=self.named.fused_groups)
        known = FUSED_ATTENTION.get(self.text.model_type)
        return known if known is not None and known[0] in layers else None

    def _add_attention(
        self, where: str, child: nn.Module, reads: str, fused: tuple[str, Fused] | None
    ) -> None:
        crossed = "cross" in where.rpartition(".")[2]
        self.kinds.append("cross-attention" if crossed else "attention")
        sites: dict[str, LinearSite] = {}
        if fused is not None:
            name, parts = fused
            sites = self._fused(parts, f"{where}.{name}", reads, _heads(child, self.text))
        for name in QKV:
            if _child(child, name) is not None and not (crossed and name != "q_proj"):
                sites[name] = self._linear(name, f"{where}.{name}", reads)
        self.reader = self.reader or sites["q_proj"]
        self.sites |= sites
        for name in ("k_proj", "v_proj"):
            if name not in sites:
                self.missing[name] = (
                    "its keys and values are made of other tokens"
                    if crossed
                    else "it takes them from another projection or block"
                )
        self._add_output(where, child)
        if crossed:
            self.missing["attention"] = "it attends to other tokens than the text's"
            return
        keys = (sites["k_proj"], sites.get("v_proj", sites["k_proj"])) if "k_proj" in sites else None
        self._add_prompt_site(AttentionSite, where, child, reads, keys)

    def _add_latent_attention(self, where: str, child: nn.Module, reads: str) -> None:
        self.kinds.append("latent attention")
        first = "q_proj" if _child(child, "q_proj") is not None else "q_a_proj"
        query = self._linear(first, f"{where}.{first}", reads)
        key = self._linear("kv_a_proj_with_mqa", f"{where}.kv_a_proj_with_mqa", reads)
        self._add_stand_in(("q_proj",), query)
        if _child(child, "q_b_proj") is not None:
            self._add_stand_in(("q_proj",), self._linear("q_b_proj", f"{where}.q_b_proj", "q_b_proj"))
        self._add_stand_in(("k_proj", "v_proj"), key)
        self.missing["kv_b_proj"] = (
            "it expands the whole cache in each call, whose earlier tokens have no gates then"
        )
        self.reader = self.reader or query
        self._add_output(where, child)
        value = self._linear("kv_b_proj", f"{where}.kv_b_proj", "kv_b_proj")
        self._add_prompt_site(LatentAttentionSite, where, child, reads, (key, value))

    def _add_prompt_site(
        self,
        kind: type[AttentionSite],
        where: str,
        child: nn.Module,
        reads: str,
        keys: tuple[LinearSite, LinearSite] | None,
    ) -> None:
        """Note the softmax attention: as a place for prompts, with what makes keys and values, or why it is none."""
        self.attention = child
        reason = _no_prompt(self.model, child, self.text)
        if reason or keys is None:
            self.missing["attention"] = reason or "it has no keys of its own: they are another block's"
            return
        heads, key_value_heads = _heads(child, self.text)
        self.sites["attention"] = kind(
            name="attention",
            module=child,
            path=f"{self.path}.{where}",
            num_heads=heads,
            num_key_value_heads=key_value_heads,
            key=keys[0],
            value=keys[1],
            reads=reads,
        )

    def _add_recurrence(self, where: str, reads: str, known: Recurrence) -> None:
        self.kinds.append(known.name)
        for name in known.inputs:
            site = self._linear(name, f"{where}.{name}", reads)
            self._add_stand_in(QKV, site)
            self.reader = self.reader or site
        if known.output is None:
            why = f"a kernel of its {known.name} reads the layer's weight and does not call it"
            self.missing.setdefault("o_proj", why)
        else:
            output = self._linear(known.output, f"{where}.{known.output}", known.output)
            self._add_stand_in(("o_proj",), output)

    def _add_stand_in(self, targets: Sequence[str], site: LinearSite) -> None:
        self.sites[site.name] = site
        for target in targets:
            if target != site.name:
                self.stand_ins.setdefault(target, []).append(site.name)

    def _add_output(self, where: str, child: nn.Module) -> None:
        name = next((one for one in OUTPUTS if _child(child, one) is not None), None)
        if name is not None:
            self.sites["o_proj"] = self._linear("o_proj", f"{where}.{name}", "o_proj")

    def _find_mlp(self, beside: Sequence[str]) -> None:
        """Find the MLP: a dense one, else one with routed experts, else layers of the block itself."""
        children = [(name, one) for name, one in self.block.named_children() if name not in beside]
        if self.named.mlp:
            one = _child(self.block, self.named.mlp)
            if one is None:
                self.missing["mlp"] = (
                    f"its block has no module {self.named.mlp!r}; name one in ArchitectureConfig(mlp=...)"
                )
                return
            children = [(self.named.mlp, one)]
        dense = [(name, one) for name, one in children if _mlp_layers(one)]
        routed = [(name, one) for name, one in children if hasattr(one, "experts")]
        reads = MLP_INPUT
        if dense or routed or (self.named.mlp and children):
            where, inside = (dense or routed or children)[0]
            self.kinds.append("routed MLP" if not dense and routed else "MLP")
            hidden = int(self.text.hidden_size)
            self.sites["mlp"] = LinearSite(
                name="mlp",
                module=inside,
                path=f"{self.path}.{where}",
                in_features=hidden,
                out_features=hidden,
                reads=MLP_INPUT,
            )
            shared = next(
                (one for one in SHARED_EXPERTS if not dense and _child(inside, one) is not None), None
            )
            if shared is not None:
                inside, where, reads = inside.get_submodule(shared), f"{where}.{shared}", shared
        elif _mlp_layers(self.block):
            inside, where = self.block, ""
            self.kinds.append("MLP")
            self.missing["mlp"] = "the layers of its MLP are the block's own: no module holds them"
        else:
            self.missing |= dict.fromkeys((*MLP_LAYERS, "mlp"), "it has no MLP")
            return
        layers = _mlp_layers(inside)
        for target, (name, part) in layers.items():
            layer, own = f"{where}.{name}".lstrip("."), target if target == "down_proj" else reads
            if part is None:
                self.sites[target] = self._linear(target, layer, own)
            else:
                self.sites[target] = self._fused(part, layer, own, (1, 1))[target]
        if not layers:
            why = "the weights of its routed experts are stacked: no linear layer holds them"
            self.missing |= dict.fromkeys(MLP_LAYERS, why)
        elif "gate_proj" not in layers:
            self.missing["gate_proj"] = "its MLP has no gate"

    def _take_named(self) -> None:
        """Take what the config names, and check that its size is the one that the name says."""
        named, heads = self.named, _heads(self.attention or self.block, self.text)
        fused = {
            name: (layer, Fused(order=tuple(order), groups=named.fused_groups))
            for layer, order in named.fused.items()
            for name in order
        }
        for name, where in {
            **named.projections,
            **{name: layer for name, (layer, _) in fused.items()},
        }.items():
            module = _child(self.block, where)
            if module is None:
                continue
            if not hasattr(module, "weight"):
                raise UsageError(
                    f"{name} is {where!r}: {self.path}.{where} is no linear layer, but {type(module).__name__}"
                )
            reads = MIXER_INPUT if name in QKV else MLP_INPUT if name in ("gate_proj", "up_proj") else name
            if name in fused:
                site = self._fused(fused[name][1], where, reads, heads)[name]
            else:
                site = self._linear(name, where, reads)
            self._check_size(site, heads)
            self.sites[name] = site
        query = self.sites.get("q_proj")
        if query is not None and ("q_proj" in named.projections or "q_proj" in fused):
            assert isinstance(query, LinearSite)
            self.reader = query

    def _check_size(self, site: LinearSite, heads: tuple[int, int]) -> None:
        hidden = int(self.text.hidden_size)
        given = getattr(self.attention, "head_dim", None) or getattr(self.text, "head_dim", None)
        head_size = int(given or hidden // heads[0])
        reads_hidden = site.name in (*QKV, "gate_proj", "up_proj")
        writes = {
            "q_proj": heads[0] * head_size,
            "k_proj": heads[1] * head_size,
            "v_proj": heads[1] * head_size,
        }
        expected = writes.get(site.name, hidden if site.name in ("o_proj", "down_proj") else None)
        if (reads_hidden and site.in_features != hidden) or (
            expected is not None and site.out_features != expected
        ):
            raise UsageError(
                f"{site.name} is {site.path}, {site.in_features} to {site.out_features} features: {site.name} of this model has "
                f"{hidden if reads_hidden else 'any number of'} to {expected or 'any number of'}. For a layer that holds several "
                "projections give ArchitectureConfig(fused={'path.in.block': ['q_proj', 'k_proj', 'v_proj']})"
            )

    def _linear(self, name: str, where: str, reads: str) -> LinearSite:
        module = self.block.get_submodule(where)
        inputs, outputs = _features(module)
        return LinearSite(
            name=name,
            module=module,
            path=f"{self.path}.{where}",
            in_features=inputs,
            out_features=outputs,
            reads=reads,
        )

    def _fused(self, fused: Fused, where: str, reads: str, heads: tuple[int, int]) -> dict[str, LinearSite]:
        """The projections that a layer holds, by name."""
        whole = self._linear("", where, reads)
        shares = {"q_proj": heads[0], "k_proj": heads[1], "v_proj": heads[1]}
        counts = {"layer": 1, "head": heads[0], "key_value_head": heads[1]}
        groups = counts[fused.groups] if isinstance(fused.groups, str) else fused.groups
        every = [shares.get(name, 1) for name in fused.order]
        sizes = [whole.out_features * share // sum(every) // groups for share in every]
        return {
            name: replace(
                whole,
                name=name,
                out_features=groups * sizes[i],
                slot=Slot(
                    groups=groups, width=whole.out_features // groups, start=sum(sizes[:i]), size=sizes[i]
                ),
            )
            for i, name in enumerate(fused.order)
        }


def _mlp_layers(module: nn.Module | None) -> dict[str, tuple[str, Fused | None]]:
    """The layers of a dense MLP: for each target the layer's name, and its part where it is fused; none for another module."""
    layers = {} if module is None else {n: m for n, m in module.named_children() if _is_linear(m)}
    down = next((name for name in MLP_LAYERS["down_proj"] if name in layers), None)
    if down is None:
        return {}
    found: dict[str, tuple[str, Fused | None]] = {}
    for target in ("gate_proj", "up_proj"):
        fused = next((name for name in FUSED_MLP_LAYERS if name in layers), None)
        plain = next((name for name in MLP_LAYERS[target] if name in layers), None)
        if fused is not None:
            found[target] = (fused, Fused(order=("gate_proj", "up_proj")))
        elif plain is not None:
            found[target] = (plain, None)
    return {**found, "down_proj": (down, None)} if "up_proj" in found else {}


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    # three dimensions where routed experts are stacked; one under ZeRO-3
    return isinstance(weight, Tensor) and weight.dim() != 3


def _no_prompt(model: nn.Module, attention: nn.Module, text: Any) -> str:
    """Why a prompt cannot be attended to, or nothing."""
    can_set: Callable[[], bool] = getattr(model, "_can_set_attn_implementation", lambda: False)
    forward = inspect.unwrap(type(attention).forward)
    if not (
        hasattr(attention, "config")
        and "ALL_ATTENTION_FUNCTIONS"
        in forward.__code__.co_names  # linear attention with a softmax attention's names
        and hasattr(sys.modules[type(attention).__module__], "eager_attention_forward")
        and can_set()
    ):
        return "its attention does not go through transformers' attention interface"
    lookups = sum(one.argval == "_attn_implementation" for one in dis.get_instructions(forward))
    if lookups > 1 and "reorder_and_upcast_attn" not in forward.__code__.co_names:
        return "its mask depends on the name of the attention implementation, which a prompt replaces"  # DeepSeek V3.2
    if getattr(text, "reorder_and_upcast_attn", False):
        return "reorder_and_upcast_attn computes attention outside transformers' attention interface"
    known = (*KEY_NORMS, *VALUE_NORMS, *_QUERY_NORMS, *_OTHER_NORMS)
    for name, child in attention.named_children():
        if "norm" in name and (name not in known or any(True for _ in child.children())):
            return f"its attention has a norm {name!r} of a kind that is not known here"
    return ""


def _heads(attention: nn.Module, text: Any) -> tuple[int, int]:
    """Heads of the queries, and of keys and values."""
    layers, index = getattr(text, "per_layer_config", None), getattr(attention, "layer_idx", None)
    if layers is not None and index is not None:
        text = layers[index]  # Gemma 4: the number is not the same in every block

    def first(*names: str) -> int | None:
        sources = [(attention, name) for name in names] + [(text, name) for name in names]
        return next(
            (int(one) for source, name in sources if isinstance(one := getattr(source, name, None), int)),
            None,
        )

    key_value_heads = first("num_key_value_heads", "num_kv_heads", "kv_heads")
    heads = first("num_attention_heads", "num_heads") or 1
    return heads, key_value_heads or heads


_SIZES = (("in_features", "out_features"), ("nx", "nf"), ("input_size", "output_size"))
"""What linear layers call their sizes: torch's, transformers' Conv1D, vLLM's."""


def _features(module: Any) -> tuple[int, int]:
    names = next((names for names in _SIZES if hasattr(module, names[0])), None)
    if names is None:
        raise UsageError(f"{type(module).__name__} is no linear layer whose sizes are known: {_NAME_THEM}")
    return int(getattr(module, names[0])), int(getattr(module, names[1]))
