"""`moa bench`: rows that say what was done, and when they must not be published."""

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from moa_peft.bench import measure as measuring
from moa_peft.bench import subjects, work
from moa_peft.bench.measure import BenchOptions, as_dict, measure, quartiles, ratios, take_turns
from moa_peft.bench.rows import BenchRow, tokens_per_second
from moa_peft.cli import main
from moa_peft.errors import RunError, UsageError
from moa_peft.mixture.block_hooks import MoALayer
from moa_peft.mixture.mixture import Mixture
from moa_peft.mixture.presets import PAPER_TARGETS
from pictures import model_of
from structures import text_model
from tiny import FAMILIES, METHODS, base_model, mixture_model, tokens


@pytest.fixture(autouse=True)
def a_small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**subjects.SHAPES["smollm2-135m"], "vocab_size": 97, "hidden_size": 36, "intermediate_size": 48}
    monkeypatch.setitem(subjects.SHAPES, "smollm2-135m", {**small, "num_hidden_layers": 2})


FEW = ("--layers", "1", "--pairs", "1", "--batch-size", "1", "--length", "4", "--methods", "sparse-moa")


def rows_of(kind: Any, *methods: str, **options: Any) -> dict[str, BenchRow]:
    given = BenchOptions(kind=kind, methods=methods, batch_size=2, length=6, new_tokens=3, pairs=2, **options)
    return {
        f"{row.method}/{row.num_experts}" if row.num_experts else row.method: row for row in measure(given)
    }


@pytest.mark.parametrize("kind", ["train", "decode"])
def test_a_row_has_the_ratios_to_baseline_and_frozen_model_and_an_error_that_is_measured(kind: str) -> None:
    rows = rows_of(kind, "soft-moa", "molora")
    assert list(rows) == ["frozen", "peft-lora", "soft-moa", "molora"]
    for name, row in rows.items():
        assert (row.over_frozen is None) is (name == "frozen")
        assert (row.over_baseline is None) is (name == "peft-lora")
        assert row.step_ms[0] <= row.step_ms[1] <= row.step_ms[2]
        assert row.pairs == 2
        assert (row.trainable_parameters == 0) is (name == "frozen")
        assert (row.max_abs_err is None) is (name in ("frozen", "peft-lora"))
        json.dumps(as_dict(row), allow_nan=False)
    errors = [(row.max_abs_err, row.rms_err) for row in rows.values() if row.max_abs_err is not None]
    assert all(largest < 1e-3 and (mean is not None and mean < 1e-5) for largest, mean in errors)


@pytest.mark.slow
def test_a_compiled_model_is_what_is_timed_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*given: Any) -> Any:
            calls.append("train" if torch.is_grad_enabled() else "logits")
            return graph.forward(*given)

        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    rows = rows_of("train", "soft-moa-no-prompt", compiled=True)
    assert calls.count("train") >= 3 * 3  # three methods, two rounds and one to warm up
    assert "logits" in calls
    assert [(row.compiled, row.work) for row in rows.values()] == [
        (True, "forward and backward, batch 2 x 6 tokens, compiled")
    ] * 3
    error = rows["soft-moa-no-prompt"].rms_err
    assert error is not None
    assert error < 1e-5


@pytest.mark.parametrize("option", ["compiled", "checkpointing"])
def test_what_is_of_a_training_step_is_refused_for_others(option: str) -> None:
    with pytest.raises(UsageError, match=f"{option[:7]}.* is on: it is not for decode"):
        BenchOptions(kind="decode", methods=(), **{option: True})


def test_a_shape_is_only_cut_to_fewer_blocks() -> None:
    with pytest.raises(UsageError, match=r"layers is 99: smollm2-135m has \d+"):
        BenchOptions(kind="train", methods=(), model="smollm2-135m", layers=99).base()


def test_an_error_in_how_experts_are_joined_shows_and_is_an_objection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    up = Mixture.up
    monkeypatch.setattr(Mixture, "up", lambda self, *given: up(self, *given) * 1.5)
    row = rows_of("train", "sparse-moa")["sparse-moa"]
    assert any("against the experts one by one" in one for one in row.objections())


