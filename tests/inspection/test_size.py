"""A page of many layers and prompts stays small enough to open and to send."""

import pytest
from peft import get_peft_model

from moa_peft import MoAConfig
from moa_peft.data.row import Row
from moa_peft.inspection.html_report import page
from moa_peft.inspection.inspection import inspect_model
from moa_peft.inspection.prompts import as_prompt, tokenise
from moa_peft.provenance import provenance
from tiny import awaken
from tiny_lm import byte_tokenizer, tiny_llama


@pytest.mark.slow
def test_a_page_of_32_layers_and_50_prompts_stays_under_five_megabytes() -> None:
    model = get_peft_model(tiny_llama(num_hidden_layers=32), MoAConfig.preset("soft-moa"))
    awaken(model)
    rows = [
        Row(instruction=f"{'why ' * 20}{number}?", input="", output="", answer="") for number in range(50)
    ]
    tokenizer = byte_tokenizer()
    found = inspect_model(model, tokenise([as_prompt(one, "paper", tokenizer) for one in rows], tokenizer))
    assert found.num_tokens > 10_000
    assert 0 < len(found.prompts) < 50  # as many as fit
    assert len(page(found, provenance()).encode()) < 5_000_000
