"""Extracts the answer that a text states: one function for each kind of answer.

Only the text's own reply is read: what follows a new question is the model talking to itself. A denied answer ("not
answer1") is none. Where a text states several, the last one counts: it corrects the earlier ones.
"""

import math
import re
import threading
from typing import Any

from moa_peft.evaluation.answer_forms import AnswerForm, bare_text, parse_number, without_thoughts
from moa_peft.extras import require

_NEXT_QUESTION = re.compile(
    r"\n[^\S\n]*(?:#{2,}\s*(?:Question|Instruction|Input|Response|User|Human|Assistant|System|Problem|Exercise|Example|Task)\b"
    r"|(?:Question|Instruction|Input|Q)\s*:)"
)
_ASIDE = re.compile(r"(?:\(\s*|\b)(?:if|when|where|because|since)\b", re.IGNORECASE)
_CHECK = re.compile(r"(?<!\\)\([^()=]*=[^()]*\)")
"""An equation in parentheses, which may stand beside what is said."""
_MORE = re.compile(r"[.!?]\s+\S|\n\s*\S")
_MARKS = r"(?:[\s\"'`*_()\[\]{}$:=]|\\(?:text|textbf|mathrm|mathbf)\{)*"
_LEAD = re.compile(
    r"(?:\b(?:answers?|choices?|options?|solutions?|endings?|result)(?P<which>\s+choice)?\s*(?:is|are|=|:|would be|should be|must be)"
    r"|\\boxed\s*\{|####)",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"(?:\bnot|n't|\bnever|\bneither|\bnor|\bincorrect|\bwrong|\bcannot be|\bisn\u2019t|\brather than|\binstead of)\W*(?:\w+\W+){0,2}$",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"[-+]?\d{1,3} \d{1,2}/\d{1,2}(?!\d)|[-+]?(?:\$\s?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?"
    r"(?:(?<=\d)[eE][-+]?\d{1,2}(?!\w))?(?:\s?/\s?\d+(?:\.\d+)?)?%?"
)
_DIGITS = re.compile(r"\d")
_RAISED = re.compile(r"[A-Za-z]\^\{?\Z")  # a unit or a name, before its exponent
_OPERATES = re.compile(r"\\(?:[dt]?frac|sqrt|times|cdot|div|pi)|\^")
_CHUNK = re.compile(
    r"\$\$(.{1,2000}?)\$\$|(?<!\\)\$((?:\\\$|[^$\n])+?)(?<!\\)\$|\\\((.{1,2000}?)\\\)|\\\[(.{1,2000}?)\\\]",
    re.DOTALL,
)
_UNITS = re.compile(
    r"\\(?:text|mathrm|mbox|textrm)\s*\{[^{}\d]*\}(?:\s*\^\s*(?:\d|\{\d\}))?|(?<=[\d})])\s+[A-Za-z][A-Za-z ,.']*$"
)
_LATEX_MARKS = re.compile(r"\\(?:textbf|mathbf|boldsymbol|left|right|displaystyle)\b|\\[,;!%$ ]")
_NEGATIVE = re.compile(r"\u2212|(?<![\w)])\u2013(?=\d)")
_LATEX_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!\s?)(?=\d{3})")
# between "the answer is" and a number on a line of its own
_OPENING = re.compile(r"^(?:[\s*:]|\\\[)+")
# a line that says the answer at once, and not by a sum
_BARE_NUMBER = re.compile(r"[\s\"'`*_$(\[\\]*[-+]?\$?\d[^=\n]*$|.*\\boxed")
_REACH = 1000
"""An answer ends within so many characters of what announces it."""
_MOST_LETTERS = 160
_MOST_SECONDS = 5
_TOO_LARGE = re.compile(r"\^.*\^|\^\s*\{?[^}\d]*\d{3}|!|\d{25}")
"""Towers of powers and the like, which could take for ever to work out."""


def stated_choice(text: str, form: AnswerForm) -> str | None:
    """Read which of a list of words a text states.

    Args:
        text: The reply.
        form: Its choices are the words.

    Returns:
        The word as ``form`` writes it. Where no sentence says which is the answer, the one word of the list that
        the text holds; None where it holds several or none.
    """
    reply = own_reply(text)
    words = {_bare(one): one for one in form.choices}
    found = [
        (match, words[_bare(match[0])])
        for match in word_pattern(form.choices).finditer(reply)
        # the pattern knows letters that are the same without case, casefold does not
        if _bare(match[0]) in words
        and not _is_denied(reply, match.start())
        and not (len(match[0]) == 1 and _is_article(reply, match))
    ]
    stated = [word for match, word in found if _follows_lead(reply, match.start())]
    if stated:
        return stated[-1]
    alone = len(reply.strip()) == 1
    distinct = {word for match, word in found if len(word) > 1 or match[0] == word or alone}
    return distinct.pop() if len(distinct) == 1 else None


