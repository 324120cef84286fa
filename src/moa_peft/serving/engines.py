"""What answers requests: it streams their new tokens to the event loop that asked, and cancels those whose stream is closed."""

import asyncio
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from moa_peft.errors import MoAError, RunError, first_line
from moa_peft.evaluation.generation import generation_config

STOP_S = 2.0
"""Seconds that an engine is waited for at its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a request is continued."""

    max_new_tokens: int
    """At least 1."""
    temperature: float
    """0 takes the likeliest token."""
    top_p: float
    """Of the likeliest tokens with this much probability together, in (0, 1]."""


class Engine(ABC):
    """Answers the requests of one model.

    Attributes:
        name: How it does so, for the log.
        room: The most tokens of a request, its answer included.
    """

    name: str
    room: int

    def __init__(self) -> None:
        self._live: dict[str, asyncio.Queue[Sequence[int] | Exception | None]] = {}

    async def stream(self, prompt: list[int], sampling: Sampling) -> AsyncIterator[Sequence[int]]:
        """Continue a prompt; closing the stream cancels the request.

        Yields:
            New tokens, an end token included.

        Raises:
            RunError: If the engine fails or is stopped.
        """
        request, arrived = uuid4().hex, asyncio.Queue()
        self._live[request] = arrived
        try:
            self._begin(request, prompt, sampling, arrived)
            while (found := await arrived.get()) is not None:
                if isinstance(found, Exception):
                    raise found
                yield found
        finally:
            del self._live[request]
            self._cancel(request)

    def stop(self) -> None:
        """End every request with an error; called in the event loop."""
        for arrived in self._live.values():
            arrived.put_nowait(RunError("the server is stopping"))

    @abstractmethod
    def close(self) -> bool:
        """Give back threads and memory; False where a thread still runs."""

    @abstractmethod
    def _begin(
        self, request: str, prompt: list[int], sampling: Sampling, arrived: asyncio.Queue[Any]
    ) -> None: ...

    @abstractmethod
    def _cancel(self, request: str) -> None: ...


class OneByOne(Engine):
    """Plain `generate`, for one request after another: right for every model."""

    name = "generate, one request after another"

    def __init__(self, model: Any, room: int, ends: Sequence[int]) -> None:
        super().__init__()
        self.room = room
        self._model, self._ends = model, list(ends)
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> bool:
        """End the thread after the request that runs."""
        self._waiting.put(None)
        self._thread.join(STOP_S)
        return not self._thread.is_alive()

    def _begin(
        self, request: str, prompt: list[int], sampling: Sampling, arrived: asyncio.Queue[Any]
    ) -> None:
        loop = asyncio.get_running_loop()

        def tell(found: Any) -> None:
            if request not in self._live:
                raise _CancelledError
            loop.call_soon_threadsafe(arrived.put_nowait, found)

        self._waiting.put((prompt, sampling, tell))

    def _cancel(self, request: str) -> None:
        """Nothing: a request that is not live any more ends with its next token."""

    def _run(self) -> None:
        while (one := self._waiting.get()) is not None:
            prompt, sampling, tell = one
            try:
                tell(())
                self._generate(prompt, sampling, tell)
                tell(None)
            except _CancelledError:
                continue
            except Exception as error:  # noqa: BLE001  # the request's, whatever it is; others go on
                _tell_error(tell, error)

    @torch.inference_mode()
    def _generate(self, prompt: list[int], sampling: Sampling, tell: Any) -> None:
        ids = torch.tensor([prompt], device=self._model.device)
        settings = generation_config(
            max_new_tokens=sampling.max_new_tokens,
            ends=self._ends,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )
        self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            streamer=_Streamer(tell),
        )


class _CancelledError(Exception):
    """Ends `generate` for a request that nobody waits for."""


class _Streamer(BaseStreamer):
    """Hands on what `generate` makes, without the prompt."""

    def __init__(self, tell: Any) -> None:
        self._tell, self._is_prompt = tell, True

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each new token."""
        self._tell(() if self._is_prompt else value.flatten().tolist())
        self._is_prompt = False

    def end(self) -> None:
        """Nothing: the engine tells the end."""


def _tell_error(tell: Any, error: Exception) -> None:
    with suppress(_CancelledError):
        tell(error if isinstance(error, MoAError) else RunError(first_line(error)))
