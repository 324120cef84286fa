"""Kinds of experts: one file each, found through the registry.

May import: the other files of mixture.
"""

from moa_peft.mixture.experts.base import (
    AttentionExpert,
    LinearExpert,
    expert_from_mapping,
    expert_kinds,
    register_expert,
)
from moa_peft.mixture.experts.dora import DoraExpert
from moa_peft.mixture.experts.ia3 import IA3Expert
from moa_peft.mixture.experts.lora import LoraExpert
from moa_peft.mixture.experts.parallel_adapter import ParallelAdapterExpert
from moa_peft.mixture.experts.prompt import PromptExpert
from moa_peft.mixture.experts.sequential_adapter import SequentialAdapterExpert
from moa_peft.mixture.experts.vera import VeraExpert

__all__ = [
    "AttentionExpert",
    "DoraExpert",
    "IA3Expert",
    "LinearExpert",
    "LoraExpert",
    "ParallelAdapterExpert",
    "PromptExpert",
    "SequentialAdapterExpert",
    "VeraExpert",
    "expert_from_mapping",
    "expert_kinds",
    "register_expert",
]
