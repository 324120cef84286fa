"""An OpenAI-compatible server: models, completions and chat completions, streamed or whole."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from typing import Any, cast
from uuid import uuid4

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from moa_peft.errors import MoAError, UsageError
from moa_peft.serving.engines import Engine, Sampling
from moa_peft.serving.protocol import Answer, ApiError, event, read_request
from moa_peft.serving.served import Served
from moa_peft.serving.text import AnswerText

_MOST_BYTES = 2_000_000
"""Of a request: while its prompt is read, which takes seconds for as much, no other is answered."""
_GRACE_S = 2
"""Seconds that connections have to end after the server was told to."""


def build_app(models: Mapping[str, Served]) -> Starlette:
    """The application that answers for some models, by their names."""

    def served_as(name: str) -> Served:
        if name not in models:
            known = ", ".join(models)
            raise ApiError(
                f"there is no model {name!r} here: this server has {known}", 404, "model", "model_not_found"
            )
        return models[name]

    async def complete(request: Request) -> Response:
        body = await request.body()
        if len(body) > _MOST_BYTES:
            raise ApiError(f"the body has {len(body):,} bytes: give at most {_MOST_BYTES:,}", 413)
        asked = read_request(body, chat="chat" in request.url.path)
        served = served_as(asked.model)
        prompt = served.tokens(asked)
        sampling = served.sampling(asked, len(prompt))
        before = () if asked.is_chat else prompt
        text = AnswerText(served.tokenizer, served.ends, asked.stop, before)
        pieces = _pieces(served.engine, prompt, sampling, text)
        prefix = "chatcmpl" if asked.is_chat else "cmpl"
        answer = Answer(
            name=f"{prefix}-{uuid4().hex}",
            model=asked.model,
            chat=asked.is_chat,
            include_usage=asked.include_usage,
        )
        if asked.stream:
            return StreamingResponse(
                _events(pieces, answer, text, len(prompt)), media_type="text/event-stream"
            )
        whole = await _unless_gone(request, _joined(pieces))
        return JSONResponse(answer.whole(whole, text.reason or "length", _usage(text, len(prompt))))

    async def list_models(request: Request) -> Response:  # noqa: ARG001  # Starlette's
        return JSONResponse({"object": "list", "data": [_about(one) for one in models]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        served_as(name)
        return JSONResponse(_about(name))

    async def health(request: Request) -> Response:  # noqa: ARG001  # Starlette's
        return JSONResponse({"status": "ok"})

    @asynccontextmanager
    async def until_closed(_app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.gather(*(asyncio.to_thread(one.engine.close) for one in models.values()))

    return Starlette(
        routes=[
            Route("/v1/chat/completions", complete, methods=["POST"]),
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", one_model),
            Route("/health", health),
        ],
        exception_handlers={MoAError: _refuse, HTTPException: _refuse, Exception: _refuse},
        lifespan=until_closed,
    )


def bind(host: str, port: int) -> socket.socket:
    """Take an address, so that no other server gets it; connections wait until this one runs.

    Raises:
        UsageError: If it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as unless_bound:
            taken = unless_bound.enter_context(socket.socket(family, kind, protocol))
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
            taken.listen()
            unless_bound.pop_all()
            return taken
    except (OSError, UnicodeError) as error:  # the second of a name such as 127..0.0.1
        why = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot listen at {host}, port {port}: {why}: give another --host or --port"
        ) from error


class Server(uvicorn.Server):
    """Ends at Ctrl-C and SIGTERM: requests end with an error, then the engines, and the process goes on after `run`."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        config = uvicorn.Config(build_app(models), log_level="warning", timeout_graceful_shutdown=_GRACE_S)
        super().__init__(config)
        self._models = models

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals; uvicorn's own way raises them again at its end, as if the server had been killed."""
        loop = asyncio.get_running_loop()
        for one in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(one, self.stop)
        yield

    def stop(self) -> None:
        """End the server; called in its event loop."""
        self.should_exit = True
        for one in self._models.values():
            one.engine.stop()


async def _pieces(
    engine: Engine, prompt: list[int], sampling: Sampling, text: AnswerText
) -> AsyncIterator[str]:
    """The text of an answer as it comes."""
    async with aclosing(cast("Any", engine.stream(prompt, sampling))) as stream:
        async for ids in stream:
            if piece := text.add(ids):
                yield piece
            if text.reason is not None:
                return
    if rest := text.finish("length"):
        yield rest


async def _joined(pieces: AsyncIterator[str]) -> str:
    async with aclosing(cast("Any", pieces)) as stream:
        return "".join([one async for one in stream])


async def _events(
    pieces: AsyncIterator[str], answer: Answer, text: AnswerText, prompt_tokens: int
) -> AsyncIterator[str]:
    """The events of a streamed answer. An error that comes late is an event, for the status is sent already."""
    try:
        async with aclosing(cast("Any", pieces)) as stream:
            if answer.chat:
                yield answer.piece("", is_first=True)
            async for piece in stream:
                yield answer.piece(piece)
        yield answer.piece("", text.reason)
        yield answer.end(_usage(text, prompt_tokens))
    except MoAError as error:
        yield event(_as_api_error(error).body())


async def _unless_gone(request: Request, answer: Any) -> str:
    """Wait for an answer, and give it up when the client is gone."""

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    asked, gone = asyncio.ensure_future(answer), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait((asked, gone), return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            raise ApiError("the client has gone", 499)
        return await asked
    finally:
        for one in (asked, gone):
            one.cancel()


def _usage(text: AnswerText, prompt_tokens: int) -> dict[str, int]:
    both = {"prompt_tokens": prompt_tokens, "completion_tokens": text.count}
    return {**both, "total_tokens": prompt_tokens + text.count}


def _about(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "moa"}


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(str(error.detail), error.status_code)
    if isinstance(error, UsageError):
        return ApiError(str(error))
    return ApiError(str(error), 503 if isinstance(error, MoAError) else 500)


async def _refuse(request: Request, error: Exception) -> Response:  # noqa: ARG001  # Starlette's
    told = _as_api_error(error)
    return JSONResponse(told.body(), status_code=told.status)
