"""The modules that axolotl and ms-swift load. Where a tool is not installed, its base classes are stood in for."""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel

from moa_peft import MoAConfig, UsageError
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
    assert (made.parts().router.threshold is not None, made.parts().experts[0].rank) == (True, 2)
    awaken(model)
    model.save_pretrained(tmp_path)
    assert any(one.requires_grad for one in model.parameters())
    loaded, _ = plugin.load_adapter(base_model("llama"), config(lora_model_dir=str(tmp_path)), inference=True)
    assert torch.equal(loaded.eval()(IDS).logits, model.eval()(IDS).logits)
    assert not any(one.requires_grad for one in loaded.parameters())


def test_axolotl_gets_the_config_alone_for_trainers_that_put_it_on_and_nothing_for_another_adapter(
    axolotl: Any,
) -> None:
    model, made = axolotl.MoAPlugin().load_adapter(base_model("llama"), config(), config_only=True)
    assert model is None
    assert made.to_dict() == MoAConfig.preset("soft-moa").to_dict()
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
    assert made.parts().router.initial_gate == 0.9
    with pytest.raises(UsageError, match="unknown method"):
        swift.register("soft-mao")
