"""From settings to rows: every method on one piece of work, in turn with the baseline and the frozen model."""

import dataclasses
import gc
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moa_peft.bench import subjects, work
from moa_peft.bench.rows import BenchRow, Kind
from moa_peft.errors import RunError, UsageError, unknown
from moa_peft.mixture.block_hooks import mixture_layers
from moa_peft.peak_memory import PeakMemory
from moa_peft.provenance import provenance

MIB = 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ERR_LIMITS = {"float32": 1e-5, "bfloat16": 0.05}
"""Of logits, against those with each expert computed by itself, root mean square over that of these: rounding of a deep model
with untrained experts. A largest difference would grow with the number of logits."""


Quartiles = tuple[float, float, float]
"""First quartile, median, third quartile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """What is measured.

    Raises:
        UsageError: If a value is wrong; the message lists every problem.
    """

    kind: Kind
    """train, decode, memory or scaling."""
    methods: tuple[str, ...]
    """The methods; the frozen model and the baseline are always added."""
    baseline: str = subjects.LORA
    """What each is taken in turn with."""
    model: str = "smollm2-135m"
    """A shape with random weights (smollm2-135m, llama-3.1-8b), smollm2, a folder, or a name on the hub."""
    layers: int | None = None
    """Only so many decoder blocks of a shape; None for all."""
    batch_size: int = 4
    """Rows of a batch."""
    length: int = 128
    """Tokens of a row; of the prompt, where tokens are decoded."""
    new_tokens: int = 64
    """Tokens decoded in each row."""
    num_experts: tuple[int, ...] = ()
    """Copies of each expert to try, for scaling."""
    pairs: int = 15
    """Times that each is taken, in turn."""
    dtype: str = "float32"
    """Of the base: float32 or bfloat16; adapters are float32."""
    device: str = "cpu"
    """cpu or cuda."""
    checkpointing: bool = False
    """Recompute activations in the backward pass."""
    compiled: bool = False
    """Time, and compare with the eager model, what ``torch.compile`` makes of each model; for train."""

    def __post_init__(self) -> None:
        known = subjects.method_names()
        problems = [
            unknown("method", one, known) for one in (*self.methods, self.baseline) if one not in known
        ]
        if self.dtype not in DTYPES:
            problems.append(unknown("dtype", self.dtype, DTYPES))
        if self.device not in ("cpu", "cuda"):
            problems.append(unknown("device", self.device, ("cpu", "cuda")))
        elif self.device == "cuda" and not torch.cuda.is_available():
            problems.append("device is cuda: there is no CUDA device here; give --device cpu")
        counts = {
            one: getattr(self, one) for one in ("layers", "batch_size", "length", "new_tokens", "pairs")
        }
        problems += [
            f"{one} is {value}: give at least 1"
            for one, value in counts.items()
            if value is not None and value < 1
        ]
        if self.kind == "scaling" and (not self.num_experts or min(self.num_experts) < 1):
            problems.append(
                f"num_experts is {list(self.num_experts)}: give numbers of copies, as in --num-experts 8,64"
            )
        if self.kind == "scaling":
            scaled = [one for one in known if subjects.has_copies(one)]
            problems += [
                f"{one!r} has no copies of its experts to scale: give {', '.join(scaled)}"
                for one in self.methods
                if one in known and one not in scaled
            ]
        for name, is_on in (
            ("compile", self.compiled and self.kind != "train"),
            ("checkpointing", self.checkpointing and self.kind == "decode"),
        ):
            if is_on:
                problems.append(f"{name} is on: it is not for {self.kind}; leave it out")
        if problems:
            raise UsageError("; ".join(problems))

    def base(self) -> nn.Module:
        """The frozen model, loaded or built."""
        dtype = DTYPES[self.dtype]
        return subjects.base_model(self.model, layers=self.layers, dtype=dtype, device=self.device)

    @property
    def said(self) -> str:
        """The piece of work in words."""
        shape = f"batch {self.batch_size} x {self.length}"
        if self.kind == "decode":
            return f"generate, {shape} prompt tokens, {self.new_tokens} new ones"
        ways = ", checkpointing" * self.checkpointing + ", compiled" * self.compiled
        return f"forward and backward, {shape} tokens{ways}"


def measure(options: BenchOptions, on_turn: Callable[[], object] = lambda: None) -> Iterator[BenchRow]:
    """Measure every method, one row each, the frozen model's first; ``on_turn`` is called after each round of the timing."""
    base = options.base()
    counts = options.num_experts if options.kind == "scaling" else (None,)
    plain = [(one, None) for one in (subjects.FROZEN, options.baseline)]
    variants = dict.fromkeys([*plain, *((one, count) for one in options.methods for count in counts)])
    ids = work.random_tokens(base, options.batch_size, options.length)
    models: dict[str, nn.Module] = {}  # all at once where they are taken in turn
    times: Mapping[str, Sequence[float]] = {}
    if options.kind != "memory":
        models = {_label(*one): _prepared(base, *one, options) for one in variants}
        runs = {label: _as_run(model, options) for label, model in models.items()}
        pieces = {label: partial(_piece, run, ids, options) for label, run in runs.items()}
        times = take_turns(pieces, options.pairs, on_turn=on_turn)
        del pieces, runs
    same = ("kind", "baseline", "model", "batch_size", "length", "dtype", "checkpointing", "compiled")
    asked: dict[str, Any] = {one: getattr(options, one) for one in same}
    made = provenance(cuda=options.device == "cuda")
    frozen: Mapping[str, float] = {}
    for name, count in variants:
        label = _label(name, count)
        model = models.pop(label) if models else _prepared(base, name, count, options)
        own = _counted(model, ids, options)
        frozen = frozen or own  # the first
        layers = base.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]  # a transformers model
        largest, error = _errors(model, _as_run(model, options), ids)
        peak, device = _peaks(model, ids, name, count, options) if options.kind == "memory" else (None, None)
        yield BenchRow(
            **asked,
            method=name,
            num_layers=layers,
            work=options.said,
            new_tokens=options.new_tokens if options.kind == "decode" else None,
            num_experts=count,
            trainable_parameters=sum(one.numel() for one in subjects.trainable(model)),
            step_ms=quartiles([1e3 * one for one in times.get(label, [0.0])]),
            over_baseline=_over(times, label, options.baseline),
            over_frozen=_over(times, label, subjects.FROZEN),
            pairs=options.pairs if times else 0,
            saved_mib=_difference(own, frozen, "saved", MIB),
            peak_mib=peak,
            device_mib=device,
            flops=own.get("flops"),
            operators=_difference(own, frozen, "operators", layers) or 0.0,
            kernels=_difference(own, frozen, "kernels", layers) or 0.0,
            max_abs_err=largest,
            rms_err=error,
            err_limit=None if error is None else ERR_LIMITS[options.dtype],
            provenance=made,
        )


