"""`MoAModel`: the PEFT tuner. It plans which block gets which experts and leaves the rest to PEFT."""

# PEFT annotates every tuner's config as PeftConfig and hands each its own kind.
# pyright: reportIncompatibleMethodOverride=false

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft import TaskType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from moa_peft.errors import UsageError, unknown
from moa_peft.mixture.adapter_file import DTYPES, check_fit, check_values, is_saved_whole, split_frozen
from moa_peft.mixture.architecture import find_blocks
from moa_peft.mixture.block_hooks import (
    CHILD,
    MERGE_REFUSAL,
    MoALayer,
    mixture_layers,
    packed_weights,
)
from moa_peft.mixture.mixed_batch import BASE, MixedBatch
from moa_peft.mixture.mixture import Mixture
from moa_peft.mixture.peft_config import BLOCKS_MARK, HEADS, MoAConfig
from moa_peft.mixture.placement import (
    check_targets,
    check_tokens,
    chosen_blocks,
    placed_experts,
)
from moa_peft.mixture.positions import number_positions
from moa_peft.mixture.registration import register
from moa_peft.mixture.sites import Block
from moa_peft.mixture.token_watch import TokenWatch, prompt_given
from moa_peft.time_limit import time_limit

_PATTERN_S = 5.0
"""Seconds that the pattern of modules to exclude may take for all names of a model; microseconds are usual."""


