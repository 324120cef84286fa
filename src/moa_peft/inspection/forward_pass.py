"""One pass of a model over texts, in batches whose padding is excluded from statistics.

Sizes: B rows of a batch, T tokens of its longest row, n real tokens of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moa_peft.data.base_loading import longest_input
from moa_peft.errors import RunError, UsageError
from moa_peft.evaluation.batching import evaluating, padded_call, plan_batches, rows_at_once
from moa_peft.inspection.observer import Batch, Observed, Observer

TOKEN_BUDGET = 1024
"""Most tokens of a forward pass, padding included, unless one text alone is longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenText:
    """A text as a model reads it."""

    ids: tuple[int, ...]
    """At least one token."""
    pieces: tuple[str, ...] = ()
    """The part of the text that each token stands for; empty where it is not needed."""
    classes: tuple[int, ...] = ()
    """Places in `CLASSES`, one a token; empty likewise."""


def check_texts(model: Any, texts: Sequence[TokenText]) -> None:
    """Check that a model can read the texts.

    Raises:
        UsageError: If there is none, or one has no tokens or more than the model reads.
    """
    if not texts:
        raise UsageError("there is no text to look at: give at least one prompt")
    most = longest_input(model)
    for number, text in enumerate(texts, start=1):
        if not text.ids:
            raise UsageError(f"prompt {number} has no tokens: leave it out")
        if most is not None and len(text.ids) > most:
            raise UsageError(
                f"prompt {number} takes {len(text.ids)} tokens, the model reads {most}: shorten it or leave it out"
            )


def read(model: Any, observer: Observer, texts: Sequence[TokenText], *, batch_size: int = 8) -> None:
    """Run a model over texts and add what is observed to the observer's sums.

    Args:
        model: A causal language model of transformers with a mixture, bare or in PEFT's wrapper.
        observer: Of the same model.
        texts: At least one, checked by `check_texts`.
        batch_size: Most texts in a forward pass; no statistic depends on it beyond rounding.
    """
    for places in batches(texts, rows_at_once(model, batch_size)):
        observe(model, observer, [texts[place] for place in places])


def batches(texts: Sequence[TokenText], batch_size: int) -> list[list[int]]:
    """Plan the batches, each a list of places in ``texts``; together they hold every place once."""
    return plan_batches(
        [len(one.ids) for one in texts],
        batch_size=batch_size,
        token_budget=TOKEN_BUDGET,
    )


def observe(model: Any, observer: Observer, texts: Sequence[TokenText]) -> Observed:
    """Run a model over one batch of texts and return the gates and changes of its mixtures.

    Raises:
        RunError: If a gate or a change is not finite.
    """
    call = padded_call(model, [one.ids for one in texts], prompts=[len(one.ids) for one in texts])
    real = call["attention_mask"].bool()
    classes: Tensor | None = None
    if all(one.classes for one in texts):
        classes = torch.tensor([name for one in texts for name in one.classes], device=real.device)
    batch = Batch(mask=real, positions=call["position_ids"][real], classes=classes)
    with torch.inference_mode(), evaluating(model), observer.observing(batch) as observed:
        model(**call, use_cache=False)
    numbers = [(where, "a gate", gates) for where, gates in observed.gates.items()]
    numbers += [
        (where, f"the change of {name}", change.length)
        for where, changes in observed.changes.items()
        for name, change in changes.items()
    ]
    for where, what, values in numbers:
        if not values.isfinite().all():
            raise RunError(
                f"{what} in block {where.layer} is not finite: load the model with another --dtype, such as float32, or look "
                "at how the adapter was trained"
            )
    return observed