def _label(name: str, count: int | None) -> str:
    return name if count is None else f"{name}/{count}"


def _prepared(base: nn.Module, name: str, count: int | None, options: BenchOptions) -> nn.Module:
    model = subjects.with_method(base, name, num_experts=count)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]  # a transformers model
    return model.train(options.kind != "decode")


def _as_run(model: nn.Module, options: BenchOptions) -> nn.Module:
    """What is timed of a model: itself, or what the compiler makes of it at the first call."""
    return torch.compile(model) if options.compiled else model  # type: ignore[return-value]  # of a module it makes one


def _piece(model: nn.Module, ids: Tensor, options: BenchOptions) -> None:
    if options.kind == "decode":
        work.decode(model, ids, options.new_tokens)
    else:
        work.training_step(model, ids)
    work.synchronise(model)


def _counted(model: nn.Module, ids: Tensor, options: BenchOptions) -> dict[str, float]:
    """What is counted rather than timed."""
    few = ids[:1, : min(16, ids.shape[1])]
    count = work.decoding_operators if options.kind == "decode" else work.operators
    every, kernels = count(model, few)
    found: dict[str, float] = {"operators": every, "kernels": kernels}
    if options.kind == "memory":
        found["saved"] = work.saved_bytes(model, ids)
    if options.kind == "scaling":
        found["flops"] = work.flops(partial(work.training_step, model, ids))
    return found


