import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from moa_peft.errors import UsageError
from moa_peft.evaluation.loading import AdapterFolder, choose_base, choose_template, load, read_adapter
from moa_peft.evaluation.options import default_out
from tiny_lm import byte_tokenizer, save_adapter, save_base, tiny_llama, with_mixture


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base)


def test_an_adapter_loads_onto_the_base_that_it_names(base: Path, adapter: Path) -> None:
    loaded = load(None, read_adapter(str(adapter)))
    assert isinstance(loaded.model, PeftModel)
    assert (loaded.base_model, loaded.model.training, loaded.model.dtype) == (str(base), False, torch.float32)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        tuned = loaded.model(input_ids=ids).logits
        with loaded.model.disable_adapter():
            frozen = loaded.model(input_ids=ids).logits
        expected = tiny_llama()(input_ids=ids).logits
    torch.testing.assert_close(frozen, expected)
    assert (tuned - frozen).abs().max() > 1e-3


def test_the_recipe_goes_before_the_config_of_peft(tmp_path: Path, base: Path) -> None:
    folder = save_adapter(tmp_path / "a", base, model="smollm2", template="chat", method="sparse-moa", seed=4)
    found = read_adapter(str(folder))
    assert (found.base_model, found.template, found.method, found.seed) == (
        "smollm2",
        "chat",
        "sparse-moa",
        4,
    )
    assert choose_template(None, found, "paper") == "chat"
    assert choose_template("paper", found, "chat") == "paper"
    assert choose_template(None, None, "paper") == "paper"


def test_a_checkpoint_is_evaluated_as_its_run_is(tmp_path: Path, base: Path) -> None:
    """It took the paper's template where the run had the chat's; and resuming the run deletes old checkpoints with what is in them."""
    save_adapter(tmp_path / "run" / "checkpoint-4", base)
    write_recipe = (tmp_path / "run" / "moa_recipe.json").write_text
    write_recipe(json.dumps({"model": str(base), "template": "chat", "method": "lora", "seed": 4}))
    found = read_adapter(str(tmp_path / "run" / "checkpoint-4"))
    assert (found.template, found.method, found.seed) == ("chat", "lora", 4)
    assert default_out(None, found) == tmp_path / "run" / "evaluation"


def test_the_bare_model_and_its_dtype(base: Path) -> None:
    assert load(str(base)).model.dtype == torch.float32
    assert load(str(base), dtype="bfloat16").model.dtype == torch.bfloat16


def test_the_tokenizer_of_the_adapter_folder_goes_before_the_bases(base: Path, adapter: Path) -> None:
    assert load(str(base), read_adapter(str(adapter))).tokenizer.chat_template is None
    byte_tokenizer(chat=True).save_pretrained(adapter)
    assert load(str(base), read_adapter(str(adapter))).tokenizer.chat_template is not None


def test_a_folder_without_an_adapter_says_what_it_is(tmp_path: Path, base: Path, adapter: Path) -> None:
    with pytest.raises(
        UsageError, match=r"base holds no adapter_config.json: it is a whole model: give it with --model"
    ):
        read_adapter(str(base))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no adapter_config.json: it is no adapter"):
        read_adapter(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match=r"adapter folder .*nowhere does not exist"):
        read_adapter(str(tmp_path / "nowhere"))
    adapter.rename(tmp_path / "empty/checkpoint-7")
    with pytest.raises(UsageError, match=r"a checkpoint in it does: --adapter .*checkpoint-7"):
        read_adapter(str(tmp_path / "empty"))


