"""The answer in a text, by named rule: "stated", what the text says its answer is, and "official"."""

import re
from collections.abc import Callable, Mapping

from moa_peft.evaluation.answer_extraction import stated_choice, stated_letter, stated_number, stated_text
from moa_peft.evaluation.answer_forms import AnswerForm, AnswerKind
from moa_peft.evaluation.code_answers import stated_code

Rule = Callable[[str, AnswerForm], str | None]
"""Takes a reply and the form of its answer; gives the answer, or None where the reply holds none."""

_STATED: Mapping[AnswerKind, Rule] = {
    "choice": stated_choice,
    "letter": stated_letter,
    "number": stated_number,
    "text": stated_text,
    "code": stated_code,
}

_MOST_READ = 2**16
"""So many characters of a reply are read: some 16,000 tokens."""

_OFFICIAL_WORDS = {"answer": 5, "ending": 4, "solution": 2, "option": 2}
"""The official evaluation looks for the word with each of these numbers, however many choices a question has."""


def stated(text: str, form: AnswerForm) -> str | None:
    """Give the answer that a text states; see `moa_peft.evaluation.answer_extraction` and `moa_peft.evaluation.code_answers`."""
    rule = _STATED.get(form.kind)
    return None if rule is None else rule(text[:_MOST_READ], form)


def official(text: str, form: AnswerForm) -> str | None:
    """Give the answer as the official evaluation takes it, for comparison with published numbers.

    It takes the first of the allowed words anywhere in the text; the first capital A to E anywhere, which misreads
    every reply that begins with a word like "Because"; the last number, commas taken out; of a program all of the
    reply, fences and words around it included.

    Args:
        text: The reply.
        form: The form of its answer.

    Returns:
        The answer, or None.

    Source: the evaluation scripts of arXiv 2506.05928; differs from them in "nothing" for these four kinds. Other
    text, which they do not have, is taken as `stated` does.
    """
    if form.kind == "choice":
        found = re.search("|".join(_official_words(form.choices)), text.strip())
        return found[0] if found else None
    if form.kind == "letter":
        found = re.search("[A-E]", text.strip())
        return found[0] if found else None
    if form.kind == "number":
        numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
        return numbers[-1] if numbers else None
    if form.kind == "code":
        return text or None
    return stated(text, form)


RULES: Mapping[str, Rule] = {"stated": stated, "official": official}
"""The rules by name; the first is the default."""


def _official_words(choices: tuple[str, ...]) -> list[str]:
    stem = choices[0].rstrip("0123456789")
    if stem in _OFFICIAL_WORDS and all(one.rstrip("0123456789") == stem for one in choices):
        return [f"{stem}{number}" for number in range(1, _OFFICIAL_WORDS[stem] + 1)]
    return [re.escape(one) for one in choices]
