"""What training was told of the base model is what every verb loads: one training, then evaluate, chat, inspect, export."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from moa_peft.cli.chat import chat
from moa_peft.cli.evaluate import evaluate
from moa_peft.cli.export import export
from moa_peft.cli.inspect import inspect
from moa_peft.cli.train import ANY_FIELD, train
from moa_peft.data.row import Row
from moa_peft.errors import UsageError
from moa_peft.json_lines import read_rows
from tiny_lm import byte_tokenizer, save_adapter, save_base, save_hub, write_rows

PROGRAM = typer.Typer(pretty_exceptions_enable=False)
PROGRAM.command(context_settings=ANY_FIELD)(train)
for verb in (evaluate, chat, inspect, export):
    PROGRAM.command()(verb)

HALVED = """
from transformers import LlamaForCausalLM
class Halved(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda module, given, out: out / 2)
"""


def call(*words: object, said: str = "") -> Result:
    return CliRunner().invoke(PROGRAM, [str(one) for one in words], input=said, catch_exceptions=False)


@dataclass(kw_only=True)
class Told:
    """A base model, and what training is told of it."""

    model: str
    flags: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    """What later verbs must be told again."""
    remembered: Mapping[str, Any] = field(default_factory=dict)
    word: str = "why"


def hub_of_two_revisions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    kept = {"revision": "v1", "dtype": "float32", "commit": "1" * 40}
    flags = ("--model_init_kwargs", '{"revision": "v1"}')
    return Told(model=save_hub(folder / "hub", monkeypatch), flags=flags, remembered=kept)


def base_with_added_tokens(folder: Path, _: pytest.MonkeyPatch) -> Told:
    base, tokenizer = save_base(folder / "base"), byte_tokenizer()
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(base)
    flags = ("--mixture.modules_to_save", "[embed_tokens, lm_head]")
    return Told(model=str(base), flags=flags, word="<new>")


def with_config(base: Path, **changes: Any) -> Path:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    return base


def quantised_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """Ternary weights, the only kind that transformers needs neither a package nor a GPU for."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # what it compiles would take 20 s
    ternary = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    return Told(model=str(with_config(save_base(folder / "base"), quantization_config=ternary)))


def base_with_code_of_its_own(folder: Path, _: pytest.MonkeyPatch) -> Told:
    base = save_base(folder / "base")
    with_config(base, auto_map={"AutoModelForCausalLM": "modeling_halved.Halved"})
    (base / "modeling_halved.py").write_text(HALVED)
    trust = ("--model-init-kwargs", '{"trust_remote_code": true}')
    return Told(model=str(base), flags=trust, repeated=trust, remembered={"trust_remote_code": True})


def bfloat16_eager_and_relative(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    save_base(folder / "models" / "base")
    monkeypatch.chdir(folder)
    flags = ("--model_init_kwargs", '{"dtype": "bfloat16", "attn_implementation": "eager"}')
    kept = {"dtype": "bfloat16", "attn_implementation": "eager"}
    return Told(model="models/base", flags=flags, remembered=kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    "told_of",
    [
        hub_of_two_revisions,
        base_with_added_tokens,
        quantised_base,
        base_with_code_of_its_own,
        bfloat16_eager_and_relative,
    ],
)
def test_every_verb_loads_the_base_model_that_the_adapter_was_trained_on(
    told_of: Callable[[Path, pytest.MonkeyPatch], Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = told_of(tmp_path, monkeypatch)
    rows = [
        Row(instruction=f"{told.word} {n}?", input="", output=f"{told.word}{n}", answer="") for n in range(6)
    ]
    data, run = write_rows(tmp_path / "rows.json", rows), tmp_path / "run"
    call(
        "train", "--model", told.model, *told.flags, "--data", data, "--validation", data, "--output_dir", run,
        "--max_steps", 2, "--learning_rate", 0.05, "--warmup_steps", 0, "--use_cpu", "--disable_tqdm", "true",
    )  # fmt: skip
    (trained,) = read_rows(run / "results.jsonl")
    loss = pytest.approx(trained["validation_loss"], rel=5e-3 if "bfloat16" in str(told.flags) else 1e-5)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    call("evaluate", "--adapter", run, "--tasks", data, *told.repeated)
    (row,) = read_rows(run / "evaluation" / "results.jsonl")
    assert row["answer_loss"] == loss
    assert told.remembered.items() <= row["base_settings"].items()

    reply = call("chat", "--adapter", run, "--max-new-tokens", 2, *told.repeated, said="y\n")
    assert (reply.exit_code, reply.stdout.count("\n")) == (0, 1)

    call(
        "inspect",
        "--adapter",
        run,
        "--data",
        data,
        "--out",
        "a.html",
        "--json",
        "a.json",
        *told.repeated,
    )
    assert (
        json.loads(Path("a.json").read_text())["adapters"]["default"]["about"]["base_settings"]
        == row["base_settings"]
    )

    if "modules_to_save" not in str(told.flags):  # neither export has a place for them
        words = ("--data", data, "--held-out", data, "--json", *told.repeated)
        plain = json.loads(call("export", run, "--format", "lora", "--out", "plain", *words).stdout)
        assert plain["losses"]["mixture"] == loss
        assert call(
            "export",
            run,
            "--format",
            "official",
            "--out",
            "a.safetensors",
            "--layout",
            "fork",
            *told.repeated,
        )


def test_adapters_of_two_revisions_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hub(tmp_path / "hub", monkeypatch)
    base = tmp_path / "hub" / "models--org--tiny" / "snapshots" / ("1" * 40)
    for revision in ("v1", "main"):
        save_adapter(tmp_path / revision, base, model="org/tiny", model_init_kwargs={"revision": revision})
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("why?")
    words = ("inspect", "--adapter", tmp_path / "v1", "--compare", tmp_path / "main", "--prompts", prompts)
    message = "main was trained on org/tiny revision main, the first adapter runs on org/tiny revision v1"
    with pytest.raises(UsageError, match=message):
        call(*words, "--out", tmp_path / "a.html")
    assert (
        call(*words, "--out", tmp_path / "a.html", "--model-init-kwargs", '{"revision": "v1"}').exit_code == 0
    )


def test_code_beside_an_adapter_does_not_run_and_the_first_turn_is_not_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    byte_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text("raise SystemExit('the code ran')")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        UsageError, match=r"the tokenizer of .*adapter cannot be loaded: it has code of its own"
    ):
        call("chat", "--adapter", folder, said="y\nhello\n")


def test_an_option_in_a_file_is_a_mapping_and_one_that_is_none_is_refused(tmp_path: Path) -> None:
    base, rows = (
        save_base(tmp_path / "base"),
        write_rows(tmp_path / "rows.json", [Row(instruction="why?", input="", output="so", answer="")]),
    )
    (tmp_path / "e.yaml").write_text("model-init-kwargs:\n  attn_implementation: eager\n")
    words = ("evaluate", "--model", base, "--tasks", rows, "--out", tmp_path / "out")
    call(*words, "--config", tmp_path / "e.yaml")
    (row,) = read_rows(tmp_path / "out" / "results.jsonl")
    assert row["base_settings"] == {"dtype": "float32", "attn_implementation": "eager"}
    with pytest.raises(UsageError, match="--model-init-kwargs is 'v1': give a mapping"):
        call(*words, "--model-init-kwargs", "v1")