def test_a_name_that_the_hub_does_not_give_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> str:
        raise FileNotFoundError(f"no {name}\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        UsageError, match=r"adapter some/one is no folder here, and the hub does not give it \(no some/one"
    ):
        read_adapter("some/one")


def test_an_adapter_from_the_hub_is_read_where_the_hub_puts_it(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: str(adapter))
    assert read_adapter("some/one").path == adapter


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_config_is_named(adapter: Path, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(
        UsageError, match=r"adapter_config\.json holds no JSON object .* was not written whole"
    ):
        read_adapter(str(adapter))


@pytest.mark.parametrize("key", ["model", "template", "method"])
def test_a_field_that_is_no_text_is_named(adapter: Path, key: str) -> None:
    (adapter / "moa_recipe.json").write_text(json.dumps({key: 7}))
    with pytest.raises(UsageError, match=r"its (base model|template|method) is 7: it must be text"):
        read_adapter(str(adapter))


def test_weights_that_are_cut_off_or_missing_are_told(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UsageError, match="its weights are damaged or cut off"):
        load(None, read_adapter(str(adapter)))
    weights.unlink()
    with pytest.raises(UsageError, match=r"the adapter .* cannot be loaded onto"):
        load(None, read_adapter(str(adapter)))


def test_an_adapter_for_a_base_of_other_sizes_is_refused(tmp_path: Path, adapter: Path) -> None:
    other = save_base(tmp_path / "other", hidden_size=16)
    with pytest.raises(UsageError, match="does not fit this model"):
        load(str(other), read_adapter(str(adapter)))
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(UsageError, match="trained on a base of other sizes; give that one with --model"):
        load(str(other), read_adapter(str(tmp_path / "lora")))


def test_a_lora_of_other_blocks_or_with_other_weights_is_refused(tmp_path: Path, base: Path) -> None:
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(str(tmp_path / "lora"))
    found = read_adapter(str(tmp_path / "lora"))
    load(str(base), found)
    fewer, more = (save_base(tmp_path / f"base{n}", num_hidden_layers=n) for n in (1, 3))
    with pytest.raises(
        UsageError, match=r"2 of its weights have no place in that model, as .*layers\.1\..*lora_A"
    ):
        load(str(fewer), found)
    with pytest.raises(UsageError, match=r"2 of its weights are not in its file, as .*layers\.2\..*lora_A"):
        load(str(more), found)
    weights = load_file(tmp_path / "lora/adapter_model.safetensors")
    renamed = {f"x.{name}": tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "lora/adapter_model.safetensors")
    with pytest.raises(UsageError, match=r"4 of its weights are not in its file"):
        load(str(base), found)


@pytest.mark.filterwarnings(
    "ignore:The following rank_pattern keys"
)  # of PEFT, which reads them by other names
def test_adapters_that_keep_more_or_other_weights_than_their_settings_tell_are_loaded(
    tmp_path: Path, base: Path
) -> None:
    """AdaLoRA whose ranks were cut, and a LoRA beside trained embeddings."""
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    schedule = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 4, "deltaT": 1}
    cut, ids = get_peft_model(tiny_llama(), AdaLoraConfig(**settings, **schedule)), torch.arange(9)[None]
    for step in range(1, 5):
        cut(input_ids=ids, labels=ids).loss.backward()
        cut.base_model.update_and_allocate(step)
    assert sum(map(sum, cut.peft_config["default"].rank_pattern.values())) < 8
    cut.save_pretrained(str(tmp_path / "cut"))
    beside = LoraConfig(**settings, modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(tiny_llama(), beside).save_pretrained(str(tmp_path / "beside"), save_embedding_layers=True)
    for name in ("cut", "beside"):
        load(str(base), read_adapter(str(tmp_path / name)))


def test_a_model_that_lacks_weights_is_refused(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks 3 of its weights, as model\.layers\.1\.mlp"):
        load(str(base))
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"the model .* cannot be loaded"):
        load(str(base))


def test_an_adapter_that_lengthens_the_prompt_is_refused(tmp_path: Path, base: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(tiny_llama(), config).save_pretrained(str(tmp_path / "prompts"))
    with pytest.raises(UsageError, match="changes the length of the prompt"):
        load(str(base), read_adapter(str(tmp_path / "prompts")))


def test_an_activated_lora_is_refused(tmp_path: Path, base: Path) -> None:
    """It scored 4.7 nats off without a word: a call on a cache does not hold its invocation tokens."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    get_peft_model(tiny_llama(), config).save_pretrained(str(tmp_path / "alora"))
    with pytest.raises(UsageError, match="it is an activated LoRA"):
        load(str(base), read_adapter(str(tmp_path / "alora")))


def test_a_model_that_cannot_be_loaded_and_an_unknown_dtype_are_named(tmp_path: Path, base: Path) -> None:
    (base / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))
    with pytest.raises(UsageError, match=r"the model .* cannot be loaded"):
        load(str(base))
    with pytest.raises(UsageError, match="unknown dtype 'bfloat61': did you mean 'bfloat16'"):
        load(str(base), dtype="bfloat61")


def told(adapter: Path, **recipe: Any) -> AdapterFolder:
    (adapter / "moa_recipe.json").write_text(json.dumps(recipe))
    return read_adapter(str(adapter))


def test_how_the_base_was_loaded_for_training_is_remembered_and_each_part_can_be_overridden(
    base: Path, adapter: Path
) -> None:
    packed = {"quant_method": "torchao"}
    given = {
        "revision": "v1",
        "dtype": "bfloat16",
        "attn_implementation": "eager",
        "quantization_config": packed,
    }
    found = told(
        adapter, model=str(base), model_init_kwargs={**given, "device_map": "auto", "use_cache": False}
    )
    assert choose_base(None, found).init_kwargs == given
    changed = choose_base(None, found, {"revision": "v2", "quantization_config": None}, "float16").init_kwargs
    assert changed == {"revision": "v2", "dtype": "float16", "attn_implementation": "eager"}
    other = choose_base(str(base), found).init_kwargs
    assert other == {name: one for name, one in given.items() if name != "revision"}, (
        "another name has others"
    )
    assert choose_base(None, told(adapter, model=str(base), bf16=True)).init_kwargs == {"dtype": "bfloat16"}
    assert choose_base(str(base), None).init_kwargs == {"dtype": "float32"}
    with pytest.raises(UsageError, match="dtype is given twice, as float16 and in model_init_kwargs"):
        choose_base(None, found, {"dtype": "float16"}, "float16")


def test_the_revision_that_pefts_own_config_states_is_taken(base: Path, adapter: Path) -> None:
    rewrite(adapter / "adapter_config.json", revision="v7")
    assert choose_base(None, read_adapter(str(adapter))).init_kwargs["revision"] == "v7"


@pytest.mark.parametrize(
    "asked",
    [
        {"trust_remote_code": True},
        {"weights_only": False},
        {"attn_implementation": "someone/kernels"},
        {"use_kernels": True},
        {"revision": ["v1"]},
    ],
)
def test_an_adapters_folder_does_not_decide_what_runs_here(
    base: Path, adapter: Path, asked: dict[str, Any]
) -> None:
    (name,) = asked
    found = told(adapter, model=str(base), model_init_kwargs=asked)
    with pytest.raises(
        UsageError, match=rf"adapter was trained with {name} for its base model, .* add --model-init"
    ):
        load(None, found)
    assert choose_base(None, found, asked).init_kwargs[name] == asked[name]
    assert name not in choose_base(None, found, {name: None}).init_kwargs
    if name == "trust_remote_code":
        with pytest.raises(UsageError, match="trained with trust_remote_code"):
            load(None, told(adapter, model=str(base), trust_remote_code=True))


def test_a_relative_base_is_found_where_training_found_it_or_beside_the_adapter(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = told(adapter, model="./base")
    assert choose_base(None, found).path == str(base)
    save_base(tmp_path / "elsewhere" / "base")
    assert choose_base(None, found).path == str(base), "not another one of that name"
    beside = save_base(adapter / "base")
    rewrite(adapter / "adapter_config.json", base_model_name_or_path="./base")
    (tmp_path / "elsewhere" / "base").rename(tmp_path / "elsewhere" / "moved")
    assert choose_base(None, read_adapter(str(adapter))).path == str(beside)
    beside.rename(adapter / "moved")
    with pytest.raises(UsageError, match=r"'\./base' does not exist \(looked for base and .*/adapter/base\)"):
        load(None, read_adapter(str(adapter)))


@pytest.fixture
def lora(tmp_path: Path, base: Path) -> Path:
    model = LlamaForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "lora"))
    return tmp_path / "lora"


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_no_adapter_of_any_kind_changes_the_frozen_model_or_brings_what_is_no_number(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    folder = request.getfixturevalue(kind)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({**weights, "base_model.model.model.norm.weight": torch.zeros(32)}, file)
    with pytest.raises(
        UsageError, match=r"holds another base_model\.model\.model\.norm\.weight than the frozen"
    ):
        load(None, read_adapter(str(folder)))
    save_file({name: torch.full_like(one, float("nan")) for name, one in weights.items()}, file)
    with pytest.raises(UsageError, match=r"adapter .*(adapter|lora) holds numbers that are not finite"):
        load(None, read_adapter(str(folder)))


def test_a_pickle_is_not_read(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    for content in (pickle.dumps(Path("/"), protocol=2), b"", b"PK\x03\x04 no zip"):
        (adapter / "adapter_model.bin").write_bytes(content)
        with pytest.raises(UsageError, match=r"the adapter .* cannot be loaded onto .*base: .") as error:
            load(None, read_adapter(str(adapter)))
        assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_tokens_that_were_added_beside_the_adapter_lengthen_the_base(tmp_path: Path, base: Path) -> None:
    model, tokenizer = LlamaForCausalLM.from_pretrained(base), byte_tokenizer()
    tokenizer.add_tokens(["<new>", "<newer>"])
    model.resize_token_embeddings(len(tokenizer))
    trained, ids = with_mixture(model), torch.arange(245, 259)[None]
    trained.save_pretrained(str(tmp_path / "a"))
    tokenizer.save_pretrained(tmp_path / "a")
    again = load(None, read_adapter(str(tmp_path / "a"))).model
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, trained(input_ids=ids).logits)


def test_a_config_that_is_nested_too_deeply_or_of_no_kind_is_named(adapter: Path) -> None:
    rewrite(adapter / "adapter_config.json", peft_type=["MOA"])
    with pytest.raises(UsageError, match=r"its peft_type is \['MOA'\]: it must be text"):
        read_adapter(str(adapter))
    (adapter / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match=r"adapter_config\.json holds no JSON object"):
        read_adapter(str(adapter))


@pytest.mark.parametrize("name", ["\ud800", "a\ud800/b", "\0"])
def test_a_name_that_no_file_can_have_is_one_line(name: str) -> None:
    with pytest.raises(UsageError, match=r"^adapter "):
        load(None, read_adapter(name))
    with pytest.raises(UsageError, match="does not exist"):
        load(name)
