"""The modules that axolotl and ms-swift load. Where a tool is not installed, its base classes are stood in for."""

import importlib
import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from moa_peft import MoAConfig, UsageError, mixture_layers
from tiny import awaken, base_model

IDS = torch.tensor([[5, 6, 7, 8]])


def module_of(monkeypatch: pytest.MonkeyPatch, name: str, tool: str, **contents: Any) -> Any:
    """Import one of ours with its tool, or with a stand-in that has what it takes from there."""
    try:
        importlib.import_module(tool)
    except ImportError:
        stand_in = ModuleType(tool)
        stand_in.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, tool.split(".")[0], ModuleType(tool.split(".")[0]))
        monkeypatch.setitem(sys.modules, tool, stand_in)
    monkeypatch.delitem(sys.modules, f"moa_peft.integrations.{name}", raising=False)
    return importlib.import_module(f"moa_peft.integrations.{name}")


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Any:
    return module_of(
        monkeypatch,
        "axolotl",
        "axolotl.integrations.base",
        BasePlugin=object,
        AdapterCapabilities=SimpleNamespace,
    )


@pytest.fixture
def swift(monkeypatch: pytest.MonkeyPatch) -> Any:
    return module_of(monkeypatch, "ms_swift", "swift.tuner_plugin", PeftTuner=object, tuners_map={})


def config(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"adapter": "moa", "lora_model_dir": None, "moa": None, **values})


def test_axolotl_trains_the_method_of_its_config_and_loads_it_again(axolotl: Any, tmp_path: Path) -> None:
    plugin = axolotl.MoAPlugin()
    assert [one.name for one in plugin.get_adapter_capabilities()] == ["moa"]
    section = {"method": "sparse-moa", "mixture": {"experts": {0: {"rank": 2}}}}
    model, made = plugin.load_adapter(base_model("llama"), config(moa=section))
    assert isinstance(made, MoAConfig)
    assert (made.router.threshold is not None, made.experts[0].rank) == (True, 2)
    awaken(model)
    model.save_pretrained(tmp_path)
    assert any(one.requires_grad for one in model.parameters())
    loaded, _ = plugin.load_adapter(base_model("llama"), config(lora_model_dir=str(tmp_path)), inference=True)
    assert torch.equal(loaded.eval()(IDS).logits, model.eval()(IDS).logits)
    assert not any(one.requires_grad for one in loaded.parameters())


def test_axolotl_gets_the_config_alone_for_trainers_that_put_it_on_and_nothing_for_another_adapter(
    axolotl: Any, tmp_path: Path
) -> None:
    model, made = axolotl.MoAPlugin().load_adapter(base_model("llama"), config(), config_only=True)
    assert model is None
    assert made.to_dict() == MoAConfig.preset("soft-lora").to_dict()
    made.save_pretrained(tmp_path)
    base = base_model("llama")
    stored = config(lora_model_dir=str(tmp_path))
    model, read = axolotl.MoAPlugin().load_adapter(base, stored, config_only=True)
    assert model is None
    assert (read.experts, read.router) == (made.experts, made.router)
    assert not mixture_layers(base)
    assert axolotl.MoAPlugin().load_adapter(base_model("llama"), config(adapter="mora")) is None


def test_axolotl_refuses_a_key_that_the_section_has_not(axolotl: Any) -> None:
    with pytest.raises(ValueError, match="preset"):
        axolotl.MoAArguments(moa={"preset": "soft-moa"})
    module, _, name = axolotl.MoAPlugin().get_input_args().rpartition(".")
    assert getattr(importlib.import_module(module), name) is axolotl.MoAArguments


def test_ms_swift_trains_the_method_that_was_registered(swift: Any) -> None:
    swift.register("soft-moa", router={"initial_gate": 0.9})
    model = swift.tuners_map["moa"].prepare_model(SimpleNamespace(), base_model("llama"))
    assert isinstance(model, PeftModel)
    made = model.active_peft_config
    assert isinstance(made, MoAConfig)
    assert made.router.initial_gate == 0.9
    with pytest.raises(UsageError, match="unknown method"):
        swift.register("soft-mao")


TINY = runpy.run_path(str(Path(__file__).parents[1] / "training" / "tiny.py"))


def trained_by(module: str, *words: str, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Run a tool's command in a folder with a tiny model and rows; gives the config and weights of its last checkpoint."""
    TINY["write_model"](folder / "model")
    TINY["write_rows"](folder / "rows.json")
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (saved,) = {one.parent for one in folder.glob("out/**/checkpoint-3/adapter_model.safetensors")}
    return yaml.safe_load((saved / "adapter_config.json").read_text()), load_file(
        saved / "adapter_model.safetensors"
    )


@pytest.mark.slow
def test_axolotls_own_command_trains_a_mixture(tmp_path: Path) -> None:
    if not importlib.util.find_spec("axolotl"):
        pytest.skip("axolotl is not installed: scripts/other_tools.sh makes an environment that has it")
    settings = {
        "base_model": "./model", "plugins": ["moa_peft.integrations.axolotl.MoAPlugin"], "adapter": "moa",
        "moa": {"method": "sparse-moa", "mixture": {"router": {"initial_gate": 0.9}}},
        "datasets": [{"path": "rows.json", "ds_type": "json", "type": "alpaca"}], "output_dir": "out",
        "sequence_len": 96, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 3,
        "learning_rate": 0.01, "lr_scheduler": "constant", "optimizer": "adamw_torch", "bf16": False, "fp16": False,
        "special_tokens": {"pad_token": "<pad>"},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    config, weights = trained_by("axolotl.cli.train", "config.yaml", folder=tmp_path)
    assert (config["peft_type"], config["router"]["initial_gate"]) == ("MOA", 0.9)
    assert config["router"]["threshold"]["maximum"] == 0.5
    assert all(value.any() for name, value in weights.items() if name.endswith(".B"))  # they start at zero


@pytest.mark.slow
def test_ms_swifts_own_command_trains_a_mixture(tmp_path: Path) -> None:
    if not importlib.util.find_spec("swift"):
        pytest.skip("ms-swift is not installed: scripts/other_tools.sh makes an environment that has it")
    (tmp_path / "moa.py").write_text(
        'from moa_peft.integrations.ms_swift import register\n\nregister("soft-moa", router={"initial_gate": 0.9})\n'
    )
    flags = {
        "external_plugins": "moa.py", "tuner_type": "moa", "model": "./model", "model_type": "llama", "template": "dummy",
        "dataset": "rows.json", "max_steps": 3, "output_dir": "out", "torch_dtype": "float32", "max_length": 96,
        "learning_rate": 0.01, "use_hf": "true", "report_to": "none",
    }  # fmt: skip
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    config, weights = trained_by("swift.cli.sft", *words, folder=tmp_path)
    assert (config["peft_type"], config["router"]["initial_gate"]) == ("MOA", 0.9)
    assert all(value.any() for name, value in weights.items() if name.endswith(".B"))
