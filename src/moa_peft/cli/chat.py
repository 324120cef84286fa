"""`moa chat`: talk to a model, with its adapter and without."""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from moa_peft.cli.overrides import Adapter, ChatTemplate, Dtype, Model, ModelInitKwargs, parse_mapping
from moa_peft.errors import UsageError
from moa_peft.serving.protocol import COLDEST

if TYPE_CHECKING:
    from moa_peft.evaluation.loading import LoadedModel

COMMANDS = {
    "/exit": "leave (so does Ctrl-D)",
    "/reset": "forget the conversation",
    "/base": "switch the adapter off, and on again",
    "/help": "list the commands",
}


@dataclass(kw_only=True)
class Conversation:
    """A loaded model and what has been said."""

    loaded: "LoadedModel"
    """The model."""
    template: str
    """"chat", which remembers earlier turns, or "paper", whose every turn is an instruction by itself."""
    system: str | None = None
    """What the model is told before the first turn."""
    max_new_tokens: int = 256
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 takes the likeliest token; above it draws, the wilder the higher."""
    use_adapter: bool = True
    """Whether the adapter is on."""
    turns: list[dict[str, str]] = field(default_factory=list)
    """The conversation so far, in the form of chat templates."""

    def answer(self, text: str) -> str:
        """Answer one turn, printing the answer to standard output as it comes.

        Args:
            text: What the user says.

        Returns:
            The answer.

        Raises:
            UsageError: If the conversation is longer than the model reads, or its chat template refuses it.
        """
        import torch
        from transformers import TextStreamer

        from moa_peft.data.base_loading import longest_input
        from moa_peft.evaluation.generation import end_ids, generation_config

        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        asked = [*self.turns, {"role": "user", "content": text}]
        ids = torch.tensor([self.prompt_tokens(asked)], device=model.device)
        most = longest_input(model)
        if most is not None and ids.shape[1] >= most:
            raise UsageError(
                f"the conversation has {ids.shape[1]} tokens, the model reads {most}: /reset forgets it"
            )
        room = self.max_new_tokens if most is None else min(self.max_new_tokens, most - ids.shape[1])
        ends = sorted(end_ids(model, tokenizer, cast("Any", self.template)))
        settings = generation_config(max_new_tokens=room, ends=ends, temperature=self.temperature)
        off = not self.use_adapter and self.loaded.adapter is not None
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.inference_mode(), model.disable_adapter() if off else nullcontext():
            whole = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                streamer=streamer,
            )
        reply = str(tokenizer.decode(whole[0, ids.shape[1] :].tolist(), skip_special_tokens=True)).strip()
        self.turns = [*asked, {"role": "assistant", "content": reply}]
        return reply

    def prompt_tokens(self, turns: list[dict[str, str]]) -> list[int]:
        """Write the conversation as the model reads it: with the chat template, or the last turn in the paper's."""
        from moa_peft.data.tokenization import conversation_ids

        told = [{"role": "system", "content": self.system}] if self.system else []
        return conversation_ids([*told, *turns], self.loaded.tokenizer, cast("Any", self.template))

    def obey(self, command: str) -> str | None:
        """Carry a command out.

        Args:
            command: One of `COMMANDS`.

        Returns:
            What to tell the user; None to leave.

        Raises:
            UsageError: If there is no such command, or no adapter to switch.
        """
        from moa_peft.errors import unknown

        if command not in COMMANDS:
            raise UsageError(unknown("command", command, COMMANDS))
        if command == "/exit":
            return None
        if command == "/help":
            return "\n".join(f"{name:8}{text}" for name, text in COMMANDS.items())
        if command == "/reset":
            self.turns = []
            return "the conversation is forgotten"
        if self.loaded.adapter is None:
            raise UsageError("/base: there is no adapter to switch off; start with --adapter DIR")
        self.use_adapter = not self.use_adapter
        return (
            "the adapter is on" if self.use_adapter else "the adapter is off: the frozen base model answers"
        )


def chat(
    adapter: Adapter = None,
    model: Model = None,
    template: ChatTemplate = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token; above: drawn at random.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
    dtype: Dtype = None,
    model_init_kwargs: ModelInitKwargs = None,
) -> None:
    """Talk to a model. Commands: /base switches the adapter off and on, /reset forgets, /exit leaves.

    Each line is one turn. Lines may be piped in; then the answers alone are printed.

    \b
    Examples:
      moa chat --adapter runs/first
      echo "Why is the sky blue?" | moa chat --max-new-tokens 60
    """  # noqa: D301  # the backspace keeps the lines of the examples apart
    _check(max_new_tokens, temperature, seed)
    from moa_peft.evaluation.loading import conversation_template, load, read_adapter
    from moa_peft.quiet import quiet_libraries

    init_kwargs = parse_mapping("--model-init-kwargs", model_init_kwargs)
    with quiet_libraries():
        found = None if adapter is None else read_adapter(adapter)
        loaded = load(model, found, dtype=dtype, init_kwargs=init_kwargs)
        chosen = conversation_template(template, loaded)
        import torch

        torch.manual_seed(seed)
        talk(
            Conversation(
                loaded=loaded,
                template=chosen,
                system=system,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            )
        )


def talk(conversation: Conversation) -> None:
    """Read turns from standard input until it ends or `/exit` is said, and answer each.

    Args:
        conversation: The model to talk to.

    Raises:
        UsageError: If a piped command is wrong; at a terminal the user is told and may try again.
    """
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        _greet(conversation)
    while (line := _read_line(at_terminal)) is not None:
        if not line:
            continue
        try:
            if line.startswith("/"):
                said = conversation.obey(line)
                if said is None:
                    return
                print(said, file=sys.stdout if at_terminal else sys.stderr, flush=True)
            else:
                conversation.answer(line)
        except UsageError as error:
            if not at_terminal:
                raise
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print()  # the answer is cut off and forgotten; the conversation goes on


def _read_line(at_terminal: bool) -> str | None:
    try:
        line = input("> " if at_terminal else "")
        return line.removeprefix("\ufeff").strip()  # some editors begin a file with it
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _greet(conversation: Conversation) -> None:
    adapter = conversation.loaded.adapter
    with_adapter = "" if adapter is None else f" with {adapter.name}"
    print(
        f"{conversation.loaded.base_model}{with_adapter}, template {conversation.template}; /help lists the commands"
    )


def _check(max_new_tokens: int, temperature: float, seed: int) -> None:
    problems: list[str] = []
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens is {max_new_tokens}: give at least 1")
    if temperature != 0 and not COLDEST <= temperature < float("inf"):
        problems.append(f"temperature is {temperature}: give 0, or {COLDEST} or more")
    if not 0 <= seed < 2**63:
        problems.append(f"seed is {seed}: give a whole number from 0, below 2**63")
    if problems:
        raise UsageError("; ".join(problems))
