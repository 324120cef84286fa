"""Which structures of blocks take which methods, and what real shapes get: the rows of docs/results/families.jsonl.

python scripts/measure_families.py            # every structure of tests/structures.py, some minutes
python scripts/measure_families.py qwen3_moe  # some, printed only
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from moa_peft import MoAConfig, UsageError
from moa_peft.json_lines import append_rows
from moa_peft.mixture.placement import find_placements
from moa_peft.provenance import provenance

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from structures import TEXT, check_mixture, text_model  # noqa: E402  # found there

OUT = ROOT / "docs" / "results" / "families.jsonl"
METHODS = ("soft-lora", "soft-moa", "sparse-moa", "molora", "lora")
REAL = ("qwen3_5_text", "qwen3_moe", "gpt_oss", "gemma3n_text")
"""Model types whose default config in transformers is that of a released model; built on the meta device."""


def measure(name: str, method: str) -> dict[str, Any]:
    """Check one method in one structure."""
    row: dict[str, Any] = {"kind": "structure", "name": name, "model_type": TEXT[name][0], "method": method}
    try:
        with tempfile.TemporaryDirectory() as folder:
            check_mixture(name, MoAConfig.preset(method), Path(folder))
    except UsageError as error:
        return row | {"result": "refused", "reason": str(error)}
    except Exception as error:  # noqa: BLE001  # a row says so
        return row | {"result": "fails", "reason": f"{type(error).__name__}: {error}"}
    return row | {"result": "works", "blocks": blocks(text_model(name), method)}


def blocks(model: Any, method: str) -> list[dict[str, Any]]:
    """What each kind of block gets."""
    found = find_placements(model, MoAConfig.preset(method))
    return [
        {"kind": one.kind, "count": len(one.blocks), "experts": one.experts, "left_out": one.left_out}
        for one in found
    ]


def shape(model_type: str, method: str) -> dict[str, Any]:
    """Plan a method on a model of real size, and count its parameters; nothing is allocated."""
    config = AutoConfig.for_model(model_type)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        found = blocks(base, method)
        base_parameters = sum(one.numel() for one in base.parameters())
        trainable, _ = get_peft_model(base, MoAConfig.preset(method)).get_nb_trainable_parameters()
    return {
        "kind": "shape", "name": model_type, "model_type": model_type, "method": method, "blocks": found,
        "hidden_size": config.hidden_size, "base_parameters": base_parameters, "trainable_parameters": trainable,
    }  # fmt: skip


def main() -> None:
    """Write every row, or print those of the names given."""
    names = sys.argv[1:]
    rows: list[dict[str, Any]] = []
    for name in names or TEXT:
        for method in METHODS:
            rows.append(measure(name, method))
            print(
                f"{name:32} {method:12} {rows[-1]['result']:8} {rows[-1].get('reason', '')[:120]}", flush=True
            )
    if names:
        return
    rows += [shape(name, method) for name in REAL for method in METHODS[:2]]
    OUT.unlink(missing_ok=True)
    source = provenance()
    append_rows(OUT, [{**row, "provenance": source} for row in rows])
    print(
        json.dumps(
            {
                result: sum(row.get("result") == result for row in rows)
                for result in ("works", "refused", "fails")
            }
        )
    )


if __name__ == "__main__":
    main()
