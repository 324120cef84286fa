import itertools
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from openai import APIError, OpenAI
from typer.testing import CliRunner

from moa_peft import extras
from moa_peft.cli import app, register_verbs
from moa_peft.serving.server import bind
from tiny_lm import save_adapter, save_base


def call(*words: str) -> str:
    if not app.registered_commands:
        register_verbs()
    return str(CliRunner().invoke(app, ["serve", *words]).exception)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a/run", "b/run"], "a/run and b/run would both be the model 'run'"),
        (["run", "--port", "70000"], "--port is 70000"),
        (["run", "--engine", "vlm"], "did you mean 'vllm'"),
        (["a", "b", "--engine", "vllm"], "vLLM serves one run, and 2 are given: leave --engine vllm out"),
        (["a", "--engine", "vllm", "--template", "chat"], "vLLM serves a run as it was trained"),
        (["a", "--engine", "vllm"], "--engine vllm needs vLLM, which is not installed"),
        (["a", "--vllm-args", "--seed 1"], "--vllm-args needs vLLM, which is not installed"),
        (["a", "--vllm-args", "--seed 1", "--engine", "transformers"], "leave one of them out"),
    ],
)
def test_what_cannot_be_served_is_refused(words: list[str], message: str) -> None:
    assert message in call(*words)


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """vLLM as if it were installed; gives the commands that take the place of this process, on a CPU."""
    started: list[list[str]] = []

    def start(program: str, command: list[str], environment: dict[str, str]) -> None:
        assert environment == {"VLLM_CPU_KVCACHE_SPACE": "4"} | dict(os.environ)
        started.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", start)
    monkeypatch.setattr(extras, "is_installed", lambda module: True)
    return started


@pytest.mark.parametrize("engine", ["auto", "vllm"])
def test_one_run_is_served_by_vllm_where_it_is_installed(
    tmp_path: Path, with_vllm: list[list[str]], engine: str
) -> None:
    run = str(save_adapter(tmp_path / "run", save_base(tmp_path / "base")))
    call(run, "--engine", engine, "--port", "81")
    (command,) = with_vllm
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    told = dict(itertools.pairwise(command))
    assert (told["--model"], told["--tokenizer"], told["--served-model-name"]) == (
        run,
        f"{tmp_path}/base",
        "run",
    )
    assert (told["--dtype"], told["--port"]) == ("float32", "81")


def test_arguments_for_vllm_follow_its_own(tmp_path: Path, with_vllm: list[list[str]]) -> None:
    run = str(save_adapter(tmp_path / "run", save_base(tmp_path / "base")))
    call(run, "--vllm-args", "--max-model-len 64 --api-key 'a b'")
    assert with_vllm[0][-4:] == ["--max-model-len", "64", "--api-key", "a b"]
    assert "No closing quotation" in call(run, "--vllm-args", "'")


@pytest.mark.parametrize("template", ["paper", "chat"])
def test_a_chat_with_vllm_has_the_template_of_the_training(
    tmp_path: Path, with_vllm: list[list[str]], template: str
) -> None:
    run = str(save_adapter(tmp_path / "run", save_base(tmp_path / "base"), template=template))
    call(run)
    told = dict(itertools.pairwise(with_vllm[0]))
    assert ("### Instruction" in told.get("--chat-template", "")) == (template == "paper")


def test_a_run_that_vllm_cannot_serve_is_served_without_it_unless_it_must(
    tmp_path: Path, with_vllm: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(
        save_adapter(tmp_path / "run", save_base(tmp_path / "base"), {"router": {"granularity": "instance"}})
    )
    assert "vLLM cannot serve" in call(run, "--engine", "vllm")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "moa serve without vLLM needs uvicorn" in call(run)
    assert not with_vllm


def test_a_port_that_is_taken_is_told_before_anything_is_loaded() -> None:
    with bind("127.0.0.1", 0) as taken:  # by a server that is still loading
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in call(
            "no/run", "--port", str(port)
        )
    assert "cannot listen at 127..0.0.1, port 0: " in call("no/run", "--host", "127..0.0.1", "--port", "0")


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "moa serve without vLLM needs uvicorn, which is not installed" in call("run", "--port", "0")
    assert "pip install -c constraints.txt '.[serve]'" in call("run", "--port", "0")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_ends_the_server_and_its_requests_within_five_seconds(
    tmp_path: Path, kind: signal.Signals
) -> None:
    base = save_base(
        tmp_path / "base", max_position_embeddings=100_000, vocab_size=256
    )  # no end token: no answer ends
    runs = [
        str(save_adapter(tmp_path / "one", base)),
        str(save_adapter(tmp_path / "two", base, {"router": {"granularity": "instance"}})),
    ]
    command = [sys.executable, "-c", "from moa_peft.cli import main; main()", "serve", *runs, "--port", "0"]
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
        ) as process,
        ExitStack() as at_the_end,
    ):
        at_the_end.callback(process.kill)  # a server that is left running would be waited for
        assert process.stdout is not None
        assert process.stderr is not None
        loading, one, two, address = [process.stdout.readline() for _ in range(4)]
        assert loading == f"loading {runs[0]}, {runs[1]} ...\n"
        assert "continuous batching\n" in one
        assert "generate, one request after another (its gates" in two
        found = re.match(r"http://127.0.0.1:\d+/v1", address)
        assert found is not None
        with OpenAI(base_url=found[0], api_key="none") as client:
            streams = [
                client.completions.create(model=one, prompt="a", max_tokens=20_000, stream=True)
                for one in ("one", "two")
            ]
            for stream in streams:
                next(iter(stream))
            process.send_signal(kind)
            start = time.monotonic()
            for stream in streams:
                with pytest.raises(APIError, match="the server is stopping"):
                    list(stream)
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - start < 5
        assert process.stderr.read() == ""