def stated_letter(text: str, form: AnswerForm) -> str | None:
    r"""Read which letter a text states: "The answer is (D)", "Answer: D", "\boxed{D}", or the letter at the start.

    Args:
        text: The reply.
        form: Its choices are the letters, in capitals.

    Returns:
        The letter; None where none is stated. A letter in running text ("A train ...") is not a statement.
    """
    reply = own_reply(text)
    letters = "".join(form.choices)
    one = re.compile(
        rf"{_MARKS}(?:(?:option|choice|letter){_MARKS})?([{letters}])(?![A-Za-z0-9'\u2019])", re.IGNORECASE
    )
    stated: list[str] = []
    for lead in _LEAD.finditer(reply):
        match = one.match(reply, lead.end())
        if match is None or _is_denied(reply, lead.start()) or _is_article(reply, match):
            continue
        stated.append(match[1].upper())
    if stated:
        return stated[-1]
    alone = re.match(rf"\s*[\"'`*(\[]*([{letters}])[\"'`*\])]*(?:\s*$|[.):]|\s*\n)", reply)
    return alone[1] if alone else None


def stated_number(text: str, form: AnswerForm) -> str | None:  # noqa: ARG001  # the form of a rule
    r"""Read the number that a text states as its answer.

    Args:
        text: The reply.
        form: Unused: a number has no choices.

    Returns:
        The number after the last "the answer is", "####" or "\boxed{"; where there is none of these, the last of the
        text. A plain number is given as the text writes it, an expression (`\frac{3}{4}`, `2 \times 10^3`) by its
        value. None where there is no number.

    Raises:
        UsageError: If there is an expression and math-verify, which reads it, is not installed.
    """
    reply = _NEGATIVE.sub("-", _LATEX_THOUSANDS.sub(",", own_reply(text)))
    for lead in reversed([*_LEAD.finditer(reply)]):
        value = None if _is_denied(reply, lead.start()) else _announced_number(reply, lead)
        if value is not None:
            return value
    expression = last_expression(reply)
    value = None if expression is None else expression_value(expression)
    if value is not None:
        return value
    values = _numbers(reply)
    return values[-1] if values else None


def _announced_number(reply: str, lead: re.Match[str]) -> str | None:
    """The number that follows "the answer is" or the like; None where none does."""
    rest = reply[lead.end() : lead.end() + _REACH]
    is_braced, is_more = lead[0].endswith("{"), _MORE.search(rest.strip())
    if lead[0].lower().startswith("result") and is_more:
        return None  # of a step on the way
    line = braced(rest) if is_braced else re.split(r"\n|[.!?](?:\s|$)", _OPENING.sub("", rest), maxsplit=1)[0]
    if lead[0].endswith(":") and is_more and not _BARE_NUMBER.match(line):
        return None  # the working follows, and its result behind that
    if re.match(rf"{_MARKS}(?:not|n't)\b", line):
        return None
    if is_expression(line) and (value := expression_value(line)) is not None:
        return value
    has_check = _numbers(_CHECK.split(line)[0]) != []
    said = _ASIDE.split(_CHECK.sub("", line) if has_check else line, maxsplit=1)[0]
    said = said if _numbers(said) else line
    # "is 3 + 4 = 7": what stands after the last equals sign is the answer
    return next(iter(_numbers(said.rpartition("=")[2]) or _numbers(said)), None)


def stated_text(text: str, form: AnswerForm) -> str | None:  # noqa: ARG001  # the form of a rule
    """Give the rest of the line after the last "the answer is", else the first paragraph; without the marks around it.

    None where nothing is there.
    """
    reply = own_reply(text).strip()
    said = reply.split("\n\n")[0]
    for lead in _LEAD.finditer(reply):
        if not re.match(r"answer|\\boxed|####", lead[0], re.IGNORECASE):
            continue  # prose has options, results and solutions of its own
        line = reply[lead.end() :].lstrip(" \t\n:").partition("\n")[0]
        if line and not _is_denied(reply, lead.start()):
            said = braced(line) if lead[0].endswith("{") else line
    return bare_text(said) or None


def own_reply(text: str) -> str:
    """Leave out what a reply thinks first, and cut it where it begins a new turn of the template or a question of its own."""
    return _NEXT_QUESTION.split(without_thoughts(text), maxsplit=1)[0]


def _bare(word: str) -> str:
    """A word without its spaces and its case."""
    return re.sub(r"\s+", "", word).casefold()


