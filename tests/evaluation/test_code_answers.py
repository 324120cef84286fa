import pytest

from moa_peft.evaluation.answer_forms import AnswerForm
from moa_peft.evaluation.code_answers import defines, has_ended, stated_code
from moa_peft.evaluation.extraction_rules import official, stated

FORM = AnswerForm(kind="code", entry_point="twice")
WHOLE = "def twice(x):\n    return 2 * x"
HEAD = 'def twice(x):\n    """Double."""\n'


def value(code: str | None, head: str = "") -> object:
    """What the program's function makes of 4."""
    assert code is not None
    names: dict[str, object] = {}
    exec(f"{head}{code}\nfound = twice(4)", names)
    return names["found"]


@pytest.mark.parametrize(
    "reply",
    [
        WHOLE,
        f"\n{WHOLE}\n",
        f"```python\n{WHOLE}\n```",
        f"```\n{WHOLE}\n```\nIt doubles.",
        f"Sure! Here it is:\n\n```py\n{WHOLE}\n```\n\nYou can try it:\n```python\nprint(twice(2))\nassert False\n```",
        f"First the call:\n```python\nassert twice(2) == 5\n```\nthen the code:\n```python\n{WHOLE}\n```",
        "1. Like this:\n   ```python\n   def twice(x):\n       return 2 * x\n   ```\n2. Done.",
        f"~~~python\n{WHOLE}\n~~~",
        f"```python\n{WHOLE}",
        f"Here is the function:\n{WHOLE}\n\nIt doubles what it is given.",
        "import math\nFACTOR = 2\n\ndef helper(x):\n    return FACTOR * x\n\ndef twice(x):\n    return helper(x)\n\nHope it helps!",
        f"{WHOLE}\n\nprint(twice('no')[99])",
        f"{WHOLE}\nassert twice(1) == 3",
        f'{WHOLE}\n\nif __name__ == "__main__":\n    raise SystemExit',
        f"{WHOLE}\n\n### Instruction:\nNow thrice.\n\n### Response:\n```python\ndef twice(x):\n    return 3 * x\n```",
        f"{WHOLE}\n\ndef thrice(x):\n    return 3 *",
        'Here:\n```python\ndef twice(x):\n    """Double it.\n\n    ```\n    twice(1)\n    ```\n    """\n    return 2 * x\n```\nDone.',
        f"```python\n{WHOLE}\n    ```\nIt doubles what it is given.",
        "- So:\n\t```python\n\tdef twice(x):\n\t\treturn 2 * x\n    ```\n- Done.",
        f"Note: f is x = 5, so\n{WHOLE}",
        "FACTOR: int = 2\ndef twice(x):\n    return FACTOR * x",
        "ONE, TWO = 1, 2\ndef twice(x):\n    return ONE * TWO * x",
        "twice = lambda x: 2 * x",
        "from operator import mul\n\ntwice = lambda x: mul(2, x)",
    ],
)
def test_a_whole_program_is_taken_out_of_what_stands_around_it(reply: str) -> None:
    assert value(stated(reply, FORM)) == 8
    assert value(stated(reply, FORM), HEAD) == 8, "also after the question's own code"


@pytest.mark.parametrize(
    "reply",
    [
        "    return 2 * x",
        "return 2 * x",
        "\n    y = x\n    for _ in range(1):\n        y += x\n    return y",
        "y = x\n    for _ in range(1):\n        y += x\n    return y",
        "y = x\nfor _ in range(1):\n    y += x\nreturn y",
        "    return 2 * x\n\nprint(twice('no')[99])",
        "    return 2 * x\n\ndef thrice(x):\n    return 3 * x",
        "return 2 * x\n\nThis doubles it.",
        "```python\n    return 2 * x\n```",
        "```python\nreturn 2 * x\n```\nThat is all.",
    ],
)
def test_lines_that_go_on_from_the_question_get_the_indentation_they_lack(reply: str) -> None:
    assert value(stated(reply, FORM), HEAD) == 8


def test_the_official_rule_takes_a_reply_with_all_that_stands_around_it() -> None:
    assert official("    return 2 * x", FORM) == "    return 2 * x"
    assert official(f"```python\n{WHOLE}\n```", FORM) == f"```python\n{WHOLE}\n```"
    assert official("", FORM) is None
    assert stated("", FORM) is None
    assert stated(" \n ", FORM) is None


@pytest.mark.parametrize(
    "reply", ["I cannot do that.", "def twice(x):\n    return 2 *", "```python\ndef twice(:\n```"]
)
def test_what_is_no_program_is_taken_as_what_it_is_and_fails(reply: str) -> None:
    with pytest.raises(SyntaxError):
        value(stated(reply, FORM), HEAD)


def test_a_reply_has_ended_when_the_fence_around_its_function_has_closed() -> None:
    assert not has_ended(f"```python\n{WHOLE}\n", FORM)
    assert not has_ended(f"```python\n{WHOLE}\n``", FORM)
    assert has_ended(f"```python\n{WHOLE}\n```", FORM)
    assert not has_ended(
        '```python\ndef twice(x):\n    """Double it.\n\n    ```\n    twice(1)\n    ```\n', FORM
    )
    assert not has_ended("```python\nprint(1)\n```\nThen", FORM)
    assert not has_ended(f"```python\nprint(1)\n```\nThen\n```python\n{WHOLE}", FORM)
    assert has_ended(f"{WHOLE}\n\n### Instruction:", FORM)
    closed = f"Well:\n```python\n{WHOLE}\n```"
    assert stated_code(closed, FORM) == stated_code(
        f"{closed}\nOr:\n```python\ndef twice(x): return 0\n```", FORM
    )


def test_a_name_is_bound_by_a_definition_an_assignment_or_an_import() -> None:
    assert defines("class twice: pass", "twice")
    assert defines("from m import thrice as twice", "twice")
    assert not defines("def f():\n    def twice(x): pass", "twice")
    assert not defines("twice(1)", "twice")
    assert defines("def twice(x):\n    return '", "twice")
