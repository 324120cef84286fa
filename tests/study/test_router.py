from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import processors

from moa_peft.data.templates import PAPER
from moa_peft.inspection import results
from moa_peft.inspection.prompts import Prompt, as_prompt, tokenise
from moa_peft.study.one_run import router_summary
from tiny_lm import CHAT_TEMPLATE, END, byte_tokenizer, choice_rows, tiny_llama, with_mixture

FIGURES = {"load_variation": 0.5, "mean_cka": None, "active_experts": 2.0}


@pytest.fixture
def texts_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the summary of a router was asked for."""
    read: list[str] = []

    def routing_summary(
        model: Any, tokenizer: Any, texts: Sequence[Prompt], *, batch_size: int = 8
    ) -> dict[str, float | None]:
        read.extend(one.text for one in texts)
        return dict(FIGURES)

    monkeypatch.setattr(results, "routing_summary", routing_summary)
    return read


def test_a_router_is_summed_up_on_the_prompts_that_training_shows(texts_read: list[str]) -> None:
    rows = choice_rows(3)
    found = router_summary(with_mixture(tiny_llama()), byte_tokenizer(), rows, "paper")
    assert found == FIGURES
    assert texts_read == [PAPER.format(instruction=row.instruction) for row in rows]


def test_a_model_without_a_router_has_no_figures() -> None:
    assert router_summary(tiny_llama(), byte_tokenizer(), choice_rows(1), "paper") is None


@pytest.mark.parametrize("template", ["paper", "chat"])
def test_a_study_reads_the_tokens_that_inspecting_reads(
    template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the chat template of a tokenizer that begins texts with a token, prompts began with two of them."""
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.bos_token = END
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    single = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 256)])
    tokenizer.backend_tokenizer.post_processor = single  # untyped setter
    rows, seen, read = choice_rows(3), [], results.read

    def watched(model: Any, observer: Any, texts: Any, **options: Any) -> None:
        seen.extend(texts)
        read(model, observer, texts, **options)

    monkeypatch.setattr(results, "read", watched)
    router_summary(with_mixture(tiny_llama()), tokenizer, rows, template)
    inspected = tokenise([as_prompt(row, template, tokenizer) for row in rows], tokenizer)
    assert [one.ids for one in seen] == [one.ids for one in inspected]
    assert all(one.ids[0] == 256 != one.ids[1] for one in seen)
