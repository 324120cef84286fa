"""`moa import` and `moa export --format official`: checkpoints of the official code, there and back."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from golden import VERIFIED, golden
from moa_peft import (
    LoraExpert,
    MoAConfig,
    ParallelAdapterExpert,
    PromptExpert,
    RouterConfig,
    ThresholdConfig,
    UsageError,
)
from moa_peft.cli import app, register_verbs
from moa_peft.json_lines import read_rows
from moa_peft.official.parity import base_model as reference_model
from moa_peft.official.reference import read_file, read_reference, under
from tiny import awaken, base_model
from tiny_lm import choice_rows, write_rows

END = "<|end|>"
FLAGS = {
    "top_k": "--top-k",
    "max_threshold": "--max-threshold",
    "constant_threshold": "--constant-threshold",
}
"""The metadata of a reference file that a native checkpoint's weights do not tell."""


def call(*words: object, said: str = "") -> Result:
    if not app.registered_commands:
        register_verbs()
    done = CliRunner().invoke(app, [str(one) for one in words], input=said)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each printable character, the line break and the end: as many as the reference models know."""
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    words = {letter: place for place, letter in enumerate(letters)} | {END: len(letters)}
    inner = Tokenizer(models.BPE(vocab=words, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)


class Golden:
    """A reference file, laid out as the official code and transformers leave such things."""

    def __init__(self, name: str, folder: Path) -> None:
        self.metadata, self.tensors = read_file(golden(name))
        self.weights = under("adapter.", self.tensors)
        self.is_native = "settings" in self.metadata
        self.base = folder / "base"
        model = reference_model(read_reference(golden(name)))
        model.config.eos_token_id = model.generation_config.eos_token_id = 96
        model.save_pretrained(self.base)
        character_tokenizer().save_pretrained(self.base)
        self.checkpoint = folder / ("adapter.pth" if self.is_native else "fork")
        if self.is_native:
            torch.save({name: one.clone() for name, one in self.weights.items()}, self.checkpoint)
        else:
            self._save_shards()

    def _save_shards(self) -> None:
        """The whole model in two shards, base weights beside the adapter's, as the fork saves it."""
        self.checkpoint.mkdir()
        whole = sorted((self.weights | under("base.", self.tensors)).items())
        for number, part in enumerate((whole[::2], whole[1::2]), start=1):
            name = f"model-{number:05d}-of-00002.safetensors"
            save_file(dict(part), self.checkpoint / name)

    @property
    def flags(self) -> list[str]:
        """What a person who knows the training's arguments types."""
        if not self.is_native:
            return []
        given = [(flag, self.metadata.get(name)) for name, flag in FLAGS.items()]
        if any("lora_A" in name for name in self.weights):
            given.append(("--alpha", self.metadata["settings"]["lora_alpha"]))
        words = [str(word) for pair in given if pair[1] is not None for word in pair]
        return words + (["--instance-level"] if "instance" in self.metadata["method"] else [])

    def logits(self, adapter: Path) -> Tensor:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base), adapter).eval()
        with torch.no_grad():
            return model(input_ids=self.tensors["input_ids"]).logits


@pytest.fixture
def official(tmp_path: Path) -> Callable[[str], Golden]:
    return lambda name: Golden(name, tmp_path)


SUMMARIES = {
    "llama3-soft-moa": (
        "soft-moa, native layout",
        "rows of B of lora_k_proj, lora_q_proj",
        "--constant-threshold",
    ),
    "llama3-soft-moa-hydra3": ("soft-moa-hydra, native", "of lora_k_proj, lora_q_proj", "method"),
    "llama3-sparse-moa-const": ("sparse-moa, native layout", "lora_q_proj", "blocks      0-1 of 0-1"),
    "llama3-instance-moa": ("instance-moa, native layout", "lora_q_proj", "float32"),
    "llama3-unipeft": ("unipeft, native layout", "lora_q_proj", "in 44 weights"),
    "llama3-lora": ("lora, native layout", "lora_q_proj", "11,264 in 20 weights"),
    "llama3-molora": ("molora, native layout", "lora_q_proj", "float32"),
    "llama3-hydralora": ("hydralora, native layout", "lora_q_proj", "float32"),
    "llama3-topk-moe-lora": ("topk-moe-lora, native layout", "lora_q_proj", "float32"),
    "llama3-adamole": ("adamole, native layout", "lora_q_proj", "float32"),
    "llama3-parallel-adapter": ("parallel-adapter, native layout", "permuted    none", "float32"),
    "llama3-prompt-tuning": ("prompt-tuning, native layout", "permuted    none", "float32"),
    "transformers-qwen3-sparse": (
        "sparse-moa, fork layout",
        "permuted    none",
        "alpha = 8, hard-coded",
        "max_threshold = 0.5, hard-coded",
        "left out    25 weights of the base model",
    ),
}
"""What the summary of an import says, by reference file."""


