"""How a base model is loaded: what may be told of it, and that nothing of it runs, is guessed or is random."""

import hashlib
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from moa_peft.data.base_loading import (
    _say_if_emulated,
    base_config,
    empty_model,
    find_base,
    load_base,
    load_tokenizer,
    model_fingerprint,
    told_init_kwargs,
)
from moa_peft.errors import UsageError
from pictures import model_of
from tiny import tokens
from tiny_lm import byte_tokenizer, save_base

CODE = "raise SystemExit('the code ran')"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_fingerprint_is_that_of_the_weights_told_of(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds no \.safetensors and no pytorch_model\*\.bin file"):
        model_fingerprint(find_base(str(tmp_path)))
    (tmp_path / "model-1.safetensors").write_bytes(b"one")
    first = model_fingerprint(find_base(str(tmp_path)))
    assert first == hashlib.sha256(b"one").hexdigest()
    (tmp_path / "model-2.safetensors").write_bytes(b"two")
    second = model_fingerprint(find_base(str(tmp_path)))
    (tmp_path / "model-2.safetensors").write_bytes(b"owt")
    (tmp_path / "model.gguf").write_bytes(b"gguf")
    packed = model_fingerprint(find_base(str(tmp_path), {"gguf_file": "model.gguf"}))
    assert packed == hashlib.sha256(b"gguf").hexdigest()
    assert len({first, second, packed, model_fingerprint(find_base(str(tmp_path)))}) == 4


def test_the_fingerprint_of_a_hub_name_is_the_cached_commit_of_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(name: str, file: str, revision: str = "main") -> str | None:
        if revision == "v3":
            return None
        return (
            str(tmp_path / name / revision / file)
            if file in ("config.json", "deep/config.json", "m.gguf")
            else None
        )

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    found = [model_fingerprint(find_base("org/m", {"revision": one})) for one in (None, "v1", "v3")]
    assert found == ["main", "v1", "unknown"]
    parts = ({"subfolder": "deep"}, {"gguf_file": "m.gguf"}, {"subfolder": "no"})
    assert [model_fingerprint(find_base("org/m", one)) for one in parts] == ["main", "main", "unknown"]


def test_code_in_a_base_folder_runs_only_where_that_is_said_and_nobody_is_asked(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks on standard input, where a piped "y" answered it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (base / "own.py").write_text(CODE)
    rewrite(
        base / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    )
    rewrite(base / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": [None, "own.T"]})
    for load in (base_config, load_base, load_tokenizer):
        with pytest.raises(UsageError, match=r"has code of its own: .*\{\"trust_remote_code\": true\}"):
            load(find_base(str(base)))
        with pytest.raises(SystemExit, match="the code ran"):
            load(find_base(str(base), {"trust_remote_code": True}))


def test_arguments_that_transformers_refuses_are_one_line(base: Path) -> None:
    for given in (
        {"dtype": "bf16"},
        {"attn_implementation": "nope"},
        {"quantization_config": {"quant_method": "x"}},
    ):
        with pytest.raises(UsageError, match=r"the model '.*base' cannot be loaded: ."):
            load_base(find_base(str(base), given))
    with pytest.raises(
        UsageError, match=r"kwargs\.token: .* `hf auth login`.*; .*\.torch_dtype: its name .* is dtype"
    ):
        find_base(str(base), {"token": "hf_secret", "torch_dtype": "float32"})
    with pytest.raises(UsageError, match="model_init_kwargs is 'v1': give a mapping"):
        told_init_kwargs({"model_init_kwargs": "v1"})


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_base_that_reads_pictures_is_loaded_for_text(tmp_path: Path, family: str) -> None:
    """Where transformers has no class for text alone, the base was refused as of an unknown kind."""
    expected = model_of(family)
    expected.save_pretrained(tmp_path)
    base = find_base(str(tmp_path), {"dtype": "float32"})
    with torch.no_grad():
        assert torch.equal(load_base(base)(tokens()).logits, expected(tokens()).logits)
    assert type(empty_model(base)) is type(expected)


def test_what_a_recipe_says_of_its_base_model() -> None:
    assert told_init_kwargs({}) == {"dtype": "auto"}
    assert told_init_kwargs({"bf16": True, "trust_remote_code": True}) == {
        "dtype": "bfloat16",
        "trust_remote_code": True,
    }
    assert told_init_kwargs({"model_init_kwargs": {"torch_dtype": "float16"}}) == {"dtype": "float16"}
    own = {"dtype": "float16", "revision": "v1"}
    assert told_init_kwargs({"bf16": True, "model_init_kwargs": own}) == own


def test_rows_for_added_tokens_are_the_same_each_time_and_leave_the_random_state_alone(base: Path) -> None:
    plain, tokenizer = load_base(find_base(str(base))), byte_tokenizer()
    tokenizer.add_tokens(["<new>", "<newer>"])
    rows = []
    for seed in range(2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = load_base(find_base(str(base)), tokenizer)
        assert torch.equal(torch.get_rng_state(), before)
        rows.append(torch.cat([model.get_input_embeddings().weight, model.get_output_embeddings().weight]))
    assert rows[0].shape[0] == 2 * 259
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0][:257], plain.get_input_embeddings().weight)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the model would run on an accelerator")
@pytest.mark.parametrize(
    ("dtype", "supported", "told"), [("bfloat16", False, 1), ("bfloat16", True, 0), ("float32", False, 0)]
)
def test_a_processor_that_must_emulate_bfloat16_says_so_once(
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
    supported: bool,
    told: int,
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False)
    _say_if_emulated.cache_clear()
    for _ in range(2):
        load_base(find_base(str(base), {"dtype": dtype}))
    assert capsys.readouterr().err.count("no instructions for bfloat16") == told


def test_a_relative_name_is_looked_for_in_every_place_and_an_error_names_them(tmp_path: Path) -> None:
    here, beside = tmp_path / "here" / "base", tmp_path / "adapter" / "base"
    with pytest.raises(
        UsageError, match=r"'\./base' does not exist \(looked for .*here/base and .*adapter/base\)"
    ):
        find_base("./base", places=(here, beside))
    save_base(beside)
    assert find_base("./base", places=(here, beside)).path == str(beside)
    there_is_none = find_base("org/base", {"local_files_only": True}, (here, tmp_path / "b"))
    with pytest.raises(
        UsageError, match=r"cannot be loaded: .*; there is no folder .*here/base or .*/b either"
    ):
        load_base(there_is_none)
