"""Figures of a trained router on a few prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moa_peft.data.loading import Row
from moa_peft.data.templates import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = {
    "active_experts": "active experts",
    "load_variation": "load variation",
    "mean_cka": "mean CKA",
}
"""Figures of a router and what the report calls them."""


def router_summary(
    model: Any, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], template: Template
) -> dict[str, float | None] | None:
    """Sum up what the routers of a model do.

    Args:
        model: The model with its adapter.
        tokenizer: Its tokenizer.
        rows: Questions whose prompts it reads.
        template: How a row becomes text.

    Returns:
        Figures by name, as in `COLUMNS`; None without a router.
    """
    from moa_peft import mixture_layers

    routers = [
        one
        for _, layer in mixture_layers(model)
        for mixture in layer.mixtures().values()
        for one in mixture.routers()
    ]
    if not routers:
        return None
    from moa_peft.inspection.prompts import as_prompt
    from moa_peft.inspection.summary import routing_summary

    prompts = [as_prompt(row, template, tokenizer) for row in rows]
    return dict(routing_summary(model, tokenizer, prompts))
