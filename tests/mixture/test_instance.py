"""Instance-level gates: from the prompt's real tokens, whatever stands around them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from trl import SFTConfig, SFTTrainer

from moa_peft import MoAConfig, RunError, UsageError, mixture_layers
from moa_peft.evaluation.generation import generate_batch
from moa_peft.evaluation.scoring import TokenQuestion, score_batch
from moa_peft.mixture.continuous_batching import paged_requests
from moa_peft.mixture.token_masks import cache_of
from tiny import awaken, base_model, cached, mixture_model, tokens
from tiny_lm import byte_tokenizer

every_model = pytest.mark.parametrize(
    ("family", "method"),
    [
        (family, method)
        for family in ("llama", "qwen3")
        for method in ("instance-moa", "unipeft", "instance-kinds")
    ],
)
IGNORED = -100


class Seen:
    """The gates of each block, in each call that made any."""

    def __init__(self, model: PeftModel) -> None:
        self.calls: list[Tensor] = []
        self._blocks: list[Tensor] = []
        self._count = len(mixture_layers(model))

    def __call__(self, record: Any) -> None:
        self._blocks.append(record.gates)
        if len(self._blocks) == self._count:
            self.calls.append(torch.stack(self._blocks, dim=1)[:, :, 0])  # [B, blocks, C]
            self._blocks = []


@contextmanager
def watching(model: PeftModel) -> Iterator[Seen]:
    seen = Seen(model)
    for _, layer in mixture_layers(model):
        layer.observer = seen
    yield seen
    for _, layer in mixture_layers(model):
        layer.observer = None


@torch.no_grad()
def gates(model: PeftModel, **call: Any) -> Tensor:
    """The gates of one call, [B, blocks, C]."""
    with watching(model) as seen:
        model(**call)
    (found,) = seen.calls
    return found


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-6)


def test_the_gates_differ_between_instances_or_nothing_below_means_anything() -> None:
    for method in ("instance-moa", "unipeft"):
        model = mixture_model("llama", method)
        found = gates(model, input_ids=tokens(2, 7))
        assert (found[0] - found[1]).abs().max() > 1e-2
        assert (found[:, 0] - found[:, 1]).abs().max() > 1e-2


@every_model
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (2, 4)])
def test_padding_on_either_side_and_other_rows_change_nothing(
    family: str, method: str, left: int, right: int
) -> None:
    model = mixture_model(family, method)
    row = tokens(1, 7)
    alone = gates(model, input_ids=row)
    mates = tokens(2, 7 + left + right, seed=5)
    mask = torch.ones(3, 7 + left + right, dtype=torch.long)
    mask[1, :left] = 0
    mask[1, left + 7 :] = 0
    padded = F.pad(row, (left, right))
    ids = torch.cat([mates[:1], padded, mates[1:]])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    found = gates(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    assert same(found[1:2], alone)


@every_model
def test_labels_keep_the_answer_out_and_its_content_changes_nothing(family: str, method: str) -> None:
    model = mixture_model(family, method)
    prompt, answer, other = tokens(2, 5), tokens(2, 4, seed=7), tokens(2, 4, seed=8)
    labels = torch.cat([torch.full_like(prompt, IGNORED), answer], dim=1)
    trained = gates(model, input_ids=torch.cat([prompt, answer], dim=1), labels=labels)
    changed = gates(model, input_ids=torch.cat([prompt, other], dim=1), labels=labels)
    asked = gates(model, input_ids=prompt)
    assert same(trained, asked)
    assert same(changed, asked)
    leaking = gates(model, input_ids=torch.cat([prompt, answer], dim=1))
    assert not same(leaking, asked)


def test_a_row_that_is_answer_throughout_is_gated_by_its_first_token() -> None:
    model = mixture_model("llama", "instance-moa")
    ids = tokens(2, 6)
    assert same(gates(model, input_ids=ids, labels=ids), gates(model, input_ids=ids[:, :1]))
    padded, mask = F.pad(ids, (2, 0)), F.pad(torch.ones_like(ids), (2, 0))
    labels = F.pad(ids, (2, 0), value=IGNORED)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    found = gates(model, input_ids=padded, attention_mask=mask, position_ids=positions, labels=labels)
    assert same(found, gates(model, input_ids=ids[:, :1]))


@every_model
def test_prompt_length_says_where_the_prompt_ends_for_each_row(family: str, method: str) -> None:
    model = mixture_model(family, method)
    ids = tokens(3, 8)
    lengths = torch.tensor([3, 8, 5])
    found = gates(model, input_ids=ids, prompt_length=lengths)
    for row, length in enumerate(lengths.tolist()):
        assert same(found[row : row + 1], gates(model, input_ids=ids[row : row + 1, :length]))
    padded, mask = F.pad(ids, (2, 0)), F.pad(torch.ones_like(ids), (2, 0))
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    again = gates(model, input_ids=padded, attention_mask=mask, position_ids=positions, prompt_length=lengths)
    assert same(again, found)


@every_model
def test_one_full_forward_and_cached_steps_agree(family: str, method: str) -> None:
    model = mixture_model(family, method)
    prompt, answer = tokens(2, 5), tokens(2, 4, seed=7)
    whole = torch.cat([prompt, answer], dim=1)
    with torch.no_grad(), watching(model) as seen:
        full = model(input_ids=whole, prompt_length=5).logits
        step = model(input_ids=prompt, use_cache=True)
        pieces = [step.logits]
        for column in range(answer.shape[1]):
            step = model(input_ids=answer[:, column : column + 1], **cached(step), use_cache=True)
            pieces.append(step.logits)
    assert len(seen.calls) == 2, "a step with a cache makes no gates of its own"
    assert same(seen.calls[0], seen.calls[1])
    assert (full - torch.cat(pieces, dim=1)).abs().max() < 1e-4


@every_model
def test_packed_sequences_are_instances_of_their_own(family: str, method: str) -> None:
    model = mixture_model(family, method)
    first, second = tokens(1, 6, seed=3), tokens(1, 5, seed=4)
    labels = [row.clone() for row in (first, second)]
    labels[0][:, :4] = IGNORED
    labels[1][:, :2] = IGNORED
    packed = {
        "input_ids": torch.cat([first, second], dim=1),
        "labels": torch.cat(labels, dim=1),
        "position_ids": torch.cat([torch.arange(6), torch.arange(5)]).unsqueeze(0),
    }
    recorded: list[Tensor] = []
    for _, layer in mixture_layers(model):
        layer.observer = lambda record: recorded.append(record.gates)
    with torch.no_grad():
        logits = model(**packed, use_cache=False).logits
    for row, own, part in ((first, labels[0], slice(0, 6)), (second, labels[1], slice(6, 11))):
        alone = gates(model, input_ids=row, labels=own)
        for block, found in enumerate(recorded):
            assert same(found[:, part], alone[:, block].unsqueeze(1).expand(-1, row.shape[1], -1))
        with torch.no_grad():
            assert (model(input_ids=row, labels=own).logits - logits[:, part]).abs().max() < 1e-4


def test_prompt_length_with_packed_sequences_is_refused() -> None:
    model = mixture_model("llama", "instance-moa")
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(UsageError, match="prompt_length is given with packed sequences"):
        model(input_ids=tokens(1, 5), position_ids=positions, prompt_length=2)


def test_the_official_pooling_sees_padding_and_answer() -> None:
    config = MoAConfig.preset("instance-moa", router={"pooling": "official"})

    model = get_peft_model(base_model("llama"), config)
    awaken(model)
    model.eval()
    ids = tokens(1, 6)
    mask = F.pad(torch.ones_like(ids), (2, 0))
    alone = gates(model, input_ids=ids)
    assert not same(gates(model, input_ids=F.pad(ids, (2, 0)), attention_mask=mask), alone)
    labels = ids.clone()
    labels[:, :3] = IGNORED
    assert same(gates(model, input_ids=ids, labels=labels), alone)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_and_every_cache_give_the_tokens_of_no_cache(cache: str) -> None:
    model = mixture_model("llama", "instance-moa")
    ids = F.pad(tokens(2, 5), (2, 0))
    mask = F.pad(torch.ones(2, 5, dtype=torch.long), (2, 0))
    common = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    cached = GenerationConfig(**common, cache_implementation=cache, disable_compile=True)
    plain = GenerationConfig(**common, use_cache=False)
    ours = model.generate(input_ids=ids, attention_mask=mask, generation_config=cached)
    assert torch.equal(ours, model.generate(input_ids=ids, attention_mask=mask, generation_config=plain))


def test_gates_follow_the_rows_of_their_cache() -> None:
    model = mixture_model("llama", "instance-moa")
    ids = tokens(3, 5)
    with torch.no_grad():
        _, cache = cache_of(model(input_ids=ids, use_cache=True))
    key, before = next(iter(cache.moa_instance_gates.items()))
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(cache.moa_instance_gates[key], before[[2, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.moa_instance_gates[key], before[[2, 2, 0, 0]])
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert torch.equal(cache.moa_instance_gates[key], before[[0, 2, 2, 0]])
    cache.reset()
    assert cache.moa_instance_gates is None


@pytest.mark.parametrize("method", ["instance-moa", "unipeft"])
@pytest.mark.parametrize("said", ["argument", "config", "model"])
def test_a_prompt_in_chunks_is_refused_with_instance_gates(method: str, said: str) -> None:
    """The gates were those of the first chunk, and the text another."""
    model = mixture_model("llama", method)
    given: dict[str, Any] = {"input_ids": tokens(1, 9), "max_new_tokens": 2, "do_sample": False}
    if said == "argument":
        given["prefill_chunk_size"] = 4
    elif said == "config":
        settings = GenerationConfig(max_new_tokens=2, prefill_chunk_size=4, pad_token_id=0)
        given = {"input_ids": given["input_ids"], "generation_config": settings}
    else:
        model.generation_config.prefill_chunk_size = 4
    with pytest.raises(UsageError, match="prefill_chunk_size reads the prompt in several calls"):
        model.generate(**given)


def test_a_prompt_in_chunks_gives_the_same_text_with_gates_for_each_token() -> None:
    model, ids = mixture_model("llama", "soft-moa"), tokens(1, 9)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6}
    given |= {"do_sample": False, "pad_token_id": 0, "eos_token_id": 96}
    assert torch.equal(model.generate(**given), model.generate(**given, prefill_chunk_size=4))


def paged_call(starts: list[int], lengths: list[int], whole: list[bool]) -> dict[str, Any]:
    """The arguments of a call of continuous batching whose requests go on from ``starts``."""
    ends = list(accumulate(lengths))
    allocator = SimpleNamespace(block_physical_stride=4, index=0, cache_tensor=torch.zeros(64, 1))
    cache = SimpleNamespace(cache_allocators={"full_attention": allocator}, use_prefix_sharing=False)
    positions = [start + one for start, length in zip(starts, lengths, strict=True) for one in range(length)]
    return {
        "cache": cache,
        "cu_seq_lens_q": torch.tensor([0, *ends, ends[-1]], dtype=torch.int32),  # one that is padding
        "cu_seq_lens_k": {"full_attention": torch.tensor([0, *ends])},
        "position_ids": torch.tensor([positions]),
        "write_index": [torch.arange(len(positions))],
        "read_index": [torch.zeros(0, dtype=torch.long)],
        "logits_indices": torch.tensor([end - 1 for end, one in zip(ends, whole, strict=True) if one]),
    }


def test_a_prompt_split_over_calls_of_continuous_batching_is_refused() -> None:
    """Its gates were those of its first part."""

    def keep(starts: list[int], lengths: list[int], whole: list[bool]) -> Tensor:
        found = paged_requests(paged_call(starts, lengths, whole))
        assert found is not None
        return found[1].keep("block", torch.ones(1, sum(lengths), 2))

    assert keep([0, 7, 0], [3, 1, 5], [True, True, True]).shape == (1, 9, 2)
    assert keep([0, 7], [3, 4], [True, False]).shape == (1, 7, 2)  # not its first call
    with pytest.raises(UsageError, match="continuous batching splits a prompt over several calls"):
        keep([0, 7, 0], [3, 1, 5], [True, True, False])


def test_our_batched_generation_gives_each_row_what_it_gives_it_alone() -> None:
    model = mixture_model("llama", "instance-moa")
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (4, 9, 6)]
    alone = [generate_batch(model, [one], max_new_tokens=12, ends={5})[0] for one in prompts]
    ends = {alone[0][2]}  # the first row ends early, so that the others move up in the cache
    alone = [generate_batch(model, [one], max_new_tokens=12, ends=ends)[0] for one in prompts]
    assert len({len(one) for one in alone}) > 1
    assert generate_batch(model, prompts, max_new_tokens=12, ends=ends) == alone


def test_likelihoods_are_those_of_one_forward_with_the_prompts_gates() -> None:
    model = mixture_model("llama", "instance-moa")
    prompt = tokens(1, 5)[0].tolist()
    completions = [[11, 12, 13, 14, 2], [11, 12, 20, 2], [30, 31, 2]]
    for chosen in (completions[:2], completions, completions[:1]):
        question = TokenQuestion(prompt=tuple(prompt), completions=tuple(map(tuple, chosen)))
        (found,) = score_batch(model, [question])
        for completion, scores in zip(chosen, found, strict=True):
            ids = torch.tensor([prompt + completion])
            with torch.no_grad():
                logits = model(input_ids=ids, prompt_length=5).logits[0, 4:-1].log_softmax(dim=-1)
            expected = logits.gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)
            assert (torch.tensor(scores) - expected).abs().max() < 1e-4


def test_the_trainer_of_trl_gates_by_the_prompt_alone(tmp_path: Path) -> None:
    model = mixture_model("llama", "instance-moa")
    rows = [tokens(1, 9, seed=seed)[0].tolist() for seed in range(2)]
    data = Dataset.from_list([{"input_ids": row, "labels": [IGNORED] * 5 + row[5:]} for row in rows])
    expected = gates(model, input_ids=torch.tensor(rows)[:, :5])
    config = SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        learning_rate=0.0, dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False,
        save_strategy="no", bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=byte_tokenizer())
    with watching(model) as seen:
        trainer.train()
    (found,) = seen.calls
    order = [0, 1] if same(found[0], expected[0]) else [1, 0]
    assert same(found[order], expected)


def test_a_copy_a_reload_and_transformers_own_loading_gate_alike(tmp_path: Path) -> None:
    model = mixture_model("llama", "instance-moa")
    ids = tokens(2, 8)
    call = {"input_ids": ids, "prompt_length": 4}
    expected = gates(model, **call)
    assert same(gates(copy.deepcopy(model), **call), expected)
    base_model("llama").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert same(
        gates(PeftModel.from_pretrained(base_model("llama"), tmp_path / "adapter").eval(), **call), expected
    )
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert same(gates(native, **call), expected)


def test_taking_the_mixture_off_stops_the_watching() -> None:
    model = mixture_model("llama", "instance-moa")
    plain = model.unload()
    hooked = [
        name for name, module in plain.named_modules() if module._forward_pre_hooks or module._forward_hooks
    ]
    assert not hooked
    with torch.no_grad():
        assert torch.equal(plain(tokens()).logits, base_model("llama")(tokens()).logits)


def test_after_a_call_that_failed_the_next_is_watched_as_ever() -> None:
    model = mixture_model("llama", "instance-moa")
    ids = tokens(2, 6)
    expected = gates(model, input_ids=ids)
    with pytest.raises(IndexError):
        model(input_ids=ids + 1000)
    assert same(gates(model, input_ids=ids), expected)


class Interrupted(BaseException):
    """As a KeyboardInterrupt, which torch tells no hook of."""


def interrupt(module: nn.Module, args: tuple[Any, ...]) -> None:
    raise Interrupted


@pytest.mark.parametrize("nested", [False, True])
def test_after_a_call_that_was_interrupted_the_next_is_watched_as_ever(nested: bool) -> None:
    model = mixture_model("llama", "instance-moa")
    ids, other = tokens(2, 6), tokens(2, 6, seed=9)
    labels = ids.clone()
    labels[:, :3] = -100
    expected = gates(model, input_ids=ids, labels=labels)
    backbone = model.get_base_model().model
    alone = gates(backbone, input_ids=ids)
    handle = backbone.layers[0].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupted):
        (model if nested else backbone)(input_ids=other)
    handle.remove()
    assert same(gates(backbone, input_ids=ids), alone)
    assert same(gates(model, input_ids=ids, labels=labels), expected)


def test_after_a_generation_that_was_interrupted_the_next_gives_its_text() -> None:
    model = mixture_model("llama", "instance-moa")
    ids, other = tokens(2, 6), tokens(2, 6, seed=9)
    more = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    steps = 0

    def interrupt_later(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise Interrupted

    handle = model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(interrupt_later)
    with pytest.raises(Interrupted):
        model.generate(input_ids=other, attention_mask=torch.ones_like(other), **more)
    handle.remove()
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    assert torch.equal(found, expected)


def test_a_call_that_fails_before_it_is_watched_leaves_the_next_as_ever() -> None:
    ids = tokens(2, 6)
    labels = ids.clone()
    labels[:, :3] = -100
    base = base_model("llama")
    failing = [base.register_forward_pre_hook(lambda module, args: 1 / 0)]
    model = get_peft_model(base, MoAConfig.preset("instance-moa"))
    awaken(model)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ids)
    failing.pop().remove()
    found = gates(model, input_ids=ids, labels=labels)
    fresh = get_peft_model(base_model("llama"), MoAConfig.preset("instance-moa"))
    awaken(fresh)
    assert same(found, gates(fresh, input_ids=ids, labels=labels))


def test_a_call_that_fails_before_its_backbone_leaves_a_call_of_that_as_ever() -> None:
    model = mixture_model("llama", "instance-moa")
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    base = model.get_base_model()
    expected = gates(base.model, input_ids=ids, attention_mask=mask)
    handle = base.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ids)
    handle.remove()
    assert same(gates(base.model, input_ids=ids, attention_mask=mask), expected)


@pytest.mark.parametrize("kind", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
@pytest.mark.parametrize("method", ["instance-moa", "adamole"])
def test_a_block_recomputed_without_its_tokens_is_refused(method: str, kind: CheckpointImpl) -> None:
    model = mixture_model("llama", method).train()
    model.enable_input_require_grads()
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=kind),
        check_fn=lambda module: isinstance(module, LlamaDecoderLayer),
    )
    loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    with pytest.raises(RunError, match="recomputed without its arguments"):
        loss.backward()
