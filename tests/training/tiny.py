"""A random Llama of two small blocks, its tokenizer, and rows to train it on; written to disk."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = (
    "Below is an instruction that describes a task. Write response appropriately completes the request. "
    "### Instruction: Response: Input: paired with input provides further context. add and is what one two three"
)


def write_model(folder: Path) -> Path:
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys(WORDS.split()), *map(str, range(40))]
    tokenizer = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(file: Path, count: int = 24) -> Path:
    rows = [
        {"instruction": f"add {i % 7} and {i % 5}", "output": " ".join([str(i % 7 + i % 5)] * (1 + i % 3))}
        for i in range(count)
    ]
    file.write_text(json.dumps(rows))
    return file
