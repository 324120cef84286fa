"""Mixtures of heterogeneous adapters as a PEFT method. Importing it registers the method.

from peft import get_peft_model
from moa_peft import MoAConfig

model = get_peft_model(base, MoAConfig.preset("soft-lora"))

Names are looked up where they are first used. The command `moa` alone defers the registration to that moment too, so that
its help does not wait for torch.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moa_peft.errors import MoAError, RunError, UsageError
    from moa_peft.mixture.block_hooks import (
        ChangeRecord,
        GateRecord,
        MoALayer,
        mixture_layers,
        packed_weights,
    )
    from moa_peft.mixture.config import ArchitectureConfig, ExpertConfig, RouterConfig, ThresholdConfig
    from moa_peft.mixture.experts import (
        DoraExpert,
        IA3Expert,
        LoraExpert,
        ParallelAdapterExpert,
        PromptExpert,
        SequentialAdapterExpert,
        VeraExpert,
        register_expert,
    )
    from moa_peft.mixture.gates import register_gate
    from moa_peft.mixture.model import MoAModel
    from moa_peft.mixture.peft_config import MoAConfig
    from moa_peft.mixture.presets import preset_names
    from moa_peft.training.optimizer import parameter_groups

__version__ = "0.2.0"

__all__ = [
    "ArchitectureConfig",
    "ChangeRecord",
    "DoraExpert",
    "ExpertConfig",
    "GateRecord",
    "IA3Expert",
    "LoraExpert",
    "MoAConfig",
    "MoAError",
    "MoALayer",
    "MoAModel",
    "ParallelAdapterExpert",
    "PromptExpert",
    "RouterConfig",
    "RunError",
    "SequentialAdapterExpert",
    "ThresholdConfig",
    "UsageError",
    "VeraExpert",
    "mixture_layers",
    "packed_weights",
    "parameter_groups",
    "preset_names",
    "register_expert",
    "register_gate",
]

_HOMES = (
    "errors",
    "mixture.block_hooks",
    "mixture.config",
    "mixture.experts",
    "mixture.gates",
    "mixture.model",
    "mixture.peft_config",
    "mixture.presets",
    "training.optimizer",
)
"""The modules of the public names."""


def __getattr__(name: str) -> Any:
    """Look up a public name, and register the method."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("moa_peft.mixture.model")
    homes = (import_module(f"{__name__}.{home}") for home in _HOMES)
    return next(getattr(home, name) for home in homes if hasattr(home, name))


def _is_the_command() -> bool:
    """Whether this process is the command `moa` that was installed beside this Python, and none that it has spawned."""
    # what multiprocessing calls the command's script in a process that it has spawned
    if "__mp_main__" in sys.modules:
        return False
    script = Path(sys.argv[0] if sys.argv else "")
    return script.name in ("moa", "moa.exe") and script.resolve().parent == Path(sys.executable).parent


if not _is_the_command():
    import_module("moa_peft.mixture.model")
