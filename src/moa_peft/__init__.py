"""Mixtures of heterogeneous adapters as a PEFT method. Importing it registers the method.

from peft import get_peft_model
from moa_peft import MoAConfig

model = get_peft_model(base, MoAConfig.preset("soft-moa"))
"""

from moa_peft.errors import MoAError, RunError, UsageError
from moa_peft.mixture.block_hooks import ChangeRecord, GateRecord, MoALayer, mixture_layers, packed_weights
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
from moa_peft.mixture.registration import register
from moa_peft.training.optimizer import parameter_groups

__version__ = "0.1.0"

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

register(MoAConfig, MoAModel)
