"""`moa export --format lora`: the LoRA part of a mixture as plain LoRA of PEFT."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner, Result

from moa_peft import LoraExpert, MoAConfig, ParallelAdapterExpert, PromptExpert, RouterConfig, UsageError
from moa_peft.cli import app, register_verbs
from moa_peft.data.row import Row
from moa_peft.evaluation.loading import load, read_adapter
from moa_peft.evaluation.scoring import TokenQuestion
from moa_peft.mixture.block_hooks import GateRecord, mixture_layers
from moa_peft.official.gate_means import gate_means
from moa_peft.official.lora_export import plain_lora, write_lora
from oracles import answer_losses
from structures import TEXT
from tiny import FAMILIES, awaken, base_model, tokens
from tiny_lm import byte_tokenizer, number_rows, save_base, write_rows

SOFTMAX = RouterConfig(kind="linear", gate="softmax", bias=False)
CONFIGS = {
    "lora": lambda targets: MoAConfig(
        experts=[
            LoraExpert(targets=targets[::2], rank=3, alpha=5),
            LoraExpert(targets=targets[1::2], rank=2, alpha=7),
        ],
        router=None,
    ),
    "some blocks": lambda targets: MoAConfig(
        experts=[LoraExpert(targets=targets, rank=2, layers=[1])], router=None
    ),
    "twice at a site": lambda targets: MoAConfig(
        experts=[LoraExpert(targets=targets, rank=2), LoraExpert(targets=targets[:1], rank=3)], router=None
    ),
    "copies": lambda targets: MoAConfig(
        experts=[LoraExpert(targets=targets, rank=2, num_experts=3, router=SOFTMAX)], router=None
    ),
    "shared": lambda targets: MoAConfig(
        experts=[LoraExpert(targets=targets, rank=2, num_experts=3, shared=True, router=SOFTMAX)], router=None
    ),
    "block router": lambda targets: MoAConfig(
        experts=[LoraExpert(targets=targets, rank=2, num_experts=3, router=SOFTMAX)],
        router=RouterConfig(kind="linear"),
    ),
    "attention alone": lambda targets: MoAConfig(experts=[LoraExpert(targets=["o_proj"])], router=None),
}
"""Mixtures of LoRA alone whose gates are constant once their routers' weights are zero."""


def call(*words: object) -> Result:
    if not app.registered_commands:
        register_verbs()
    done = CliRunner().invoke(app, [str(one) for one in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def questions(rows: int = 3) -> list[TokenQuestion]:
    """Questions of unequal length, so that a batch has padding."""
    ids = tokens(rows, 11).tolist()
    return [
        TokenQuestion(prompt=tuple(one[: 4 + place]), completions=(tuple(one[4 + place : 8 + place]),))
        for place, one in enumerate(ids)
    ]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["lora", "copies"])
def test_a_mixture_with_constant_gates_loses_nothing_on_any_family(
    family: str, case: str, tmp_path: Path
) -> None:
    check_constant_gates(family, case, tmp_path)


@pytest.mark.parametrize("case", [case for case in CONFIGS if case != "attention alone"])
def test_a_mixture_with_constant_gates_loses_nothing(case: str, tmp_path: Path) -> None:
    config = check_constant_gates("llama", case, tmp_path)
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert set(config["target_modules"]) == set(FAMILIES["llama"].targets)


def test_modules_that_share_the_end_of_their_names_are_told_apart(tmp_path: Path) -> None:
    """GPT-2 calls the last layer of its attention and that of its MLP by one name."""
    config = check_constant_gates("gpt2", "attention alone", tmp_path)
    assert config["target_modules"] == ["attn.c_proj"]


def test_a_module_of_another_size_with_the_name_of_a_target_gets_zeros_of_its_size(tmp_path: Path) -> None:
    """A vision tower's q_proj got those of the decoder's, and PEFT could not load the file."""
    base = base_model("llama")
    base.vision_tower = nn.ModuleDict(
        {"0": nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(4, 6)})})}
    )
    lora = {"model.layers.0.self_attn.q_proj": (torch.ones(2, 32), torch.ones(32, 2))}
    write_lora(tmp_path, base, lora)
    found = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.vision_tower.0.self_attn.q_proj.lora_{}.weight"
    assert found[name.format("A")].shape == (2, 4)
    assert found[name.format("B")].shape == (6, 2)


