"""What OpenAI's API asks and is answered: requests read strictly, errors and results in its form.

A field that would change the answer and is not supported is refused, never ignored.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moa_peft.errors import MoAError, unknown

_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that say nothing of the answer."""

_ROLES = ("system", "developer", "user", "assistant")

COLDEST = 0.001
"""The lowest temperature to draw at; below it logits overflow, and the likeliest token is taken."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "verbosity": ("medium",),
}
"""Fields that are not supported, and the values with which they ask for nothing."""


class ApiError(MoAError):
    """A request that is answered with an error.

    Args:
        message: What is wrong, and what to do.
        status: Of HTTP.
        parameter: The field that is wrong.
        code: OpenAI's name of the error.
    """

    def __init__(
        self, message: str, status: int = 400, parameter: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.parameter, self.code = status, parameter, code

    def body(self) -> dict[str, Any]:
        """The answer, in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        told = {"message": str(self), "type": kind, "param": self.parameter, "code": self.code}
        return {"error": told}


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A request, checked as far as it can be without its model."""

    model: str
    prompt: str | list[int] | list[dict[str, str]]
    """Text, token ids, or the turns of a conversation."""
    max_tokens: int | None
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    """Whether a stream ends with the number of its tokens."""
    is_chat: bool
    """Whether the prompt is a conversation."""


def read_request(body: bytes, *, chat: bool) -> Asked:
    """Read the body of a request for a chat completion, or a plain one.

    Raises:
        ApiError: If it is no JSON object, has a field that is unknown, wrong or asks for what is not supported.
    """
    try:
        given = json.loads(body)
        json.dumps(given, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ApiError("the body must be a JSON object")
    fields = {name: one for name, one in given.items() if one is not None}
    own = "messages" if chat else "prompt"
    known = {"model", own, "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "stream"}
    known |= {"stream_options", "seed"}
    for name, value in fields.items():
        if name in _NEUTRAL and not any(type(one) is type(value) and one == value for one in _NEUTRAL[name]):
            raise ApiError(f"{name} {value!r} is not supported", parameter=name)
        if name not in (*known, *_IGNORED, *_NEUTRAL):
            raise ApiError(unknown("field", name, known), parameter=name)
    if own not in fields:
        raise ApiError(f"{own} is missing", parameter=own)
    if not isinstance(fields.get("model"), str):
        raise ApiError("model is missing: name one of /v1/models", parameter="model")
    limits = {_whole(fields, name) for name in ("max_completion_tokens", "max_tokens") if name in fields}
    if len(limits) > 1:
        raise ApiError("max_completion_tokens and max_tokens differ: give one", parameter="max_tokens")
    temperature = _number(fields, "temperature", 1.0, 0, 2)
    temperature = temperature if temperature >= COLDEST else 0.0
    if "seed" in fields and temperature > 0:
        raise ApiError(
            "seed is not supported: requests are sampled in one batch. temperature 0 needs none",
            parameter="seed",
        )
    options = _of_kind(fields, "stream_options", {}, dict)
    return Asked(
        model=fields["model"],
        prompt=_turns(fields["messages"]) if chat else _prompt(fields["prompt"]),
        max_tokens=limits.pop() if limits else None,
        temperature=temperature,
        top_p=_number(fields, "top_p", 1.0, 0, 1, above=True),
        stop=_stop(fields.get("stop", [])),
        stream=_of_kind(fields, "stream", False, bool),
        include_usage=options.get("include_usage") is True,
        is_chat=chat,
    )


def _of_kind(fields: Mapping[str, Any], name: str, otherwise: Any, kind: type) -> Any:
    value = fields.get(name, otherwise)
    if not isinstance(value, kind):
        raise ApiError(f"{name} is {value!r}: it must be a {kind.__name__}", parameter=name)
    return value


def _whole(fields: Mapping[str, Any], name: str) -> int:
    value = fields[name]
    if type(value) is not int or value < 1:
        raise ApiError(f"{name} is {value!r}: give a whole number of at least 1", parameter=name)
    return value


def _number(
    fields: Mapping[str, Any], name: str, otherwise: float, low: float, high: float, *, above: bool = False
) -> float:
    value = fields.get(name, otherwise)
    if type(value) not in (int, float) or not low <= value <= high or (above and value == low):
        raise ApiError(
            f"{name} is {value!r}: give a number {'above' if above else 'from'} {low} to {high}",
            parameter=name,
        )
    return float(value)


def _stop(value: Any) -> tuple[str, ...]:
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or not all(isinstance(one, str) and one for one in several):
        raise ApiError(f"stop is {value!r}: give a text, or a list of texts, none empty", parameter="stop")
    return tuple(several)


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    is_ids = isinstance(value, list) and all(type(one) is int for one in value)
    if not value or not (isinstance(value, str) or is_ids):
        raise ApiError(
            "prompt must be a text or a list of token ids, one prompt a request, not empty",
            parameter="prompt",
        )
    return value


def _turns(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ApiError("messages must be a list of at least one message", parameter="messages")
    return [_turn(one, place) for place, one in enumerate(value)]


def _turn(one: Any, place: int) -> dict[str, str]:
    where = f"messages[{place}]"
    role, content = (one.get("role"), one.get("content")) if isinstance(one, dict) else (None, None)
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ApiError(f"{where} must have a role and a content of text", parameter=where)
    if role not in _ROLES:
        raise ApiError(f"{where} has the role {role!r}: give {', '.join(_ROLES)}", parameter=where)
    if any(one.get(name) for name in ("tool_calls", "function_call", "audio")):
        raise ApiError(f"{where} has more than text, which is not supported", parameter=where)
    return {"role": "system" if role == "developer" else role, "content": content}


@dataclass(kw_only=True)
class Answer:
    """Writes the answer to one request."""

    name: str
    model: str
    chat: bool
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """An answer that is not streamed."""
        message = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._about(message, reason, streamed=False) | {"usage": usage}

    def piece(self, text: str, reason: str | None = None, *, is_first: bool = False) -> str:
        """A piece of a stream; the last has a reason."""
        delta = ({"role": "assistant"} if is_first else {}) | ({"content": text} if text or is_first else {})
        return event(self._about({"delta": delta} if self.chat else {"text": text}, reason, streamed=True))

    def end(self, usage: dict[str, int]) -> str:
        """The end of a stream."""
        counted = (
            event(self._about(None, None, streamed=True) | {"usage": usage}) if self.include_usage else ""
        )
        return f"{counted}data: [DONE]\n\n"

    def _about(self, choice: dict[str, Any] | None, reason: str | None, *, streamed: bool) -> dict[str, Any]:
        kind = "chat.completion" + (".chunk" if streamed else "") if self.chat else "text_completion"
        about = {"id": self.name, "object": kind, "created": self.created, "model": self.model}
        told = [] if choice is None else [{"index": 0, **choice, "logprobs": None, "finish_reason": reason}]
        return about | {"choices": told}


def event(told: Mapping[str, Any]) -> str:
    """An event of a stream."""
    return f"data: {json.dumps(told)}\n\n"
