"""Mixtures of heterogeneous adapters as a PEFT method. Importing it registers the method.

from peft import get_peft_model
from moa_peft import MoAConfig

model = get_peft_model(base, MoAConfig.preset("soft-moa"))
"""

from moa_peft.block_hooks import ChangeRecord, GateRecord, MoALayer, mixture_layers, packed_weights
from moa_peft.config import ArchitectureConfig, ExpertConfig, RouterConfig, ThresholdConfig
from moa_peft.errors import MoAError, RunError, UsageError
from moa_peft.experts import (
    DoraExpert,
    IA3Expert,
    LoraExpert,
    ParallelAdapterExpert,
    PromptExpert,
    SequentialAdapterExpert,
    VeraExpert,
    register_expert,
)
from moa_peft.gates import register_gate
from moa_peft.model import MoAModel
from moa_peft.peft_config import MoAConfig
from moa_peft.presets import preset_names
from moa_peft.registration import register
from moa_peft.train.optimizer import parameter_groups

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
