"""A mixture served by vLLM answers as under transformers. `make serve-env` makes the environment that these tests need."""

import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer

from moa_peft import MoAConfig, RouterConfig
from moa_peft.bench.subjects import one_by_one
from moa_peft.data.base_loading import find_base, load_base
from moa_peft.data.base_model import resolve_model
from moa_peft.evaluation.loading import load, read_adapter
from moa_peft.serving.vllm.command import vllm_command
from moa_peft.serving.vllm.folder import export_vllm
from pictures import model_of
from structures import text_model
from tiny import FAMILIES, METHODS, awaken, base_model, tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
WORKER = Path(__file__).with_name("vllm_worker.py")
NEW_TOKENS = 24
PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):\n",
    "Once upon a time, a small fox lived at the edge of a wood, and every morning it went down to the river to look for",
    "The three primary colours are red,",
    "Question: what is 12 + 3? Answer:",
)
RANDOM = {"soft-moa": 0.02, "sparse-moa": 0.04, "molora": 0.07, "adamole": 0.07}
"""Methods, and the deviation of what is added to their weights: each changes log-probabilities by more than 1 nat."""
SERVED = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "olmo2", "gpt_neox")
KINDS = [
    *(
        one
        for one in METHODS
        if one not in ("soft-moa", "instance-moa", "instance-kinds", "unipeft", "extra-kinds")
    ),
    "others",
]
"""Methods beside Soft MoA, which every family is served with; instance gates and DoRA are refused."""

Answer = dict[str, Any]


def work(asked: dict[str, Any]) -> Any:
    """Run the worker."""
    done = subprocess.run(
        [sys.executable, WORKER], input=json.dumps(asked), capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def engine(folder: Path, **options: Any) -> dict[str, Any]:
    own = {} if (folder / "config.json").is_file() else {"config_format": "moa"}
    return {"model": str(folder), "skip_tokenizer_init": True, **own, **options}


def greedy(model: Any, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], Tensor]:
    """The greedy answer under transformers and its log-probabilities, [T, V]."""
    ids = torch.tensor([list(prompt)])
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return found.sequences[0, ids.shape[1] :].tolist(), torch.stack(found.logits)[:, 0].log_softmax(-1)


class Reference:
    """What a model answers under transformers, and how far its own ways of computing it lie apart."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS) -> None:
        self.prompts = [list(one) for one in prompts]
        self.answers = [greedy(model, one, new_tokens) for one in prompts]
        self.noise = self.effect = 0.0
        for prompt, (answer, logprobs) in zip(prompts, self.answers, strict=True):
            ids = torch.tensor([[*prompt, *answer[:-1]]])
            with torch.no_grad(), one_by_one(model):
                plain = model(ids).logits[0, len(prompt) - 1 :].log_softmax(-1)
            with torch.no_grad(), model.disable_adapter():
                frozen = model(ids).logits[0, len(prompt) - 1 :].log_softmax(-1)
            best = logprobs.topk(5).indices
            self.noise = max(self.noise, float((plain - logprobs).gather(-1, best).abs().max()))
            self.effect = max(self.effect, float((frozen - logprobs).gather(-1, best).abs().max()))

    def difference(self, answers: Sequence[Answer]) -> float:
        """The largest difference of vLLM's five best log-probabilities; the tokens must be the same."""
        assert [one["tokens"] for one in answers] == [tokens for tokens, _ in self.answers]
        return max(
            abs(float(logprobs[step, int(token)]) - value)
            for one, (_, logprobs) in zip(answers, self.answers, strict=True)
            for step, best in enumerate(one["logprobs"])
            for token, value in best.items()
        )


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the adapter of a method, with random weights; that of `moa demo` is trained."""
    folder = tmp_path_factory.mktemp("adapters")
    base = find_base("smollm2", {"dtype": "float32"})

    def make(method: str) -> Path:
        if method == "moa demo":
            command = [Path(sys.executable).with_name("moa"), "demo", "--steps", "24", "--questions", "2"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            return folder / "runs" / "demo"
        if not (folder / method).exists():
            torch.manual_seed(0)
            model = get_peft_model(load_base(base), MoAConfig.preset(method))
            assert isinstance(model, PeftModel)
            generator = torch.Generator().manual_seed(2)
            for one in model.parameters():
                if one.requires_grad:
                    one.data += torch.randn(one.shape, generator=generator) * RANDOM[method]
            model.save_pretrained(str(folder / method))
            AutoTokenizer.from_pretrained(base.path).save_pretrained(folder / method)
        return folder / method

    return make


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2"))
    return [tokenizer(one)["input_ids"] for one in PROMPTS]


def reference(folder: Path, prompts: Sequence[Sequence[int]]) -> Reference:
    return Reference(load(adapter=read_adapter(str(folder)), dtype="float32").model, prompts)


def noted(found: Reference, difference: float, ran: str, *, least: float = 0.0) -> dict[str, Any]:
    """A row's part; the limit is five times what our own ways of computing the same lie apart."""
    limit = max(5 * found.noise, least)
    assert difference <= limit
    return {
        "ran": ran,
        "compared": f"{len(found.prompts)} greedy answers are equal; log-probabilities",
        "difference": difference,
        "limit": limit,
        "effect": found.effect,
        "seed": 0,
    }


