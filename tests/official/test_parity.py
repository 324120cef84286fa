"""The official code's reference files and layouts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from golden import VERIFIED, golden
from moa_peft import MoAConfig, UsageError
from moa_peft.cli import app, register_verbs
from moa_peft.mixture.balance_scaling import set_loss_scale
from moa_peft.official.conversion import OfficialSettings, load_weights, placed_weights, read_config
from moa_peft.official.names import destinations, half_split
from moa_peft.official.parity import _forward, _gradients, _ours, _rebuild, compare
from moa_peft.official.reference import read_reference
from tiny import base_model


@pytest.mark.parametrize("name", VERIFIED)
def test_our_numbers_are_the_official_ones(name: str) -> None:
    result = compare(golden(name))
    assert result.ok, result.line()
    quantities = {"logits", "loss", "gradient"} | ({"greedy"} if name.startswith("transformers") else set())
    quantities |= {"balance loss"} if name.endswith(("topk-moe-lora", "adamole")) else set()
    assert result.errors.keys() == quantities


def contents(name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(golden(name), "pt") as file:
        return dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def tampered(tmp_path: Path, name: str, key: str, change: float) -> Path:
    """A copy of a reference file with one entry of one tensor moved."""
    metadata, tensors = contents(name)
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
        ("adapter.model.layers.0.p_adapter.up_proj.bias", 1e-2, "logits"),
    ],
)
def test_a_reference_that_differs_fails(tmp_path: Path, key: str, change: float, quantity: str) -> None:
    result = compare(tampered(tmp_path, "transformers-llama-sparse", key, change))
    assert not result.ok
    assert result.errors[quantity] > 1e-4


def test_one_wrong_greedy_token_fails(tmp_path: Path) -> None:
    metadata, tensors = contents("transformers-llama-soft")
    tensors["greedy"][1, -1] = (tensors["greedy"][1, -1] + 1) % 97
    save_file(tensors, tmp_path / "greedy.safetensors", metadata)
    result = compare(tmp_path / "greedy.safetensors")
    assert result.errors["greedy"] == 1.0
    assert not result.ok


def test_greedy_text_goes_on_after_the_token_that_ends_texts_elsewhere(tmp_path: Path) -> None:
    """Llama's config calls token 2 the end; generation stopped there and padded, and right files failed.

    Two rows of the head change places, so that a token which is generated in the middle becomes number 2.
    """
    metadata, tensors = contents("transformers-llama-soft")
    common = int(tensors["greedy"][0, 9])
    order = torch.arange(97)
    order[[2, common]] = order[[common, 2]]
    for name in ("base.lm_head.weight", "base.model.embed_tokens.weight"):
        tensors[name] = tensors[name][order].contiguous()
    tensors["logits"] = tensors["logits"][..., order].contiguous()
    for name in ("input_ids", "greedy"):
        tensors[name] = order[tensors[name]]
    tensors["labels"] = torch.where(
        tensors["labels"] < 0, tensors["labels"], order[tensors["labels"].clamp(min=0)]
    )
    assert 2 in tensors["greedy"][0, 7:-1]
    save_file(tensors, tmp_path / "end.safetensors", metadata)
    result = compare(tmp_path / "end.safetensors")
    assert result.errors["greedy"] == 0
    assert result.ok


@pytest.mark.parametrize("stated", ["loss", None, "loss + 0 * load_balancing_loss"])
def test_a_balance_loss_outside_the_loss_has_no_gradient_and_is_compared_all_the_same(
    tmp_path: Path, stated: str | None
) -> None:
    """Its coefficient was taken for our default, 0.001, where the file named none; with 0 nothing was compared."""
    metadata, tensors = contents("llama3-topk-moe-lora")
    reference = read_reference(golden("llama3-topk-moe-lora"))
    model = _rebuild(reference)
    set_loss_scale(model, 0.0)
    _forward(model, reference)
    plain = _gradients(model, reference)
    placed = destinations(reference.adapter, reference.head_size)
    for (_, name), one in plain.items():
        tensors[f"grad.{name}"] = placed[name].inverse(one).contiguous()
    metadata.pop("grad_of")
    if stated is not None:
        metadata["grad_of"] = json.dumps(stated)
    save_file(tensors, tmp_path / "plain.safetensors", metadata)
    result = compare(tmp_path / "plain.safetensors")
    assert result.ok, result.line()
    assert "balance loss" in result.errors
    router = "grad.layers.0.attention.lora_Q.router.topkroute_linear.weight"
    given = contents("llama3-topk-moe-lora")[1][router]
    assert (tensors[router] - given).abs().max() > 1e-3 * given.abs().max()  # the balance loss would show


ILL = "llama3-adamole"
"""A reference that stands where rounding is magnified: float32 alone does not tell it from a wrong one."""


def shaken(tmp_path: Path, size: float) -> Path:
    """That reference with an error in one gradient, of a share of its largest entry."""
    return tampered(tmp_path, ILL, "grad.layers.0.attention.lora_Q.experts.0.lora_A.weight", size)


def test_an_error_as_small_as_rounding_is_told_from_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where float32 moves our own numbers beyond the limit, the reference's own rounding may do so as well."""
    rounding = _rounding_of(ILL)
    assert rounding > 0
    within, beyond = 2 * rounding, 20 * rounding
    monkeypatch.setattr("moa_peft.official.parity.LIMIT", rounding / 100)
    assert compare(golden(ILL)).rule == "rounding"
    result = compare(shaken(tmp_path, within))
    assert (result.ok, result.rule) == (True, "rounding")
    assert "(rounding)" in result.line()
    assert not compare(shaken(tmp_path, beyond)).ok
    monkeypatch.setattr("moa_peft.official.parity.ROUNDING_LIMIT", rounding / 100)
    assert not compare(shaken(tmp_path, within)).ok


