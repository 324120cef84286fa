"""What decides the result of an evaluation, and what is needed to repeat it."""

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

from moa_peft.data.loading import Row, rows_md5
from moa_peft.data.templates import render_completion, render_prompt
from moa_peft.data.tokenization import completion_ids, end_token_id, prompt_ids
from moa_peft.evaluation.code_execution import Limits
from moa_peft.evaluation.generation import end_ids
from moa_peft.evaluation.options import EvaluationOptions
from moa_peft.evaluation.questions import Task
from moa_peft.evaluation.result_key import ModelIdentity
from moa_peft.evaluation.text_choices import text_form, text_questions
from moa_peft.provenance import provenance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METHOD_VERSION = 3
"""Goes up when scoring, generation or extraction changes, so that no old example is taken for a new one."""

_ELSEWHERE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Settings of a model that say where it came from, or what its weights say themselves."""

_TOKENISER_ROWS = 16
"""Rows whose tokens stand for the tokenizer in a key."""


def evaluation_key(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    options: EvaluationOptions,
    identity: ModelIdentity,
) -> str:
    """Hash everything that decides what a model makes of the examples of a task.

    The size of the batch and the device are left out, they change rounding alone; so is the extraction rule, as every
    example is read by all of them.

    Args:
        model: The model, for the settings beside its weights.
        tokenizer: Its tokenizer.
        task: The task.
        options: How it is evaluated.
        identity: Which model it is.

    Returns:
        64 hexadecimal digits.
    """
    mode = options.mode_for(task)
    rows = [one.row for one in task.questions]
    tokens: list[Any]
    if mode == "text":
        asked = [one.tokens(tokenizer) for one in text_questions(task)[:_TOKENISER_ROWS]]
        tokens = [[one.prompt, one.completions] for one in asked]
    else:
        tokens = [
            [
                prompt_ids(render_prompt(row, options.template, tokenizer), tokenizer, options.template),
                completion_ids(render_completion(row), tokenizer),
            ]
            for row in rows[:_TOKENISER_ROWS]
        ]
    decisive = {
        "version": METHOD_VERSION,
        "rows": rows_md5(rows),
        "mode": mode,
        "template": None if mode == "text" else options.template,
        "max_new_tokens": options.tokens_for(task) if mode == "generation" else None,
        "base": identity.base_fingerprint,
        "adapter": identity.adapter_fingerprint,
        "settings": {name: value for name, value in model.config.to_dict().items() if name not in _ELSEWHERE},
        "tokens": tokens,
        "ends": [end_token_id(tokenizer), *sorted(end_ids(model, tokenizer))],
    }
    if task.runs_code:
        decisive["tests"] = [
            None if one.code is None else dataclasses.asdict(one.code) for one in task.questions
        ]
        decisive["limits"] = dataclasses.asdict(Limits())
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()


def describe(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    options: EvaluationOptions,
    identity: ModelIdentity,
) -> dict[str, Any]:
    """Say what is needed to repeat an evaluation.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        task: The task.
        options: How it is evaluated.
        identity: Which model it is.

    Returns:
        Fields of `ResultRow`.
    """
    form = Row(instruction="{instruction}", input="", output="", answer="")
    mode = options.mode_for(task)
    return {
        "task": task.name,
        "source": task.source,
        "split": task.split,
        "limit": task.limit,
        "data_md5": rows_md5([one.row for one in task.questions]),
        "file_md5": task.file_md5,
        "max_new_tokens": options.tokens_for(task) if mode == "generation" else None,
        "template": "none" if mode == "text" else options.template,
        "prompt_form": text_form(task).prompt
        if mode == "text"
        else render_prompt(form, options.template, tokenizer),
        "batch_size": options.batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        **dataclasses.asdict(identity),
        **provenance(),
    }
