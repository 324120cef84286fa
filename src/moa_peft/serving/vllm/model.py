"""The model that vLLM runs: a base model of its Transformers backend, with the mixture hooked onto its blocks.

Nothing of the mixture is written anew here. vLLM's linear layers stand where transformers' would, several projections
in one of them; the blocks' hooks (`MoALayer`) see [1, T, D], all tokens of a step in one row.
"""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

import re
from collections.abc import Iterable
from dataclasses import replace

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.transformers.fusers import QKVFuser

from moa_peft.evaluation.loading import read_adapter
from moa_peft.mixture.adapter_file import KEY_PREFIX, check_fit, check_values
from moa_peft.mixture.architecture import find_blocks
from moa_peft.mixture.block_hooks import CHILD, MoALayer, mixtures_of, packed_weights
from moa_peft.mixture.mixture import Mixture
from moa_peft.mixture.placement import check_targets, chosen_blocks, placed_experts
from moa_peft.mixture.sites import AttentionSite
from moa_peft.mixture.token_watch import TokenWatch
from moa_peft.serving.vllm.folder import served_config

_ADAPTER = "default"


class MoAForCausalLM(TransformersForCausalLM):
    """A causal language model with one mixture, served from the mixture's folder."""

    supports_lora = False  # its layers would be called past the hooks
    supports_pp = False
    allow_patterns_overrides = [SAFETENSORS_WEIGHTS_NAME]  # noqa: RUF012  # vLLM's name
    """What is loaded of the folder that is served; the base's weights come second."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        hf_config = vllm_config.model_config.hf_config
        own = hf_config.architectures
        # renames of the base's weights hang on it (GPT-NeoX)
        hf_config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf_config.model_type]]
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        finally:
            hf_config.architectures = own
        self.secondary_weights = [
            DefaultModelLoader.Source(hf_config.moa_base, getattr(hf_config, "moa_revision", None))
        ]
        self._add_mixtures()
        self._packed = packed_weights(self)
        self._packed.__enter__()  # for as long as the model lives

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the base model's weights as vLLM does, and the adapter's into its mixtures.

        Raises:
            UsageError: If the adapter does not fit the base model.
        """
        own: dict[str, Tensor] = {}

        def of_base() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith(KEY_PREFIX):
                    own[name] = tensor.clone()
                else:
                    yield name, tensor

        loaded = super().load_weights(of_base())
        name = self.model_config.model
        check_values(own, name)
        given = {self._parameter_name(key): tensor for key, tensor in own.items()}
        expected = {key: one for key, one in self.named_parameters() if f".{CHILD}.moa_mixture." in key}
        check_fit(expected, given, name)
        for key, parameter in expected.items():
            parameter.data.copy_(given[key])
        return loaded | expected.keys()

    def eval(self) -> "MoAForCausalLM":
        """Prepare for serving; vLLM's last call before it runs the model, when its layers have their weights in place."""
        super().eval()
        with torch.no_grad():
            for mixture in mixtures_of(self):
                _pack(mixture, self.model_config.dtype)
        return self

    def _add_mixtures(self) -> None:
        config = served_config(read_adapter(self.model_config.model))
        named = config.architecture
        found = find_blocks(self.model, replace(named, fused={**named.fused, **self._merged()}))
        blocks = chosen_blocks(found, config)
        check_targets(list(blocks.values()), config)
        watch = TokenWatch()
        before = torch.get_default_dtype()  # the base's
        torch.set_default_dtype(torch.float32)  # of experts and routers, as under PEFT
        try:
            for block in blocks.values():
                if placed := placed_experts(block, config):
                    layer = MoALayer(block, watch)
                    block.module.add_module(CHILD, layer)
                    layer.add_mixture(_ADAPTER, placed, config.router)
                    layer.set_adapter(_ADAPTER, inference_mode=True)
                    for router in layer.mixtures()[_ADAPTER].routers().values():
                        router.has_losses = False  # they cost time in each step, and nothing is trained here
        finally:
            torch.set_default_dtype(before)

    def _merged(self) -> dict[str, tuple[str, ...]]:
        """The attention layers that vLLM has merged, by their path in a block: which projections, in order."""
        return {
            f"{re.sub(r'.*[.][0-9]+[.]', '', path)}.{fuser.merged_name}": ("q_proj", "k_proj", "v_proj")
            for path, fusers in self.fusers.items()
            for fuser in fusers
            if isinstance(fuser, QKVFuser)
        }

    def _parameter_name(self, key: str) -> str:
        """The name here of a weight in the adapter's file."""
        inner = key.removeprefix(KEY_PREFIX).removeprefix(f"{self.model.base_model_prefix}.")
        return "model." + inner.replace(".moa_mixture.", f".moa_mixture.{_ADAPTER}.", 1)


def _pack(mixture: Mixture, dtype: torch.dtype) -> None:
    """Make now what a mixture would make in its first call: a compiled graph makes nothing that lasts."""
    for name in mixture.readers:
        mixture.down(name, dtype)
    for path, changes in mixture.modules_changed.items():
        if changes.joined:
            mixture.up(path, dtype)
        for place in changes.others:
            if isinstance(place.site, AttentionSite):
                device = next(mixture.parameters()).device
                query = torch.zeros(
                    1, place.site.num_heads, 1, place.site.head_size, dtype=dtype, device=device
                )
                scaling = getattr(place.site.module, "scaling", place.site.head_size**-0.5)
                mixture.attention_change(place, query, scaling, torch.zeros(1, 1, 1, device=device))
