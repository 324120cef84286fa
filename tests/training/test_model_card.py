from pathlib import Path
from typing import Any

import yaml

from moa_peft.training.model_card import write_card

ROW: dict[str, Any] = {
    "final_loss": 1.25,
    "validation_loss": 1.5,
    "trainable_parameters": 1234,
    "total_parameters": 123400,
    "placements": [
        {
            "kind": "state space",
            "blocks": (0, 1),
            "experts": ("lora in_proj",),
            "left_out": ("prompt attention (it has no softmax attention)",),
        }
    ],
    "rows_kept": 7000,
    "steps": 55,
    "versions": {"moa-peft": "0.9"},
}
RECIPE: dict[str, Any] = {
    "model": "smollm2",
    "method": "soft-moa",
    "data": "demo",
    "data_md5": "abc",
    "template": "paper",
    "learning_rate": 1e-4,
    "output_dir": "/home/someone/run",
    "validation": "a|b",
}


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_names_base_method_data_sizes_settings_and_paper(tmp_path: Path) -> None:
    write_card(tmp_path, ROW, RECIPE, "AutoModelForCausalLM")
    card = (tmp_path / "README.md").read_text()
    assert metadata(card) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "tags": [
            *["moa", "mixture-of-adapters", "peft", "soft-moa"],
            "base_model:adapter:HuggingFaceTB/SmolLM2-135M-Instruct",
        ],
    }
    wanted = ["With moa-peft 0.9, ", "1,234 (1.00 % of all)", "7,000 rows of `demo` (MD5 abc)", "2506.05928"]
    wanted += [
        "- lora in_proj in 2 blocks of state space; left out: prompt attention (it has no softmax attention)",
        "| learning_rate | `0.0001` |",
        "| validation | `a\\|b` |",
        "| held-out loss, at the end | 1.5000 |",
    ]
    assert [one for one in wanted if one not in card] == []
    assert "/home/someone" not in card
    write_card(
        tmp_path, ROW, RECIPE | {"model_init_kwargs": {"revision": "v1"}}, "AutoModelForImageTextToText"
    )
    call = 'AutoModelForImageTextToText.from_pretrained("path/to/this/folder", revision="v1")'
    assert call in (tmp_path / "README.md").read_text()


def test_a_card_names_the_source_of_its_own_method(tmp_path: Path) -> None:
    """Every card named the paper of MoA."""
    write_card(tmp_path, ROW, RECIPE | {"method": "hydralora"}, "AutoModelForCausalLM")
    card = (tmp_path / "README.md").read_text()
    assert "Source: HydraLoRA, [arXiv 2404.19245](https://arxiv.org/abs/2404.19245)." in card
    assert "2506.05928" not in card


def test_a_base_model_in_a_folder_of_this_machine_is_no_metadata(tmp_path: Path) -> None:
    write_card(
        tmp_path, ROW | {"validation_loss": None}, RECIPE | {"model": str(tmp_path)}, "AutoModelForCausalLM"
    )
    card = (tmp_path / "README.md").read_text()
    assert "base_model" not in metadata(card)
    assert not [tag for tag in metadata(card)["tags"] if "base_model" in tag]
    assert "held-out" not in card