@pytest.mark.parametrize("method", ["moa demo", *RANDOM])
def test_greedy_answers_equal_those_of_transformers(
    method: str, adapters: Callable[[str], Path], prompts: list[list[int]], note_run: Callable[..., None]
) -> None:
    folder = adapters(method)
    expected = reference(folder, prompts)
    assert expected.effect > 1
    [found] = work({"engines": [engine(folder)], "rounds": [prompts], "tokens": NEW_TOKENS})
    ran = "SmolLM2-135M, float32, eager, 6 prompts x 24 tokens"
    note_run(
        f"vLLM, {method}",
        f"smollm2 {method}",
        **noted(expected, expected.difference(found["rounds"][0]), ran),
    )


def test_chunked_prefill_a_prefix_cache_preemption_and_concurrency_change_nothing(
    adapters: Callable[[str], Path], prompts: list[list[int]], note_run: Callable[..., None]
) -> None:
    folder = adapters("soft-moa")
    story = prompts[3]
    prompts = [[*story, *story, *one] for one in prompts]  # longer than a block of the cache, of 32 tokens
    expected = reference(folder, prompts)
    alone = [[one] for one in prompts]
    eight = [*prompts, *prompts[:2]]
    engines = [
        engine(folder, max_num_batched_tokens=16, max_num_seqs=8, block_size=32, enable_prefix_caching=True),
        engine(
            folder, num_gpu_blocks_override=9, block_size=32, enable_prefix_caching=False, max_model_len=128
        ),
    ]
    rounds = {"rounds": [eight, *alone], "tokens": NEW_TOKENS}
    chunked, preempted = [
        work({"engines": [one], **rounds})[0] for one in engines
    ]  # one's counters hide the other's
    assert chunked["counters"]["vllm:prefix_cache_hits"] > 0
    assert preempted["counters"]["vllm:num_preemptions"] > 0
    worst = 0.0
    for found in (chunked, preempted):
        first, *others = found["rounds"]
        assert [one["tokens"] for one in first[6:]] == [one["tokens"] for one in first[:2]]
        worst = max(worst, expected.difference(first[:6]), expected.difference([one for [one] in others]))
    ran = (
        "8 requests at once and 6 alone: prefill in chunks of 16 tokens with prefix cache "
        f"({chunked['counters']['vllm:prefix_cache_hits']:.0f} tokens found in it); without room for all "
        f"({preempted['counters']['vllm:num_preemptions']:.0f} preemptions)"
    )
    note_run("vLLM, scheduling", "smollm2 soft-moa", **noted(expected, worst, ran))


