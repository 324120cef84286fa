"""Whatever the pattern of calls, instance gates are those of the prompts that the caller means, or the call is refused.

The reference is a twin with the official pooling, the mean over a whole call: it reads each prompt alone, and so needs no
rule of what a prompt is.
"""

import copy
import inspect
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, StaticCache

from moa_peft import (
    ChangeRecord,
    LoraExpert,
    MoAConfig,
    ParallelAdapterExpert,
    RouterConfig,
    UsageError,
    mixture_layers,
)
from tiny import awaken, base_model, cached

Prompt = tuple[int, ...]
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
IGNORED, STATIC = -100, 20


def tiny(pooling: str) -> PeftModel:
    router = RouterConfig(granularity="instance", pooling=pooling)  # type: ignore[arg-type]  # one of two words
    experts = [LoraExpert(targets=("q_proj", "down_proj"), rank=2), ParallelAdapterExpert(size=3)]
    model = get_peft_model(base_model("llama"), MoAConfig(experts=experts, router=router))
    assert isinstance(model, PeftModel)
    awaken(model)
    return model.eval()


@dataclass
class World:
    """A model whose gates are compared, in every block of every call, with those of the prompts that are meant."""

    rng: random.Random
    model: PeftModel = field(default_factory=lambda: tiny("prompt"))
    twin: PeftModel = field(default_factory=lambda: tiny("official"))
    known: dict[Prompt, dict[tuple[str, str], Tensor]] = field(default_factory=dict)
    meant: list[Prompt] = field(default_factory=list)
    """The prompt of each row of the calls that run, or of each sequence of a packed row."""
    owners: list[int] | None = None
    """Of a packed row: the sequence of each token."""
    checked: int = 0

    def __post_init__(self) -> None:
        for _, layer in mixture_layers(self.model):
            layer.change_observer = self.check

    def truth(self, prompt: Prompt) -> dict[tuple[str, str], Tensor]:
        if prompt not in self.known:
            found = self.known[prompt] = {}
            for _, layer in mixture_layers(self.twin):
                layer.change_observer = lambda one: found.update({(one.path, one.expert): one.gate[0, 0]})
            self.twin(input_ids=torch.tensor([prompt]), use_cache=False)
        return self.known[prompt]

    def check(self, record: ChangeRecord) -> None:
        """Compare the gates of an expert, [B, 1 or T, 1], with those of the prompts."""
        want = torch.stack([self.truth(one)[record.path, record.expert] for one in self.meant]).unsqueeze(1)
        if self.owners is not None:
            want = want[self.owners].transpose(0, 1)
        elif len(record.gate) != len(want):
            want = want.repeat_interleave(len(record.gate) // len(want), dim=0)  # beams
        torch.testing.assert_close(record.gate, want.expand_as(record.gate), rtol=1e-4, atol=1e-4)
        self.checked += 1

    @contextmanager
    def meaning(self, prompts: list[Prompt], owners: list[int] | None = None) -> Iterator[None]:
        before = self.meant, self.owners
        self.meant, self.owners = prompts, owners
        yield
        self.meant, self.owners = before

    def tokens(self, least: int = 1, most: int = 6) -> Prompt:
        return tuple(self.rng.choices(range(3, 97), k=self.rng.randint(least, most)))

    def one_of(self, *values: Any) -> Any:
        return self.rng.choice(values)


def works(act: Callable[[], Any]) -> bool:
    """Whether a call goes through; else it is refused by an error that names the prompt and a way out."""
    try:
        act()
    except UsageError as error:
        refusal = str(error).lower()
    else:
        return True
    assert "prompt" in refusal
    assert any(way in refusal for way in ("give", "leave", "read", "belongs", "must")), refusal
    return False


def batch(world: World, rows: list[tuple[Prompt, Prompt]], side: str, mask: str) -> dict[str, Tensor]:
    """Token ids, labels, and what mask and positions of that kind there are."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, real = torch.randint(3, 97, (len(rows), width)), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        text = torch.tensor([*prompt, *answer])
        start = width - len(text) if side == "left" else 0
        ids[row, start : start + len(text)], real[row, start : start + len(text)] = text, 1
        labels[row, start + len(prompt) : start + len(text)] = text[len(prompt) :]
    call = {"input_ids": ids, "labels": labels, "attention_mask": real}
    if side == "left" or world.one_of(True, False):
        call["position_ids"] = (real.cumsum(dim=1) - 1).clamp(min=0)
    if mask == "4d":
        seen = torch.ones(width, width, dtype=torch.bool).tril() & real.bool()[:, None, None]
        seen = seen & real.bool()[:, None, :, None]
        call["attention_mask"] = seen | torch.eye(width, dtype=torch.bool) & real.bool()[:, None, None]
    if mask == "none" and bool(real.all()):
        del call["attention_mask"]
    return call


def a_call(world: World) -> str:
    """One call in any mode, whose prompts are told or not, and what goes on with its cache."""
    training, word = world.one_of(True, False), world.one_of(None, "labels", "length")
    begins = world.one_of("unset", "no", "empty", "static")
    alone = not training and begins != "no" and word is None
    count = world.rng.randint(1, 3)
    rows = [(world.tokens(2), () if alone else world.tokens(1, 3)) for _ in range(count)]
    side, mask = world.one_of("left", "right"), world.one_of("none", "2d", "2d", "4d")
    call: dict[str, Any] = batch(world, rows, side, mask)
    labels = call.pop("labels")
    if word is not None:
        lengths = [len(prompt) for prompt, _ in rows]
        call |= {"labels": labels} if word == "labels" else {"prompt_length": torch.tensor(lengths)}
    caches = {"empty": DynamicCache, "static": lambda: StaticCache(world.model.config, max_cache_len=STATIC)}
    if begins == "no":
        call["use_cache"] = False
    elif begins in caches:
        call[CACHE] = caches[begins]()
        if begins == "static" and call.get("attention_mask", torch.empty(0)).dim() == 4:
            call["attention_mask"] = F.pad(call["attention_mask"], (0, STATIC - call["input_ids"].shape[1]))
    world.model.train(training)
    outputs: list[Any] = []
    model = world.one_of(world.model, world.model.get_base_model())
    with world.meaning([prompt for prompt, _ in rows]):
        worked = works(lambda: outputs.append(model(**call)))
    assert worked == (word is not None or alone), (training, word, begins)
    if not worked or begins == "no":
        return f"call, {'right' if worked else 'refused'}"
    return goes_on(world, rows, side, call["input_ids"], cached(outputs[0])[CACHE], told=word == "length")


def goes_on(world: World, rows: list[Any], side: str, ids: Tensor, cache: Any, *, told: bool) -> str:
    """A call on a cache to which something was done."""
    prompts, width = [prompt for prompt, _ in rows], ids.shape[1]
    reals = torch.ones(len(rows), width, dtype=torch.long)
    for row, (prompt, answer) in enumerate(rows):
        padding = width - len(prompt) - len(answer)
        reals[row, slice(0, padding) if side == "left" else slice(width - padding, width)] = 0
    if isinstance(cache, DynamicCache):
        change = world.one_of("nothing", "deepcopy", "pickle", "reorder", "select", "repeat", "crop")
    else:
        change = world.one_of("nothing", "deepcopy", "pickle", "reorder")
    whole = True
    order = list(range(len(rows)))
    if change in ("deepcopy", "pickle"):
        cache = copy.deepcopy(cache) if change == "deepcopy" else pickle.loads(pickle.dumps(cache))
    elif change == "crop":
        away = world.rng.randint(1, max(1, width - 1))
        cache.crop(-away)
        ends = [width - len(answer) if side == "left" else len(prompt) for prompt, answer in rows]
        whole, reals = max(ends) <= width - away, reals[:, : width - away]
        if width == away:
            return "all cropped"
    elif change == "repeat":
        order = [row for row in order for _ in range(2)]
        cache.batch_repeat_interleave(2)
    elif change != "nothing":
        order = world.rng.sample(
            order, k=len(order) if change == "reorder" else world.rng.randint(1, len(order))
        )
        act = cache.reorder_cache if change == "reorder" else cache.batch_select_indices
        act(torch.tensor(order))
    columns = world.rng.randint(1, 3)
    more = torch.randint(3, 97, (len(order), columns))
    mask = torch.cat([reals[order], torch.ones_like(more)], dim=1)
    call = {"input_ids": more, "attention_mask": mask, CACHE: cache}
    with world.meaning([prompts[row] for row in order]):
        worked = works(lambda: world.model(**call))
    assert worked == (whole and (told or columns == 1)), (change, told, columns, whole)
    return f"{change}, {'right' if worked else 'refused'}"


def a_packed_row(world: World) -> str:
    """Several sequences in a row, told apart in one way or another."""
    texts = [(world.tokens(), world.tokens(1, 3)) for _ in range(world.rng.randint(2, 4))]
    lengths = [len(prompt) + len(answer) for prompt, answer in texts]
    owners = [number for number, length in enumerate(lengths) for _ in range(length)]
    form, word = (
        world.one_of("positions", "positions", "2d", "4d"),
        world.one_of("labels", "labels", "length", None),
    )
    call: dict[str, Any] = {
        "input_ids": torch.tensor([[token for prompt, answer in texts for token in (*prompt, *answer)]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
    }
    if form == "2d":
        call["attention_mask"] = torch.ones_like(call["input_ids"])
    elif form == "4d":
        own = torch.tensor(owners)
        call["attention_mask"] = ((own[:, None] == own) & torch.ones(len(own), len(own)).tril().bool())[
            None, None
        ]
        if world.one_of(True, False):
            del call["position_ids"]
    if word == "labels":
        parts = [(*[IGNORED] * len(prompt), *answer) for prompt, answer in texts]
        call["labels"] = torch.tensor([[label for part in parts for label in part]])
    elif word == "length":
        call["prompt_length"] = len(texts[0][0])
    if world.one_of(True, False):
        call["use_cache"] = False
    world.model.train(world.one_of(True, False))
    with world.meaning([prompt for prompt, _ in texts], owners):
        worked = works(lambda: world.model(**call))
    assert worked == (form == "positions" and word == "labels" and "use_cache" in call), (
        form,
        word,
        call.keys(),
    )
    return f"packed, {'right' if worked else 'refused'}"


def a_prompt_in_parts(world: World) -> str:
    """The prompt comes in several calls by hand: nothing says so, and so none may go on."""
    prompt, cache = world.tokens(4, 9), DynamicCache()
    first = world.rng.randint(1, len(prompt) - 2)
    said = world.one_of({}, {"prompt_length": len(prompt)})
    world.model.eval()
    with world.meaning([prompt[:first]]):  # what it is to whoever does not see the rest
        begun = works(lambda: world.model(input_ids=torch.tensor([prompt[:first]]), **{CACHE: cache}, **said))
    assert begun != bool(said)
    rest = {"input_ids": torch.tensor([prompt[first:]]), CACHE: cache, **said}
    act: Callable[..., Any] = world.model
    if generates := world.one_of(True, False):
        act = world.one_of(world.model, world.model.get_base_model()).generate
        rest |= {"input_ids": torch.tensor([prompt]), "max_new_tokens": 2, "do_sample": False}
        rest.pop("prompt_length", None)
    with world.meaning([prompt]):
        assert works(lambda: act(**rest)) == (
            generates and bool(said)
        )  # then the first call has left nothing
    return "parts"


class SecondPrompt(LogitsProcessor):
    """Reads another prompt at each step of a generation, with a cache of its own or without one."""

    def __init__(self, world: World, prompt: Prompt, *, keeps_cache: bool) -> None:
        self.world, self.prompt, self.keeps_cache, self.cache = world, prompt, keeps_cache, {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids = input_ids[:1, -1:] if self.cache else torch.tensor([self.prompt])
        with self.world.meaning([self.prompt]):
            found = self.world.model(input_ids=ids, use_cache=self.keeps_cache, **self.cache)
        self.cache = cached(found) if self.keeps_cache else {}
        return scores


def a_generation(world: World) -> str:
    """`generate` in any of its ways, and a second prompt inside."""
    count, beams = world.rng.randint(1, 3), world.rng.randint(1, 3)
    prompts = [world.tokens() for _ in range(count)]
    call: dict[str, Any] = batch(world, [(prompt, ()) for prompt in prompts], "left", "2d")
    call = {name: call[name] for name in ("input_ids", "attention_mask")}
    call |= {
        "max_new_tokens": world.rng.randint(2, 4),
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
    }
    training, way = (
        world.one_of(True, False),
        world.one_of("plain", "no cache", "static", "lookup", "chunks", "embeds"),
    )
    if way == "no cache":
        call["use_cache"] = False
    elif way == "static":
        call |= {"cache_implementation": "static", "disable_compile": True}
    elif way == "lookup" and count == beams == 1:
        call["prompt_lookup_num_tokens"] = 2
    elif way == "chunks":
        call["prefill_chunk_size"] = 2
    elif way == "embeds":
        call["inputs_embeds"] = world.model.get_input_embeddings()(call.pop("input_ids")).detach()
    second = world.one_of(None, None, "cache", "no cache")
    if second is not None:
        other = prompts[0] + world.tokens() if world.one_of(True, False) else world.tokens()
        inside = SecondPrompt(world, other, keeps_cache=second == "cache")
        call["logits_processor"] = LogitsProcessorList([inside])
    world.model.train(training)
    model = world.one_of(world.model, world.model.get_base_model())
    with world.meaning(prompts):
        worked = works(lambda: model.generate(**call))
    expected = way != "chunks" and second != "no cache" and not (training and second)
    assert worked == expected, (way, second, training)
    return f"generate, {way}, {'right' if worked else 'refused'}"


PATTERNS = (a_call, a_call, a_call, a_packed_row, a_prompt_in_parts, a_generation, a_generation)


def run(number: int, seed: int) -> Counter[str]:
    torch.manual_seed(seed)
    world = World(random.Random(seed))
    with torch.no_grad():
        outcomes = Counter(world.one_of(*PATTERNS)(world) for _ in range(number))
    assert world.checked > number
    return outcomes


def test_every_call_has_the_gates_of_its_prompt_or_is_refused() -> None:
    run(50, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_every_call_of_many_has_the_gates_of_its_prompt_or_is_refused(seed: int) -> None:
    outcomes = run(200, seed)
    assert (
        min(sum(count for name, count in outcomes.items() if word in name) for word in ("right", "refused"))
        > 50
    )
