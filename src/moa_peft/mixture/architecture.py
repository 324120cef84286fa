"""Where a decoder block keeps its mixer, its MLP and their projections: read from the model, not copied from it.

A block is a mixer (attention, linear attention, a state space, a convolution), an MLP (dense or routed), or both. Layers
are found by the names of `moa_peft.mixture.families` or those that `ArchitectureConfig` gives.
"""

import dis
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class _Found:
    """What has been found of a block so far."""

    kinds: list[str] = field(default_factory=list)
    sites: dict[str, Site] = field(default_factory=dict)
    stand_ins: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    attention: nn.Module | None = None
    reader: LinearSite | None = None
    """The first layer that reads the mixer's input."""

    def stand_in(self, targets: Sequence[str], site: LinearSite) -> None:
        self.sites[site.name] = site
        for target in targets:
            if target != site.name:
                self.stand_ins.setdefault(target, []).append(site.name)


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
    found = [_block(model, f"{path}.{i}", i, one, named, text) for i, one in enumerate(blocks)]
    known = [one for one in found if one is not None]
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


def _block(
    model: nn.Module, path: str, index: int, module: nn.Module, named: ArchitectureConfig, text: Any
) -> Block | None:
    found = _Found()
    mixers = _find_mixers(module, path, found, named, model, text)
    _find_mlp(module, path, found, named, text, beside=mixers)
    _name_sites(module, path, found, named, text)
    if "attention" not in found.sites and "attention" not in found.missing:
        found.missing["attention"] = "it has no softmax attention"
    reader = found.reader or next(
        (one for one in found.sites.values() if isinstance(one, LinearSite) and one.name != "mlp"), None
    )
    if reader is None:
        return None
    norm = named.norm or next((name for name in PRE_NORMS if _child(module, name) is not None), None)
    plain = norm is None and text.model_type in POST_NORM_FAMILIES
    return Block(
        index=index,
        path=path,
        module=module,
        family=text.model_type,
        kind=", ".join(found.kinds) or "named parts",
        hidden_size=reader.in_features,
        attention=found.attention,
        projection_input=reader.module,
        projection_input_path=reader.path,
        block_input=reader.module if plain else _child(module, norm),
        block_input_path=reader.path if plain else f"{path}.{norm}",
        sites=found.sites,
        stand_ins={target: tuple(names) for target, names in found.stand_ins.items()},
        missing={target: why for target, why in found.missing.items() if target not in found.sites},
    )


def _find_mixers(
    block: nn.Module, path: str, found: _Found, named: ArchitectureConfig, model: nn.Module, text: Any
) -> list[str]:
    """Find what mixes tokens in a block; several read its input one after the other (Falcon-H1). Gives their names."""
    mixers: list[str] = []
    named_one = _child(block, named.attention)
    if named.attention:
        children = [] if named_one is None else [(named.attention, named_one)]
    else:
        children = list(block.named_children())
    for name, child in children:
        if mixers and ("cross" in name or "encoder" in name):
            continue  # beside a block's own attention, one to an encoder's tokens, which no decoder alone has
        reads = name if mixers else MIXER_INPUT
        layers = dict(child.named_children())
        fused = _fused_layer(name, layers, named, text)
        recurrence = next(
            (one for one in RECURRENCES if all(layer in layers for layer in one.known_by)), None
        )
        if "kv_a_proj_with_mqa" in layers:
            _latent_attention(child, f"{path}.{name}", found, reads, model, text)
        elif recurrence is not None and "q_proj" not in layers and not fused:
            _recurrence(child, f"{path}.{name}", found, reads, recurrence)
        elif "q_proj" in layers or fused:
            _attention(child, f"{path}.{name}", found, reads, model, text, fused)
        elif named.attention:
            found.kinds.append("attention")
            found.attention = child
        else:
            continue
        mixers.append(name)
    return mixers


def _fused_layer(
    attention: str, layers: Mapping[str, nn.Module], named: ArchitectureConfig, text: Any
) -> tuple[str, Fused] | None:
    """The layer that holds an attention's queries among others, and its order: as it is named, or as the family has it."""
    for layer in layers:
        order = named.fused.get(f"{attention}.{layer}", ())
        if "q_proj" in order:
            return layer, Fused(order=tuple(order), groups=named.fused_groups)
    known = FUSED_ATTENTION.get(text.model_type)
    return known if known is not None and known[0] in layers else None


def _attention(
    child: nn.Module,
    path: str,
    found: _Found,
    reads: str,
    model: nn.Module,
    text: Any,
    fused: tuple[str, Fused] | None,
) -> None:
    layers = dict(child.named_children())
    crossed = "cross" in path.rpartition(".")[2]
    found.kinds.append("cross-attention" if crossed else "attention")
    sites: dict[str, LinearSite] = {}
    if fused is not None:
        name, parts = fused
        sites = _fused_sites(parts, layers[name], f"{path}.{name}", reads, _heads(child, text))
    for name in QKV:
        if name in layers and not (crossed and name != "q_proj"):
            sites[name] = _linear(name, layers[name], f"{path}.{name}", reads)
    found.reader = found.reader or sites["q_proj"]
    found.sites |= sites
    for name in ("k_proj", "v_proj"):
        if name not in sites:
            found.missing[name] = (
                "its keys and values are made of other tokens"
                if crossed
                else "it takes them from another projection or block"
            )
    _output(child, path, found)
    if crossed:
        found.missing["attention"] = "it attends to other tokens than the text's"
        return
    keys = (sites["k_proj"], sites.get("v_proj", sites["k_proj"])) if "k_proj" in sites else None
    _softmax(AttentionSite, child, path, found, reads, model, text, keys)