@pytest.mark.slow
@pytest.mark.parametrize("name", VERIFIED)
def test_an_imported_checkpoint_is_recognised_computes_the_official_logits_and_exports_the_same_bits(
    official: Callable[[str], Golden], tmp_path: Path, name: str
) -> None:
    one, adapter = official(name), tmp_path / "adapter"
    told = call("import", one.checkpoint, "--base", one.base, "--out", adapter, *one.flags).stdout
    for part in (
        *SUMMARIES.get(name, ()),
        f"moa evaluate --adapter {adapter}",
        f"moa chat --adapter {adapter}",
    ):
        assert part in told
    torch.testing.assert_close(one.logits(adapter), one.tensors["logits"], atol=1e-4, rtol=0)
    out = tmp_path / ("back.pth" if one.is_native else "back.safetensors")
    call("export", adapter, "--format", "official", "--out", out)
    back = torch.load(out, weights_only=True) if one.is_native else load_file(out)
    assert back.keys() == one.weights.keys()
    for key, weight in one.weights.items():
        assert torch.equal(back[key], weight), key
        assert back[key].is_contiguous(), key


def test_a_report_for_machines_counts_every_weight(official: Callable[[str], Golden], tmp_path: Path) -> None:
    one, adapter = official("llama3-soft-moa"), tmp_path / "adapter"
    words = ["import", one.checkpoint, "--base", one.base, "--out", adapter, *one.flags, "--json"]
    found = json.loads(call(*words).stdout)
    assert found["num_parameters"] == sum(weight.numel() for weight in one.weights.values())
    assert found["method"] == "soft-moa"


@pytest.mark.parametrize("name", ["llama3-soft-moa", "transformers-llama-sparse-prompt"])
def test_an_imported_adapter_can_be_evaluated_and_talked_to(
    official: Callable[[str], Golden], tmp_path: Path, name: str
) -> None:
    one, adapter = official(name), tmp_path / "adapter"
    call("import", one.checkpoint, "--base", one.base, "--out", adapter, *one.flags)
    rows = write_rows(tmp_path / "mine" / "test.json", choice_rows(3))
    assert "1 row added" in call("evaluate", "--adapter", adapter, "--tasks", rows).stdout
    (row,) = read_rows(adapter / "evaluation" / "results.jsonl")
    assert (row["n"], row["base_model"]) == (3, str(one.base))
    words = ["chat", "--adapter", adapter, "--max-new-tokens", 12]
    tuned, frozen = call(*words, said="hi\n"), call(*words, said="/base\nhi\n")
    assert tuned.exit_code == frozen.exit_code == 0
    assert tuned.stdout.strip() != frozen.stdout.strip()


def wrapped(weights: dict[str, Tensor]) -> dict[str, Any]:
    return {"model": {f"module.{name}": one for name, one in weights.items()}, "epoch": 3}


def lightning(weights: dict[str, Tensor]) -> dict[str, Any]:
    """A wrapper whose prefix is that of the other layout."""
    return {"state_dict": {f"model.{name}": one for name, one in weights.items()}}


def with_base(weights: dict[str, Tensor]) -> dict[str, Any]:
    base = {"tok_embeddings.weight": torch.zeros(3, 2), "layers.0.attention.wq.weight": torch.zeros(2, 2)}
    return weights | base


@pytest.mark.parametrize("form", [wrapped, lightning, with_base])
def test_wrappers_prefixes_and_base_weights_change_nothing(
    official: Callable[[str], Golden], tmp_path: Path, form: Callable[[dict[str, Tensor]], dict[str, Any]]
) -> None:
    one, adapter = official("llama3-soft-moa"), tmp_path / "adapter"
    torch.save(form({name: weight.clone() for name, weight in one.weights.items()}), one.checkpoint)
    call(
        "import", tmp_path, "--base", one.base, "--out", adapter, *one.flags
    )  # the folder that holds adapter.pth
    torch.testing.assert_close(one.logits(adapter), one.tensors["logits"], atol=1e-4, rtol=0)


