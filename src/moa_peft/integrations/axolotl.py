"""axolotl's plug-in: ``adapter: moa`` trains a mixture.

In axolotl's config:

    plugins: [moa_peft.integrations.axolotl.MoAPlugin]
    adapter: moa
    moa:
      method: soft-lora
      mixture: {router: {initial_gate: 0.9}}   # optional: fields of MoAConfig that differ from the method's
"""

from typing import Any

from axolotl.integrations.base import (  # type: ignore[import-not-found]  # users have it
    AdapterCapabilities,
    BasePlugin,
)
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, ConfigDict
from torch import nn

from moa_peft.training.recipe import DEFAULT_METHOD, mixture_config

ADAPTER = "moa"


class MoASettings(BaseModel):
    """The section ``moa`` of a config."""

    model_config = ConfigDict(extra="forbid")

    method: str = DEFAULT_METHOD
    """One of `moa methods`."""
    mixture: dict[str, Any] = {}
    """Fields of `MoAConfig` that differ from it."""


class MoAArguments(BaseModel):
    """What the plug-in adds to axolotl's config."""

    moa: MoASettings | None = None


class MoAPlugin(BasePlugin):
    """Makes the adapter, or loads the one in ``lora_model_dir``; axolotl trains and saves it as it does any of PEFT's."""

    def get_input_args(self) -> str:
        """The name of the class that checks the section."""
        return f"{__name__}.{MoAArguments.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """That ``adapter: moa`` is known, and is no LoRA: it is neither merged nor restarted."""
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(
        self, model: nn.Module, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        """Put the mixture on a model.

        Args:
            model: The base model.
            cfg: axolotl's config.
            inference: Whether a loaded adapter is frozen.
            config_only: For trainers that put the adapter on by themselves.

        Returns:
            The model (None with ``config_only``) and the config; None where another adapter is asked for.

        Raises:
            UsageError: If the method or a field is unknown, or a value is wrong.
        """
        if cfg.adapter != ADAPTER:
            return None
        if cfg.lora_model_dir and config_only:
            return None, PeftConfig.from_pretrained(cfg.lora_model_dir)
        if cfg.lora_model_dir:
            loaded = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            return loaded, loaded.active_peft_config
        settings = MoASettings(**(cfg.moa or {}))
        config = mixture_config(settings.method, settings.mixture)
        return None if config_only else get_peft_model(model, config), config
