import sys
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from moa_peft.compare.router import router_summary
from moa_peft.data.templates import PAPER
from tiny_lm import byte_tokenizer, choice_rows, tiny_llama, with_mixture

FIGURES = {"load_variation": 0.5, "mean_cka": None, "active_experts": 2.0}


@pytest.fixture
def texts_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the summary of a router was asked for."""
    read: list[str] = []

    def routing_summary(
        model: Any, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 8
    ) -> dict[str, float | None]:
        read.extend(texts)
        return dict(FIGURES)

    module = types.ModuleType("moa_peft.analysis.summary")
    module.routing_summary = routing_summary  # type: ignore[attr-defined]  # a module made here
    package = types.ModuleType("moa_peft.analysis")
    package.__spec__ = ModuleSpec("moa_peft.analysis", None)
    monkeypatch.setitem(sys.modules, "moa_peft.analysis", package)
    monkeypatch.setitem(sys.modules, "moa_peft.analysis.summary", module)
    return read


def test_a_router_is_summed_up_on_the_prompts_that_training_shows(texts_read: list[str]) -> None:
    rows = choice_rows(3)
    found = router_summary(with_mixture(tiny_llama()), byte_tokenizer(), rows, "paper")
    assert found == FIGURES
    assert texts_read == [PAPER.format(instruction=row.instruction) for row in rows]


def test_a_model_without_a_router_has_no_figures(texts_read: list[str]) -> None:
    assert router_summary(tiny_llama(), byte_tokenizer(), choice_rows(1), "paper") is None
    assert texts_read == []
