"""Three numbers of a model's routing, for tables of many models."""

from collections.abc import Sequence
from typing import Any

from moa_peft.inspection.forward_pass import TokenText, check_texts, read
from moa_peft.inspection.gate_statistics import load_variation
from moa_peft.inspection.observer import Listener
from moa_peft.inspection.prompts import Prompt, token_ids
from moa_peft.mixture.block_hooks import mixture_layers


def routing_summary(
    model: Any, tokenizer: Any, texts: Sequence[str | Prompt], *, batch_size: int = 8
) -> dict[str, float | None]:
    """Say how evenly and how differently a model's experts work, in one pass over texts.

    Each number is a mean over the routers of all blocks: those of the blocks, and those that weigh the copies of an
    expert at its site. A change is the gated one, what is really added. Padding does not count.

    Args:
        model: A causal language model of transformers, bare or in PEFT's wrapper. It stays as it is.
        tokenizer: The base model's; it adds its special tokens, but to a prompt that holds them already.
        texts: At least one; a row as the model sees it comes from `as_prompt`.
        batch_size: Most texts in a forward pass; no number depends on it beyond rounding.

    Returns:
        ``load_variation``, the coefficient of variation of the experts' load (`load_variation`);
        ``mean_cka``, the mean linear CKA of the pairs of what a router weighs (`linear_cka`);
        ``active_experts``, the mean number of gates above 0 of a token. Each is None where no router has one: in a model
        without a mixture or a router, with one expert, where nothing is added.

    Raises:
        UsageError: If there is no text, or one has no tokens or more than the model reads.
    """
    if not any(
        mixture.routers() for _, layer in mixture_layers(model) for mixture in layer.mixtures().values()
    ):
        return {"load_variation": None, "mean_cka": None, "active_experts": None}
    prompts = [one if isinstance(one, Prompt) else Prompt(text=one, own=()) for one in texts]
    tokens = [TokenText(ids=token_ids(one, tokenizer)) for one in prompts]
    check_texts(model, tokens)
    listener = Listener(model)
    read(model, listener, tokens, batch_size=batch_size)
    groups = [listener.groups[one].statistics() for one in listener.gates if one in listener.groups]
    return {
        "load_variation": _mean([load_variation(sums.gate) for sums in listener.gates.values()]),
        "mean_cka": _mean([one.mean_cka for one in groups]),
        "active_experts": _mean([float(one.active.sum() / one.tokens) for one in listener.gates.values()]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [one for one in values if one is not None]
    return sum(known) / len(known) if known else None
