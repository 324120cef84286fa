"""What PEFT finds in an adapter's file: it would copy everything into the model that has a name there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from moa_peft.errors import UsageError
from tiny_lm import byte_tokenizer, save_adapter, save_base, with_mixture

IDS = torch.arange(240, 257)[None]
NEW_IDS = torch.arange(245, 259)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base)


def change(adapter: Path, how: Callable[[dict[str, Tensor]], Any]) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    how(weights)
    save_file(weights, file, metadata={"format": "pt"})


def loaded(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter))


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    "name", ["model.norm", "model.embed_tokens", "lm_head", "model.layers.1.self_attn.q_proj"]
)
def test_a_file_with_other_weights_of_the_frozen_model_is_refused(
    base: Path, adapter: Path, name: str
) -> None:
    """Switched off, such an adapter moved the logits by 4.9."""
    key, own = f"base_model.model.{name}.weight", LlamaForCausalLM.from_pretrained(base).state_dict()
    change(adapter, lambda weights: weights.update({key: torch.zeros_like(own[f"{name}.weight"])}))
    with pytest.raises(UsageError, match=rf"'default' holds another {key} than the frozen base model has"):
        loaded(base, adapter)
    before = logits(loaded(base, save_adapter(adapter.parent / "clean", base)))
    change(adapter, lambda weights: weights.update({key: own[f"{name}.weight"].clone()}))
    assert torch.equal(logits(loaded(base, adapter)), before), "the model's own weight changes nothing"


def test_a_weight_that_nothing_in_the_model_is_called_by_is_refused(base: Path, adapter: Path) -> None:
    change(adapter, lambda weights: weights.update({"base_model.model.model.nope.weight": torch.zeros(2)}))
    with pytest.raises(UsageError, match=r"does not fit this model: .*model\.nope\.weight is unknown"):
        loaded(base, adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_refused(base: Path, adapter: Path, value: float) -> None:
    change(adapter, lambda weights: next(iter(weights.values())).view(-1)[-1:].fill_(value))
    with pytest.raises(UsageError, match=r"'default' holds numbers that are not finite, in base_model\."):
        loaded(base, adapter)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_that_no_training_leaves_is_refused(base: Path, adapter: Path, dtype: torch.dtype) -> None:
    change(adapter, lambda weights: weights.update({key: one.to(dtype) for key, one in weights.items()}))
    with pytest.raises(UsageError, match=rf"in {dtype}: adapters are of float32, bfloat16, float16, float64"):
        loaded(base, adapter)


def save_with_added_tokens(folder: Path, base: Path, *, seed: int, saved: list[str] | None) -> PeftModel:
    """An adapter on a base model whose vocabulary was lengthened by hand, with the tokenizer beside it."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(base), byte_tokenizer()
    tokenizer.add_tokens(["<new>", "<newer>"])
    model.resize_token_embeddings(len(tokenizer))
    trained = with_mixture(model, seed=seed, modules_to_save=saved)
    tokenizer.save_pretrained(folder)
    trained.save_pretrained(str(folder))
    return trained


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("saved", [None, ["embed_tokens", "lm_head"]])
def test_rows_of_added_tokens_come_from_the_file_and_all_others_from_the_base(
    tmp_path: Path, base: Path, saved: list[str] | None
) -> None:
    trained = save_with_added_tokens(tmp_path / "a", base, seed=1, saved=saved)
    again = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "a"))
    assert torch.equal(logits(again, NEW_IDS), logits(trained, NEW_IDS))
    with again.disable_adapter(), trained.disable_adapter():
        assert torch.equal(logits(again, NEW_IDS), logits(trained, NEW_IDS))

    name = f"base_model.model.lm_head.{'original_module.' if saved else ''}weight"
    change(tmp_path / "a", lambda weights: weights[name][5].add_(1))
    with pytest.raises(UsageError, match=rf"holds another {name} than the frozen base model has"):
        AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "a"))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_another_size_of_the_vocabulary_is_named_with_what_to_call(tmp_path: Path, base: Path) -> None:
    rows = len(byte_tokenizer()) + 2
    save_with_added_tokens(tmp_path / "a", base, seed=1, saved=None)
    with pytest.raises(UsageError, match=rf"holds {rows} rows of .*call resize_token_embeddings\({rows}\)"):
        loaded(base, tmp_path / "a")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_a_second_adapter_leaves_the_first_ones_trained_modules_alone(tmp_path: Path, base: Path) -> None:
    """PEFT wrote the copies under the name "default" as well, and put them back under that name."""
    for seed in (1, 2):
        save_with_added_tokens(tmp_path / f"{seed}", base, seed=seed, saved=["embed_tokens", "lm_head"])
    model = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "1"))
    first = logits(model)
    model.load_adapter(str(tmp_path / "2"), adapter_name="second")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert (logits(model) - first).abs().max() > 1e-3
    save_with_added_tokens(tmp_path / "3", base, seed=3, saved=None)
    with pytest.raises(UsageError, match=r"'third' holds another .* than the frozen base model has"):
        model.load_adapter(str(tmp_path / "3"), adapter_name="third")
