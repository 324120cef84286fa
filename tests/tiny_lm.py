"""A tiny random Llama with a byte-level tokenizer, and rows of the paper's form: enough to evaluate and to talk to."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moa_peft import LoraExpert, MoAConfig, ParallelAdapterExpert, PromptExpert
from moa_peft.data.row import Row

END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, and an end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: place for place, letter in enumerate(letters)} | {END: len(letters)}
    inner = Tokenizer(models.BPE(vocab=words, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # untyped setter
    inner.decoder = decoders.ByteLevel()  # untyped setter
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)
    if chat:
        made.chat_template = CHAT_TEMPLATE
    return made


def tiny_llama(*, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Random weights, far enough from uniform that choices differ."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def with_mixture(model: LlamaForCausalLM, *, seed: int = 1, **options: Any) -> PeftModel:
    """A mixture of every kind of expert, none of them zero; with options of its config."""
    torch.manual_seed(seed)
    experts = [
        LoraExpert(targets=["q_proj", "down_proj"], rank=2),
        ParallelAdapterExpert(size=2),
        PromptExpert(length=2),
    ]
    wrapped = get_peft_model(model, MoAConfig(experts=experts, **options))
    with torch.no_grad():
        for one in wrapped.parameters():
            if one.requires_grad:
                one.normal_(std=0.2)
    assert isinstance(wrapped, PeftModel)
    return wrapped.eval()


def save_base(folder: Path, *, chat: bool = False, **changes: Any) -> Path:
    """Write the model and its tokenizer as a plain model folder."""
    tiny_llama(**changes).save_pretrained(folder)
    byte_tokenizer(chat=chat).save_pretrained(folder)
    return folder


def save_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a cache of the hub with a model whose main has moved on since v1, go offline, and give the model's name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for seed, (revision, commit) in enumerate((("v1", "1" * 40), ("main", "2" * 40))):
        save_base(folder / "models--org--tiny" / "snapshots" / commit, seed=seed)
        ref = folder / "models--org--tiny" / "refs" / revision
        ref.parent.mkdir(exist_ok=True)
        ref.write_text(commit)
    return "org/tiny"


def save_adapter(folder: Path, base: Path, options: dict[str, Any] | None = None, **recipe: Any) -> Path:
    """Write an adapter folder for a base model, by options of its config, with a recipe if there is anything to say in it."""
    model = LlamaForCausalLM.from_pretrained(base)
    with_mixture(model, **(options or {})).save_pretrained(str(folder))
    if recipe:
        (folder / "moa_recipe.json").write_text(json.dumps(recipe))
    return folder


def choice_rows(count: int) -> list[Row]:
    """Questions of unequal length, with two, three and four choices, of one word each or with a number."""
    formats = ("true/false", "answer1/answer2/answer3", "ending1/ending2/ending3/ending4", "yes/perhaps/no")
    rows: list[Row] = []
    for place in range(count):
        words = formats[place % len(formats)].split("/")
        answer = words[place // 2 % len(words)]
        instruction = f"Q{place} {'why ' * (place * 7 % 5)}?\n\nAnswer format: {'/'.join(words)}"
        rows.append(
            Row(instruction=instruction, input="", output=f"the correct answer is {answer}", answer=answer)
        )
    return rows


def number_rows(count: int) -> list[Row]:
    """Sums, of unequal length."""
    return [
        Row(
            instruction=f"{'Well. ' * (place % 3)}What is {place} + 1?",
            input="",
            output=f"\nA: It is {place + 1}. The answer is {place + 1}.",
            answer=f"{place + 1}.0",
        )
        for place in range(count)
    ]


def write_rows(file: Path, rows: Sequence[Row]) -> Path:
    """Write rows as a file of the paper's form."""
    file.parent.mkdir(parents=True, exist_ok=True)
    names = ("instruction", "input", "output", "answer")
    file.write_text(json.dumps([{name: getattr(row, name) for name in names} for row in rows]))
    return file
