"""One measurement, and when it must not be published."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["train", "decode", "memory", "scaling"]

LEAST_PAIRS = 15
"""Below so many pairs quartiles say little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRow:
    """One method on one piece of work. Tables and figures use only rows without `objections`."""

    kind: Kind
    """What was measured."""
    method: str
    """The method."""
    baseline: str
    """What it was taken in turn with."""
    model: str
    """The base model, or the shape it was built in."""
    num_layers: int
    """Decoder blocks."""
    work: str
    """The piece of work, in words."""
    batch_size: int
    """Rows of a batch."""
    length: int
    """Tokens of a row; of the prompt, where tokens are decoded."""
    new_tokens: int | None
    """Tokens decoded in each row."""
    num_experts: int | None
    """Copies of each expert, where they were set."""
    trainable_parameters: int
    """What the method trains."""
    step_ms: tuple[float, float, float]
    """Time of one piece of work: quartiles and median, milliseconds, device synchronised, warm-up excluded."""
    over_baseline: tuple[float, float, float] | None
    """Ratio to the baseline's time, pair by pair: quartiles and median."""
    over_frozen: tuple[float, float, float] | None
    """Ratio to the frozen model's time, likewise."""
    pairs: int
    """Times that each was taken, in turn."""
    saved_mib: float | None
    """What autograd keeps for the backward pass beyond the frozen model's, 2**20 bytes; parameters excluded."""
    peak_mib: float | None
    """Peak memory of a process of its own (of what is allocated, on CUDA) above that before the first step, 2**20 bytes."""
    device_mib: float | None
    """What the process held of a CUDA device at that peak, the model's weights included, 2**20 bytes."""
    flops: float | None
    """Floating-point operations of one piece of work."""
    operators: float
    """Operators that a block's forward pass has beyond the frozen block's, views included; in decoding, that of one token."""
    kernels: float
    """The same without views."""
    max_abs_err: float | None
    """Largest difference of the logits from those with each expert computed by itself, not compiled; None without a mixture."""
    rms_err: float | None
    """The difference's root mean square over that of the logits themselves."""
    err_limit: float | None
    """What that may be: written down before the run, for the dtype."""
    dtype: str
    """Of the base; adapters are float32."""
    checkpointing: bool
    """Whether activations are recomputed."""
    compiled: bool
    """Whether what ``torch.compile`` makes of the model was timed; what is counted is counted without it."""
    provenance: dict[str, Any]
    """Commit, command, versions, device, threads, time."""

    def objections(self) -> list[str]:
        """Reasons not to publish this row; empty when there are none."""
        reasons: list[str] = []
        if self.provenance.get("dirty") is not False:
            reasons.append(f"the working tree differs from commit {self.provenance.get('commit')}")
        if self.pairs < LEAST_PAIRS and self.kind != "memory":
            reasons.append(f"{self.pairs} pairs, {LEAST_PAIRS} needed for quartiles")
        if self.rms_err is not None and not self.rms_err <= (self.err_limit or 0):  # also catches NaN
            reasons.append(f"error {self.rms_err:g} against the experts one by one, limit {self.err_limit:g}")
        return reasons


def tokens_per_second(row: Mapping[str, Any]) -> float | None:
    """Tokens of all rows, or those decoded, by the median time, the reading of prompts included; of a row as a file holds it."""
    each = row["new_tokens"] if row["kind"] == "decode" else row["length"]
    return row["batch_size"] * each / row["step_ms"][1] * 1e3 if row["pairs"] else None
