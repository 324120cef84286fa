"""The official code's reference files: which there are, and where."""

import os
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
METHODS_OF_OTHERS = (
    "lora", "parallel-adapter", "prompt-tuning", "molora", "hydralora", "topk-moe-lora", "adamole", "unipeft",
    "instance-moa", "soft-moa-hydra3",
)  # fmt: skip
VERIFIED = [
    *(f"transformers-{family}-{kind}" for family in ("llama", "qwen3") for kind in ("soft", "soft-prompt")),
    *(
        f"transformers-{family}-{kind}"
        for family in ("llama", "qwen3")
        for kind in ("sparse", "sparse-prompt")
    ),
    *(f"llama3-soft-moa{variant}" for variant in ("", "-no-prompt", "-linear-router")),
    *(f"llama3-sparse-moa{variant}" for variant in ("", "-prompt", "-const")),
    *(f"llama3-{method}" for method in METHODS_OF_OTHERS),
]


def golden(name: str) -> Path:
    path = GOLDEN / f"{name}.safetensors"
    if not path.exists() and not os.environ.get("CI"):
        pytest.skip("the reference files of the official code are not beside this checkout")
    return path
