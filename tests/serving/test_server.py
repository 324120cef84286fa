"""`moa serve` answers as OpenAI's API does, and each request as if it were alone."""

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, AsyncOpenAI, OpenAI

from moa_peft.evaluation.loading import LoadedModel, load, read_adapter
from moa_peft.serving import served as served_module
from moa_peft.serving.batching import Batched
from moa_peft.serving.engines import OneByOne
from moa_peft.serving.served import Served, load_served
from moa_peft.serving.server import Server, bind
from oracles import generate
from tiny_lm import save_adapter, save_base

HOST = "127.0.0.1"
PORT: list[int] = []
PROMPTS = [f"{'why ' * (place % 6)}is {place} so?" for place in range(20)]


class InThread(Server):
    """A server beside the tests, which keep their signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Adapters on one base: gates for each token, gates for whole instances, and one of single instructions."""
    folder = tmp_path_factory.mktemp("runs")
    base = save_base(folder / "base", chat=True)
    save_adapter(folder / "first", base)
    save_adapter(folder / "whole", base, {"router": {"granularity": "instance"}})
    save_adapter(folder / "paper", base, template="paper")
    return {name: str(folder / name) for name in ("first", "whole", "paper")}


def test_runs_on_one_base_model_hold_its_weights_once_whichever_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of runs on the bases A, B and B, B was held twice."""
    runs = {}
    for name, seed in (("one", 1), ("two", 2), ("three", 2)):
        adapter = save_adapter(tmp_path / name, save_base(tmp_path / f"base{name}", seed=seed))
        runs[name] = str(adapter)
    models: list[Any] = []
    monkeypatch.setattr(served_module, "make_engine", lambda model, *_, **__: (models.append(model), None))
    load_served(runs)
    one, two, three = (
        {
            tensor.data_ptr()
            for name, tensor in model.named_parameters()
            if ".moa." not in name and tensor.dim() > 1
        }
        for model in models
    )
    assert two == three
    assert not one & two


@pytest.fixture(scope="module")
def served(runs: dict[str, str]) -> Iterator[dict[str, Served]]:
    made = {name: one for name, (one, _) in load_served(runs).items()}
    server = InThread(made)
    with bind(HOST, 0) as address:
        PORT[:] = [
            address.getsockname()[1]
        ]  # a process may make the server again for tests that it took from another
        thread = threading.Thread(target=server.run, args=([address],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield made
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(served: dict[str, Served]) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"http://{HOST}:{PORT[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


@cache
def loaded_run(run: str) -> LoadedModel:
    return load(None, read_adapter(run))


def alone(run: str, prompt: str, most: int) -> str:
    """What the evaluation's own greedy loop says."""
    loaded = loaded_run(run)
    ids = [loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    return generate(loaded.model, loaded.tokenizer, ids, max_new_tokens=most)[0].text


def test_what_batches_serves_all_but_gates_of_whole_prompts(served: dict[str, Served]) -> None:
    assert {name: type(one.engine) for name, one in served.items()} == {
        "first": Batched, "whole": OneByOne, "paper": Batched,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first", "whole"])
def test_twenty_streams_at_once_have_what_each_has_alone(
    runs: dict[str, str], served: dict[str, Served], name: str
) -> None:
    async def ask(client: AsyncOpenAI, prompt: str) -> str:
        turns: Any = [{"role": "user", "content": prompt}]
        stream = await client.chat.completions.create(
            model=name, messages=turns, temperature=0, max_tokens=8, stream=True
        )
        return "".join([one.choices[0].delta.content or "" async for one in stream if one.choices])

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"http://{HOST}:{PORT[0]}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, one) for one in PROMPTS))

    expected = [alone(runs[name], f"<user>{one}<|end|><assistant>", 8) for one in PROMPTS]
    assert len(set(expected)) > 10
    assert asyncio.run(ask_all()) == expected


def test_a_whole_answer_says_why_it_ends_and_counts_its_tokens(client: OpenAI, runs: dict[str, str]) -> None:
    answer = client.completions.create(model="first", prompt="one two", temperature=0, max_tokens=6)
    text = alone(runs["first"], "one two", 6)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 6)
    stop = text[2:4]
    cut = client.completions.create(model="first", prompt="one two", temperature=0, max_tokens=6, stop=stop)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (text.partition(stop)[0], "stop")


def test_the_models_are_listed_by_the_names_of_their_runs(client: OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["first", "whole", "paper"]
    assert client.models.retrieve("whole").id == "whole"


def test_a_run_of_single_instructions_takes_one_user_turn(client: OpenAI, runs: dict[str, str]) -> None:
    user: Any = {"role": "user", "content": "hi"}
    said = client.chat.completions.create(model="paper", messages=[user], temperature=0, max_tokens=5)
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nhi\n\n### Response:\n"
    )
    assert said.choices[0].message.content == alone(runs["paper"], prompt, 5)
    with pytest.raises(APIStatusError, match="give one user message"):
        client.chat.completions.create(
            model="paper", messages=[user, {"role": "assistant", "content": "a"}, user]
        )


def test_each_request_draws_by_its_own_settings(client: OpenAI) -> None:
    def ask(**settings: Any) -> str:
        return (
            client.completions.create(model="first", prompt="one", max_tokens=12, **settings).choices[0].text
        )

    greedy = ask(temperature=0)
    assert ask(temperature=2, top_p=1e-6) == greedy
    assert ask(temperature=1e-44) == greedy
    assert len({ask(temperature=2) for _ in range(4)}) > 2


def post(path: str, body: str) -> tuple[int, dict[str, Any]]:
    with closing(http.client.HTTPConnection(HOST, PORT[0], timeout=30)) as connection:
        connection.request("POST", path, body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


@pytest.mark.parametrize(
    ("changes", "status", "code", "message"),
    [
        (
            {"model": "nope"},
            404,
            "model_not_found",
            "there is no model 'nope' here: this server has first, whole, paper",
        ),
        ({"prompt": "x" * 1100}, 400, "context_length_exceeded", "a prompt of 1100 tokens: this model"),
        ({"max_tokens": 1024}, 400, "context_length_exceeded", "and 1024 more are asked for"),
        ({"prompt": ["a", "b"]}, 400, None, "one prompt a request"),
        ({"prompt": [1, 257]}, 400, None, "outside 0..256"),
        ({"prompt": ""}, 400, None, "not empty"),
        ({"temperature": "hot"}, 400, None, "temperature is 'hot'"),
        ({"top_p": 0}, 400, None, "give a number above 0 to 1"),
        ({"max_tokens": 0}, 400, None, "at least 1"),
        ({"max_tokens": [1]}, 400, None, "max_tokens is [1]: give a whole number"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, None, "differ: give one"),
        ({"verbosity": "low"}, 400, None, "verbosity 'low' is not supported"),
        ({"seed": 1}, 400, None, "seed is not supported"),
        ({"n": 2}, 400, None, "n 2 is not supported"),
        ({"logprobs": 0}, 400, None, "logprobs 0 is not supported"),
        ({"stop": [""]}, 400, None, "none empty"),
        ({"stream": "yes"}, 400, None, "it must be a bool"),
        ({"temprature": 1}, 400, None, "did you mean"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(
    served: dict[str, Served], changes: dict[str, Any], status: int, code: str | None, message: str
) -> None:
    found, told = post("/v1/completions", json.dumps({"model": "first", "prompt": "a", **changes}))
    assert (found, told["error"]["code"]) == (status, code)
    assert message in told["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", '{"model": ', 400, "the body is not JSON"),
        ("completions", "[" * 100_000, 400, "the body is not JSON"),
        ("completions", "[]", 400, "must be a JSON object"),
        ("completions", '{"model": "first", "prompt": "\\ud800"}', 400, "surrogates not allowed"),
        ("completions", "x" * 2_000_001, 413, "the body has 2,000,001 bytes: give at most 2,000,000"),
        (
            "chat/completions",
            '{"model": "first", "messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}',
            400,
            "messages[0] must have",
        ),
        ("completions", '{"prompt": "a"}', 400, "model is missing"),
        ("completions", '{"model": "first"}', 400, "prompt is missing"),
        ("chat/completions", '{"model": "first", "messages": []}', 400, "at least one message"),
        (
            "chat/completions",
            '{"model": "first", "messages": [{"role": "user"}]}',
            400,
            "messages[0] must have",
        ),
        (
            "chat/completions",
            '{"model": "first", "messages": [{"role": "tool", "content": "x"}]}',
            400,
            "messages[0] has the role 'tool': give system, developer, user, assistant",
        ),
        ("nothing", "{}", 404, "Not Found"),
        ("models", "{}", 405, "Method Not Allowed"),
    ],
)
def test_a_malformed_request_is_told_what_is_wrong(
    served: dict[str, Served], path: str, body: str, status: int, message: str
) -> None:
    found, told = post(f"/v1/{path}", body)
    assert found == status
    assert message in told["error"]["message"]


@pytest.mark.parametrize("name", ["first", "whole"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_leaves_ends_its_request_and_no_other(
    client: OpenAI, served: dict[str, Served], name: str, stream: bool
) -> None:
    engine = served[name].engine
    model = engine._manager.model if isinstance(engine, Batched) else engine._model.get_base_model()
    passes: list[float] = []
    handle = model.register_forward_pre_hook(lambda *inputs: passes.append(time.monotonic()))
    with closing(http.client.HTTPConnection(HOST, PORT[0], timeout=30)) as connection:
        asked = {"model": name, "prompt": "a", "max_tokens": 1000, "temperature": 0, "stream": stream}
        connection.request("POST", "/v1/completions", json.dumps(asked))
        while not passes:
            time.sleep(0.01)
    other = client.completions.create(model=name, prompt="b", max_tokens=3, temperature=0)
    assert other.usage.completion_tokens == 3
    while time.monotonic() - passes[-1] < 0.5:
        time.sleep(0.05)
    handle.remove()
    assert not engine._live
    assert 4 <= len(passes) < 500


def test_runs_on_one_base_hold_its_weights_once(runs: dict[str, str], served: dict[str, Served]) -> None:
    first, other = served["first"].engine._manager.model, served["paper"].engine._manager.model
    assert first is not other
    assert first.lm_head.weight is other.lm_head.weight