def check_constant_gates(family: str, case: str, folder: Path) -> dict[str, Any]:
    model = get_peft_model(base_model(family), CONFIGS[case](FAMILIES[family].targets))
    assert isinstance(model, PeftModel)
    awaken(model)
    for name, one in model.named_parameters():
        if ".logits.linear_weight" in name:
            one.data.zero_()
    expected, frozen = logits(model), logits(base_model(family))
    assert (expected - frozen).abs().max() > 0.1
    lora = plain_lora(model, gate_means(model.eval(), questions(), 4))
    write_lora(folder, base_model(family), lora)
    again = PeftModel.from_pretrained(base_model(family), folder)
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-5)
    return json.loads((folder / "adapter_config.json").read_text())


def soft(**changes: Any) -> PeftModel:
    """A mixture whose gates differ between tokens, with copies under the block's gate."""
    experts = [
        LoraExpert(targets=["q_proj", "down_proj"], rank=2, alpha=6),
        LoraExpert(targets=["v_proj"], rank=2, num_experts=3, router=SOFTMAX),
        PromptExpert(length=2),
        ParallelAdapterExpert(size=2),
    ]
    model = get_peft_model(base_model("llama"), MoAConfig(experts=experts, router=RouterConfig(**changes)))
    assert isinstance(model, PeftModel)
    awaken(model)
    return model.eval()


def gates_one_by_one(model: PeftModel, asked: list[TokenQuestion], **arguments: Any) -> dict[str, Tensor]:
    """Every gate of every token [T, N], row by row without any padding, by block and expert."""
    found: dict[str, list[Tensor]] = {}
    heard: dict[tuple[int, str], GateRecord] = {}
    layers = mixture_layers(model)
    for block, (_, layer) in enumerate(layers):
        layer.observer = lambda record, block=block: heard.update({(block, record.router): record})
    for one in asked:
        ids = torch.tensor([[*one.prompt, *one.completions[0]]])
        with torch.no_grad():
            model(input_ids=ids, **{key: value(one) for key, value in arguments.items()})
        for block, (_, layer) in enumerate(layers):
            whole = heard[block, ""]
            for place in layer.mixtures()["default"].places:
                column = whole.names.index(place.name)
                gates = whole.gates[0, :, column : column + 1].expand(ids.shape[1], 1)
                if (block, place.name) in heard:
                    gates = gates * heard[block, place.name].gates[0]
                found.setdefault(f"{block}.{place.name}", []).append(gates)
    for _, layer in layers:
        layer.observer = None
    return {name: torch.cat(gates).double() for name, gates in found.items()}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_means_are_over_real_tokens_and_over_products_of_gates(batch_size: int) -> None:
    model, asked = soft(), questions()
    means = gate_means(model, asked, batch_size)
    wanted = gates_one_by_one(model, asked)
    names = {name: str(block) for block, (name, _) in enumerate(mixture_layers(model))}
    assert {f"{names[layer]}.{expert}" for layer, expert in means} == wanted.keys()
    for (layer, expert), one in means.items():
        gates = wanted[f"{names[layer]}.{expert}"]
        torch.testing.assert_close(one.mean(), gates.mean(dim=0), atol=1e-6, rtol=0)
        deviation = gates.sum(dim=1).std(correction=0).item()
        assert one.deviation() == pytest.approx(deviation, abs=1e-4)
        assert deviation > 1e-3


@pytest.mark.parametrize("pooling", ["prompt", "official"])
def test_instance_gates_are_those_of_the_prompt_and_not_diluted_by_padding(pooling: str) -> None:
    model, asked = soft(granularity="instance", pooling=pooling), questions()
    means = gate_means(model, asked, 3)
    told = {"prompt_length": lambda one: len(one.prompt)} if pooling == "prompt" else {}
    wanted = gates_one_by_one(model, asked, **told)
    names = {name: str(block) for block, (name, _) in enumerate(mixture_layers(model))}
    for (layer, expert), one in means.items():
        gates = wanted[f"{names[layer]}.{expert}"]
        torch.testing.assert_close(one.mean(), gates.mean(dim=0), atol=1e-6, rtol=0)


