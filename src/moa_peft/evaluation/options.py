"""How a task is evaluated."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from moa_peft.data.base_model import DEFAULT_MODEL
from moa_peft.data.templates import Template
from moa_peft.errors import UsageError, expanded, unknown
from moa_peft.evaluation.extraction_rules import RULES
from moa_peft.evaluation.questions import Task
from moa_peft.evaluation.results import file_name
from moa_peft.extras import require

if TYPE_CHECKING:
    from moa_peft.evaluation.loading import AdapterFolder


Mode = Literal["likelihood", "generation", "text"]

RULES_OF: Mapping[Mode, tuple[str, ...]] = {
    "likelihood": ("sum", "per_token"),
    "generation": tuple(RULES),
    "text": ("sum", "per_character"),
}
"""The rules that an accuracy may go by in each mode, the default first. The likeliest choice is that of the highest
log-likelihood (of texts `acc` of the harness), or of the highest divided by its tokens or characters (`acc_norm`)."""

REPLY_TOKENS = {"choice": 32, "code": 512, "other": 256}
"""Most tokens of a generated reply: one that only has to name a choice, a program, any other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationOptions:
    """How a task is evaluated.

    Raises:
        UsageError: If a value is wrong; the message lists every problem.
    """

    mode: Mode | None = None
    """Compare replies that name the choices by likelihood, or generate, or compare the texts of the choices as lm-eval
    does; None generates only where a task has answers but no choices, and never compares texts."""
    extraction: str | None = None
    """The rule behind the headline accuracy; all are recorded. Of generated replies: "stated" (default), what the reply
    says its answer is, or "official". Of likelihoods: "sum" (default), or "per_token"; of texts, "per_character"."""
    template: Template = "paper"
    """How a row becomes text; the one that the adapter was trained with. Mode text has its own prompts."""
    batch_size: int = 16
    """Most questions in a forward pass."""
    max_new_tokens: int | None = None
    """Most tokens of a generated reply; None for 32 where a choice is asked for, 512 for a program, else 256."""
    allow_code_execution: bool = False
    """Whether programs that the model wrote may be run, in the sandbox of `moa_peft.evaluation.code_execution`."""
    out: Path | None = None
    """Folder for results.jsonl and the examples; None keeps everything in memory."""
    progress: bool = True
    """Show a bar on standard error for what takes over two seconds."""

    def __post_init__(self) -> None:
        rules = {rule for some in RULES_OF.values() for rule in some}
        problems = [
            unknown(name, given, known)
            for name, given, known in (
                ("mode", "likelihood" if self.mode is None else self.mode, get_args(Mode)),
                ("extraction rule", "sum" if self.extraction is None else self.extraction, rules),
                ("template", self.template, get_args(Template)),
            )
            if given not in known
        ]
        for name, number in (("batch_size", self.batch_size), ("max_new_tokens", self.max_new_tokens)):
            if number is not None and number < 1:
                problems.append(f"{name} is {number}: give at least 1")
        if self.mode not in (None, "generation") and self.max_new_tokens is not None:
            problems.append(
                f"max_new_tokens has no meaning in mode {self.mode}: leave it out, or choose generation"
            )
        if problems:
            raise UsageError("; ".join(problems))

    def mode_for(self, task: Task) -> Mode:
        """The mode asked for, or the one that suits a task."""
        if self.mode is not None:
            return self.mode
        return "generation" if task.has_answers and not task.has_choices else "likelihood"

    def rule_for(self, mode: Mode) -> str:
        """The rule asked for, or the first of a mode.

        Raises:
            UsageError: If the rule belongs to another mode.
        """
        rule = self.extraction or RULES_OF[mode][0]
        if rule not in RULES_OF[mode]:
            other = next(one for one, rules in RULES_OF.items() if rule in rules)
            raise UsageError(
                f"extraction {rule!r} does not go with mode {mode}, which has {', '.join(RULES_OF[mode])}: "
                f"add --mode {other}, or leave --extraction out"
            )
        return rule

    def tokens_for(self, task: Task) -> int:
        """The longest reply asked for, or the one that suits a task."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return REPLY_TOKENS["code" if task.runs_code else "choice" if task.has_choices else "other"]

    def check_needs(self, task: Task) -> None:
        """Check that what a task needs is there: texts of choices, a reader of numbers, leave to run programs and a place.

        Raises:
            UsageError: As `text_questions`; if an answer has several paragraphs, math-verify is not installed, programs may not be
                run, or cannot be isolated here.
        """
        if self.mode_for(task) == "text":
            # its tokens need torch, which options do not
            from moa_peft.evaluation.text_choices import text_questions

            text_questions(task)
        if self.mode_for(task) != "generation":
            return
        if any(one.form.kind == "text" and "\n\n" in one.row.answer.strip() for one in task.questions):
            raise UsageError(
                f"task {task.name!r} has answers of several paragraphs, and of a reply one is read: shorten them, or take --mode "
                "likelihood for their loss alone"
            )
        if any(one.form.kind == "number" for one in task.questions):
            # not only once an expression turns up: a score must not depend on what is installed
            require("math_verify", f"reading the numbers of task {task.name!r} out of replies")
        if not task.runs_code:
            return
        if not self.allow_code_execution:
            raise UsageError(
                f"task {task.name!r} runs the programs that the model writes: add --allow-code-execution "
                "(allow_code_execution=True) to run them in a sandbox, or leave the task out"
            )
        from moa_peft.evaluation.code_execution import check_isolation

        check_isolation()


def default_out(model: str | None, adapter: "AdapterFolder | None") -> Path:
    """Where results go unless a folder is named."""
    if adapter is not None and expanded(adapter.name).is_dir():
        from moa_peft.evaluation.loading import run_of

        return (run_of(adapter.path) or adapter.path) / "evaluation"  # resuming deletes old checkpoints
    name = adapter.name if adapter is not None else model or DEFAULT_MODEL
    return Path("moa_evaluation") / file_name(name).strip("_.")