def test_the_forks_names_without_their_prefix_are_still_the_forks(
    official: Callable[[str], Golden], tmp_path: Path
) -> None:
    one, adapter = official("transformers-qwen3-sparse-prompt"), tmp_path / "adapter"
    file = tmp_path / "x.safetensors"
    save_file({name.removeprefix("model."): weight for name, weight in one.weights.items()}, file)
    told = call("import", file, "--base", one.base, "--out", adapter).stdout
    assert "fork layout" in told
    torch.testing.assert_close(one.logits(adapter), one.tensors["logits"], atol=1e-4, rtol=0)


def test_weights_keep_their_dtype_and_bits(official: Callable[[str], Golden], tmp_path: Path) -> None:
    one, adapter = official("llama3-soft-moa"), tmp_path / "adapter"
    low = {name: weight.bfloat16() for name, weight in one.weights.items()}
    torch.save(low, one.checkpoint)
    told = call("import", one.checkpoint, "--base", one.base, "--out", adapter, *one.flags).stdout
    assert "bfloat16" in told
    call("export", adapter, "--format", "official", "--out", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert all(torch.equal(back[name], weight) for name, weight in low.items())
    assert {weight.dtype for weight in back.values()} == {torch.bfloat16}


def test_blocks_without_experts_stay_without(official: Callable[[str], Golden], tmp_path: Path) -> None:
    """The native code gives such blocks empty routers and idle thresholds, which are left out."""
    one, adapter = official("llama3-sparse-moa"), tmp_path / "adapter"
    part = {name: weight for name, weight in one.weights.items() if name.startswith("layers.1.")}
    idle = {
        "layers.0.adapter_type_router.w1.weight": torch.zeros(0, 64),
        "layers.0.adapter_threshold_fn.weight": torch.ones(1, 64),
    }
    torch.save({name: weight.clone() for name, weight in (part | idle).items()}, one.checkpoint)
    words = ["import", one.checkpoint, "--base", one.base, "--out", adapter, *one.flags]
    told = call(*words).stdout
    assert "blocks      1 of 0-1" in told
    assert "left out    2 weights of routers in blocks without an expert" in told
    assert json.loads((adapter / "adapter_config.json").read_text())["layers_to_transform"] == [1]
    one.logits(adapter)
    call("export", adapter, "--format", "official", "--out", tmp_path / "back.pth")
    assert torch.load(tmp_path / "back.pth", weights_only=True).keys() == part.keys()


def without(flag: str) -> Callable[[list[str]], list[str]]:
    def left(flags: list[str]) -> list[str]:
        place = flags.index(flag)
        return flags[:place] + flags[place + 2 :]

    return left


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama3-soft-moa", without("--alpha"), r"give --alpha, .* the usual official value is --alpha 8"),
        (
            "llama3-topk-moe-lora",
            without("--top-k"),
            r"give --top-k, .* \(the usual official value is --top-k 2\)",
        ),
        (
            "llama3-sparse-moa",
            without("--max-threshold"),
            r"the usual official value is --max-threshold 0\.5",
        ),
        ("llama3-sparse-moa", lambda flags: [], r"give --alpha.*; give --max-threshold"),
        ("llama3-molora", lambda flags: [*flags, "--top-k", "2"], "has no top-k router"),
        ("llama3-soft-moa", lambda flags: [*flags, "--max-threshold", "1"], "has no learned threshold"),
        ("llama3-sparse-moa", lambda flags: [*flags, "--constant-threshold", "1"], "has a learned threshold"),
        ("llama3-prompt-tuning", lambda flags: ["--alpha", "8"], "the checkpoint has no LoRA"),
        ("llama3-lora", lambda flags: [*flags, "--instance-level"], "has no router of its blocks"),
        ("llama3-unipeft", lambda flags: [*flags, "--instance-level"], "are of a whole instance already"),
        (
            "llama3-unipeft",
            lambda flags: [*flags, "--constant-threshold", "0.5"],
            "--constant-threshold is given: leave it out, UniPEFT's gates are .* without a threshold",
        ),
    ],
)
def test_settings_that_are_needed_or_contradict_the_weights_are_named(
    official: Callable[[str], Golden],
    tmp_path: Path,
    name: str,
    change: Callable[[list[str]], list[str]],
    message: str,
) -> None:
    one = official(name)
    words = ["import", one.checkpoint, "--base", one.base, "--out", tmp_path / "adapter", *change(one.flags)]
    with pytest.raises(UsageError, match=message):
        call(*words)
    assert not (tmp_path / "adapter").exists()