def test_each_change_is_weighed_by_its_mean_gate(tmp_path: Path) -> None:
    model = soft()
    means = gate_means(model, questions(), 3)
    write_lora(tmp_path, base_model("llama"), plain_lora(model, means))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    rank, path = 6, "base_model.model.model.layers.1.{}.lora_{}.weight"
    layer, (name, _) = mixture_layers(model)[1][1], mixture_layers(model)[1]
    mixture = layer.mixtures()["default"]
    for where, expert, scale in (
        ("self_attn.q_proj", "lora_q_proj", 3.0),
        ("self_attn.v_proj", "lora_v_proj", 4.0),
        ("mlp.down_proj", "lora_down_proj", 3.0),
    ):
        one, gates = mixture.experts[expert], means[name, expert].mean()
        wanted = sum(
            scale * gates[n] * one.B.double()[:, 2 * n : 2 * n + 2] @ one.A.double()[2 * n : 2 * n + 2]
            for n in range(len(gates))
        )
        down, up = stored[path.format(where, "A")], stored[path.format(where, "B")]
        assert down.shape[0] == up.shape[1] == rank
        torch.testing.assert_close(up.double() @ down.double(), wanted.detach(), atol=1e-5, rtol=0)
    assert len(stored) == 2 * 2 * 3


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def save_mixture(folder: Path, base: Path, config: MoAConfig) -> Path:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(4)
    for one in model.parameters():
        if one.requires_grad:
            one.data.copy_(torch.randn(one.shape, generator=generator) * 0.2)
    model.save_pretrained(str(folder))
    return folder


def mixed() -> MoAConfig:
    return MoAConfig(
        experts=[
            LoraExpert(targets=["q_proj", "down_proj"], rank=2),
            PromptExpert(length=2),
            ParallelAdapterExpert(size=2),
        ]
    )


def token_loss(model: Any, tokenizer: Any, rows: list[Row]) -> float:
    """The mean over all answer tokens; a token is a byte here, and the end counts."""
    losses = answer_losses(model, tokenizer, rows)
    counts = [len(row.output.encode()) + 1 for row in rows]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def test_the_losses_are_those_of_the_written_files_on_the_held_out_rows(tmp_path: Path, base: Path) -> None:
    adapter = save_mixture(tmp_path / "adapter", base, mixed())
    data = write_rows(tmp_path / "train.json", number_rows(7))
    held_out = number_rows(9)[7:]
    out = tmp_path / "plain"
    words = ["export", adapter, "--format", "lora", "--data", data, "--out", out]
    words += ["--held-out", write_rows(tmp_path / "validation.json", held_out)]
    found = json.loads(call(*words, "--json").stdout)
    assert (found["rows"], found["losses"]["rows"]) == (7, 2)
    assert found["losses"]["tokens"] == sum(len(row.output.encode()) + 1 for row in held_out)
    mixture, frozen = load(str(base), read_adapter(str(adapter))), load(str(base))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    for name, model in (("mixture", mixture.model), ("frozen", frozen.model), ("export", plain)):
        wanted = token_loss(model, frozen.tokenizer, held_out)
        assert found["losses"][name] == pytest.approx(wanted, abs=1e-5), name
    assert len({round(found["losses"][name], 3) for name in ("mixture", "frozen", "export")}) == 3
    told = call(*words, "--overwrite").stdout
    assert f"{found['losses']['export']:.4f}" in told
    for name, fate in (("lora_q_proj", "kept"), ("prompt", "dropped"), ("parallel_adapter", "dropped")):
        (line,) = [one.split() for one in told.splitlines() if one.split()[:1] == [name]]
        (figures,) = [one for one in found["experts"] if one["name"] == name]
        assert line[1:] == [fate, f"{figures['mean_gate']:.3f}", f"{figures['gate_deviation']:.3f}", "2"]
    assert "lossy" in told


def test_rows_that_are_too_long_for_the_model_are_left_out_and_counted(tmp_path: Path, base: Path) -> None:
    adapter = save_mixture(tmp_path / "adapter", base, mixed())
    long = [dataclasses.replace(row, instruction="a" * 1100) for row in number_rows(2)]
    words = ["export", adapter, "--format", "lora", "--out", tmp_path / "plain", "--data"]
    data = write_rows(tmp_path / "train.json", [*number_rows(10), *long])
    words += [data, "--held-out", write_rows(tmp_path / "validation.json", number_rows(3)), "--json"]
    found = json.loads(call(*words).stdout)
    assert (found["rows"], found["losses"]["rows"], found["rows_dropped"]) == (10, 3, 2)
    with pytest.raises(UsageError, match="no row to hold out is short enough: the model reads 1024 tokens"):
        call(*words[:-2], write_rows(tmp_path / "validation.json", long), "--overwrite")


def test_a_fifth_of_the_rows_is_held_out_of_the_means(tmp_path: Path, base: Path) -> None:
    adapter = save_mixture(tmp_path / "adapter", base, mixed())
    words = ["export", adapter, "--format", "lora", "--out", tmp_path / "plain", "--json", "--data"]
    found = json.loads(call(*words, write_rows(tmp_path / "train.json", number_rows(10))).stdout)
    assert (found["rows"], found["losses"]["rows"]) == (8, 2)


