"""Instance-level gates: from the prompt's real tokens, whatever stands around them."""

import copy
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
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from trl import SFTConfig, SFTTrainer

from instance_gates import gates, same, watching
from moa_peft import MoAConfig, RunError, UsageError, mixture_layers
from moa_peft.evaluation.generation import generate_batch
from moa_peft.evaluation.scoring import TokenQuestion, score_batch
from moa_peft.mixture.continuous_batching import paged_requests
from moa_peft.mixture.token_masks import CallTokens, call_tokens
from moa_peft.training.trainer import AdapterTrainer
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


def test_packed_sequences_are_told_apart_by_their_lengths_where_there_are_no_positions() -> None:
    """As `DataCollatorWithFlattening` gives them to flash attention; the attention used here reads across, so the first block counts."""
    model, ids = mixture_model("llama", "instance-moa"), tokens(1, 11)
    ends = torch.tensor([0, 6, 11], dtype=torch.int32)
    labels = torch.where(torch.tensor([0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0]).bool(), -100, ids)

    positions = torch.cat([torch.arange(6), torch.arange(5)]).unsqueeze(0)
    seen: list[Tensor] = []
    mixture_layers(model)[0][1].observer = lambda record: seen.append(record.gates)
    for packed in ({"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}, {"position_ids": positions}):
        model(input_ids=ids, labels=labels, use_cache=False, **packed)
    by_lengths, by_positions = seen
    assert same(by_lengths, by_positions)
    assert not same(by_lengths[:, 0], by_lengths[:, 10])


def test_prompt_length_with_packed_sequences_is_refused() -> None:
    model = mixture_model("llama", "instance-moa")
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(UsageError, match="prompt_length is given with packed sequences"):
        model(input_ids=tokens(1, 5), position_ids=positions, prompt_length=2, use_cache=False)


@pytest.mark.parametrize("packed", [False, True])
def test_the_mean_of_a_long_prompt_does_not_overflow_float16(packed: bool) -> None:
    """The sum of 4,096 tokens did, and every gate was NaN."""
    x = torch.full((1, 4096, 2), 40.0, dtype=torch.float16)
    sequences = torch.zeros(1, 4096, dtype=torch.long) if packed else None
    call = CallTokens(real=None, prompt=torch.ones(1, 4096, dtype=torch.bool), sequences=sequences)
    assert torch.equal(call.mean(x, everything=False)[0, 0], torch.tensor([40.0, 40.0]))


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
    with pytest.raises(UsageError, match="pooling 'official' is the mean of a whole row, and this row holds"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)


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


def test_shared_keys_of_continuous_batching_matter_to_instance_gates_alone() -> None:
    """A method with a balance loss alone was refused."""
    model = mixture_model("llama", "instance-moa")
    call = paged_call([0], [3], [True]) | {"input_ids": tokens(1, 3)}
    call["cache"].use_prefix_sharing = True
    assert call_tokens(model, (), call, pools=False).paged is None
    with pytest.raises(UsageError, match="shares the keys of equal prefixes"):
        call_tokens(model, (), call, pools=True)


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


def trainer_of(kind: type[Trainer], model: PeftModel, folder: Path, **changes: Any) -> Trainer:
    """A trainer of one step on two rows whose last four of nine tokens are the answer."""
    rows = [tokens(1, 9, seed=seed)[0].tolist() for seed in range(2)]
    data = Dataset.from_list([{"input_ids": row, "labels": [IGNORED] * 5 + row[5:]} for row in rows])
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True,
        "learning_rate": 0.0, "gradient_checkpointing": False, "save_strategy": "no", "bf16": False,
        "label_smoothing_factor": changes.pop("label_smoothing_factor", 0.0),
    }  # fmt: skip
    if kind is Trainer:
        return Trainer(model=model, args=TrainingArguments(**settings), train_dataset=data, **changes)
    config = SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True})
    return kind(model=model, args=config, train_dataset=data, processing_class=byte_tokenizer(), **changes)


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def tell(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What a data collator does for a loss that keeps the labels from the model."""
    return default_data_collator(rows) | {"prompt_length": torch.full((len(rows),), 5)}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (SFTTrainer, {}),
        (AdapterTrainer, {"label_smoothing_factor": 0.1}),
        (AdapterTrainer, {"compute_loss_func": own_loss}),
        (Trainer, {"label_smoothing_factor": 0.1, "data_collator": tell}),
        (Trainer, {"compute_loss_func": own_loss, "data_collator": tell}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*deprecated.*and will be removed in v2:FutureWarning")  # TRL's
def test_a_trainer_gates_by_the_prompt_alone(
    tmp_path: Path, kind: type[Trainer], changes: dict[str, Any]
) -> None:
    """Label smoothing and compute_loss_func take the labels out first, and gates were made of the answer too."""
    model = mixture_model("llama", "instance-moa")
    prompts = torch.cat([tokens(1, 9, seed=seed)[:, :5] for seed in range(2)])
    expected = gates(model, input_ids=prompts)
    trainer = trainer_of(kind, model, tmp_path, **dict(changes))
    with watching(model) as seen:
        trainer.train()
    for found in seen.calls:
        order = [0, 1] if same(found[0], expected[0]) else [1, 0]
        assert same(found[order], expected)


@pytest.mark.parametrize("changes", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": own_loss}])
@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_trainer_that_keeps_the_labels_to_itself_is_refused(
    tmp_path: Path, changes: dict[str, Any], verb: str
) -> None:
    trainer = trainer_of(Trainer, mixture_model("llama", "instance-moa"), tmp_path, **changes)
    trainer.eval_dataset = trainer.train_dataset
    with pytest.raises(
        UsageError, match=r"nothing says where it ends.*\(label smoothing, compute_loss_func\)"
    ):
        getattr(trainer, verb)()


@pytest.mark.parametrize("training", [False, True])
def test_a_call_of_prompt_and_answer_without_a_word_is_refused(training: bool) -> None:
    """As ORPO and CPO of TRL make it; its gates were made of the answer too."""
    model, ids = mixture_model("llama", "instance-moa").train(training), tokens(2, 9)
    with pytest.raises(UsageError, match=r"nothing says where it ends.*\(ORPO, CPO\)"):
        model(ids, attention_mask=torch.ones_like(ids), use_cache=False)


@pytest.mark.parametrize("length", [0, 6, [3, 6]])
def test_a_prompt_length_beyond_the_call_is_refused(length: Any) -> None:
    """Such a call is a part of its prompt."""
    model = mixture_model("llama", "instance-moa")
    with pytest.raises(UsageError, match=r"prompt_length must lie in 1\.\.5"):
        model(input_ids=tokens(2, 5), prompt_length=length)


@pytest.mark.parametrize("positions", [True, False])
def test_a_row_of_several_sequences_under_a_mask_of_four_dimensions_is_refused(positions: bool) -> None:
    """It was gated as one."""
    model, owners = mixture_model("llama", "instance-moa"), torch.tensor([0, 0, 0, 1, 1])
    ids = tokens(1, 5)
    call: dict[str, Any] = {"input_ids": ids, "labels": torch.tensor([[IGNORED, IGNORED, 7, IGNORED, 7]])}
    call["attention_mask"] = ((owners[:, None] == owners) & torch.ones(5, 5).tril().bool())[None, None]
    if positions:
        call["position_ids"] = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(UsageError, match="the row holds several sequences"):
        model(**call)


def test_an_attention_mask_that_is_no_tensor_is_refused() -> None:
    call = {"input_ids": tokens(1, 5), "attention_mask": object()}
    base = mixture_model("llama", "instance-moa").get_base_model()
    tokens_of_call = call_tokens(base, (), call, pools=True)
    with pytest.raises(UsageError, match="cannot read padding off a object as attention mask"):
        tokens_of_call.mean(torch.zeros(1, 5, 3), everything=False)


def test_an_attention_mask_by_position_is_read() -> None:
    """Padding counted as prompt."""
    model = mixture_model("llama", "instance-moa").get_base_model()
    ids, mask = tokens(1, 7), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    expected = gates(model, input_ids=ids, attention_mask=mask)
    with torch.no_grad(), watching(model) as seen:
        model(ids, mask)
    assert same(seen.calls[0], expected)


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