def test_the_compiled_model_answers_as_the_eager_one(
    adapters: Callable[[str], Path], prompts: list[list[int]], note_run: Callable[..., None]
) -> None:
    folder = adapters("soft-moa")
    expected = reference(folder, prompts)
    compiled = engine(folder, enforce_eager=False)
    [found] = work({"engines": [compiled], "rounds": [prompts], "tokens": NEW_TOKENS})
    ran = "torch.compile, vLLM's default (`enforce_eager=False`)"
    note_run(
        "vLLM, compiled", "smollm2 soft-moa", **noted(expected, expected.difference(found["rounds"][0]), ran)
    )


def others(family: Any) -> MoAConfig:
    """The kinds beyond the paper's that vLLM can serve."""
    full = METHODS["extra-kinds"](family)
    return MoAConfig(
        experts=[one for one in full.experts if one.kind != "dora"],
        router=RouterConfig(kind="linear"),
    )


def tiny_adapter(folder: Path, family: str, method: str) -> tuple[Path, Any]:
    """A tiny random model with an adapter, both saved; gives the adapter's folder and the model."""
    head_size = {"head_dim": 32} if "head_dim" in FAMILIES[family].settings else {}
    base = base_model(family, hidden_size=128, **head_size)  # a CPU's attention in vLLM needs heads of 32
    config = others(FAMILIES[family]) if method == "others" else METHODS[method](FAMILIES[family])
    return saved_adapter(folder, base, config)


def saved_adapter(folder: Path, base: Any, config: MoAConfig) -> tuple[Path, Any]:
    """Save a base model whose generation stops nowhere, and an adapter on it."""
    base.config.eos_token_id = None
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model = get_peft_model(base, config)
    awaken(model)
    assert isinstance(model, PeftModel)
    model.eval().save_pretrained(str(folder / "adapter"))
    return folder / "adapter", model


@pytest.mark.parametrize(
    "cases",
    [[(one, "soft-moa") for one in SERVED], [("llama", one) for one in KINDS]],
    ids=["families", "methods"],
)
def test_tiny_random_models_answer_alike(
    cases: list[tuple[str, str]], tmp_path: Path, note_run: Callable[..., None]
) -> None:
    rows = tokens(rows=3).tolist()
    made = [tiny_adapter(tmp_path / f"{family}-{method}", family, method) for family, method in cases]
    small = {"max_model_len": 64, "max_num_seqs": 4}
    asked = {"engines": [engine(folder, **small) for folder, _ in made], "rounds": [rows], "tokens": 8}
    for (family, method), (_, model), found in zip(cases, made, work(asked), strict=True):
        expected = Reference(model, rows, new_tokens=8)
        ran = "float32, eager, 3 prompts x 8 tokens each"
        row = noted(expected, expected.difference(found["rounds"][0]), ran, least=1e-5)
        note_run("vLLM, tiny random models", f"{family} {method}", **row)


