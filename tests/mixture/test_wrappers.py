"""A mixture trains right under every wrapper: the losses and gradients of the plain run, and an adapter that reloads equal."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny import FAMILIES, METHODS, awaken, base_model
from wrappers import PLAIN, RANKS, STEPS, WRAPPERS, Wrapper, compile_whole, reloaded, run_all, train

pytestmark = pytest.mark.slow
SMOOTH = (("llama", "soft-moa"), ("llama", "extra-kinds"))
"""In half precision a threshold decides otherwise about some tokens."""
ONE_PROCESS = (*SMOOTH, ("llama", "everything"))
TWO_PROCESSES = (*ONE_PROCESS, ("llama", "soft-moa-hydra"), ("qwen3", "everything"), ("gpt2", "everything"))
LIMITS = {torch.float32: (2e-6, 2e-4), torch.float16: (1e-3, 0.1), torch.bfloat16: (1e-2, 0.4)}
"""Of the losses, relative; and of a tensor's change, relative to it or to a tenth of the largest one's."""


def rounding(wrapper: Wrapper) -> torch.dtype:
    return wrapper.autocast or wrapper.dtype


def cases(wrapper: Wrapper) -> tuple[tuple[str, str], ...]:
    if wrapper.prepare is compile_whole:
        return SMOOTH[:1]  # test_compiled.py has every method's gradients
    if rounding(wrapper) != torch.float32:
        return SMOOTH
    return TWO_PROCESSES if wrapper.processes else ONE_PROCESS


RUNS = [(name, *case) for name, wrapper in WRAPPERS.items() for case in cases(wrapper)]


def is_installed(wrapper: Wrapper) -> bool:
    return wrapper.package is None or importlib.util.find_spec(wrapper.package) is not None


def frozen(family: str) -> PreTrainedModel:
    """A model with rows of 64 numbers, which nf4 on a CPU needs, and weights that do not magnify rounding."""
    wide = (
        {"n_embd": 64, "n_inner": 128} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 128}
    )
    model = base_model(family, **wide)
    for one in model.parameters():
        one.data *= 0.7 if one.dim() > 1 else 1.0
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The frozen models, and where the runs leave their results."""
    path = tmp_path_factory.mktemp("wrappers")
    for family in {family for family, _ in TWO_PROCESSES}:
        frozen(family).save_pretrained(path / family)
    return path


@pytest.fixture(scope="module")
def two_processes(folder: Path) -> Path:
    """The folder, with the results of all runs of two processes."""
    installed = {name: one for name, one in WRAPPERS.items() if one.processes and is_installed(one)}
    runs = [(name, *case) for name, one in installed.items() for case in cases(one)]
    torch.multiprocessing.spawn(run_all, (str(folder), runs), nprocs=RANKS)
    return folder


def plain_run(name: str, family: str, method: str, folder: Path) -> Path:
    """Train without a wrapper, with the numbers that a quantised base stands for."""
    wrapper = WRAPPERS[name]
    out = folder / f"plain-{wrapper.dtype}-{name if wrapper.quantization else ''}" / family / method
    if not out.exists():
        plain = replace(PLAIN, dtype=wrapper.dtype)
        model = plain.load(folder / family)
        if wrapper.quantization:
            packed = dict(wrapper.load(folder / family).named_modules())
            for path, module in model.named_modules():
                if isinstance(module, nn.Linear):
                    module.weight.data = dequantize_module_weight(packed[path]).data
        train(plain, family, method, folder / family, out, model)
    return out


def changes(out: Path, family: str, method: str) -> dict[str, Tensor]:
    """How far a run has moved each weight of its adapter."""
    model = get_peft_model(frozen(family), METHODS[method](FAMILIES[family]))
    awaken(model)
    start, end = get_peft_model_state_dict(model), load_file(out / "adapter_model.safetensors")
    assert start.keys() == end.keys()
    return {name: end[name] - one for name, one in start.items()}


@pytest.mark.parametrize(("name", "family", "method"), RUNS)
def test_a_wrapped_run_equals_the_plain_one_and_its_adapter_reloads_equal(
    name: str,
    family: str,
    method: str,
    folder: Path,
    request: pytest.FixtureRequest,
    note_run: Callable[..., None],
) -> None:
    wrapper = WRAPPERS[name]
    if not is_installed(wrapper):
        pytest.skip(f"{wrapper.package} is not installed")
    out = folder / name / family / method
    if wrapper.processes:
        request.getfixturevalue("two_processes")
    else:
        train(wrapper, family, method, folder / family, out)
    plain = plain_run(name, family, method, folder)
    run, expected = torch.load(out / "run.pt"), torch.load(plain / "run.pt")
    assert torch.equal(reloaded(wrapper, folder / family, out), run["logits"])

    of_losses, of_changes = LIMITS[rounding(wrapper)]
    assert len(run["losses"]) == len(expected["losses"]) == STEPS
    difference = max(abs(a / b - 1) for a, b in zip(run["losses"], expected["losses"], strict=True))
    assert difference <= of_losses
    found, wanted = changes(out, family, method), changes(plain, family, method)
    largest = max(one.norm().item() for one in wanted.values())
    for key, one in wanted.items():
        size = one.norm().item()
        assert size > 0, key
        assert (found[key] - one).norm().item() <= of_changes * max(size, 0.1 * largest), key
    processes = f"{RANKS} processes" if wrapper.processes else "1 process"
    note_run(
        name,
        f"{family} {method}",
        ran=f"{STEPS} steps of `Trainer`, {processes}: {wrapper.ran}",
        compared="losses",
        difference=difference,
        limit=of_losses,
    )


def test_a_model_that_transformers_has_laid_out_over_two_processes_is_refused(
    two_processes: Path, note_run: Callable[..., None]
) -> None:
    said = {(two_processes / f"tensor-parallel-{rank}").read_text() for rank in range(RANKS)}
    assert len(said) == 1
    [refusal] = said
    assert "tensor-parallel over 2 ranks" in refusal
    note_run("Tensor parallelism", "llama soft-moa", ran='`tp_plan="auto"`, 2 processes', refused=refusal)