def word_pattern(choices: tuple[str, ...]) -> re.Pattern[str]:
    """Match the words whole, also with a space before their digit: "Answer 1"."""
    longest_first = sorted(choices, key=len, reverse=True)
    forms = [
        re.sub(r"(?<=[A-Za-z])(?=\d)", r"\\s?", re.escape(one)).replace(r"\ ", r"\s+")
        for one in longest_first
    ]
    return re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(forms)})(?![A-Za-z0-9])", re.IGNORECASE)


def _is_denied(reply: str, start: int) -> bool:
    """Whether what stands there is denied earlier in the same sentence part."""
    part = re.split(r"[.,;!?\n]|\bbut\b|\bit is\b", reply[max(0, start - 80) : start], flags=re.IGNORECASE)[
        -1
    ]
    return _DENIAL.search(part) is not None


def _follows_lead(reply: str, start: int) -> bool:
    """Whether "the answer is" or the like stands right before, with at most a word or two between."""
    before = reply[max(0, start - 60) : start]
    leads = list(_LEAD.finditer(before))
    if not leads:
        return False
    between = before[leads[-1].end() :]
    return re.fullmatch(rf"{_MARKS}(?:(?:that|the|option|choice|definitely|probably|likely|clearly){_MARKS})*", between, re.IGNORECASE) is not None  # fmt: skip


def _is_article(reply: str, match: re.Match[str]) -> bool:
    """Whether an A or I begins a phrase, as in "the answer is a train", and is no letter that stands for an answer."""
    bare = match[0].strip()
    goes_on = re.match(r"\s+(?!(?:is|was|as|because|since)\b)[a-z]", reply[match.end() :])
    return bare in tuple("aAiI") and goes_on is not None


def _numbers(text: str) -> list[str]:
    """The numbers of a text as it writes them; a hyphen after a word or digit is no sign."""
    found: list[str] = []
    for match in _VALUE.finditer(text) if _DIGITS.search(text) else ():  # it also matches nothing, anywhere
        value = match[0]
        if not _DIGITS.search(value) or _RAISED.search(text[max(0, match.start() - 3) : match.start()]):
            continue
        if value[0] in "-+" and match.start() > 0 and re.match(r"[\w)]", text[match.start() - 1]):
            value = value[1:]
        if parse_number(value) is not None:
            found.append(value)
    return found


def is_expression(text: str) -> bool:
    """Whether a text holds signs that only an expression has, so that its first or last number is not its value."""
    return _OPERATES.search(text) is not None


def last_expression(text: str) -> str | None:
    """The last piece of mathematics of a text, if it is an expression and no number follows it; else None."""
    chunks = list(_CHUNK.finditer(text))
    if not chunks or re.search(r"\d", text[chunks[-1].end() :]):
        return None
    inner = next(one for one in chunks[-1].groups() if one is not None)
    return inner if is_expression(inner) else None


def braced(text: str) -> str:
    """What stands before the brace that closes one opened before the text; all of it where none does."""
    depth = 1
    for one in re.finditer(r"[{}]", text):
        depth += 1 if one[0] == "{" else -1
        if depth == 0:
            return text[: one.start()]
    return text


def expression_value(text: str) -> str | None:
    r"""Work out an expression.

    Args:
        text: An expression, perhaps in `$...$` or `\(...\)`, with words or units after it; of an equation the right
            side counts.

    Returns:
        Its value: a whole number, a fraction such as "3/4", or a decimal; None where it has none.

    Raises:
        UsageError: If math-verify is not installed.
    """
    reader: Any = require("math_verify", "reading a number from an expression")
    chunk = _CHUNK.search(text)
    inner = next(one for one in chunk.groups() if one is not None) if chunk else text
    inner = _LATEX_MARKS.sub(" ", _UNITS.sub("", inner.rpartition("=")[2])).strip().rstrip(".,;:$*")
    if len(inner) > _MOST_LETTERS or _TOO_LARGE.search(inner):
        return None
    # its clock is a signal, which only the main thread can have
    seconds = _MOST_SECONDS if threading.current_thread() is threading.main_thread() else None
    latex, plain = reader.LatexExtractionConfig(), reader.ExprExtractionConfig()
    found = reader.parse(f"${inner}$", [latex], parsing_timeout=seconds)
    found = found or reader.parse(inner, [latex, plain], parsing_timeout=seconds)
    return _written(found[0]) if found else None


def _written(value: Any) -> str | None:
    """A number of sympy as text."""
    if not getattr(value, "is_number", False) or not getattr(value, "is_real", False):
        return None
    exact = value.doit()
    if getattr(exact, "is_Rational", False) and abs(exact.p) < 10**15 and exact.q < 10**6:
        return str(exact)
    number = float(exact)
    return f"{number:.12g}" if math.isfinite(number) and abs(number) < 1e15 else None
