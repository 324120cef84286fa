"""Continuous batching of transformers as an engine, with settings of their own for the requests of a batch."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import cb_logits_processors as processors

from moa_peft.errors import RunError
from moa_peft.evaluation.batching import rotary_switch
from moa_peft.mixture.block_hooks import packed_weights
from moa_peft.serving.engines import STOP_S, Engine, Sampling

_BLOCK = 256
"""Tokens of a block of the key-value cache."""
_CPU_BLOCKS = (64, 512)
"""The least and the most of them on a CPU, for all engines: four of the longest requests, or more shorter ones."""
_TRIED_LENGTHS = (3, 7, 12, 5)
"""Tokens of the prompts that show whether continuous batching is right for a model."""
_TRIED_TOKENS = 4
_START_S = 600.0
"""Seconds that an answer to one may take."""


class _Temperature(processors.ContinuousBatchingTemperatureLogitsWarper):
    """A temperature for each request; at 0 the likeliest token, the first of several, has all the probability."""

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Scale scores [T, V], float32."""
        temperature = tensor_arg[: len(scores)].view(dtype=torch.float32).unsqueeze(-1)
        likeliest = torch.full_like(scores, -torch.inf).scatter(-1, scores.argmax(dim=-1, keepdim=True), 0.0)
        return torch.where(temperature == 0, likeliest, scores / temperature)


class _TopP(processors.ContinuousBatchingTopPLogitsWarper):
    """A top_p for each request; nothing is sorted on a CPU where all are 1."""

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Cut scores [T, V], float32."""
        given = tensor_arg[: len(scores)].view(dtype=torch.float32)
        if scores.device.type == "cpu" and bool((given == 1).all()):
            return scores
        return super().__call__(scores, tensor_arg)


_PROCESSORS: Mapping[type, Callable[[Any], Any]] = {
    processors.ContinuousBatchingTemperatureLogitsWarper: _Temperature,
    processors.ContinuousBatchingTopPLogitsWarper: _TopP,
}


class Batched(Engine):
    """Continuous batching of transformers, each request with a temperature and a top_p of its own.

    Args:
        model: In PEFT's wrapper or bare.
        room: The most tokens of a request that the model reads.
        ends: Tokens that end an answer.
        share: How many engines share the memory of the device.

    Raises:
        Exception: Whatever transformers raises for a model that it cannot batch.
    """

    name = "continuous batching"

    def __init__(self, model: Any, room: int, ends: Sequence[int], share: int = 1) -> None:
        super().__init__()
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not getattr(bare, "_supports_attention_backend", False):
            raise RunError("its attention is not transformers' attention interface")
        if rotary_switch(bare) is not None:
            raise RunError("its rotary frequencies depend on the longest request of a batch (longrope)")
        # its errors are told to those who asked
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        with ExitStack() as undo:
            undo.enter_context(packed_weights(bare))
            # this also packs the weights, which must not happen while a graph is captured
            expected = {prompt: _continued(bare, prompt) for prompt in _tried_prompts(bare)}
            self._manager = bare.init_continuous_batching(
                generation_config=_draws(ends), continuous_batching_config=_batching(bare, room, share)
            )
            made = self._manager.logit_processor.logits_processor
            made[:] = [_PROCESSORS[type(one)](one) for one in made]
            self._manager.start()
            undo.callback(self._manager.stop, timeout=STOP_S, hard_stop=True)
            self._try_out(expected)
            self._undo = undo.pop_all()
        settled = self._manager.continuous_batching_config
        self.room = min(room, settled.num_blocks * settled.page_size)

    def close(self) -> bool:
        """Stop the thread that batches."""
        self._undo.close()
        return not self._manager.is_running()

    def _try_out(self, expected: Mapping[tuple[int, ...], list[int]]) -> None:
        """Answer the prompts together, and see that each answer is the one of the plain model."""
        for prompt in expected:
            self._manager.add_request(list(prompt), max_new_tokens=_TRIED_TOKENS, temperature=0.0, top_p=1.0)
        for _ in expected:
            found = self._manager.get_result(timeout=_START_S)
            if found is None or found.error is not None:
                raise RunError(found.error if found else f"no answer in {_START_S:g} s")
            known = expected[tuple(found.prompt_ids)][: len(found.generated_tokens)]
            if found.generated_tokens[: len(known)] != known:
                raise RunError("answers given together differ from those given alone")

    def _begin(
        self, request: str, prompt: list[int], sampling: Sampling, arrived: asyncio.Queue[Any]
    ) -> None:
        told = 0

        def take(output: Any) -> None:
            nonlocal told
            if output.error is not None:
                arrived.put_nowait(RunError(str(output.error).partition("\n")[0]))
            elif len(output.generated_tokens) > told:
                arrived.put_nowait(output.generated_tokens[told:])
                told = len(output.generated_tokens)
            if output.is_finished():
                arrived.put_nowait(None)

        self._manager.register_result_handler(request, take)
        add = partial(
            self._manager.add_request,
            prompt,
            request_id=request,
            streaming=True,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )
        if add() is None:  # the thread has failed with its requests
            self._manager.join(time.perf_counter(), STOP_S)
            self._manager.start()
            if add() is None:
                raise RunError(
                    "continuous batching has failed and cannot start again: start the server again"
                )

    def _cancel(self, request: str) -> None:
        self._manager.cancel_request(request)
        router = self._manager.output_router
        router.result_handlers.pop(request, None)
        # what came of earlier requests after they were cancelled, which nobody reads
        while not router.output_queue.empty():
            router.output_queue.get_nowait()


def _tried_prompts(model: Any) -> list[tuple[int, ...]]:
    """Random prompts of several lengths."""
    draw, size = torch.Generator().manual_seed(0), model.config.get_text_config().vocab_size
    return [tuple(torch.randint(size, (length,), generator=draw).tolist()) for length in _TRIED_LENGTHS]


@torch.no_grad()
def _continued(model: Any, prompt: tuple[int, ...]) -> list[int]:
    """The likeliest tokens after a prompt, as far as rounding cannot change them."""
    ids, slack = list(prompt), max(1e-3, 8 * torch.finfo(model.dtype).eps)
    while len(ids) < len(prompt) + _TRIED_TOKENS:
        logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float()
        best, second = logits.topk(2).values
        if best - second <= slack * logits.abs().max():
            break
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def _draws(ends: Sequence[int]) -> GenerationConfig:
    """Settings for which transformers makes the processors that each request then sets; their numbers are never used."""
    return GenerationConfig(
        do_sample=True, temperature=0.5, top_p=0.5, top_k=0, eos_token_id=list(ends), pad_token_id=ends[0]
    )


def _batching(model: Any, room: int, share: int) -> ContinuousBatchingConfig:
    common: dict[str, Any] = {
        "per_request_processors": True,
        "page_size": _BLOCK,
        "auto_switch_to_flash": model.dtype in (torch.float16, torch.bfloat16),
    }
    if model.device.type == "cpu":  # all of its memory would be taken, and filled
        least, most = _CPU_BLOCKS
        blocks = min(most, max(least, 4 * ceil(room / _BLOCK))) // share
        return ContinuousBatchingConfig(num_blocks=max(blocks, 4), max_batch_tokens=512, **common)
    graphs = None if share == 1 else False  # no thread may capture while another allocates
    return ContinuousBatchingConfig(max_memory_percent=0.8 / share, use_cuda_graph=graphs, **common)