def write_as_ours(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Write a reference file whose outcomes are what we compute of its weights in float64."""
    save_file(tensors, path, metadata)
    reference = read_reference(path)
    placed = destinations(reference.adapter, reference.head_size)
    for (what, name), one in _ours(reference, torch.float64).items():
        whole = what if what != "balance loss" else "load_balancing_loss"
        value = placed[name].inverse(one) if what == "gradient" else one.view(tensors[whole].shape)
        tensors[f"grad.{name}" if what == "gradient" else whole] = value.float().contiguous()
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(("share", "ok"), [(1e-8, True), (1e-6, False)])
def test_what_is_left_of_a_gradient_that_cancels_is_no_error(tmp_path: Path, share: float, ok: bool) -> None:
    """The gates of a top-1 router are 1, so it has no gradient; the official division leaves rounding there."""
    metadata, tensors = contents("llama3-topk-moe-lora")
    metadata |= {"top_k": "1", "grad_of": json.dumps("loss")}
    path = tmp_path / "top-1.safetensors"
    write_as_ours(path, metadata, tensors)
    largest = max(float(one.abs().max()) for name, one in tensors.items() if name.startswith("grad."))
    router = tensors["grad.layers.0.attention.lora_Q.router.topkroute_linear.weight"]
    assert router.abs().max() < 1e-12
    router[0, 0] += share * largest
    save_file(tensors, path, metadata)
    result = compare(path)
    assert result.ok is ok, result.line()


@pytest.mark.parametrize(("wrong", "ok"), [(0.0, True), (1e-3, False)])
def test_a_gradient_that_a_saturated_router_has_in_float64_alone_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float, ok: bool
) -> None:
    """Where another value needed float64, its error was divided by the smallest float, and the file called FAIL."""
    monkeypatch.setattr("moa_peft.official.parity.LIMIT", 1e-6)  # so that float32 alone does not decide
    metadata, tensors = contents("llama3-soft-moa")
    router, path = "layers.1.adapter_type_router", tmp_path / "saturated.safetensors"
    tensors[f"adapter.{router}.w2.weight"] *= 10000
    tensors[f"adapter.{router}.w2.bias"].fill_(
        1606
    )  # the lowest logit is about 17, whose sigmoid rounds to 1
    write_as_ours(path, metadata, tensors)
    left = [one for name, one in tensors.items() if name.startswith(f"grad.{router}")]
    assert min(one.abs().max() for one in left) > 0
    for one in left:
        one.fill_(wrong)
    save_file(tensors, path, metadata)
    result = compare(path)
    assert result.ok is ok, result.line()


def _rounding_of(name: str) -> float:
    """How far float32 moves the gradient of `shaken`, as a share of its largest entry."""
    reference = read_reference(golden(name))
    key = ("gradient", "layers.0.attention.lora_Q.experts.0.lora_A.weight")
    single, double = (_ours(reference, dtype)[key] for dtype in (torch.float32, torch.float64))
    return float((single - double).abs().max() / double.abs().max())


def scaled(tensors: dict[str, Tensor]) -> None:
    tensors["adapter.layers.1.attention.lora_V.experts.1.lora_B.weight"] *= 1.002


def permuted(tensors: dict[str, Tensor]) -> None:
    for part in "AB":
        names = [f"adapter.layers.1.feed_forward.lora_DOWN.experts.{n}.lora_{part}.weight" for n in (0, 1)]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]].clone(), tensors[names[0]].clone()


def without_bias(tensors: dict[str, Tensor]) -> None:
    tensors["adapter.layers.0.attention.lora_Q.threshold_fn.bias"].zero_()


@pytest.mark.parametrize("mistake", [scaled, permuted, without_bias])
def test_a_mistake_is_not_taken_for_rounding_where_rounding_is_magnified(
    tmp_path: Path, mistake: Callable[[dict[str, Tensor]], None]
) -> None:
    metadata, tensors = contents(ILL)
    mistake(tensors)
    save_file(tensors, tmp_path / "mistake.safetensors", metadata)
    result = compare(tmp_path / "mistake.safetensors")
    assert not result.ok, result.line()
    assert result.line().endswith("FAIL")


def verify(*files: Path, options: tuple[str, ...] = ()) -> tuple[int, str]:
    if not app.registered_commands:
        register_verbs()
    done = CliRunner().invoke(app, ["verify", *options, *map(str, files)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file"),
        (b"\x10\x00", "damaged or cut off"),
        ("cut", "damaged or cut off"),
        ("empty", "it lacks"),
    ],
)
def test_what_is_no_reference_file_is_refused(
    tmp_path: Path, content: bytes | str | None, message: str
) -> None:
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        path.write_bytes(golden("llama3-lora").read_bytes()[:300_000])
    elif content is not None:
        save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match=message):
        compare(path)


def test_the_command_compares_each_file_and_its_exit_code_is_that_of_the_worst(tmp_path: Path) -> None:
    good, unreadable = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    shutil.copy(golden("transformers-llama-soft"), good)
    unreadable.write_text("no safetensors")
    wrong = tampered(tmp_path, "transformers-llama-soft", "logits", 1e-2)
    code, out = verify(good)
    assert code == 0
    assert out.startswith("good.safetensors  logits ")
    assert out.endswith("ok\n")
    code, out = verify(unreadable, wrong, good)
    assert code == 2
    assert [line.split()[-1] for line in out.splitlines()] == ["ERROR", "FAIL", "ok"]
    assert str(unreadable) in out
    code, out = verify(wrong, options=("--json",))
    assert code == 1
    assert json.loads(out)["ok"] is False
    code, out = verify(unreadable, options=("--json",))
    assert code == 2
    assert "damaged or cut off" in json.loads(out)["failure"]


SETTINGS_OF_BAD_FILES: dict[str, tuple[str, dict[str, object], str]] = {
    "order": ("llama3-sparse-moa", {"expert_order": ["q_proj", "foo"]}, "KeyError: 'foo'"),
    "short order": (
        "llama3-sparse-moa",
        {"expert_order": ["q_proj"]},
        r"expert_order .* lacks \['lora_down_proj'",
    ),
    "no alpha": ("llama3-sparse-moa", {"settings": None}, "alpha"),
    "no maximum": ("llama3-sparse-moa", {"max_threshold": None}, "give max_threshold"),
    "high": ("llama3-sparse-moa", {"max_threshold": 2.0}, r"maximum is 2\.0: it must lie in \(0, 1\]"),
    "words": ("llama3-sparse-moa", {"max_threshold": "half"}, "maximum is 'half'"),
    "both": (
        "llama3-sparse-moa",
        {"constant_threshold": 0.5},
        "both 'max_threshold' and 'constant_threshold'",
    ),
    "architecture": (
        "llama3-lora",
        {"architecture": "bert"},
        "'architecture' is 'bert': it has to be llama or",
    ),
    "config": ("llama3-lora", {"config": "x"}, "TypeError"),
    "top-k": ("llama3-topk-moe-lora", {"top_k": 9}, r"keep is 9: there are 4 copies"),
    "no top-k": ("llama3-topk-moe-lora", {"top_k": None}, "need the metadata 'top_k'"),
    "half of one": ("llama3-topk-moe-lora", {"top_k": 1.5}, r"keep is 1\.5"),
    "gradients of": (
        "llama3-lora",
        {"grad_of": "the loss"},
        "'grad_of' is 'the loss': it has to be 'loss', or",
    ),
    "unknown": (
        "llama3-lora",
        {"no_gradient": ["abc"]},
        "'no_gradient' names 'abc', which is no weight in it",
    ),
}


@pytest.mark.parametrize("case", SETTINGS_OF_BAD_FILES)
def test_a_reference_with_settings_that_cannot_be_is_refused(tmp_path: Path, case: str) -> None:
    name, changes, message = SETTINGS_OF_BAD_FILES[case]
    metadata, tensors = contents(name)
    save_file(
        tensors, tmp_path / "x.safetensors", metadata | {key: json.dumps(v) for key, v in changes.items()}
    )
    with pytest.raises(UsageError, match=rf"x\.safetensors cannot be compared: .*{message}"):
        compare(tmp_path / "x.safetensors")


SIZES_OF_BAD_FILES: dict[str, tuple[dict[str, object], str]] = {
    "zero": ({"num_attention_heads": 0}, "ZeroDivisionError"),
    "groups": ({"num_key_value_heads": 3}, ""),
    "odd": ({"head_dim": 5}, ""),
    "deep": ({"num_hidden_layers": 3}, r"'base\.model\.layers\.2\.input_layernorm\.weight' is missing"),
    "shallow": ({"num_hidden_layers": 1}, "is no weight of the model"),
    "wide": (
        {"intermediate_size": 200},
        r"down_proj\.weight' is \[64, 192\], the config makes it \[64, 200\]",
    ),
    "type": ({"rms_norm_eps": "small"}, "StrictDataclass"),
}


@pytest.mark.parametrize("case", SIZES_OF_BAD_FILES)
def test_a_reference_whose_model_cannot_be_built_is_refused(tmp_path: Path, case: str) -> None:
    changes, message = SIZES_OF_BAD_FILES[case]
    metadata, tensors = contents("llama3-lora")
    metadata["config"] = json.dumps(json.loads(metadata["config"]) | changes)
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(UsageError, match=rf"x\.safetensors cannot be compared: .*{message}"):
        compare(tmp_path / "x.safetensors")


Change = Callable[[Tensor], Tensor | None]
WEIGHT = "model.layers.0.self_attn.lora_Q.lora_A.weight"
TENSORS_OF_BAD_FILES: dict[str, tuple[str, Change, str]] = {
    "no gradient": (f"grad.{WEIGHT}", lambda _: None, f"'grad.{WEIGHT}' is missing, and 'no_gradient'"),
    "narrow gradient": (
        f"grad.{WEIGHT}",
        lambda one: one[:3],
        r"lora_A\.weight' is \[3, 64\], its weight \[8, 64\]",
    ),
    "foreign gradient": (
        "grad.foo",
        lambda _: torch.zeros(2),
        "'grad.foo' is the gradient of no weight in it",
    ),
    "short": ("logits", lambda one: one[:, :5], r"'logits' is \[3, 5, 97\]: it has to be \[3, 17, 97\]"),
    "losses": ("loss", lambda one: one.repeat(2), "'loss' has to be one number"),
    "words": ("input_ids", lambda one: one + 90, ""),
    "floats": ("input_ids", lambda one: one.float(), ""),
    "labels": ("labels", lambda one: one[:2], r"'labels' is \[2, 17\]: it has to be \[3, 17\]"),
    "greedy rows": ("greedy", lambda one: one[:2], r"'greedy' is \[2, \d+\]: it has to be \[3, T\]"),
    "greedy prompt": (
        "greedy",
        lambda one: (one + 1) % 97,
        "'greedy' has to begin with tokens of 'input_ids'",
    ),
    "greedy end": ("greedy", lambda one: one[:, :7], "'greedy' continues nothing"),
}


@pytest.mark.parametrize("case", TENSORS_OF_BAD_FILES)
def test_a_reference_with_tensors_that_do_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    name, change, message = TENSORS_OF_BAD_FILES[case]
    metadata, tensors = contents("transformers-llama-soft")
    made = change(tensors.pop(name, torch.zeros(1)))
    if made is not None:
        tensors[name] = made.contiguous()
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(UsageError, match=rf"x\.safetensors cannot be compared: .*{message}"):
        compare(tmp_path / "x.safetensors")


def test_values_that_are_not_finite_agree_with_nothing(tmp_path: Path) -> None:
    assert not compare(tampered(tmp_path, "transformers-llama-soft", "logits", float("inf"))).ok
    path = tampered(tmp_path, "transformers-llama-soft", f"adapter.{WEIGHT}", float("inf"))
    with pytest.raises(UsageError, match="not finite"):
        compare(path)


def test_a_reference_without_an_adapter_is_refused(tmp_path: Path) -> None:
    metadata, tensors = contents("llama3-lora")
    tensors = {name: one for name, one in tensors.items() if not name.startswith("adapter.")}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(UsageError, match=r"it has no weights 'adapter\.\*'"):
        compare(tmp_path / "x.safetensors")
    metadata["seed"] = "notjson{"
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(UsageError, match=r"its metadata 'seed' is 'notjson\{', which is no JSON"):
        compare(tmp_path / "x.safetensors")


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
SETTINGS = OfficialSettings(alpha=5, expert_order=("lora_up_proj", "prompt", "lora_q_proj"))


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
    placed = placed_weights(checkpoint, 8)
    config = read_config(checkpoint, placed, SETTINGS)
    assert config.router.router_input == "block"
    assert config.router.kind == "linear"
    model = get_peft_model(base_model("llama"), config)
    load_weights(model, checkpoint, placed)
    state = {
        name.split(".moa_mixture.default.")[-1]: p
        for name, p in model.named_parameters()
        if ".layers.1.moa" in name
    }
    assert torch.equal(
        interleaved(state["experts.lora_q_proj.B"], 8), checkpoint["layers.1.attention.lora_Q.lora_B.weight"]
    )
    assert torch.equal(
        state["router.logits.linear_weight"], checkpoint["layers.1.adapter_type_router.weight"]
    )
    names = [layer.mixtures()["default"].names for layer in model.modules() if hasattr(layer, "mixtures")]
    assert names == [("lora_up_proj", "lora_q_proj"), ("lora_up_proj", "prompt", "lora_q_proj")]


def test_a_weight_of_an_expert_that_its_block_lacks_is_refused_by_name() -> None:
    model = get_peft_model(base_model("llama"), MoAConfig.preset("sparse-moa"))
    weights = {"layers.1.attention.prompt.weight": torch.zeros(4, 32)}
    with pytest.raises(UsageError, match=r"block 1 has no experts\.prompt\.vectors"):
        load_weights(model, weights, placed_weights(weights, 8))


def test_settings_that_contradict_the_weights_are_refused() -> None:
    def read(weights: dict[str, Tensor], settings: OfficialSettings = SETTINGS) -> None:
        read_config(weights, placed_weights(weights, 8), settings)

    checkpoint = native_checkpoint()
    with pytest.raises(UsageError, match=r"lacks \['lora_up_proj'\]"):
        read(checkpoint, OfficialSettings(alpha=5, expert_order=("prompt", "lora_q_proj")))
    threshold = {f"layers.{i}.adapter_threshold_fn.weight": torch.zeros(1, 32) for i in (0, 1)}
    with pytest.raises(UsageError, match="has a learned threshold: give max_threshold"):
        read(checkpoint | threshold)
    with pytest.raises(UsageError, match="has no adapter_type_router"):
        read({name: one for name, one in checkpoint.items() if "router" not in name})


def test_a_reference_whose_first_block_carries_nothing_is_rebuilt(tmp_path: Path) -> None:
    """Its numbers are those of the mixture without that block's experts; the block's router gates nothing."""
    metadata, tensors = contents("llama3-soft-moa")
    empty = ("adapter.layers.0.", "grad.layers.0.")
    kept = {n: t for n, t in tensors.items() if not n.startswith(empty) or ".adapter_type_router." in n}
    save_file(kept, tmp_path / "second-block.safetensors", metadata)
    result = compare(tmp_path / "second-block.safetensors")
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
