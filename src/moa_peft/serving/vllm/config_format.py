"""What vLLM reads in its front end: the config of an adapter folder, and what it must not be asked to do."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.config import get_config_parser
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from moa_peft.errors import UsageError
from moa_peft.evaluation.loading import read_adapter
from moa_peft.serving.vllm.folder import chat_ends, config_changes, served_base, served_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class AdapterConfigParser(ConfigParserBase):
    """``--config-format moa``: the base model's config, for a folder that holds an adapter and none."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,  # noqa: ARG002  # of the adapter's folder
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], PreTrainedConfig]:
        """Give the config as a mapping and as an object; see vLLM's own."""
        adapter = read_adapter(str(model))
        base = served_base(adapter)
        changes = config_changes(base)
        with suppress(UsageError):  # a model without a tokenizer can be asked by token ids
            changes |= chat_ends(adapter, base)
        given, config = get_config_parser("hf").parse(
            base.path, trust_remote_code, changes["moa_revision"], code_revision, **kwargs
        )
        config.update(changes)
        return {**given, **changes}, config


class ServedMixture(VerifyAndUpdateConfig):
    """Checks what is served, and how, before vLLM starts anything."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Refuse what would come out wrong.

        Raises:
            UsageError: If the adapter is one that vLLM cannot serve, or a setting of vLLM does not go with it.
        """
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        config = served_config(read_adapter(model.model))
        reasons = {
            "--enable-lora": vllm_config.lora_config is not None,
            "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
            "--tensor-parallel-size": parallel.tensor_parallel_size > 1,
        }
        if given := [flag for flag, is_given in reasons.items() if is_given]:
            raise UsageError(f"{', '.join(given)} cannot be used with a mixture: leave it out")
        # vLLM keeps compiled models by their config: another adapter is another model. As text, for a new process that
        # is sent it does not know PEFT's type of this package yet.
        model.hf_config.update({"moa_adapter": json.dumps(config.to_dict(), default=str)})
