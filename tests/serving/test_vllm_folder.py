"""`moa export --format vllm`: the folder that vLLM serves, and what it does not serve; vLLM itself is not needed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM
from typer.testing import CliRunner

from moa_peft import DoraExpert, LoraExpert, MoAConfig, RouterConfig, UsageError
from moa_peft.cli import app, register_verbs
from moa_peft.data.row import Row
from moa_peft.data.templates import render_prompt
from moa_peft.evaluation.loading import read_adapter
from moa_peft.serving.vllm.command import vllm_command
from moa_peft.serving.vllm.folder import export_vllm
from pictures import model_of
from structures import text_model
from tiny_lm import END, byte_tokenizer, save_adapter, save_base

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", chat=True)


def export(adapter: Path, **options: Any) -> Path:
    out = adapter.parent / "served"
    export_vllm(read_adapter(str(adapter)), out, **options)
    return out


def test_the_folder_holds_the_adapter_and_the_config_of_the_base_with_its_place(base: Path) -> None:
    if not app.registered_commands:
        register_verbs()
    adapter, out = save_adapter(base.parent / "adapter", base), base.parent / "served"
    words = ["export", str(adapter), "--format", "vllm", "--out", str(out)]
    told = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert f"next        vllm serve {out}" in told
    assert {one.name for one in out.iterdir()} == {
        "adapter_config.json", WEIGHTS, "chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    for name in ("adapter_config.json", WEIGHTS, "chat_template.jinja"):
        origin = base if name.startswith("chat") else adapter
        assert (out / name).read_bytes() == (origin / name).read_bytes()
    own = {"architectures": ["MoAForCausalLM"], "moa_base": str(base), "moa_revision": None}
    ignored = {"transformers_version", "_name_or_path"}
    found, expected = (AutoConfig.from_pretrained(one).to_dict() for one in (out, base))
    assert {key: found[key] for key in found.keys() - ignored} == {
        key: {**expected, **own}[key] for key in (expected.keys() | own.keys()) - ignored
    }
    with pytest.raises(UsageError, match="--overwrite"):
        export(adapter)


@pytest.mark.parametrize("template", ["chat", "paper"])
def test_answers_end_where_the_template_of_the_training_ends_them(base: Path, template: str) -> None:
    """vLLM takes the ends of the base model's settings alone, so that a chat ran on until its longest length."""
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace(END, "<|im_end|>")
    tokenizer.save_pretrained(base)
    adapter = save_adapter(base.parent / "adapter", base, template=template, model=str(base))
    ends = GenerationConfig.from_pretrained(export(adapter)).eos_token_id
    assert ends == ([256, 257] if template == "chat" else 256)


def test_settings_of_generation_that_transformers_reads_and_does_not_save_are_written(base: Path) -> None:
    settings = {"temperature": 0.6, "top_p": 0.9}
    (base / "generation_config.json").write_text(json.dumps(settings))
    out = export(save_adapter(base.parent / "adapter", base, template="chat", model=str(base)))
    found = json.loads((out / "generation_config.json").read_text())
    assert {name: found[name] for name in settings} == settings
    assert "trust_remote_code" not in found


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_an_adapter_trained_with_the_papers_template_is_asked_by_it(base: Path, system: str) -> None:
    out = export(save_adapter(base.parent / "adapter", base, model=str(base), template="paper"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    question = {"role": "user", "content": "Name a fox."}
    turns = [{"role": "system", "content": system}, question] if system else [question]
    row = Row(instruction="Name a fox.", input="", output="", answer="", system=system)
    assert tokenizer.apply_chat_template(turns, tokenize=False) == render_prompt(row, "paper", tokenizer)
    with pytest.raises(Exception, match="one user message"):
        tokenizer.apply_chat_template([question, {"role": "assistant", "content": "Reynard"}, question])


def with_config(**changes: Any) -> Callable[[Path, Path], None]:
    def save(folder: Path, base: Path) -> None:
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), MoAConfig(**changes))
        assert isinstance(model, PeftModel)
        model.save_pretrained(str(folder))

    return save


def of_another_size(folder: Path, base: Path) -> None:
    save_adapter(folder, save_base(base.parent / "other", hidden_size=64))
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(base)}))


def of_another_rank(folder: Path, base: Path) -> None:
    save_adapter(folder, base)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["experts"][0]["rank"] = 3
    (folder / "adapter_config.json").write_text(json.dumps(config))


def with_added_tokens(folder: Path, base: Path) -> None:
    save_adapter(folder, base)
    embeddings = {"base_model.model.model.embed_tokens.weight": torch.zeros(260, 32)}
    save_file(load_file(folder / WEIGHTS) | embeddings, folder / WEIGHTS)


def on_a_quantised_base(folder: Path, base: Path) -> None:
    four_bits = {"quantization_config": {"load_in_4bit": True}}
    save_adapter(folder, base, model=str(base), model_init_kwargs=four_bits)


def on(make: Callable[[], Any]) -> Callable[[Path, Path], None]:
    def save(folder: Path, base: Path) -> None:
        odd = make()
        odd.save_pretrained(base.parent / "odd")
        odd.name_or_path = str(base.parent / "odd")
        model = get_peft_model(odd, MoAConfig.preset("lora"))
        assert isinstance(model, PeftModel)
        model.save_pretrained(str(folder))

    return save


LORA = LoraExpert(targets=["q_proj"])
INSTANCE = RouterConfig(kind="linear", granularity="instance")
REFUSED: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "instance gates": (with_config(experts=[LORA], router=INSTANCE), "granularity 'instance'.*moa serve"),
    "modules_to_save": (
        with_config(experts=[LORA], modules_to_save=["lm_head"]),
        "trained lm_head as a whole",
    ),
    "DoRA": (with_config(experts=[DoraExpert(targets=["q_proj"])]), "expert 'dora' reads the frozen weights"),
    "size": (of_another_size, "does not fit this model"),
    "rank": (of_another_rank, r"is \[2, 32\], the model's is \[3, 32\]"),
    "added tokens": (with_added_tokens, "embed_tokens.weight, a weight of the base model"),
    "pictures": (on(lambda: model_of("llava")), "is multimodal.*moa serve --engine transformers"),
    "routed experts": (on(lambda: text_model("qwen3_moe")), "is a mixture of experts.*moa serve --engine"),
    "quantised while loaded": (on_a_quantised_base, 'with quantization_config.*"quantization_config": null'),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_vllm_would_serve_wrong_is_refused_and_nothing_written(base: Path, what: str) -> None:
    save, message = REFUSED[what]
    save(base.parent / "adapter", base)
    with pytest.raises(UsageError, match=message):
        export(base.parent / "adapter")
    assert not (base.parent / "served").exists()


def test_an_adapter_whose_weights_are_missing_or_cut_off_is_refused(base: Path) -> None:
    adapter = save_adapter(base.parent / "adapter", base)
    weights = adapter / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UsageError, match="is damaged or cut off"):
        export(adapter)
    weights.unlink()
    with pytest.raises(UsageError, match=f"holds no {WEIGHTS}"):
        export(adapter)


def test_the_command_names_the_config_format_of_a_folder_without_a_config(base: Path) -> None:
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    assert vllm_command(base, "0.0.0.0", 80) == [*words, "--host", "0.0.0.0", "--port", "80"]
    run = vllm_command(base.parent, "0.0.0.0", 80)
    assert run == [
        *words[:-1],
        str(base.parent),
        "--config-format",
        "moa",
        "--host",
        "0.0.0.0",
        "--port",
        "80",
    ]
