"""vLLM's plug-in for mixtures: vLLM calls `register` in each of its processes."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from moa_peft.serving.vllm.command import ARCHITECTURE, CONFIG_FORMAT


def register() -> None:
    """Make the architecture and the config format known to vLLM; the entry point of ``vllm.general_plugins``."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import register_config_parser

    from moa_peft.serving.vllm.config_format import AdapterConfigParser, ServedMixture

    # by its name, so that no process imports the model before it builds one
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ServedMixture
    register_config_parser(CONFIG_FORMAT)(AdapterConfigParser)