@pytest.mark.slow
def test_plain_peft_loads_the_export_without_this_package(tmp_path: Path, base: Path) -> None:
    adapter = save_mixture(tmp_path / "adapter", base, mixed())
    data = write_rows(tmp_path / "train.json", number_rows(4))
    call("export", adapter, "--format", "lora", "--data", data, "--out", tmp_path / "plain")
    script = (
        "import sys, torch; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "base, plain, out = sys.argv[1:]\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), plain).eval()\n"
        "assert not any(name.split('.')[0] == 'moa_peft' for name in sys.modules)\n"
        "torch.save(model(input_ids=torch.tensor([[5, 6, 7]])).logits.detach(), out)\n"
    )
    out = tmp_path / "logits.pt"
    words = [sys.executable, "-c", script, str(base), str(tmp_path / "plain"), str(out)]
    subprocess.run(words, check=True, capture_output=True)
    here = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "plain").eval()
    with torch.no_grad():
        expected = here(input_ids=torch.tensor([[5, 6, 7]])).logits
    torch.testing.assert_close(torch.load(out, weights_only=True), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MoAConfig.preset("prompt-tuning"), "has no LoRA, only prompt"),
        (MoAConfig.preset("lora", modules_to_save=["lm_head"]), r"has modules_to_save \['lm_head'\]"),
    ],
)
def test_what_no_plain_lora_can_hold_is_refused(
    tmp_path: Path, base: Path, config: MoAConfig, message: str
) -> None:
    adapter = save_mixture(tmp_path / "adapter", base, config)
    data = write_rows(tmp_path / "train.json", number_rows(4))
    with pytest.raises(UsageError, match=message):
        call("export", adapter, "--format", "lora", "--data", data, "--out", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("format_", ["lora", "official", "vllm"])
def test_an_export_is_not_written_into_the_folder_of_its_adapter(
    tmp_path: Path, base: Path, format_: str
) -> None:
    """With --overwrite the mixture was replaced by what was made of it."""
    adapter = save_mixture(tmp_path / "adapter", base, MoAConfig.preset("soft-moa"))
    before = {one.name: one.read_bytes() for one in adapter.iterdir()}
    data = ["--data", write_rows(tmp_path / "train.json", number_rows(4))] if format_ == "lora" else []
    out = adapter / "adapter_model.safetensors" if format_ == "official" else adapter
    with pytest.raises(UsageError, match="lies in the folder of the adapter itself"):
        call("export", adapter, "--format", format_, *data, "--out", out, "--overwrite")
    assert {one.name: one.read_bytes() for one in adapter.iterdir()} == before


def test_weights_that_peft_would_leave_out_are_no_export(tmp_path: Path) -> None:
    """For some mixtures of experts PEFT takes down_proj for the routed experts, and left the dense layers' out without a word."""
    model_type, settings = TEXT["qwen3_moe"]
    tokenizer, base = byte_tokenizer(), tmp_path / "base"
    config = AutoConfig.for_model(
        model_type, **{**settings, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    experts = [LoraExpert(targets=["q_proj", "down_proj"])]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), MoAConfig(experts=experts))
    model.save_pretrained(str(tmp_path / "adapter"))
    data = write_rows(tmp_path / "train.json", number_rows(4))
    with pytest.raises(
        UsageError, match=r"PEFT has no plain LoRA like this on .*: 2 of its weights are not in"
    ):
        call("export", tmp_path / "adapter", "--format", "lora", "--data", data, "--out", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_one_row_cannot_be_measured_and_held_out(tmp_path: Path, base: Path) -> None:
    adapter = save_mixture(tmp_path / "adapter", base, mixed())
    data = write_rows(tmp_path / "train.json", number_rows(1))
    with pytest.raises(UsageError, match="holds one row, which cannot be both"):
        call("export", adapter, "--format", "lora", "--data", data, "--out", tmp_path / "plain")


def test_a_plain_lora_is_no_mixture_to_export(tmp_path: Path, base: Path) -> None:
    adapter = save_mixture(tmp_path / "adapter", base, mixed())
    data = write_rows(tmp_path / "train.json", number_rows(4))
    call("export", adapter, "--format", "lora", "--data", data, "--out", tmp_path / "plain")
    with pytest.raises(UsageError, match=r"is an adapter of PEFT's .*LORA, no mixture"):
        call("export", tmp_path / "plain", "--format", "official", "--out", tmp_path / "x")
