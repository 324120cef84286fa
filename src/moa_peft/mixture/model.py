"""`MoAModel`: the PEFT tuner. It plans which block gets which experts and leaves the rest to PEFT."""

# PEFT annotates every tuner's config as PeftConfig and hands each its own kind.
# pyright: reportIncompatibleMethodOverride=false

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from moa_peft.errors import UsageError
from moa_peft.mixture.architecture import Block, find_blocks
from moa_peft.mixture.block_hooks import (
    CHILD,
    MERGE_REFUSAL,
    MoALayer,
    mixture_layers,
    needs_tokens,
    packed_weights,
)
from moa_peft.mixture.mixture import PlacedExpert
from moa_peft.mixture.peft_config import BLOCKS_MARK, MoAConfig
from moa_peft.mixture.registration import register
from moa_peft.mixture.token_masks import TokenWatch
from moa_peft.time_limit import time_limit

_PATTERN_S = 5.0
"""Seconds that the pattern of modules to exclude may take for all names of a model; microseconds are usual."""


class MoAModel(BaseTuner):
    """Adds a mixture of adapters to each decoder block of a causal language model.

    Use it through PEFT: ``get_peft_model(base, MoAConfig.preset("soft-moa"))``.
    """

    prefix = "moa_"
    tuner_layer_cls = MoALayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT's name; targets are the blocks

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put an adapter onto a model; one that is refused leaves no trace in it, of PEFT or transformers either."""
        host: Any = model
        before = dict(getattr(model, "peft_config", {}))
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except UsageError:
            if before:
                host.peft_config = before
            elif getattr(model, "_hf_peft_config_loaded", False):  # set before `add_adapter` has called us
                host._hf_peft_config_loaded = False
            raise

    def _prepare_adapter_config(self, peft_config: MoAConfig, model_config: dict[str, Any]) -> MoAConfig:  # noqa: ARG002
        return peft_config

    def _pre_injection_hook(self, model: nn.Module, config: MoAConfig, adapter_name: str) -> None:  # noqa: ARG002
        """Refuse what cannot work before anything is touched: such weights, and names that torch cannot keep a module under."""
        _check_placement(model)
        if not getattr(model, "can_generate", lambda: True)():
            raise UsageError(
                f"{type(model).__name__} is no causal language model: a mixture would train without its head, and is not supported "
                "there; give a model of AutoModelForCausalLM"
            )
        if "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
            raise UsageError(
                f"adapter name {adapter_name!r} cannot be used: give one without dots, such as 'default'"
            )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does; instance gates keep to the prompt also where no cache remembers it.

        Raises:
            UsageError: If the prompt would be read in chunks, and the gates of the mixture are those of whole prompts.
        """
        if _reads_in_chunks(self.model, args, kwargs) and _has_instance_gates(self.model):
            raise UsageError(
                "prefill_chunk_size reads the prompt in several calls, but instance gates are made of the whole prompt "
                "in one: leave it out, or use a mixture with gates for each token (RouterConfig(granularity='token'))"
            )
        given = [*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        prompt = next((one for one in given if isinstance(one, Tensor)), None)
        layers = mixture_layers(self.model)
        with ExitStack() as stack:
            stack.enter_context(packed_weights(self.model))
            if prompt is not None and layers:
                stack.enter_context(layers[0][1].watch.generating(prompt.shape[1]))
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:  # noqa: ARG002
        if kwargs.get("adapter_names") is not None:
            raise UsageError(
                "adapter_names is not supported: a batch goes through one adapter; use set_adapter"
            )
        yield

    def _prepare_model(self, peft_config: MoAConfig, model: nn.Module) -> None:
        """Plan the whole mixture before the first block is touched, so that an error leaves the model as it was."""
        _check_names(peft_config, [name for name, _ in model.named_modules()])
        self._check_architecture(peft_config)
        self._blocks = _chosen_blocks(find_blocks(model, peft_config.parts().architecture), peft_config)
        plan = {path: _placed_experts(block, peft_config) for path, block in self._blocks.items()}
        self._plan = {path: experts for path, experts in plan.items() if experts}
        if not self._plan:
            raise UsageError(
                f"no target matched: exclude_modules={peft_config.exclude_modules!r} and the experts' layers leave "
                "no block with an expert"
            )
        for path in self._plan:
            _check_router_input(self._blocks[path], peft_config)
        layers = mixture_layers(model)
        self._watch = layers[0][1].watch if layers else TokenWatch()
        list_of_blocks = next(iter(self._plan)).rpartition(".")[0]
        self._watched = (model, model.get_submodule(list_of_blocks.rpartition(".")[0]))
        paths = "|".join(re.escape(path) for path in self._plan)
        peft_config.target_modules = f"{BLOCKS_MARK}(?:{paths})"

    def _check_architecture(self, config: MoAConfig) -> None:
        others = [
            one for one in self.peft_config.values() if isinstance(one, MoAConfig) and one is not config
        ]
        if any(one.parts().architecture != config.parts().architecture for one in others):
            raise UsageError("architecture differs from that of the adapter that is there: one model has one")

    def _create_and_replace(
        self,
        peft_config: MoAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,  # noqa: ARG002
        parent: nn.Module,  # noqa: ARG002
        current_key: str,
        parameter_name: str | None = None,  # noqa: ARG002
    ) -> None:
        """Give one decoder block its experts. Nothing is replaced: the block gets a child, its modules get hooks."""
        layer = getattr(target, CHILD, None)
        if layer is None:
            layer = MoALayer(self._blocks[current_key], self._watch)
            target.add_module(CHILD, layer)
        layer.add_mixture(adapter_name, self._plan[current_key], peft_config.parts().router)
        if needs_tokens(layer.mixtures()[adapter_name]):
            layer.watch.attach(*self._watched)
        if any(router.has_losses for router in layer.mixtures()[adapter_name].routers().values()):
            from moa_peft.mixture.balance_scaling import (
                give_to_trainers,  # builds on this module, so not at the top
            )

            give_to_trainers()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep adapters in float32 whatever the base is, unless ``autocast_adapter_dtype`` is False."""
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        for _, layer in mixture_layers(self.model):
            _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            if adapter_name in layer.moa_mixture and dtype is not None and dtype.is_floating_point:
                layer.moa_mixture[adapter_name].to(dtype)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Refuse to combine adapters into one.

        Raises:
            UsageError: Always, with the reason.
        """
        raise UsageError(
            "add_weighted_adapter: mixtures cannot be combined into one, for their gates depend on the input; activate several "
            "at once (set_adapter with a list), or put the experts into one MoAConfig"
        )

    def _check_merge_allowed(self) -> None:
        raise UsageError(MERGE_REFUSAL)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        layers = mixture_layers(self.model)
        super()._unload_and_optionally_merge(False, *args, **kwargs)
        for name, layer in layers:
            layer.disconnect()
            layer.watch.detach()
            delattr(self.model.get_submodule(name.removesuffix(f".{CHILD}")), CHILD)
        return self.model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return re.sub(rf"(\.moa_mixture)\.{re.escape(adapter_name)}(?=\.)", r"\1", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: MoAConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Map a checkpoint's keys to the model's, and refuse a checkpoint that does not fit it exactly.

        Raises:
            UsageError: If weights are missing, unknown or of other sizes; PEFT itself would go on with random ones.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = {
            key: tensor.shape
            for key, tensor in model.state_dict().items()
            if f".{CHILD}.moa_mixture.{adapter_name}." in key
        }
        given = {key: tensor.shape for key, tensor in remapped.items() if f".{CHILD}.moa_mixture." in key}
        _check_fit(expected, given, adapter_name)
        return remapped


def _check_placement(model: nn.Module) -> None:
    """Refuse a model whose weights are not all here in full.

    Raises:
        UsageError: If it is tensor-parallel, or has weights offloaded to the disk or to the CPU.
    """
    ranks = getattr(model, "tp_size", None) or 1
    if ranks > 1:
        raise UsageError(
            f"the model is tensor-parallel over {ranks} ranks (tp_plan): each has a part of every layer, and the experts' sizes "
            "are those of whole layers. Load it without tp_plan; to train on several GPUs use FSDP or DeepSpeed ZeRO, as with "
            "`accelerate launch`"
        )
    for name, module in model.named_modules():
        away = any(one.is_meta for one in module.parameters(recurse=False))
        if away and hasattr(module, "_hf_hook"):
            raise UsageError(
                f"the weights of {name} are offloaded to the disk or the CPU (device_map): outside of their own call they are on "
                "the meta device, where a prompt cannot be projected nor an expert placed. Give a device_map without 'disk' "
                "and 'cpu' offload, a smaller or a quantised base model"
            )


def _check_names(config: MoAConfig, modules: Sequence[str]) -> None:
    """Check what names modules: every one to save is there, and the pattern of those to exclude ends.

    Raises:
        UsageError: If not.
    """
    for saved in config.modules_to_save or []:
        if not saved or not any(name.endswith(saved) for name in modules):
            raise UsageError(
                f"modules_to_save has {saved!r}: no module's name ends so; give names such as lm_head or embed_tokens"
            )
    if isinstance(config.exclude_modules, str):
        with time_limit(_PATTERN_S, f"the regular expression exclude_modules {config.exclude_modules!r}"):
            for name in modules:
                re.fullmatch(config.exclude_modules, name)


def _has_instance_gates(model: nn.Module) -> bool:
    """Whether an adapter that is at work gates whole instances."""
    return any(
        router.config.granularity == "instance"
        for _, layer in mixture_layers(model)
        if not layer.disable_adapters
        for adapter, mixture in layer.mixtures().items()
        if adapter in layer.active_adapters
        for router in mixture.routers().values()
    )


def _reads_in_chunks(model: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments of `generate`, or the model's own settings, split the prompt."""
    configs = (*args[1:2], kwargs.get("generation_config"), getattr(model, "generation_config", None))
    chunks = [
        kwargs.get("prefill_chunk_size"),
        *(getattr(one, "prefill_chunk_size", None) for one in configs),
    ]
    return any(one is not None for one in chunks)


def _check_fit(
    expected: Mapping[str, torch.Size], given: Mapping[str, torch.Size], adapter_name: str
) -> None:
    """Compare a checkpoint's weights with the model's, by name and size."""
    missing, extra = expected.keys() - given.keys(), given.keys() - expected.keys()
    if any(".router.gate.threshold_" in key for key in missing):
        raise UsageError(
            f"adapter {adapter_name!r} has no threshold but its config is Sparse MoA: the weights are Soft MoA's; load "
            "them with their own config (RouterConfig(threshold=None))"
        )
    if any(".router.gate.threshold_" in key for key in extra):
        raise UsageError(
            f"adapter {adapter_name!r} has a learned threshold but its config has none: the weights are Sparse MoA's; "
            "load them with their own config (RouterConfig(threshold=ThresholdConfig(maximum=...)))"
        )
    wrong = [f"{key} is missing" for key in sorted(missing)] + [f"{key} is unknown" for key in sorted(extra)]
    wrong += [
        f"{key} is {list(given[key])}, the model's is {list(expected[key])}"
        for key in sorted(expected.keys() & given.keys())
        if given[key] != expected[key]
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UsageError(
            f"adapter {adapter_name!r} does not fit this model: {'; '.join(wrong[:3])}{more}. It belongs to another "
            "base model or another config: see base_model_name_or_path in its adapter_config.json"
        )


def _chosen_blocks(blocks: list[Block], config: MoAConfig) -> dict[str, Block]:
    """The blocks of ``layers_to_transform``, by path."""
    wanted = range(len(blocks)) if config.layers_to_transform is None else config.layers_to_transform
    indices = {wanted} if isinstance(wanted, int) else set(wanted)
    layers = {index for expert in config.parts().experts for index in expert.layers or ()}
    beyond = sorted(index for index in indices | layers if not 0 <= index < len(blocks))
    if beyond:
        raise UsageError(f"layers {beyond} do not exist: the model has blocks 0 to {len(blocks) - 1}")
    return {block.path: block for block in blocks if block.index in indices}


def _placed_experts(block: Block, config: MoAConfig) -> list[PlacedExpert]:
    """The experts of one block with their sites, without those of other layers and of excluded modules."""
    if _is_excluded(block.path, config):
        return []
    placed: list[PlacedExpert] = []
    for expert in config.parts().experts:
        if expert.layers is not None and block.index not in expert.layers:
            continue
        sites = [block.site(name, expert.kind) for name in expert.site_names()]
        placed += [(expert, site) for site in sites if not _is_excluded(site.path, config)]
    return placed


def _is_excluded(path: str, config: MoAConfig) -> bool:
    """Whether PEFT's rules keep adapters away from a module."""
    if _is_saved_whole(path, config):
        return True
    excluded = config.exclude_modules or []
    if isinstance(excluded, str):
        return re.fullmatch(excluded, path) is not None
    return any(path == one or path.endswith(f".{one}") for one in excluded)


def _is_saved_whole(path: str, config: MoAConfig) -> bool:
    """Whether a module or one around it is in ``modules_to_save``, which PEFT compares with the endings of names."""
    parts = path.split(".")
    around = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(name.endswith(saved) for saved in config.modules_to_save or [] for name in around)


def _check_router_input(block: Block, config: MoAConfig) -> None:
    """Refuse to read gates off a module that is not there, or that PEFT will wrap and copy."""
    router = config.parts().router
    router_input = "projection" if router is None else router.router_input
    if router_input == "block" and block.block_input is None:
        raise UsageError(
            f"router_input 'block' cannot be had on {block.family}: the norm at the block's start was not "
            "found; name it in ArchitectureConfig(norm=...) or use router_input 'projection'"
        )
    path = block.block_input_path if router_input == "block" else block.projection_input_path
    if _is_saved_whole(path, config):
        raise UsageError(
            f"modules_to_save {config.modules_to_save} covers {path}, which the router reads (router_input "
            f"{router_input!r}): leave it out, or choose the other router_input"
        )


register(MoAConfig, MoAModel)