class MoAModel(BaseTuner):
    """Adds a mixture of adapters to each decoder block of a model.

    Use it through PEFT: ``get_peft_model(base, MoAConfig.preset("soft-lora"))``.
    """

    prefix = "moa_"
    tuner_layer_cls = MoALayer

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put an adapter onto a model; one that is refused leaves no trace in it, of PEFT or transformers either."""
        host: Any = model
        before = dict(getattr(model, "peft_config", {}))
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except BaseException:
            if before:
                host.peft_config = before
            elif getattr(model, "_hf_peft_config_loaded", False):  # set before `add_adapter` has called us
                host._hf_peft_config_loaded = False
            raise

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into every block, as PEFT does; one that fails at a block is taken off those before it."""
        before = {name: layer.mixtures().get(adapter_name) for name, layer in mixture_layers(model)}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            _restore(model, adapter_name, before)
            raise
        _delete(model, adapter_name, but=self._plan)  # where an earlier one of its name was, it is gone

    def _prepare_adapter_config(self, peft_config: MoAConfig, model_config: dict[str, Any]) -> MoAConfig:  # noqa: ARG002
        return peft_config

    def _pre_injection_hook(self, model: nn.Module, config: MoAConfig, adapter_name: str) -> None:  # noqa: ARG002
        """Refuse what cannot work before anything is touched: such weights, and names that torch cannot keep a module under."""
        _check_placement(model)
        if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
            raise UsageError(
                f"adapter name {adapter_name!r} cannot be used: give one without dots, such as 'default'"
            )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does, with weights that are joined once for all its calls."""
        layers = mixture_layers(self.model)
        mixed = layers[0][1].watch.mixed if layers else None
        if mixed is not None:
            given = prompt_given(args, kwargs)
            mixed.check(1 if given is None else len(given))
            mixed.is_generating = True
        with packed_weights(self.model):
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:  # noqa: ARG002
        """Let each row of a call go through an adapter of its own, as PEFT's LoRA does for ``adapter_names``.

        Raises:
            UsageError: If the model is in training mode, a name is unknown, there is not one for each row, or something is
                there that cannot be told apart by rows: saved modules, observers.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        layers = [layer for _, layer in mixture_layers(self.model)]
        self._check_mixed(names, layers)
        watch = layers[0].watch
        before, watch.mixed = watch.mixed, MixedBatch(names)
        try:
            yield
        finally:
            watch.mixed = before

    def _check_mixed(self, names: Any, layers: Sequence[MoALayer]) -> None:
        if not isinstance(names, list | tuple) or not names:
            raise UsageError(
                f"adapter_names is {names!r}: give a list with the name of an adapter, or {BASE!r}, for each row"
            )
        for name in names:
            if name not in (BASE, *self.peft_config):
                raise UsageError(unknown("adapter", name, (*self.peft_config, BASE)))
        if self.training:
            raise UsageError(
                "adapter_names is for evaluation mode: call model.eval(), or train one adapter with set_adapter"
            )
        if any(isinstance(one, AuxiliaryTrainingWrapper) for one in self.model.modules()):
            raise UsageError(
                "adapter_names cannot go with modules_to_save: their copies are of whole batches; use set_adapter"
            )
        if any(one.observer or one.change_observer for one in layers):
            raise UsageError(
                "adapter_names cannot go with observers: they are told of whole batches; use set_adapter"
            )

    def _prepare_model(self, peft_config: MoAConfig, model: nn.Module) -> None:
        """Plan the whole mixture before the first block is touched, so that an error leaves the model as it was."""
        _check_names(peft_config, [name for name, _ in model.named_modules()])
        self._check_architecture(peft_config)
        self._blocks = chosen_blocks(find_blocks(model, peft_config.architecture), peft_config)
        head = _head_of(model, TaskType(peft_config.task_type).value)
        check_targets(list(self._blocks.values()), peft_config)
        plan = {path: placed_experts(block, peft_config) for path, block in self._blocks.items()}
        self._plan = {path: experts for path, experts in plan.items() if experts}
        if not self._plan:
            raise UsageError(
                f"no target matched: exclude_modules={peft_config.exclude_modules!r} and the experts' layers leave "
                "no block with an expert"
            )
        for path in self._plan:
            _check_router_input(self._blocks[path], peft_config)
            check_tokens(self._blocks[path], peft_config)
        layers = mixture_layers(model)
        self._watch = layers[0][1].watch if layers else TokenWatch(model)
        list_of_blocks = next(iter(self._plan)).rpartition(".")[0]
        self._watched = (model, model.get_submodule(list_of_blocks.rpartition(".")[0]))
        if head is not None and not is_saved_whole(head, peft_config.modules_to_save):
            peft_config.modules_to_save = [*(peft_config.modules_to_save or ()), head]
        paths = "|".join(re.escape(path) for path in self._plan)
        peft_config.target_modules = f"{BLOCKS_MARK}(?:{paths})"

    def _check_architecture(self, config: MoAConfig) -> None:
        others = [
            one for one in self.peft_config.values() if isinstance(one, MoAConfig) and one is not config
        ]
        if any(one.architecture != config.architecture for one in others):
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
        elif not layer.moa_mixture:  # the last one may have had another architecture
            layer.disconnect()
            layer.block = self._blocks[current_key]
        layer.add_mixture(adapter_name, self._plan[current_key], peft_config.router)
        if layer.has_prompts_of(adapter_name) and not layer.watch.numbering:  # once for all blocks
            layer.watch.numbering = number_positions(self._watched[1])
        mixture = layer.mixtures()[adapter_name]
        routers = mixture.routers().values()
        if mixture.needs_tokens:
            pools = any(one.config.granularity == "instance" for one in routers)
            has_answers = peft_config.task_type == TaskType.CAUSAL_LM
            layer.watch.attach(*self._watched, pools=pools, has_answers=has_answers)
        if any(one.has_losses for one in routers):
            # builds on this module, so not at the top
            from moa_peft.mixture.balance_scaling import give_to_trainers

            give_to_trainers()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep adapters in float32 whatever the base is, unless ``autocast_adapter_dtype`` is False."""
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        for _, layer in mixture_layers(self.model):
            _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            if adapter_name in layer.moa_mixture and dtype in DTYPES:  # float8 stores, and does not train
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
        _take_off(self.model, layers)
        return self.model

    @classmethod
    def _get_adapter_state_dict(
        cls, *, adapter_name: str, state_dict: dict[str, Tensor], **_: Any
    ) -> dict[str, Tensor]:
        """Select an adapter's weights by their keys.

        PEFT goes by the modules' names. Those inside FSDP1 and checkpoint wrappers have parts that the keys lack, and PEFT would
        save an empty adapter.
        """
        return {key: one for key, one in state_dict.items() if f".{CHILD}.moa_mixture.{adapter_name}." in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return re.sub(rf"(\.moa_mixture|\.modules_to_save)\.{re.escape(adapter_name)}(?=\.)", r"\1", key)

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
            UsageError: If weights are missing, unknown, of other sizes, not finite or of the frozen model; PEFT itself would
                go on with random or with changed ones.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        mine = re.compile(rf"\.(moa_mixture|modules_to_save)\.{re.escape(adapter_name)}\.")
        check_values(remapped, f"adapter {adapter_name!r}")
        own = {key: one for key, one in remapped.items() if mine.search(key)}
        rest = {key: one for key, one in remapped.items() if key not in own}
        others, added_rows = split_frozen(model, rest, config, f"adapter {adapter_name!r}")
        # PEFT writes the copies in modules_to_save twice where tokens were added
        unknown = {key: one for key, one in others.items() if ".modules_to_save." not in key}
        expected = {key: one for key, one in model.state_dict().items() if mine.search(key)}
        check_fit(expected, own | unknown, adapter_name)
        return own | added_rows


def _restore(model: nn.Module, adapter_name: str, before: Mapping[str, Mixture | None]) -> None:
    """Put the mixtures of an adapter back as they were, by the names of their layers."""
    layers = mixture_layers(model)
    for name, layer in layers:
        earlier, now = before.get(name), layer.mixtures().get(adapter_name)
        if earlier is not None and earlier is not now:
            layer.moa_mixture[adapter_name] = earlier
            layer.connect()
        elif earlier is None and now is not None:
            layer.delete_adapter(adapter_name)
    _take_off(model, [(name, layer) for name, layer in layers if not layer.moa_mixture])


def _delete(model: nn.Module, adapter_name: str, but: Collection[str] = ()) -> None:
    """Delete an adapter from every block but some, and layers that are then empty."""
    layers = mixture_layers(model)
    for name, layer in layers:
        if adapter_name in layer.moa_mixture and name.removesuffix(f".{CHILD}") not in but:
            layer.delete_adapter(adapter_name)
    _take_off(model, [(name, layer) for name, layer in layers if not layer.moa_mixture])


def _take_off(model: nn.Module, layers: Sequence[tuple[str, MoALayer]]) -> None:
    """Remove layers, with their hooks, from the blocks of a model."""
    for name, layer in layers:
        layer.disconnect()
        delattr(model.get_submodule(name.removesuffix(f".{CHILD}")), CHILD)
    if layers and not mixture_layers(model):
        layers[0][1].watch.detach()  # one for all blocks


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


def _head_of(model: Any, task: str) -> str | None:
    """The name of a model's new head, which a task trains with the mixture; None for a model that has none.

    Raises:
        UsageError: If the task is not the model's, with the one that is.
    """
    kind, parts = type(model).__name__, dict(model.named_children())
    fitting = [one for one, names in HEADS.items() if parts.keys() & names]
    if getattr(model, "can_generate", lambda: True)():
        fitting = ["CAUSAL_LM"]
    elif not fitting and model.base_model is model:
        fitting = ["FEATURE_EXTRACTION"]
    if not fitting:
        raise UsageError(
            f"{kind} is no causal language model, and has no head that PEFT would train and save"
        )
    if task not in fitting:
        raise UsageError(
            f"task_type is {task}, and {kind} is a model for {' or '.join(fitting)}: give MoAConfig(task_type={fitting[0]!r}), "
            "or another model"
        )
    return next((name for name in HEADS[task] if name in parts), None)


def _check_names(config: MoAConfig, modules: Sequence[str]) -> None:
    """Check what names modules: every one to save is there, and the pattern of those to exclude ends.

    Raises:
        UsageError: If not.
    """
    for saved in set(config.modules_to_save or []).difference(HEADS[config.task_type or ""]):
        if not saved or not any(name.endswith(saved) for name in modules):
            raise UsageError(
                f"modules_to_save has {saved!r}: no module's name ends so; give names such as lm_head or embed_tokens"
            )
    if isinstance(config.exclude_modules, str):
        with time_limit(_PATTERN_S, f"the regular expression exclude_modules {config.exclude_modules!r}"):
            for name in modules:
                re.fullmatch(config.exclude_modules, name)


def _check_router_input(block: Block, config: MoAConfig) -> None:
    """Refuse to read gates off a module that is not there, or that PEFT will wrap and copy."""
    router = config.router
    router_input = "projection" if router is None else router.router_input
    if router_input == "block" and block.block_input is None:
        raise UsageError(
            f"router_input 'block' cannot be had on {block.family}: the norm at the block's start was not "
            "found; name it in ArchitectureConfig(norm=...) or use router_input 'projection'"
        )
    path = block.block_input_path if router_input == "block" else block.projection_input_path
    if is_saved_whole(path, config.modules_to_save):
        raise UsageError(
            f"modules_to_save {config.modules_to_save} covers {path}, which the router reads (router_input "
            f"{router_input!r}): leave it out, or choose the other router_input"
        )


register(MoAConfig, MoAModel)