def test_the_forks_alpha_is_assumed_for_the_forks_rank_alone(
    official: Callable[[str], Golden], tmp_path: Path
) -> None:
    one = official("transformers-llama-soft")
    other = {
        name: weight[:4] if name.endswith("lora_A.weight") else weight[:, :4] if "lora_B" in name else weight
        for name, weight in one.weights.items()
    }
    save_file({name: weight.contiguous() for name, weight in other.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=r"give --alpha.* rank 4"):
        call("import", tmp_path / "x.safetensors", "--base", one.base, "--out", tmp_path / "adapter")


class Opaque:
    """Something that is no tensor."""


def saved(content: object) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        torch.save(content, folder / "bad.pth")
        return folder / "bad.pth"

    return save


def written(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def cut_off(weights: dict[str, Tensor]) -> Callable[[Path], Path]:
    def cut(folder: Path) -> Path:
        file = saved(weights)(folder)
        file.write_bytes(file.read_bytes()[:60_000])
        return file

    return cut


def flipped(weights: dict[str, Tensor]) -> Callable[[Path], Path]:
    """One bit of a weight changed on the way, which torch's reader does not see."""

    def flip(folder: Path) -> Path:
        file = saved(weights)(folder)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        return file

    return flip


def damages(weights: dict[str, Tensor]) -> dict[str, Callable[[Path], Path]]:
    """Checkpoints that cannot be imported, by what is wrong with them."""
    bias = "layers.0.p_adapter.up_proj.bias"
    return {
        "unknown name": saved(weights | {"layers.0.attention.lora_Q.mixer.weight": torch.zeros(1)}),
        "bias tuning": saved(weights | {"layers.0.attention.wq.bias": torch.zeros(1)}),
        "lacking": saved(without_key(weights, "layers.1.attention.lora_Q.lora_A.weight")),
        "too deep": saved({name.replace("layers.1.", "layers.7."): one for name, one in weights.items()}),
        "0-d": saved(weights | {"layers.0.attention.lora_Q.lora_B.weight": torch.tensor(1.0)}),
        "no rows": saved(weights | {"layers.0.adapter_type_router.w2.weight": torch.zeros(0, 28)}),
        "whole numbers": saved(
            weights | {"layers.0.p_adapter.up_proj.bias": torch.zeros(64, dtype=torch.int8)}
        ),
        "not finite": saved(weights | {"layers.0.p_adapter.up_proj.bias": torch.full((64,), float("nan"))}),
        "odd rows": saved(weights | {"layers.0.attention.lora_Q.lora_B.weight": torch.zeros(9, 8)}),
        "ranks": saved(weights | {"layers.1.attention.lora_V.lora_A.weight": torch.zeros(3, 64)}),
        "both layouts": saved(weights | {"model.layers.0.mlp.lora_down.lora_A.weight": torch.zeros(8, 3)}),
        "objects": saved({"model": weights, "args": Opaque()}),
        "no weights": saved({"epoch": 3}),
        "a list": saved([torch.zeros(1)]),
        "base only": saved({"tok_embeddings.weight": torch.zeros(3, 2)}),
        "damaged": written("bad.pth", b"PK\x03\x04 and no more"),
        "text": written("bad.pth", b"weights: none\n"),
        "mutated": written("bad.pth", b"\x80\x02h\x00."),
        "holds itself": saved(cyclic(weights)),
        "cut off": cut_off(weights),
        "damaged shard": written("bad.safetensors", b"\x10\x00"),
        "flipped bit": flipped(weights),
        "float8": saved(weights | {bias: weights[bias].to(torch.float8_e4m3fn)}),
        "sparse": saved(weights | {bias: weights[bias].to_sparse()}),
        "twice": saved(weights | {f"module.{bias}": weights[bias]}),
        "shard": lambda folder: written("model-00001-of-00002.safetensors", b"")(folder).parent,
        "one shard": written("model-00001-of-00002.safetensors", b""),
        "adapter": lambda folder: written("adapter_config.json", b'{"peft_type": "MOA"}')(folder).parent,
        "empty folder": lambda folder: folder,
        "kind of file": written("x.txt", b"x"),
        "absent": lambda folder: folder / "absent",
    }


def cyclic(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Weights beside a "model" that is the whole mapping again: looking for what is inside never ended."""
    whole: dict[str, Any] = dict(weights)
    whole["model"] = whole
    return whole


def without_key(weights: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if name != key}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("unknown name", r"cannot place the weight 'layers\.0\.attention\.lora_Q\.mixer\.weight'"),
        ("not finite", r"numbers that are not finite, in layers\.0\.p_adapter\.up_proj\.bias"),
        ("bias tuning", r"cannot place the weight 'layers\.0\.attention\.wq\.bias'"),
        ("lacking", r"lacks weights for \[\(1, 'experts\.lora_q_proj\.A'\)\]"),
        ("too deep", "has weights of block 7, the base model .* has blocks 0 to 1"),
        ("0-d", r"lora_B\.weight' is float32 \[\]: it has to be floats of 2 dimensions"),
        ("no rows", r"w2\.weight' is float32 \[0, 28\]: it has to be floats"),
        ("whole numbers", r"up_proj\.bias' is int8 \[64\]: it has to be floats of 1 dim"),
        ("odd rows", r"lora_Q\.lora_B\.weight' is \[9, 8\], its place is \[64, 8\]"),
        ("ranks", r"lora_V\.lora_A\.weight' is \[3, 64\], its place is \[8, 64\]"),
        ("both layouts", "mixes two layouts"),
        ("cut off", r"bad\.pth is damaged or cut off"),
        ("objects", "holds more than tensors, or is damaged, and is not loaded"),
        ("no weights", "holds 'epoch', which is no weight"),
        ("a list", "holds no weights by name"),
        ("damaged", r"bad\.pth is damaged or cut off"),
        ("text", r"bad\.pth holds more than tensors, or is damaged"),
        ("mutated", r"bad\.pth is damaged or cut off"),
        ("holds itself", "holds 'model', which is no weight"),
        ("damaged shard", r"bad\.safetensors is damaged or cut off"),
        ("base only", "holds no adapter: all of its 1 weights are those of a base model"),
        ("flipped bit", r"bad\.pth is damaged or cut off"),
        ("float8", r"up_proj\.bias in torch\.float8_e4m3fn: adapters are of float32"),
        ("sparse", r"up_proj\.bias without numbers of its own, or sparse"),
        ("twice", r"holds 'layers\.0\.p_adapter\.up_proj\.bias' twice, once as 'module\."),
        ("shard", r"lacks model-00002-of-00002\.safetensors: copy every shard"),
        ("one shard", "is one of several shards: give their folder"),
        ("empty folder", r"holds no \.pth and no \.safetensors file"),
        ("adapter", "is an adapter of this package already"),
        ("kind of file", "is of an unknown kind"),
        ("absent", "does not exist"),
    ],
)
def test_what_cannot_be_imported_is_refused_and_leaves_nothing(
    official: Callable[[str], Golden], tmp_path: Path, kind: str, message: str
) -> None:
    one, folder = official("llama3-soft-moa"), tmp_path / "given"
    folder.mkdir()
    bad = damages({name: weight.clone() for name, weight in one.weights.items()})[kind](folder)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=message):
        call("import", bad, "--base", one.base, "--out", tmp_path / "adapter", "--alpha", 16)
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_of_another_base_is_refused(official: Callable[[str], Golden], tmp_path: Path) -> None:
    one, other = official("llama3-soft-moa"), tmp_path / "other"
    base_model("llama").save_pretrained(other)
    with pytest.raises(UsageError, match="the checkpoint was made on another base model"):
        call("import", one.checkpoint, "--base", other, "--out", tmp_path / "adapter", *one.flags)


@pytest.mark.parametrize("width", [24, 72])
def test_rows_that_are_no_heads_of_the_base_are_refused(
    official: Callable[[str], Golden], tmp_path: Path, width: int
) -> None:
    """The rows were permuted first, by heads of a size that did not divide them, which ended in a traceback."""
    one, other = official("llama3-soft-moa"), tmp_path / "other"
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=width * 2,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    config.save_pretrained(other)
    with pytest.raises(UsageError, match="the checkpoint was made on another base model"):
        call("import", one.checkpoint, "--base", other, "--out", tmp_path / "adapter", *one.flags)


def test_copies_whose_number_differs_between_blocks_are_refused(
    official: Callable[[str], Golden], tmp_path: Path
) -> None:
    one = official("llama3-molora")
    weights = {
        name: weight
        for name, weight in one.weights.items()
        if not re.search(r"layers\.1\..*_l\.3\.weight", name)
    }
    torch.save(weights, one.checkpoint)
    with pytest.raises(UsageError, match=r"is one of 3 in block 1, other blocks have another number"):
        call("import", one.checkpoint, "--base", one.base, "--out", tmp_path / "adapter", *one.flags)


UNIPEFT_WITHOUT = {
    "prompt": re.compile(r"layers\.0\.attention\.prompt"),
    "adapter": re.compile(r"layers\.0\.p_adapter\."),
    "lora": re.compile(r"layers\.0\..*\.lora_[A-Z]"),
    "all but the adapter": re.compile(r"layers\.0\..*(\.lora_[A-Z]|attention\.prompt)"),
    "all": re.compile(r"layers\.0\..*(\.lora_[A-Z]|attention\.prompt|p_adapter\.)"),
}


@pytest.mark.parametrize("lacking", UNIPEFT_WITHOUT)
def test_unipeft_whose_blocks_carry_different_kinds_is_imported_and_exported(
    official: Callable[[str], Golden], tmp_path: Path, lacking: str
) -> None:
    """The official code has all three gates in each block; the import met rows that no gate of the block takes.

    An expert that changes nothing is as good as none: the golden model with that expert silenced is the oracle.
    """
    one, adapter = official("llama3-unipeft"), tmp_path / "adapter"
    gone = UNIPEFT_WITHOUT[lacking]
    silent = {
        name: torch.zeros_like(weight) if gone.search(name) and not name.endswith("_gate.weight") else weight
        for name, weight in one.weights.items()
    }
    torch.save(silent, one.checkpoint)
    words = ["--base", one.base, *one.flags]
    call("import", one.checkpoint, "--out", tmp_path / "silent", *words)
    weights = {name: weight for name, weight in one.weights.items() if not gone.search(name)}
    torch.save(weights, one.checkpoint)
    report = json.loads(call("import", one.checkpoint, "--out", adapter, *words, "--json").stdout)
    torch.testing.assert_close(one.logits(adapter), one.logits(tmp_path / "silent"), atol=1e-5, rtol=0)
    call("export", adapter, "--format", "official", "--out", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    idle = {name for name in weights if name not in back or not torch.equal(back[name], weights[name])}
    assert len(idle) == report["num_idle_weights"]
    assert all(re.match(r"layers\.0\.\w+_gate\.", name) for name in idle)
    if lacking != "all":
        assert back.keys() == weights.keys()
        assert not any(back[name].any() for name in idle)


def test_only_an_adapter_is_overwritten_and_only_when_asked(
    official: Callable[[str], Golden], tmp_path: Path
) -> None:
    one, out = official("llama3-prompt-tuning"), tmp_path / "adapter"
    words = ["import", one.checkpoint, "--base", one.base, "--out", out]
    out.mkdir()
    call(*words)
    with pytest.raises(UsageError, match=r"holds an adapter: .* --overwrite"):
        call("import", "nowhere", *words[2:])  # said before anything is read
    (out / "notes.txt").write_text("mine")
    weights = out / "adapter_model.safetensors"
    weights.write_bytes(b"old")
    call(*words, "--overwrite")
    assert weights.read_bytes() != b"old"
    assert (out / "notes.txt").read_text() == "mine"
    (out / "moa_recipe.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a training run"):
        call(*words, "--overwrite")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="is not empty and holds no adapter"):
        call(*words[:-1], tmp_path / "full", "--overwrite")
    with pytest.raises(UsageError, match="is a file: choose a folder"):
        call(*words[:-1], tmp_path / "full" / "thesis.tex", "--overwrite")


def test_what_belongs_to_an_overwritten_adapter_does_not_stay_beside_the_new_one(
    official: Callable[[str], Golden], tmp_path: Path
) -> None:
    """A tokenizer and a config left there by `moa export --format vllm` were then read for the new adapter."""
    one, out = official("llama3-prompt-tuning"), tmp_path / "adapter"
    words = ["import", one.checkpoint, "--base", one.base, "--out", out, "--overwrite"]
    call(*words)
    new = {file.name for file in out.iterdir()}
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        (out / name).write_text("{}")
    (out / "additional_chat_templates").mkdir()
    call(*words)
    assert {file.name for file in out.iterdir()} == new


def test_the_revision_of_the_base_model_goes_into_the_adapter(
    official: Callable[[str], Golden], tmp_path: Path
) -> None:
    one, out = official("llama3-prompt-tuning"), tmp_path / "adapter"
    call(
        "import",
        one.checkpoint,
        "--base",
        one.base,
        "--out",
        out,
        "--model-init-kwargs",
        '{"revision": "v1"}',
    )
    assert json.loads((out / "adapter_config.json").read_text())["revision"] == "v1"


def test_an_adapter_is_written_into_a_folder_that_cannot_be_renamed(
    official: Callable[[str], Golden], tmp_path: Path
) -> None:
    """A mount point or a link: nothing beside it is written, and what a killed command was writing there is no obstacle."""
    one, folder, out = official("llama3-prompt-tuning"), tmp_path / "folder", tmp_path / "link"
    (folder / ".adapter-killed").mkdir(parents=True)
    out.symlink_to(folder)
    before = set(tmp_path.iterdir())
    call("import", one.checkpoint, "--base", one.base, "--out", out)
    assert set(tmp_path.iterdir()) == before
    assert out.is_symlink()
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }


def save_mixture(folder: Path, config: MoAConfig, family: str = "llama") -> Path:
    """A tiny model and a mixture on it, as folders."""
    model = base_model(family)
    model.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    wrapped_model = get_peft_model(model, config)
    awaken(wrapped_model)
    wrapped_model.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def hydra(**changes: Any) -> RouterConfig:
    return RouterConfig(**{"kind": "linear", "gate": "softmax", "bias": False} | changes)


REFUSED: dict[str, tuple[MoAConfig, str]] = {
    "alpha": (
        MoAConfig(experts=[LoraExpert(targets=["q_proj"], alpha=4), LoraExpert(targets=["v_proj"], alpha=8)]),
        r"its LoRA have one alpha for all targets, these have 4\b.* and 8",
    ),
    "rank": (
        MoAConfig(experts=[LoraExpert(targets=["q_proj"], rank=4), LoraExpert(targets=["v_proj"], rank=8)]),
        "one rank for all targets, these have 4 and 8",
    ),
    "layers": (
        MoAConfig(experts=[LoraExpert(targets=["q_proj"], layers=[0]), LoraExpert(targets=["v_proj"])]),
        "one layers for all targets",
    ),
    "twice": (
        MoAConfig(experts=[LoraExpert(targets=["q_proj"]), LoraExpert(targets=["q_proj"])]),
        "it has one of each expert, lora_q_proj is there twice",
    ),
    "gate": (
        MoAConfig(experts=[LoraExpert(targets=["q_proj", "v_proj"])], router=RouterConfig(gate="softmax")),
        "the gate 'softmax' of a block's router is not in it",
    ),
    "bias": (
        MoAConfig(experts=[LoraExpert(targets=["q_proj"])], router=RouterConfig(bias=False)),
        "its block routers have biases",
    ),
    "routerless": (
        MoAConfig(experts=[LoraExpert(targets=["q_proj"]), PromptExpert()], router=None),
        r"experts of several kinds \(lora, prompt\) need a router",
    ),
    "copies' bias": (
        MoAConfig(
            experts=[LoraExpert(targets=["q_proj"], num_experts=2, router=hydra(bias=True))], router=None
        ),
        "copies of lora with gate 'softmax' have no bias in it",
    ),
    "copies' kind": (
        MoAConfig(
            experts=[LoraExpert(targets=["q_proj"], num_experts=2, router=RouterConfig(gate="softmax"))],
            router=None,
        ),
        "a swiglu router with gate 'softmax' over copies of lora is not in it",
    ),
    "shared top-k": (
        MoAConfig(
            experts=[
                LoraExpert(
                    targets=["q_proj"],
                    num_experts=2,
                    shared=True,
                    router=hydra(gate="top-k", keep=1, bias=True),
                )
            ],
            router=None,
        ),
        "that share A have the gate 'softmax' in it, these have 'top-k'",
    ),
    "adapters": (
        MoAConfig(experts=[ParallelAdapterExpert(num_experts=2, router=hydra(bias=True))], router=None),
        "several copies of the parallel adapter that share nothing crash it",
    ),
    "one copy": (
        MoAConfig(experts=[PromptExpert(router=hydra(bias=True))], router=None),
        "a router over a single copy of prompt is not in it",
    ),
    "kinds": (
        MoAConfig(
            experts=[LoraExpert(targets=["q_proj"]), PromptExpert()],
            router=RouterConfig(kind="linear", granularity="instance", gate_of="kind", router_input="block"),
        ),
        "its gates of kinds are lora, prompt, parallel_adapter, this adapter has lora, prompt",
    ),
    "fork's copies": (MoAConfig.preset("soft-moa-hydra"), "the fork's experts have no copies"),
    "fork's instances": (MoAConfig.preset("instance-moa"), "the fork has no gates of a whole instance"),
    "fork's constant": (
        MoAConfig.preset("sparse-moa", router={"threshold": ThresholdConfig(constant=0.5)}),
        "the fork has no constant threshold",
    ),
    "saved": (
        MoAConfig.preset("soft-moa", modules_to_save=["lm_head"]),
        r"modules_to_save \['lm_head'\] is not",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_official_code_has_no_name_for_is_refused(tmp_path: Path, case: str) -> None:
    config, message = REFUSED[case]
    adapter = save_mixture(tmp_path, config)
    with pytest.raises(UsageError, match=message):
        call("export", adapter, "--format", "official", "--out", tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


def test_an_expert_kind_that_the_official_code_lacks_is_named(tmp_path: Path) -> None:
    adapter = save_mixture(tmp_path, MoAConfig(experts=[{"kind": "ia3", "targets": ["k_proj"]}], router=None))
    with pytest.raises(UsageError, match="the expert kind 'ia3' is not in it"):
        call("export", adapter, "--format", "official", "--out", tmp_path / "x.pth")


def test_a_family_that_the_official_code_does_not_know_is_refused(tmp_path: Path) -> None:
    adapter = save_mixture(tmp_path, MoAConfig.preset("soft-moa"), "mistral")
    with pytest.raises(UsageError, match=r"is of the family mistral: .* fork layout knows llama, qwen3"):
        call("export", adapter, "--format", "official", "--out", tmp_path / "x.safetensors")


def test_a_file_whose_name_says_another_kind_is_refused(tmp_path: Path) -> None:
    adapter = save_mixture(tmp_path, MoAConfig.preset("soft-moa"))
    for name in ("x.pth", "x"):
        with pytest.raises(
            UsageError, match=r"the fork layout, .* is a \.safetensors file: give .*x\.safetensors"
        ):
            call("export", adapter, "--format", "official", "--out", tmp_path / name)
        assert not (tmp_path / name).exists()


def test_an_adapter_with_weights_that_its_config_does_not_make_is_not_exported(tmp_path: Path) -> None:
    adapter = save_mixture(tmp_path, MoAConfig.preset("soft-moa"))
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    first = next(iter(weights))
    for wrong, message in (
        (
            {name: one for name, one in weights.items() if ".1.moa" not in name},
            r"layers\.1\.moa.* is missing",
        ),
        (weights | {first: torch.zeros(1)}, rf"{re.escape(first)} is \[1\], the model's is"),
        (
            {name: one / 0 for name, one in weights.items()},
            "holds numbers that are not finite, in base_model",
        ),
    ):
        save_file(wrong, file)
        with pytest.raises(UsageError, match=message):
            call("export", adapter, "--format", "official", "--out", tmp_path / "x.safetensors")


def test_the_layout_goes_by_what_the_router_reads(tmp_path: Path) -> None:
    adapter = save_mixture(tmp_path, MoAConfig.preset("soft-moa"))
    with pytest.raises(UsageError, match=r"--layout native: .* this adapter's read 'projection'"):
        call("export", adapter, "--format", "official", "--out", tmp_path / "x", "--layout", "native")
    with pytest.raises(UsageError, match="unknown layout 'frok': did you mean 'fork'"):
        call("export", adapter, "--format", "official", "--out", tmp_path / "x", "--layout", "frok")
    with pytest.raises(UsageError, match="--batch-size"):
        call("export", adapter, "--format", "official", "--out", tmp_path / "x", "--batch-size", "2")
    told = call("export", adapter, "--format", "official", "--out", tmp_path / "x.safetensors").stdout
    assert "soft-moa, fork layout" in told
    assert "lora_rank 8, lora_alpha 8" in told
    assert "warning" not in told


def test_an_export_says_what_the_official_code_does_otherwise(tmp_path: Path) -> None:
    config = MoAConfig(
        experts=[LoraExpert(targets=["q_proj", "k_proj"], rank=4, alpha=8)],
        router=RouterConfig(threshold=ThresholdConfig(maximum=0.4)),
    )
    adapter = save_mixture(tmp_path, config)
    words = ["export", adapter, "--format", "official", "--out", tmp_path / "x.safetensors"]
    told = call(*words).stdout
    assert "lora_rank is 4, the fork hard-codes 8" in told
    assert "max_threshold is 0.4, the fork hard-codes 0.5" in told
    assert "has no expert there; here it keeps the best" in told
    with pytest.raises(UsageError, match=r"x\.safetensors exists: .*--overwrite"):
        call(*words)
    found = json.loads(call(*words, "--overwrite", "--json").stdout)
    assert found["settings"] == {"lora_rank": 4, "lora_alpha": 8.0, "swi_x": 4, "max_threshold": 0.4}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "gguf"], "unknown format 'gguf'"),
        (["--format", "official", "--data", "x.json"], "--data belongs to --format lora"),
        (["--format", "lora", "--layout", "fork"], "--layout belongs to --format official"),
        (["--format", "lora"], "--format lora needs --data"),
    ],
)
def test_flags_of_the_other_format_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call("export", "nowhere", *words, "--out", tmp_path / "x")


def test_help_says_that_the_official_sparse_moa_keeps_its_oddities() -> None:
    told = " ".join(call("import", "--help").stdout.split())
    for part in ("at_least_one false", "--alpha", "--constant-threshold", "moa import adapter.pth"):
        assert part in told
    assert "moa export" in call("export", "--help").stdout
