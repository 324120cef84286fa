import io
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from moa_peft.cli.chat import Conversation, chat, talk
from moa_peft.errors import UsageError
from moa_peft.evaluation.loading import load, read_adapter
from oracles import generate
from tiny_lm import save_adapter, save_base

PROGRAM = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
PROGRAM.command()(chat)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", chat=True)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "run", base)


def call(said: str, *words: object) -> Result:
    return CliRunner().invoke(PROGRAM, [str(one) for one in words], input=said, catch_exceptions=False)


def conversation(base: Path, adapter: Path | None = None, **changes: Any) -> Conversation:
    loaded = load(str(base), None if adapter is None else read_adapter(str(adapter)))
    return Conversation(loaded=loaded, **({"template": "chat", "max_new_tokens": 8} | changes))


def greedy(one: Conversation, prompt: str) -> str:
    """What the model says to a prompt of its template, by the evaluation's own greedy loop."""
    tokens = [one.loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    reply = generate(one.loaded.model, one.loaded.tokenizer, tokens, max_new_tokens=one.max_new_tokens)  # type: ignore[arg-type]  # token ids
    return reply[0].text.strip()


def test_every_turn_sees_the_turns_before_it_until_the_reset(base: Path) -> None:
    one = conversation(base, system="Be brief.")
    start = "<system>Be brief.<|end|>"
    first = one.answer("hi")
    assert first == greedy(one, f"{start}<user>hi<|end|><assistant>")
    second = one.answer("and?")
    longer = f"{start}<user>hi<|end|><assistant>{first}<|end|><user>and?<|end|><assistant>"
    assert second == greedy(one, longer)
    one.obey("/reset")
    assert one.answer("hi") == first


def test_the_papers_template_takes_each_turn_by_itself(base: Path) -> None:
    one = conversation(base, template="paper")
    expected = greedy(
        one,
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nhi\n\n### Response:\n",
    )
    assert one.answer("hi") == expected
    assert one.answer("hi") == expected
    one.system = "Be brief."
    told = one.loaded.tokenizer.decode(one.prompt_tokens([{"role": "user", "content": "hi"}]))
    assert "### Instruction:\nBe brief.\n\nhi\n\n### Response:" in str(told)


def test_base_switches_the_adapter_off_and_on(base: Path, adapter: Path) -> None:
    one, bare = conversation(base, adapter), conversation(base)
    tuned, frozen = one.answer("hi"), bare.answer("hi")
    assert tuned != frozen
    one.obey("/reset")
    assert "off" in str(one.obey("/base"))
    assert one.answer("hi") == frozen
    one.obey("/reset")
    assert one.obey("/base") == "the adapter is on"
    assert one.answer("hi") == tuned


def test_piped_lines_are_answered_without_decoration(base: Path, adapter: Path) -> None:
    done = call("hi\n\n/reset\nhi\n", "--adapter", adapter, "--max-new-tokens", 8)
    assert done.exit_code == 0
    answer = conversation(base, adapter).answer("hi")
    assert done.stdout.split("\n") == [answer, answer, ""] or done.stdout.count(answer) == 2
    assert ">" not in done.stdout.replace(answer, "")
    assert "the conversation is forgotten" in done.stderr


def test_exit_leaves_before_the_rest_is_read(base: Path) -> None:
    done = call("/exit\nhi\n", "--model", base)
    assert (done.exit_code, done.stdout) == (0, "")


def test_drawing_at_random_follows_the_seed(base: Path) -> None:
    drawn = [call("hi\n", "--model", base, "--temperature", 2, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_template_is_the_adapters_own_or_the_chat_template_or_the_papers(
    tmp_path: Path, base: Path
) -> None:
    seen: list[str] = []

    def listen(one: Conversation) -> None:
        seen.append(one.template)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moa_peft.cli.chat.talk", listen)
        call("", "--model", base)
        call("", "--model", save_base(tmp_path / "plain"))
        call("", "--adapter", save_adapter(tmp_path / "paper", base, template="paper"))
        call("", "--adapter", tmp_path / "paper", "--template", "chat")
    assert seen == ["chat", "paper", "paper", "chat"]


class Terminal(io.StringIO):
    """Typed input."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_is_greeted_and_may_mistype(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal("/rest\n/base\n/help\n/exit\n"))
    talk(conversation(base))
    told = capsys.readouterr()
    assert "template chat; /help lists the commands" in told.out
    assert "/reset  forget the conversation" in told.out
    assert "unknown command '/rest': did you mean '/reset'" in told.err
    assert "there is no adapter to switch off" in told.err


def test_an_answer_interrupted_at_the_terminal_is_forgotten(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = conversation(base)

    def interrupted(*args: Any, **rest: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(one.loaded.model, "generate", interrupted)
    monkeypatch.setattr("sys.stdin", Terminal("hi\n/exit\n"))
    talk(one)
    assert one.turns == []
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    with pytest.raises(KeyboardInterrupt):
        talk(one)


@pytest.mark.parametrize(
    ("said", "words", "message"),
    [
        ("/rest\n", [], "unknown command '/rest': did you mean '/reset'"),
        ("/base\n", [], "there is no adapter to switch off"),
        ("", ["--template", "papr"], "template is 'papr': give 'chat' or 'paper'"),
        ("", ["--temperature", "-1"], "temperature is -1.0: give 0, or 0.001 or more"),
        ("", ["--seed", str(2**70)], "seed is 1180591620717411303424: give a whole number from 0, below"),
        ("", ["--max-new-tokens", "0", "--seed", "-1"], "max_new_tokens is 0: give at least 1; seed is -1"),
    ],
)
def test_a_users_mistake_is_one_clear_error(said: str, words: list[str], message: str, base: Path) -> None:
    with pytest.raises(UsageError, match=message):
        call(said, "--model", base, *words)


def test_a_conversation_that_the_model_cannot_read_is_said_to_be_too_long(tmp_path: Path) -> None:
    base = save_base(tmp_path / "short", chat=True, max_position_embeddings=64)
    one = conversation(base, max_new_tokens=100)
    one.answer("hi")
    with pytest.raises(
        UsageError, match=r"the conversation has \d+ tokens, the model reads 64: /reset forgets it"
    ):
        one.answer("again " * 20)
    one.obey("/reset")
    one.answer("hi")


def test_a_template_that_refuses_a_turn_and_input_that_is_no_text_are_told(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = conversation(base, system="Be brief.")
    one.loaded.tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(
        UsageError, match="chat template refuses system, user: no system turn: use template 'paper'"
    ):
        one.answer("hi")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(UsageError, match=r"standard input is not UTF-8 text: .* at byte 3"):
        talk(one)


def test_the_chat_template_needs_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the tokenizer of this model has no chat template: use 'paper'"):
        call("", "--model", save_base(tmp_path / "plain"), "--template", "chat")


def test_help_explains_and_shows_examples() -> None:
    done = call("", "--help")
    assert "moa chat --adapter runs/first" in done.stdout
    for flag in ("--adapter", "--temperature", "--seed", "--system", "--max-new-tokens"):
        assert flag in done.stdout
