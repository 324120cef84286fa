"""The official code's reference files and layouts."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from moa_peft import MoAConfig, UsageError
from moa_peft.cli import app, register_verbs
from moa_peft.official.importer import OfficialSettings, load_weights, read_config
from moa_peft.official.names import destinations, half_split
from moa_peft.official.verify import compare
from tiny import base_model

pytestmark = pytest.mark.usefixtures("both_paths")

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
METHODS_OF_OTHERS = (
    "lora", "parallel-adapter", "prompt-tuning", "molora", "hydralora", "topk-moe-lora", "adamole", "unipeft",
    "instance-moa", "soft-moa-hydra3",
)  # fmt: skip
VERIFIED = [
    *(f"transformers-{family}-{kind}" for family in ("llama", "qwen3") for kind in ("soft", "soft-prompt")),
    *(
        f"transformers-{family}-{kind}"
        for family in ("llama", "qwen3")
        for kind in ("sparse", "sparse-prompt")
    ),
    *(f"llama3-soft-moa{variant}" for variant in ("", "-no-prompt", "-linear-router")),
    *(f"llama3-sparse-moa{variant}" for variant in ("", "-prompt", "-const")),
    *(f"llama3-{method}" for method in METHODS_OF_OTHERS),
]


def golden(name: str) -> Path:
    path = GOLDEN / f"{name}.safetensors"
    if not path.exists() and not os.environ.get("CI"):
        pytest.skip("the reference files of the official code are not beside this checkout")
    return path


@pytest.mark.parametrize("name", VERIFIED)
def test_our_numbers_are_the_official_ones(name: str) -> None:
    result = compare(golden(name))
    assert result.ok, result.line()
    quantities = {"logits", "loss", "gradient"} | ({"greedy"} if name.startswith("transformers") else set())
    quantities |= {"balance loss"} if name.endswith(("topk-moe-lora", "adamole")) else set()
    assert result.errors.keys() == quantities


def tampered(tmp_path: Path, name: str, key: str, change: float) -> Path:
    """A copy of a reference file with one entry of one tensor moved."""
    with safe_open(golden(name), "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors[key].view(-1)[0] += change * tensors[key].abs().max().to(tensors[key].dtype)
    path = tmp_path / "tampered.safetensors"
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("key", "change", "quantity"),
    [
        ("logits", 1e-3, "logits"),
        ("loss", 1e-3, "loss"),
        ("grad.model.layers.1.self_attn.lora_Q.lora_A.weight", 1e-3, "gradient"),
        ("grad.model.layers.0.adapter_type_router.w3.bias", 1e-3, "gradient"),
        ("adapter.model.layers.0.p_adapter.up_proj.bias", 1e-2, "logits"),
    ],
)
def test_a_reference_that_differs_fails(tmp_path: Path, key: str, change: float, quantity: str) -> None:
    result = compare(tampered(tmp_path, "transformers-llama-sparse", key, change))
    assert not result.ok
    assert result.errors[quantity] > 1e-4


def test_one_wrong_greedy_token_fails(tmp_path: Path) -> None:
    with safe_open(golden("transformers-llama-soft"), "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors["greedy"][1, -1] = (tensors["greedy"][1, -1] + 1) % 97
    save_file(tensors, tmp_path / "greedy.safetensors", metadata)
    result = compare(tmp_path / "greedy.safetensors")
    assert result.errors["greedy"] == 1.0
    assert not result.ok


def test_a_missing_gradient_fails(tmp_path: Path) -> None:
    with safe_open(golden("transformers-llama-soft"), "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del tensors["grad.model.layers.0.self_attn.lora_Q.lora_A.weight"]
    save_file(tensors, tmp_path / "lacking.safetensors", metadata)
    assert not compare(tmp_path / "lacking.safetensors").ok


def verify(*files: Path, options: tuple[str, ...] = ()) -> tuple[int, str]:
    if not app.registered_commands:
        register_verbs()
    done = CliRunner().invoke(app, ["verify", *options, *map(str, files)])
    if isinstance(done.exception, UsageError):
        raise done.exception
    return done.exit_code, done.stdout


def test_the_command_prints_one_line_a_file_and_fails_if_one_fails(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    shutil.copy(golden("transformers-llama-soft"), good)
    bad = tampered(tmp_path, "transformers-llama-soft", "logits", 1e-2)
    code, out = verify(good)
    assert code == 0
    assert out.startswith("good.safetensors  logits ")
    assert out.endswith("ok\n")
    code, out = verify(good, bad)
    assert code == 1
    assert [line.split()[-1] for line in out.splitlines()] == ["ok", "FAIL"]
    code, out = verify(bad, options=("--json",))
    assert code == 1
    assert json.loads(out)["ok"] is False


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a file"), (b"\x10\x00", "is not a reference file"), ("empty", "it lacks")],
)
def test_what_is_no_reference_file_is_refused(
    tmp_path: Path, content: bytes | str | None, message: str
) -> None:
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match=message):
        verify(path)


def test_half_split_puts_each_heads_even_rows_before_its_odd_ones() -> None:
    rows = torch.arange(12).view(12, 1)
    assert half_split(rows, 6).flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def interleaved(rows: Tensor, head_size: int) -> Tensor:
    """The other way round, row by row."""
    out, half = torch.empty_like(rows), head_size // 2
    for row in range(rows.shape[0]):
        head, place = divmod(row, head_size)
        pair, second = (place, 0) if place < half else (place - half, 1)
        out[head * head_size + 2 * pair + second] = rows[row]
    return out


OFFICIAL = {
    "lora_q_proj.A": "attention.lora_Q.lora_A.weight",
    "lora_q_proj.B": "attention.lora_Q.lora_B.weight",
    "lora_up_proj.A": "feed_forward.lora_UP.lora_A.weight",
    "lora_up_proj.B": "feed_forward.lora_UP.lora_B.weight",
    "prompt.vectors": "attention.prompt.weight",
    "prompt.head_scale": "attention.prompt_gate",
}
SETTINGS = OfficialSettings(alpha=5, head_size=8, expert_order=("lora_up_proj", "prompt", "lora_q_proj"))


def native_checkpoint() -> dict[str, Tensor]:
    """Native names, ranks that differ, the prompt in the second block only, the gates in an order of their own."""
    torch.manual_seed(3)
    checkpoint: dict[str, Tensor] = {}
    for block, experts in enumerate((2, 3)):
        shapes = {
            "lora_q_proj.A": (3, 32), "lora_q_proj.B": (32, 3), "lora_up_proj.A": (2, 32), "lora_up_proj.B": (44, 2),
        }  # fmt: skip
        if block:
            shapes |= {"prompt.vectors": (4, 32), "prompt.head_scale": (1, 4, 1, 1)}
        for name, shape in shapes.items():
            checkpoint[f"layers.{block}.{OFFICIAL[name]}"] = torch.randn(shape)
        checkpoint[f"layers.{block}.adapter_type_router.weight"] = torch.randn(experts, 32)
        checkpoint[f"layers.{block}.adapter_type_router.bias"] = torch.randn(experts)
    return checkpoint


def test_a_native_checkpoint_of_other_sizes_and_layers_finds_its_places() -> None:
    checkpoint = native_checkpoint()
    config = read_config(checkpoint, SETTINGS)
    assert config.router.router_input == "block"
    assert config.router.kind == "linear"
    model = get_peft_model(base_model("llama"), config)
    load_weights(model, checkpoint, 8)
    state = {
        name.split(".moa_mixture.default.")[-1]: p
        for name, p in model.named_parameters()
        if ".layers.1.moa" in name
    }
    assert torch.equal(
        interleaved(state["experts.lora_q_proj.B"], 8), checkpoint["layers.1.attention.lora_Q.lora_B.weight"]
    )
    assert torch.equal(
        state["router.logits.linear.weight"], checkpoint["layers.1.adapter_type_router.weight"]
    )
    names = [layer.mixtures()["default"].names for layer in model.modules() if hasattr(layer, "mixtures")]
    assert names == [("lora_up_proj", "lora_q_proj"), ("lora_up_proj", "prompt", "lora_q_proj")]


def test_weights_that_have_no_place_are_refused_by_name() -> None:
    with pytest.raises(
        UsageError, match=r"cannot place the weight 'layers\.0\.attention\.lora_Q\.mixer\.weight'"
    ):
        destinations(["layers.0.attention.lora_Q.mixer.weight"], 8)
    model = get_peft_model(base_model("llama"), MoAConfig.preset("sparse-moa"))
    with pytest.raises(UsageError, match=r"block 1 has no experts\.prompt\.vectors"):
        load_weights(model, {"layers.1.attention.prompt.weight": torch.zeros(4, 32)}, 8)


def test_a_checkpoint_that_lacks_weights_is_refused() -> None:
    checkpoint = native_checkpoint()
    model = get_peft_model(base_model("llama"), read_config(checkpoint, SETTINGS))
    del checkpoint["layers.0.attention.lora_Q.lora_A.weight"]
    with pytest.raises(UsageError, match=r"lacks weights for \[\(0, 'experts\.lora_q_proj\.A'\)\]"):
        load_weights(model, checkpoint, 8)


def test_settings_that_contradict_the_weights_are_refused() -> None:
    checkpoint = native_checkpoint()
    with pytest.raises(UsageError, match=r"lacks \['lora_up_proj'\]"):
        read_config(
            checkpoint, OfficialSettings(alpha=5, head_size=8, expert_order=("prompt", "lora_q_proj"))
        )
    threshold = {
        f"layers.{i}.adapter_threshold_fn.{n}": torch.zeros(1) for i in (0, 1) for n in ("weight", "bias")
    }
    with pytest.raises(UsageError, match="has a learned threshold: give max_threshold"):
        read_config(checkpoint | threshold, SETTINGS)
    routerless = {name: one for name, one in checkpoint.items() if "router" not in name}
    with pytest.raises(UsageError, match="has no adapter_type_router"):
        read_config(routerless, SETTINGS)


def test_a_reference_whose_first_block_carries_nothing_is_rebuilt(tmp_path: Path) -> None:
    """Its numbers are those of the mixture without that block's experts; the block's router gates nothing."""
    with safe_open(golden("llama3-soft-moa"), "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    empty = ("adapter.layers.0.", "grad.layers.0.")
    kept = {n: t for n, t in tensors.items() if not n.startswith(empty) or ".adapter_type_router." in n}
    save_file(kept, tmp_path / "second-block.safetensors", metadata)
    result = compare(tmp_path / "second-block.safetensors")
    assert not result.failure
    assert not result.ok  # the file's numbers are those of both blocks
    silent = dict(tensors)
    for name in tensors:
        if name.startswith("adapter.layers.0.") and name.endswith(
            ("lora_B.weight", "prompt_gate", "up_proj.weight", "up_proj.bias")
        ):
            silent[name] = torch.zeros_like(tensors[name])
    save_file(silent, tmp_path / "silent.safetensors", metadata)
    both = compare(tmp_path / "silent.safetensors")
    assert both.errors["logits"] == pytest.approx(result.errors["logits"], abs=1e-5)
