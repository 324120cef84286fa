"""`moa serve`: an OpenAI-compatible server for adapters."""

import os
import shlex
import sys
from pathlib import Path, PurePath
from typing import Annotated

import typer

from moa_peft.cli.overrides import ChatTemplate, Dtype, Model, ModelInitKwargs, parse_mapping
from moa_peft.errors import UsageError, unknown

ENGINES = ("auto", "vllm", "transformers")
_CPU_CACHE_GIB = "4"


def serve(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Adapter folders, or names on the hub.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    engine: Annotated[
        str,
        typer.Option(
            help="vllm, transformers or auto: vLLM where it is installed, for one run without other options of its model."
        ),
    ] = "auto",
    vllm_args: Annotated[
        str | None,
        typer.Option(help='Arguments for vLLM, in one text: "--max-model-len 2048 --api-key secret".'),
    ] = None,
    model: Model = None,
    template: ChatTemplate = None,
    dtype: Dtype = None,
    model_init_kwargs: ModelInitKwargs = None,
) -> None:
    """Serve adapters through OpenAI's API: /v1/models, /v1/completions, /v1/chat/completions, streamed or whole.

    Each run is a model of the name of its folder. Requests run together, each as if it were alone. Ctrl-C ends the server.

    \b
    Examples:
      moa serve runs/first
      moa serve runs/reviews runs/sums --port 8080
      moa serve runs/first --vllm-args "--max-model-len 2048"
    """  # noqa: D301  # the backspace keeps the lines of the examples apart
    from moa_peft.extras import is_installed, require

    names = _names(runs)
    if not 0 <= port < 65536:
        raise UsageError(f"--port is {port}: give one from 1 to 65535, or 0 for any that is free")
    if engine not in ENGINES:
        raise UsageError(unknown("engine", engine, ENGINES))
    is_plain = len(runs) == 1 and all(one is None for one in (model, template, dtype, model_init_kwargs))
    if vllm_args is not None and engine == "transformers":
        raise UsageError("--vllm-args are for vLLM, and --engine is transformers: leave one of them out")
    asked = "--engine vllm" if engine == "vllm" else None if vllm_args is None else "--vllm-args"
    if asked and len(runs) > 1:
        raise UsageError(f"vLLM serves one run, and {len(runs)} are given: leave {asked} out")
    if asked and not is_plain:
        raise UsageError(
            f"vLLM serves a run as it was trained: leave the options of its model, or {asked}, out"
        )
    if asked and not is_installed("vllm"):
        raise UsageError(
            f"{asked} needs vLLM, which is not installed: leave it out, or install vllm (on a CPU `make serve-env`)"
        )
    if asked or (engine == "auto" and is_plain and is_installed("vllm")):
        _go_on_as_vllm(names, host, port, _split(vllm_args or ""), must=asked is not None)
    for needed in ("uvicorn", "starlette"):
        require(needed, "moa serve without vLLM")
    from moa_peft.quiet import quiet_libraries
    from moa_peft.serving.served import load_served
    from moa_peft.serving.server import Server, bind

    init_kwargs = parse_mapping("--model-init-kwargs", model_init_kwargs)
    address = bind(host, port)
    print(f"loading {', '.join(runs)} ...", flush=True)
    with quiet_libraries():
        served = load_served(names, model, template, dtype, init_kwargs)
        for name, (one, reason) in served.items():
            why = f" ({reason})" if reason else ""
            print(f"{name}: up to {one.engine.room:,} tokens, {one.engine.name}{why}", flush=True)
        print(f"http://{host}:{address.getsockname()[1]}/v1 (Ctrl-C ends it)", flush=True)
        server = Server({name: one for name, (one, _) in served.items()})
        server.run([address])
    sys.stdout.flush()
    os._exit(0 if server.started else 1)  # a thread in the middle of a long prompt would keep the process


def _names(runs: list[str]) -> dict[str, str]:
    """Runs by the name of their folder.

    Raises:
        UsageError: If two have one name.
    """
    names: dict[str, str] = {}
    for run in runs:
        name = PurePath(run).name or Path(run).resolve().name
        if name in names:
            raise UsageError(f"{names[name]} and {run} would both be the model {name!r}: rename a folder")
        names[name] = run
    return names


def _split(vllm_args: str) -> list[str]:
    """The words of a text as a shell reads it.

    Raises:
        UsageError: If a quotation mark is not closed.
    """
    try:
        return shlex.split(vllm_args)
    except ValueError as error:
        raise UsageError(f"--vllm-args is {vllm_args!r}: {error}") from error


def _go_on_as_vllm(names: dict[str, str], host: str, port: int, more: list[str], *, must: bool) -> None:
    """Become vLLM's server of an only run; where vLLM cannot serve it and need not, say why.

    Raises:
        UsageError: If ``must`` and vLLM cannot serve the run.
    """
    import torch

    from moa_peft.data.base_loading import load_tokenizer
    from moa_peft.data.tokenization import paper_chat_template
    from moa_peft.evaluation.loading import read_adapter
    from moa_peft.serving.vllm.command import vllm_command
    from moa_peft.serving.vllm.folder import served_base, served_config

    ((name, run),) = names.items()
    adapter = read_adapter(run)
    try:
        served_config(adapter)
        base = served_base(adapter)
    except UsageError as error:
        if must:
            raise
        print(error, flush=True)
        return
    command = vllm_command(adapter.path, host, port)
    command += ["--served-model-name", name, "--dtype", str(base.init_kwargs["dtype"])]
    if adapter.tokenizer_path is None:
        command += ["--tokenizer", base.path]
        if revision := base.init_kwargs.get("revision"):
            command += ["--tokenizer-revision", str(revision)]
    if adapter.template == "paper":
        command += ["--chat-template", paper_chat_template(load_tokenizer(base, adapter.tokenizer_path))]
    # unless told, vLLM on a CPU wants 92 % of the memory, and stops where that is not free
    cache = {} if torch.cuda.is_available() else {"VLLM_CPU_KVCACHE_SPACE": _CPU_CACHE_GIB}
    os.execve(command[0], [*command, *more], {**cache, **os.environ})