@contextmanager
def server(folder: Path, log: Path) -> Iterator[str]:
    """The server that `moa serve` starts; gives its address."""
    port = 8000 + os.getpid() % 1000
    more = [
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--served-model-name",
        "mixture",
    ]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [*vllm_command(folder, "127.0.0.1", port), *more],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(300):
            time.sleep(1)
            assert process.poll() is None, log.read_text()[-3000:]
            if "Application startup complete" in log.read_text():
                break
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def post(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        address,
        json.dumps({"model": "mixture", "temperature": 0, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def test_the_server_answers_over_http_from_a_run_and_from_an_export(
    adapters: Callable[[str], Path], prompts: list[list[int]], tmp_path: Path, note_run: Callable[..., None]
) -> None:
    run = adapters("moa demo")
    expected = reference(run, prompts)
    export_vllm(read_adapter(str(run)), tmp_path / "served")
    tokenizer = AutoTokenizer.from_pretrained(run)
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer, _ in expected.answers]
    for folder in (run, tmp_path / "served"):
        with server(folder, tmp_path / "log") as address:
            found = post(f"{address}/completions", {"prompt": prompts, "max_tokens": NEW_TOKENS})
            turns = [{"role": "user", "content": "Name a colour."}]
            chat = post(f"{address}/chat/completions", {"messages": turns, "max_tokens": 4})
        assert [one["text"] for one in found["choices"]] == texts
        assert chat["choices"][0]["message"]["content"]
    ran = "OpenAI server, `--config-format moa` on a run and `moa export --format vllm`, completions of 6 prompts; a chat answer"
    note_run("vLLM, server", "smollm2 soft-moa", ran=ran, compared="texts", difference=0.0, limit=0.0, seed=0)


def test_what_does_not_go_with_a_mixture_is_refused_before_anything_starts(
    adapters: Callable[[str], Path], tmp_path: Path, note_run: Callable[..., None]
) -> None:
    folder = adapters("soft-moa")
    flags = {"enable_lora": True, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    instance, _ = tiny_adapter(tmp_path / "instance", "llama", "instance-moa")
    routed, _ = saved_adapter(tmp_path / "routed", text_model("qwen3_moe"), MoAConfig.preset("lora"))
    seeing, _ = saved_adapter(tmp_path / "seeing", model_of("llava"), MoAConfig.preset("lora"))
    misfit, _ = tiny_adapter(tmp_path / "misfit", "llama", "lora")
    file = misfit / "adapter_config.json"
    file.write_text(file.read_text().replace('"rank": 16', '"rank": 4'))
    tiny = [engine(one, max_model_len=64) for one in (instance, routed, seeing, misfit)]
    asked = [*(engine(folder, **{name: value}) for name, value in flags.items()), *tiny]
    messages = [
        "--enable-lora",
        "--tensor-parallel-size",
        "--pipeline-parallel-size",
        "granularity 'instance'",
        "is a mixture of experts",
        "is multimodal",
        "does not fit this model",
    ]
    for said, message in zip(work({"refused": asked}), messages, strict=True):
        assert message in said
        own = said.split("Value error, ")[-1].split(" [type=")[0].replace(f"{tmp_path}/", "")
        note_run(f"vLLM, {message}", "llama soft-moa", ran="", refused=own, seed=0)


@pytest.mark.parametrize(
    ("method", "read", "dtype", "shortest"),
    [
        ("soft-moa", 8, "float32", 32),
        ("soft-moa", 32, "float32", 32),
        ("molora", 32, "float32", 32),
        ("soft-moa", 32, "bfloat16", 32),
        ("soft-moa", 32, "bfloat16", 8),
    ],
)
def test_throughput(
    method: str,
    read: int,
    dtype: str,
    shortest: int,
    adapters: Callable[[str], Path],
    note_run: Callable[..., None],
) -> None:
    """New tokens a CPU second, one thread, 32 requests of ``read`` tokens each. It only measures.

    Each wants 32 more, or evenly from ``shortest`` to as many above 32 as that lies below. transformers' batch ends
    with its longest row.
    """
    folder = adapters(method)
    rows = torch.randint(3, 49000, (32, read), generator=torch.Generator().manual_seed(0))
    wanted = torch.linspace(shortest, 64 - shortest, 32).round().int().tolist()
    options = {"enable_prefix_caching": False, "dtype": dtype}
    timed = {
        "base": {
            "model": resolve_model("smollm2"),
            "model_impl": "transformers",
            "skip_tokenizer_init": True,
            **options,
        },
        "mixture": engine(folder, **options),
    }
    found = work({"timed": timed, "prompts": rows.tolist(), "tokens": wanted, "times": 5})
    model = load(adapter=read_adapter(str(folder)), dtype=dtype).model
    rates = []
    for _ in range(3):
        start = time.process_time()
        model.generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            do_sample=False,
            min_new_tokens=max(wanted),
            max_new_tokens=max(wanted),
            pad_token_id=0,
        )
        rates.append(sum(wanted) / (time.process_time() - start))
    figures = {**found, "transformers": rates[1:]}
    each = "32" if shortest == 32 else f"{min(wanted)} to {max(wanted)}"
    note_run(
        f"vLLM, throughput of {method} after {read} tokens, {dtype}, {each} new", f"smollm2 {method}",
        ran=f"32 requests x {each} tokens after {read}, {dtype}, eager, one thread, base and mixture in turn",
        rates=figures, seed=0,
    )  # fmt: skip
