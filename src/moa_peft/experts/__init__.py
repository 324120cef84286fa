"""Kinds of experts: one file each, found through the registry."""

from moa_peft.experts.base import (
    AttentionExpert,
    LinearExpert,
    expert_from_mapping,
    expert_kinds,
    register_expert,
)
from moa_peft.experts.lora import LoraExpert
from moa_peft.experts.parallel_adapter import ParallelAdapterExpert
from moa_peft.experts.prompt import PromptExpert

__all__ = [
    "AttentionExpert",
    "LinearExpert",
    "LoraExpert",
    "ParallelAdapterExpert",
    "PromptExpert",
    "expert_from_mapping",
    "expert_kinds",
    "register_expert",
]