def _softmax(
    kind: type[AttentionSite],
    child: nn.Module,
    path: str,
    found: _Found,
    reads: str,
    model: nn.Module,
    text: Any,
    keys: tuple[LinearSite, LinearSite] | None,
) -> None:
    """Note a block's softmax attention: as a place for prompts, with what makes keys and values, or why it is none."""
    found.attention = child
    reason = _no_prompt(model, child, text)
    if reason or keys is None:
        found.missing["attention"] = reason or "it has no keys of its own: they are another block's"
        return
    heads, key_value_heads = _heads(child, text)
    found.sites["attention"] = kind(
        name="attention",
        module=child,
        path=path,
        num_heads=heads,
        num_key_value_heads=key_value_heads,
        key=keys[0],
        value=keys[1],
        reads=reads,
    )


def _latent_attention(
    child: nn.Module, path: str, found: _Found, reads: str, model: nn.Module, text: Any
) -> None:
    found.kinds.append("latent attention")
    layers = dict(child.named_children())
    first = "q_proj" if "q_proj" in layers else "q_a_proj"
    query = _linear(first, layers[first], f"{path}.{first}", reads)
    key = _linear("kv_a_proj_with_mqa", layers["kv_a_proj_with_mqa"], f"{path}.kv_a_proj_with_mqa", reads)
    found.stand_in(("q_proj",), query)
    if "q_b_proj" in layers:
        found.stand_in(("q_proj",), _linear("q_b_proj", layers["q_b_proj"], f"{path}.q_b_proj", "q_b_proj"))
    found.stand_in(("k_proj", "v_proj"), key)
    found.missing["kv_b_proj"] = (
        "it expands the whole cache in each call, whose earlier tokens have no gates then"
    )
    found.reader = found.reader or query
    _output(child, path, found)
    value = _linear("kv_b_proj", layers["kv_b_proj"], f"{path}.kv_b_proj", "kv_b_proj")
    _softmax(LatentAttentionSite, child, path, found, reads, model, text, (key, value))


def _recurrence(child: nn.Module, path: str, found: _Found, reads: str, known: Recurrence) -> None:
    found.kinds.append(known.name)
    layers = dict(child.named_children())
    for name in known.inputs:
        site = _linear(name, layers[name], f"{path}.{name}", reads)
        found.stand_in(QKV, site)
        found.reader = found.reader or site
    if known.output is None:
        found.missing.setdefault(
            "o_proj", f"a kernel of its {known.name} reads the layer's weight and does not call it"
        )
    else:
        found.stand_in(
            ("o_proj",), _linear(known.output, layers[known.output], f"{path}.{known.output}", known.output)
        )


def _output(child: nn.Module, path: str, found: _Found) -> None:
    name = next((one for one in OUTPUTS if isinstance(getattr(child, one, None), nn.Module)), None)
    if name is not None:
        found.sites["o_proj"] = _linear("o_proj", child.get_submodule(name), f"{path}.{name}", "o_proj")


def _find_mlp(
    block: nn.Module, path: str, found: _Found, named: ArchitectureConfig, text: Any, beside: Sequence[str]
) -> None:
    """Find a block's MLP: a dense one, else one with routed experts, else layers of the block itself."""
    children = [(name, one) for name, one in block.named_children() if name not in beside]
    if named.mlp:
        one = _child(block, named.mlp)
        if one is None:
            found.missing["mlp"] = (
                f"its block has no module {named.mlp!r}; name one in ArchitectureConfig(mlp=...)"
            )
            return
        children = [(named.mlp, one)]
    dense = [(name, one) for name, one in children if _mlp_layers(one)]
    routed = [(name, one) for name, one in children if hasattr(one, "experts")]
    if dense or routed or (named.mlp and children):
        name, mlp = (dense or routed or children)[0]
        found.kinds.append("routed MLP" if not dense and routed else "MLP")
        hidden = int(text.hidden_size)
        found.sites["mlp"] = LinearSite(
            name="mlp",
            module=mlp,
            path=f"{path}.{name}",
            in_features=hidden,
            out_features=hidden,
            reads=MLP_INPUT,
        )
        shared = next((one for one in SHARED_EXPERTS if not dense and _child(mlp, one) is not None), None)
        inside, where = (
            (mlp, f"{path}.{name}") if shared is None else (_child(mlp, shared), f"{path}.{name}.{shared}")
        )
        reads = MLP_INPUT if shared is None else shared
    elif _mlp_layers(block):
        inside, where, reads = block, path, MLP_INPUT
        found.kinds.append("MLP")
        found.missing["mlp"] = "the layers of its MLP are the block's own: no module holds them"
    else:
        found.missing |= dict.fromkeys((*MLP_LAYERS, "mlp"), "it has no MLP")
        return
    assert inside is not None, "it was found above"
    layers = _mlp_layers(inside)
    for target, (name, part) in layers.items():
        module = inside.get_submodule(name)
        own = target if target == "down_proj" else reads
        if part is None:
            found.sites[target] = _linear(target, module, f"{where}.{name}", own)
        else:
            found.sites |= {target: _fused_sites(part, module, f"{where}.{name}", own, (1, 1))[target]}
    if not layers:
        why = "the weights of its routed experts are stacked: no linear layer holds them"
        found.missing |= dict.fromkeys(MLP_LAYERS, why)
    elif "gate_proj" not in layers:
        found.missing["gate_proj"] = "its MLP has no gate"


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