def _difference(
    own: Mapping[str, float], frozen: Mapping[str, float], name: str, unit: float
) -> float | None:
    return (own[name] - frozen[name]) / unit if name in own else None


def _over(times: Mapping[str, Sequence[float]], label: str, other: str) -> Quartiles | None:
    return ratios(times[label], times[other]) if times and label != other else None


def _errors(model: nn.Module, run: nn.Module, ids: Tensor) -> tuple[float, float] | tuple[None, None]:
    """Distance of one row's logits from those with each expert by itself, at most and in the mean square; None without a mixture."""
    if not mixture_layers(model):
        return None, None
    found = work.logits(run, ids[:1]).float()
    with subjects.one_by_one(model):
        expected = work.logits(model, ids[:1]).float()
    difference = found - expected
    return difference.abs().max().item(), (difference.norm() / expected.norm()).item()


def _peaks(
    model: nn.Module, ids: Tensor, name: str, count: int | None, options: BenchOptions
) -> tuple[float | None, float | None]:
    """Peak memory of a few training steps above that before them; on CUDA also all that was held of the device; MiB."""
    if options.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return _peak_above(model, ids, options), torch.cuda.max_memory_reserved() / MIB
    spawned = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawned) as pool:  # a process's peak never falls
            return pool.submit(_peak_here, name, count, options).result(), None
    except BrokenProcessPool as error:
        raise RunError(
            f"the process that measured {_label(name, count)} was killed, perhaps for want of memory: give a smaller --batch-size, "
            "--length or --layers"
        ) from error


def _peak_here(name: str, count: int | None, options: BenchOptions) -> float | None:
    base = options.base()
    model = _prepared(base, name, count, options)
    return _peak_above(model, work.random_tokens(base, options.batch_size, options.length), options)


def _peak_above(model: nn.Module, ids: Tensor, options: BenchOptions) -> float | None:
    gc.collect()
    memory = PeakMemory(cuda=options.device == "cuda")
    for _ in range(2):
        _piece(model, ids, options)
    peak = memory.mib()
    return None if peak is None or memory.before_mib is None else peak - memory.before_mib


def as_dict(row: BenchRow) -> dict[str, Any]:
    """A row as a file of results holds it, with its objections."""
    return {**dataclasses.asdict(row), "objections": row.objections()}


def take_turns(
    work: Mapping[str, Callable[[], None]],
    pairs: int,
    *,
    on_turn: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time several pieces of work in turn, A B C, B A C, ..., after a round to warm up, so that drift of the machine's speed affects each alike.

    The order of a round is random, so that no piece always finds the memory state that the same other leaves, and the same in
    every run.

    Args:
        work: By name; each waits for its device before it returns.
        pairs: How often each is timed.
        on_turn: Called after each round, the warm-up's too.

    Returns:
        Seconds, by name, in the order they were taken.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    orders = random.Random(0)
    for turn in range(1 + pairs):
        for name in orders.sample(list(work), len(work)):
            start = time.perf_counter()
            work[name]()
            if turn > 0:
                times[name].append(time.perf_counter() - start)
        on_turn()
    return times


def quartiles(values: Sequence[float]) -> Quartiles:
    """First quartile, median and third quartile; of one value, the value three times."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def ratios(times: Sequence[float], others: Sequence[float]) -> Quartiles:
    """Quartiles of the ratio of two timings, pair by pair."""
    return quartiles([one / other for one, other in zip(times, others, strict=True)])