def test_memory_rows_count_what_autograd_keeps_beyond_the_frozen_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "_peaks", lambda *_: (1.0, None))  # each takes a process of its own
    rows = rows_of("memory", "soft-moa-no-prompt", "lora")
    assert rows["frozen"].saved_mib == 0
    lora, soft = rows["peft-lora"].saved_mib, rows["soft-moa-no-prompt"].saved_mib
    assert lora is not None
    assert soft is not None
    assert lora > 0
    assert soft > 0


@pytest.mark.slow
def test_the_peak_of_a_process_is_not_its_parents() -> None:
    held = torch.ones(2**28)  # 1 GiB
    row = rows_of("memory")["frozen"]
    del held
    assert row.peak_mib is not None
    assert 0 < row.peak_mib < 512


def _killed(*_given: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_process_ends_the_measurement_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of multiprocessing waited for ever for a process that the system had killed for want of memory."""
    monkeypatch.setattr(measuring, "_peak_here", _killed)
    with pytest.raises(
        RunError, match="the process that measured frozen was killed, perhaps for want of mem"
    ):
        rows_of("memory")


def test_on_a_machine_with_a_gpu_a_row_of_the_cpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its device was the GPU's name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert rows_of("train")["peft-lora"].provenance["device"].startswith("cpu (")


def test_the_number_of_operators_does_not_grow_with_the_number_of_experts() -> None:
    names = ("molora", "hydralora", "topk-moe-lora", "adamole")
    rows = rows_of("scaling", *names, num_experts=(2, 16))
    for name in names:
        few, many = rows[f"{name}/2"], rows[f"{name}/16"]
        assert few.kernels == many.kernels > 0
        assert abs(few.operators - many.operators) <= 10  # a view more or less, by which layout is fast
        assert few.flops is not None
        assert many.flops is not None
        assert few.flops < many.flops
        assert few.trainable_parameters < many.trainable_parameters


def test_a_scaled_method_may_be_compared_with_itself_and_a_number_given_twice_counts_once() -> None:
    """The baseline's own numbers were ignored; a number given twice was a KeyError after the timing."""
    rows = rows_of("scaling", "molora", "hydralora", baseline="molora", num_experts=(2, 2))
    assert list(rows) == ["frozen", "molora", "molora/2", "hydralora/2"]
    assert [row.over_baseline is None for row in rows.values()] == [False, True, False, False]
    assert rows["molora/2"].trainable_parameters < rows["molora"].trainable_parameters  # of 8 copies


def test_operators_of_peft_lora_are_those_that_can_be_counted_by_hand() -> None:
    """Two linear layers of four operators each (one of them no view), a scaling and a sum, at five sites."""
    row = rows_of("train")["peft-lora"]
    assert (row.operators, row.kernels) == (50, 20)


@pytest.mark.parametrize(
    ("kind", "dtype", "lora", "most"),
    [
        ("train", "float32", 20, {"soft-moa-no-prompt": 27, "soft-moa": 36, "sparse-moa": 43}),
        ("train", "bfloat16", 30, {"soft-moa-no-prompt": 46, "soft-moa": 58, "sparse-moa": 63}),
        ("decode", "float32", 20, {"soft-moa-no-prompt": 31, "soft-moa": 36, "sparse-moa": 38}),
    ],
)
def test_a_block_takes_no_more_kernels_than_it_did(
    kind: str, dtype: str, lora: int, most: dict[str, int]
) -> None:
    """PEFT's LoRA takes 20 or 30. A number above these is a pass that has got longer: shorten it, or say why."""
    rows = rows_of(kind, *most, dtype=dtype)
    assert rows["peft-lora"].kernels == lora
    assert {
        name: row.kernels for name, row in rows.items() if name in most and row.kernels > most[name]
    } == {}


def test_bytes_kept_count_a_storage_once_and_no_parameter_and_are_freed() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.weight = nn.Parameter(torch.ones(4))

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def forward(self, inputs_embeds: torch.Tensor, labels: Any, use_cache: bool) -> Any:
            x = inputs_embeds * self.weight
            kept_by_its_own_node = x.view(-1).exp()
            made.append(weakref.ref(kept_by_its_own_node))
            return type("Output", (), {"loss": (x * x + kept_by_its_own_node.view(x.shape)).sum()})

    kept = work.saved_bytes(Twice(), torch.zeros(1, 3, dtype=torch.long))
    assert kept == 3 * (3 * 4 * 4)  # the embedded tokens, x, and exp's own result
    gc.collect()
    assert made[0]() is None


def test_a_copy_shares_the_frozen_weights_and_every_expert_speaks() -> None:
    base = subjects.base_model("smollm2-135m", layers=None, dtype=torch.float32, device="cpu")
    model = subjects.with_method(base, "soft-moa")
    frozen = {one.data_ptr() for one in base.parameters()}
    assert frozen <= {one.data_ptr() for one in model.parameters()}
    assert all(one.any() for one in subjects.trainable(model))
    assert not any(isinstance(one, MoALayer) for one in base.modules())


@pytest.mark.parametrize("method", ["peft-lora", "peft-lora-all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_lora_stands_on_the_layers_of_a_mixtures(family: str, method: str) -> None:
    """On fused layers PEFT found a part of the names, or none."""
    tiny = FAMILIES[family]
    targets = PAPER_TARGETS if method == "peft-lora" else tiny.targets
    model: Any = subjects.with_method(base_model(family), method)
    for block in ("0", "1"):
        places = [name.partition(f".{block}.")[2] for name in model.targeted_module_names]
        assert sorted(filter(None, places)) == sorted({tiny.paths[one] for one in targets})


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
def test_pefts_lora_leaves_the_vision_tower_alone(family: str) -> None:
    """Its attention has projections of the same names."""
    model: Any = subjects.with_method(model_of(family), "peft-lora-all")
    assert len(model.targeted_module_names) == 2 * 7  # blocks, projections
    assert all(".language_model." in one for one in model.targeted_module_names)


@pytest.mark.parametrize("method", ["peft-lora", "peft-lora-all"])
def test_pefts_lora_on_a_shape_is_the_one_of_plain_names(method: str) -> None:
    base: Any = subjects.base_model("smollm2-135m", layers=None, dtype=torch.float32, device="cpu")
    targets = [*PAPER_TARGETS, *(["gate_proj", "up_proj"] if method == "peft-lora-all" else [])]
    found = subjects.with_method(base, method).state_dict()
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    expected = get_peft_model(base, config).state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_layer_that_pefts_lora_cannot_have_is_told() -> None:
    """For the layers of a shared expert PEFT takes the stacked weights of the routed ones."""
    told = (
        r"leaves out model\.layers\.0\.mlp\.shared_expert\.down_proj, one of 2 layers: give --baseline lora"
    )
    with pytest.raises(UsageError, match=told):
        subjects.with_method(text_model("qwen3_next"), "peft-lora")


def test_a_kind_of_layer_that_pefts_lora_does_not_know_is_told() -> None:
    class Packed(nn.Module):
        in_features, out_features = 48, 36

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(36, 48))

    base: Any = subjects.base_model("smollm2-135m", layers=1, dtype=torch.float32, device="cpu")
    base.model.layers[0].mlp.down_proj = Packed()
    with pytest.raises(
        UsageError, match=r"give --baseline lora, .*Target module Packed\(\) is not supported"
    ):
        subjects.with_method(base, "peft-lora")


def test_methods_are_taken_in_turn_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []
    times = take_turns({name: partial(order.append, name) for name in "abc"}, 3)
    rounds = [tuple(order[start : start + 3]) for start in range(0, 12, 3)]
    assert len(rounds) == 4
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1  # nobody always follows the same other
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_quartiles_of_ratios_are_taken_pair_by_pair() -> None:
    assert ratios([2, 6, 30], [1, 2, 10]) == (2.5, 3, 3)
    assert quartiles([4.0]) == (4.0, 4.0, 4.0)


def test_objections_name_a_dirty_tree_and_too_few_pairs() -> None:
    row = rows_of("train")["peft-lora"]
    clean = dataclasses.replace(row, pairs=15, provenance={**row.provenance, "dirty": False})
    assert clean.objections() == []
    assert "2 pairs, 15 needed" in dataclasses.replace(clean, pairs=2).objections()[0]
    dirty = dataclasses.replace(clean, provenance={**row.provenance, "dirty": True})
    assert "the working tree differs from commit" in dirty.objections()[0]
    unknown = dataclasses.replace(clean, rms_err=float("nan"), err_limit=1e-3)
    assert "error nan against the experts one by one" in unknown.objections()[0]


def test_tokens_a_second_are_those_read_in_training_and_those_decoded() -> None:
    row = dataclasses.replace(rows_of("train")["peft-lora"], step_ms=(1.0, 4.0, 5.0))  # 2 x 6 tokens
    assert tokens_per_second(as_dict(row)) == 3000
    decoded = dataclasses.replace(row, kind="decode", new_tokens=3)
    assert tokens_per_second(as_dict(decoded)) == 1500
    assert tokens_per_second(as_dict(dataclasses.replace(row, kind="memory", pairs=0))) is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"methods": ("soft-mao",)}, "unknown method 'soft-mao': did you mean 'soft-moa'"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"pairs": 0, "layers": 0}, "layers is 0: give at least 1; pairs is 0: give at least 1"),
        ({"kind": "scaling"}, r"num_experts is \[\]: give numbers of copies"),
        (
            {
                "kind": "scaling",
                "num_experts": (2,),
                "methods": ("molora", "peft-lora", "soft-moa-no-prompt"),
            },
            "'peft-lora' has no copies of its experts to scale: give .*molora, hydralora, topk-moe-lora, adamole; 'soft-moa-no",
        ),
        pytest.param(
            {"device": "cuda"},
            "there is no CUDA device here; give --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        BenchOptions(**{"kind": "train", "methods": ("soft-moa",), **options})


def test_a_method_must_be_known_and_a_loaded_model_cannot_be_cut() -> None:
    base = subjects.base_model("smollm2-135m", layers=1, dtype=torch.float32, device="cpu")
    with pytest.raises(UsageError, match="unknown method 'lroa'"):
        subjects.with_method(base, "lroa")
    with pytest.raises(UsageError, match=r"only the shapes smollm2-135m, llama-3\.1-8b can be cut"):
        subjects.base_model("somewhere", layers=1, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_experts_asked_one_by_one_make_the_same_logits_as_joined_ones(method: str) -> None:
    model = mixture_model("llama", method)
    with torch.no_grad():
        joined = model(tokens()).logits
        with subjects.one_by_one(model):
            apart = model(tokens()).logits
        again = model(tokens()).logits
    torch.testing.assert_close(apart, joined, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, joined)


def test_the_command_prints_one_object_and_appends_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["moa", "bench", "train", *FEW, "--json", "--out", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in printed] == ["frozen", "peft-lora", "sparse-moa"]
    assert [json.loads(line) for line in file.read_text().splitlines()] == printed


def test_rows_that_were_measured_before_an_error_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All were lost."""

    def failing(options: BenchOptions, **_: Any) -> Iterator[BenchRow]:
        yield from islice(measure(options), 2)
        raise RunError("no more")

    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr(measuring, "measure", failing)
    monkeypatch.setattr(sys, "argv", ["moa", "bench", "train", *FEW, "--out", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    kept = [json.loads(line)["method"] for line in file.read_text().splitlines()]
    assert kept == ["frozen", "peft-lora"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run",), "unknown kind of measurement 'run'"),
        (("scaling", "--num-experts", "8,many"), "--num-experts is '8,many': give whole numbers"),
        (("train", "--num-experts", "8"), "--num-experts is for scaling, not for train: leave it out"),
        (("train", "--new-tokens", "8"), "--new-tokens is for decode, not for train: leave it out"),
        (("train", "--out", __file__), "line 1: not a JSON object: delete the file, or mend the line"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(
    words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moa", "bench", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_installed_command_measures_memory_in_processes_that_know_the_method() -> None:
    command = [
        Path(sys.executable).with_name("moa"),
        "bench",
        "memory",
        "--layers",
        "1",
        "--length",
        "4",
        "--batch-size",
        "1",
    ]
    done = subprocess.run(
        [*command, "--methods", "soft-moa", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(row["peak_mib"] > 0 for row in json.loads(done.stdout)["rows"])