def _name_sites(block: nn.Module, path: str, found: _Found, named: ArchitectureConfig, text: Any) -> None:
    """Take what the config names, and check that its size is the one that the name says."""
    fused = {
        name: (layer, Fused(order=tuple(order), groups=named.fused_groups))
        for layer, order in named.fused.items()
        for name in order
    }
    for name, where in {**named.projections, **{name: layer for name, (layer, _) in fused.items()}}.items():
        module = _child(block, where)
        if module is None:
            continue
        if not hasattr(module, "weight"):
            raise UsageError(
                f"{name} is {where!r}: {path}.{where} is no linear layer, but {type(module).__name__}"
            )
        reads = MIXER_INPUT if name in QKV else MLP_INPUT if name in ("gate_proj", "up_proj") else name
        heads = _heads(found.attention or block, text)
        if name in fused:
            site = _fused_sites(fused[name][1], module, f"{path}.{where}", reads, heads)[name]
        else:
            site = _linear(name, module, f"{path}.{where}", reads)
        _check_size(site, heads, int(text.hidden_size), found, text)
        found.sites[name] = site
    query = found.sites.get("q_proj")
    if query is not None and ("q_proj" in named.projections or "q_proj" in fused):
        assert isinstance(query, LinearSite)
        found.reader = query


def _check_size(site: LinearSite, heads: tuple[int, int], hidden: int, found: _Found, text: Any) -> None:
    head_size = int(
        getattr(found.attention, "head_dim", None) or getattr(text, "head_dim", None) or hidden // heads[0]
    )
    reads_hidden = site.name in (*QKV, "gate_proj", "up_proj")
    writes = {"q_proj": heads[0] * head_size, "k_proj": heads[1] * head_size, "v_proj": heads[1] * head_size}
    expected = writes.get(site.name, hidden if site.name in ("o_proj", "down_proj") else None)
    if (reads_hidden and site.in_features != hidden) or (
        expected is not None and site.out_features != expected
    ):
        raise UsageError(
            f"{site.name} is {site.path}, {site.in_features} to {site.out_features} features: {site.name} of this model has "
            f"{hidden if reads_hidden else 'any number of'} to {expected or 'any number of'}. For a layer that holds several "
            "projections give ArchitectureConfig(fused={'path.in.block': ['q_proj', 'k_proj', 'v_proj']})"
        )


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


def _linear(name: str, module: nn.Module, path: str, reads: str) -> LinearSite:
    inputs, outputs = _features(module)
    return LinearSite(
        name=name, module=module, path=path, in_features=inputs, out_features=outputs, reads=reads
    )


_SIZES = (("in_features", "out_features"), ("nx", "nf"), ("input_size", "output_size"))
"""What linear layers call their sizes: torch's, transformers' Conv1D, vLLM's."""


def _features(module: Any) -> tuple[int, int]:
    names = next((names for names in _SIZES if hasattr(module, names[0])), None)
    if names is None:
        raise UsageError(f"{type(module).__name__} is no linear layer whose sizes are known: {_NAME_THEM}")
    return int(getattr(module, names[0])), int(getattr(module, names[1]))


def _fused_sites(
    fused: Fused, module: nn.Module, path: str, reads: str, heads: tuple[int, int]
) -> dict[str, LinearSite]:
    inputs, outputs = _features(module)
    shares = {"q_proj": heads[0], "k_proj": heads[1], "v_proj": heads[1]}
    counts = {"layer": 1, "head": heads[0], "key_value_head": heads[1]}
    groups = counts[fused.groups] if isinstance(fused.groups, str) else fused.groups
    every = [shares.get(name, 1) for name in fused.order]
    sizes = [outputs * share // sum(every) // groups for share in every]
    return {
        name: LinearSite(
            name=name,
            module=module,
            path=path,
            in_features=inputs,
            out_features=groups * sizes[i],
            reads=reads,
            slot=Slot(groups=groups, width=outputs // groups, start=sum(sizes[:i]), size=sizes[i]),
        )
        for i, name in enumerate(fused.order)
    }
