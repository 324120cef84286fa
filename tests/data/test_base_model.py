"""The base model: which names are taken, and that the embedded default is converted without a change."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moa_peft.data import base_loading, base_model
from moa_peft.data.base_loading import find_base, model_fingerprint
from moa_peft.data.base_model import convert_gguf, mark_as_plain, resolve_model
from moa_peft.data.cache import cache_root
from moa_peft.errors import UsageError


def tiny_llama(end: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.config.quantization_config = {"quant_method": "gguf"}  # the marks that loading from GGUF leaves
    marks = {"is_quantized": True, "hf_quantizer": SimpleNamespace(is_serializable=lambda *_, **__: False)}
    vars(model).update(marks)
    return model


@pytest.fixture
def source(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[LlamaForCausalLM, Path]:
    """Stand in for a GGUF file: what transformers would load from it, and its path."""
    model = tiny_llama(end=cast("int", tokenizer.eos_token_id))
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF")
    for auto, loaded in ((transformers.AutoModelForCausalLM, model), (transformers.AutoTokenizer, tokenizer)):
        plain = auto.from_pretrained

        def load(
            place: Any = None, *args: Any, _plain: Any = plain, _loaded: Any = loaded, **kwargs: Any
        ) -> Any:
            if "gguf_file" in kwargs:
                assert Path(kwargs["pretrained_model_name_or_path"]) / kwargs["gguf_file"] == gguf
                return _loaded
            return _plain(place, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", load)
    monkeypatch.setattr(base_model, "package_files", lambda package: dict.fromkeys(package.members, gguf))
    return model, gguf


def test_a_converted_model_reloads_to_the_bit_and_is_plain(
    source: tuple[LlamaForCausalLM, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, gguf = source
    (tmp_path / "out").mkdir()
    convert_gguf(gguf, tmp_path / "out")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert {one.dtype for one in again.parameters()} == {torch.float32}
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()
    reread = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (reread.chat_template, reread.eos_token) == (tokenizer.chat_template, "</s>")
    assert again.generation_config.eos_token_id == reread.eos_token_id


def test_a_model_marked_as_quantised_is_saved_only_after_the_marks_are_cleared(tmp_path: Path) -> None:
    model = tiny_llama(end=2)
    with pytest.raises(Exception, match=r"quanti|serializ"):
        model.save_pretrained(tmp_path / "a")
    mark_as_plain(model)
    model.save_pretrained(tmp_path / "a")


def test_the_embedded_default_is_made_once_and_again_when_damaged(
    source: tuple[LlamaForCausalLM, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(resolve_model("smollm2"))
    assert folder == cache_root() / "smollm2"
    assert "converting SmolLM2-135M-Instruct to float32" in capsys.readouterr().err
    weights = (folder / "model.safetensors").read_bytes()
    with monkeypatch.context() as reading:
        reading.setattr(
            base_loading, "sha256_of", None
        )  # the manifest states it: half a gigabyte is not read again
        assert model_fingerprint(find_base("smollm2")) == hashlib.sha256(weights).hexdigest()
    assert resolve_model("smollm2") == str(folder)
    assert capsys.readouterr().err == ""
    (folder / "model.safetensors").write_bytes(weights[:-4])
    mark_as_plain(source[0])
    assert resolve_model("smollm2") == str(folder)
    assert "is not whole (model.safetensors has" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == weights


def test_folders_and_hub_names_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    for name in ("gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "org/model_1.5b"):
        assert resolve_model(name) == name


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere", "~/nowhere", "a/b/c", "runs\\model", "", "a b", "org/"]
)
def test_a_name_that_is_neither_folder_nor_hub_name_is_an_error(name: str) -> None:
    with pytest.raises(
        UsageError,
        match=r"does not exist: give a folder with a config\.json, a name on the hub, or 'smollm2'",
    ):
        resolve_model(name)


def test_a_folder_or_file_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no config\.json: it is no model"):
        resolve_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UsageError, match=r"holds no config\.json: it is an adapter: give --adapter, and --model for its base"
    ):
        resolve_model(str(tmp_path))
    with pytest.raises(UsageError, match=r"adapter_config\.json' is a file: give a folder"):
        resolve_model(str(tmp_path / "adapter_config.json"))


@pytest.mark.slow
def test_the_real_embedded_default_speaks_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOA_CACHE")
    if not (cache_root() / "smollm2").exists():
        pytest.skip("the embedded default is not in the user's cache")
    folder = resolve_model("smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert tokenizer.eos_token == "<|im_end|>"
    assert sum(one.numel() for one in model.parameters()) == 134_515_008
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    said = model.generate(**asked, max_new_tokens=40, do_sample=False)[0]
    assert said[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(said[asked["input_ids"].shape[1] :])
