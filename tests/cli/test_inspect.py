"""`moa inspect` from end to end on a tiny model, and what it says of wrong use."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner, Result

from moa_peft import MoAConfig, mixture_layers
from moa_peft.cli.inspect import inspect
from moa_peft.errors import UsageError
from moa_peft.mixture.presets import PRESETS
from tiny import awaken
from tiny_lm import choice_rows, save_adapter, save_base, write_rows

PROGRAM = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
PROGRAM.command()(inspect)
PROMPTS = "What is 7 times 8?\n\nWho <b>wrote</b> it? <script>alert(1)</script>\n  7 + 5 & 3  \n"


def call(*words: object) -> Result:
    return CliRunner().invoke(PROGRAM, [str(one) for one in words], catch_exceptions=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "run", base, model=str(base), template="paper", method="soft-moa", seed=3)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text(PROMPTS)
    return file


def page_data(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert found is not None
    return json.loads(found.group(1))


def shown_gates(text: str, experts: int) -> torch.Tensor:
    """Two letters of base 64 a gate, as the page's script reads them."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    pairs = [text[place : place + 2] for place in range(0, len(text), 2)]
    levels = [64 * letters.index(pair[0]) + letters.index(pair[1]) for pair in pairs]
    return torch.tensor(levels).view(-1, experts) / 4095


def recomputed(folder: Path, base: Path, ids: list[int]) -> dict[tuple[int, str], torch.Tensor]:
    """Each router's gates for one text alone, without padding."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
    gates: dict[tuple[int, str], torch.Tensor] = {}
    for layer, (_, one) in enumerate(mixture_layers(model)):
        one.observer = lambda record, layer=layer: gates.update({(layer, record.router): record.gates[0]})
    with torch.no_grad():
        model(torch.tensor([ids]))
    return gates


def test_the_files_hold_what_the_model_says(tmp_path: Path, base: Path, adapter: Path, prompts: Path) -> None:
    out, numbers = tmp_path / "new" / "report.html", tmp_path / "stats.json"
    done = call("--adapter", adapter, "--prompts", prompts, "--out", out, "--json", numbers)
    assert done.exit_code == 0
    assert f"page    {out}" in done.stdout
    data = page_data(out)
    assert [one["start"] for one in data["prompts"]] == [
        "What is 7 times 8?",
        "Who <b>wrote</b> it? <script>alert(1)</script>",
        "7 + 5 & 3",
    ]
    stats = json.loads(numbers.read_text())
    assert stats["num_prompts"] == 3
    assert stats["num_tokens"] == sum(len(one["pieces"]) for one in data["prompts"])
    finding = stats["adapters"]["default"]
    assert finding["about"]["method"] == "soft-moa"
    assert finding["sentences"][0] in done.stdout
    assert stats["commit"] is None or len(stats["commit"]) == 40
    from tiny_lm import byte_tokenizer

    for prompt in data["prompts"]:
        text = "".join(prompt["pieces"])
        assert "### Instruction:\n" in text
        kinds = {data["classes"][kind] for kind in prompt["classes"]}
        assert kinds >= {"template", "word" if "W" in text[80:] and "7 + 5" not in text else "number"}
        gates = recomputed(adapter, base, byte_tokenizer()(text)["input_ids"])
        for router, encoded in zip(finding["routers"], prompt["gates"][0], strict=True):
            expected = gates[router["layer"], router["router"]]
            torch.testing.assert_close(
                shown_gates(encoded, len(router["names"])), expected, atol=0.5 / 4095 + 1e-6, rtol=0
            )
    parameters = {part: total for part, _, total in finding["about"]["parameters"]}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    held = sum(one.numel() for name, one in model.named_parameters() if "moa_mixture" in name)
    assert sum(parameters.values()) == held
    assert {path.name for path in tmp_path.iterdir()} == {
        "base", "run", "prompts.txt", "new", "stats.json"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["soft-moa", "unipeft", "adamole", "lora"])
def test_every_kind_of_method_has_its_page(tmp_path: Path, base: Path, prompts: Path, method: str) -> None:
    changes: dict[str, Any] = {}
    if method == "adamole":  # one of its five sites, three of its eight copies
        (experts,) = PRESETS[method].experts
        changes["experts"] = [{**experts.to_dict(), "targets": ["q_proj"], "num_experts": 3}]
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), MoAConfig.preset(method, **changes))
    awaken(model)
    model.save_pretrained(str(tmp_path / "run"))
    out, png = tmp_path / "report.html", tmp_path / "figures"
    drawn_too = [] if method == "unipeft" else ["--png", png]  # they take time
    call("--adapter", tmp_path / "run", "--model", base, "--prompts", prompts, "--out", out, *drawn_too)
    data = page_data(out)
    assert {one["layer"] for one in data["adapters"][0]["groups"]} == {0, 1}
    routed = bool(data["adapters"][0]["routers"])
    assert routed == (method != "lora")
    if drawn_too:
        drawn = {file.name for file in png.iterdir()}
        assert any(name.endswith("gates.png") for name in drawn) == routed
        assert any(name.endswith("changes.png") for name in drawn)
        assert all(file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for file in png.iterdir())


def test_two_adapters_stand_side_by_side_and_one_agrees_with_itself(
    tmp_path: Path, base: Path, adapter: Path, prompts: Path
) -> None:
    words = [
        "--adapter",
        adapter,
        "--prompts",
        prompts,
        "--json",
        tmp_path / "n.json",
        "--out",
        tmp_path / "r.html",
    ]
    call(*words, "--compare", adapter)
    same = json.loads((tmp_path / "n.json").read_text())
    assert list(same["adapters"]) == ["default", "compare"]
    one, other = (same["adapters"][name]["routers"] for name in same["adapters"])
    assert one == other
    for layer in same["agreement"]:
        assert layer["gate_correlation"] == pytest.approx([1] * len(layer["names"]))
        assert layer["gate_difference"] == [0] * len(layer["names"])
        assert layer["change_cka"] == pytest.approx([1] * len(layer["names"]))
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), MoAConfig.preset("molora"))
    awaken(model)
    model.save_pretrained(str(tmp_path / "other"))
    (tmp_path / "other" / "moa_recipe.json").write_text(json.dumps({"model": str(base)}))
    alone = json.loads((tmp_path / "n.json").read_text())["adapters"]["default"]
    call(*words, "--compare", tmp_path / "other")
    both = json.loads((tmp_path / "n.json").read_text())
    assert both["adapters"]["default"]["routers"] == alone["routers"]
    assert {one["router"] for one in both["adapters"]["compare"]["routers"]} >= {"lora_q_proj"}
    assert len(page_data(tmp_path / "r.html")["adapters"]) == 2


def test_rows_are_prompts_too_with_a_template_or_without(tmp_path: Path, adapter: Path) -> None:
    rows = write_rows(tmp_path / "rows.json", choice_rows(4))
    out = tmp_path / "r.html"
    call("--adapter", adapter, "--data", rows, "--limit", 2, "--template", "none", "--out", out)
    data = page_data(out)
    assert ["".join(one["pieces"]) for one in data["prompts"]] == [one.instruction for one in choice_rows(2)]
    assert all(data["classes"][kind] != "template" for one in data["prompts"] for kind in one["classes"])
    with pytest.raises(UsageError, match=r"split 'test' was asked for, and .*rows\.json is one file"):
        call("--adapter", adapter, "--data", rows, "--split", "test", "--out", out)


def test_markup_in_a_prompt_is_text_everywhere(tmp_path: Path, adapter: Path, prompts: Path) -> None:
    call("--adapter", adapter, "--prompts", prompts, "--out", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<b>" not in text
    assert "<script>alert" not in text
    assert "\\u003cscript\\u003ealert(1)" in text


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"--prompts .*p\.txt is empty: write a prompt on each line"),
        (b"\n  \n", "is empty"),
        (b"\xff\xfe\x00", "is not text in UTF-8: invalid start byte at byte 0"),
        (b"PK\x03\x04\0\0", "is not text: it holds zero bytes"),
        (b"short\n" + b"x" * 1100, "prompt 2 takes 1[0-9]{3} tokens, the model reads 1024"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_and_nothing_is_written(
    tmp_path: Path, adapter: Path, content: bytes, match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        call(
            "--adapter",
            adapter,
            "--prompts",
            write(tmp_path / "p.txt", content),
            "--out",
            tmp_path / "r.html",
        )
    assert not list(tmp_path.glob("*.html*"))


def test_a_json_file_of_something_else_is_left_alone(tmp_path: Path, adapter: Path) -> None:
    prompts, out = write(tmp_path / "p.txt", b"Hello."), tmp_path / "r.html"
    other = adapter / "adapter_config.json"
    before = other.read_bytes()
    with pytest.raises(UsageError, match=r"adapter_config\.json exists and is no inspection"):
        call("--adapter", adapter, "--prompts", prompts, "--out", out, "--json", other)
    assert other.read_bytes() == before
    for _ in range(2):  # one of its own is replaced
        call("--adapter", adapter, "--prompts", prompts, "--out", out, "--json", tmp_path / "r.json")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "give either --prompts FILE, a prompt on each line, or --data NAME"),
        (["--prompts", "p", "--data", "demo"], "give either --prompts FILE"),
        (["--prompts", "missing.txt"], "--prompts missing.txt does not exist: give a text file"),
        (["--prompts", "."], "--prompts . is a folder"),
        (["--prompts", "/dev/zero"], "--prompts /dev/zero is no file"),
        (["--prompts", "p", "--limit", 0], "--limit is 0: give at least 1"),
        (["--prompts", "p", "--template", "papr"], "unknown template 'papr': did you mean 'paper'"),
        (["--prompts", "p", "--out", "report"], "--out is report: give a file whose name ends in .html"),
        (["--prompts", "p", "--json", "x.txt"], "--json is x.txt: give a file whose name ends in .json"),
        (["--prompts", "p", "--png", "x.png"], "--png is x.png: give a folder"),
        (["--prompts", "p", "--out", "/proc/nowhere/r.html"], "--out: /proc/nowhere cannot be written to"),
    ],
)
def test_wrong_use_is_said_before_anything_is_loaded(
    tmp_path: Path, adapter: Path, words: list[Any], match: str
) -> None:
    out = [] if "--out" in words else ["--out", tmp_path / "r.html"]
    with pytest.raises(UsageError, match=match):
        call("--adapter", adapter, *out, *words)
    assert not (tmp_path / "r.html").exists()


def test_png_without_matplotlib_says_what_to_install(
    tmp_path: Path, adapter: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(
        UsageError, match=r"--png needs matplotlib: .*pip install -c constraints.txt '.\[report\]'"
    ):
        call(
            "--adapter",
            adapter,
            "--prompts",
            prompts,
            "--out",
            tmp_path / "r.html",
            "--png",
            tmp_path / "png",
        )
    assert not (tmp_path / "png").exists()


def test_an_adapter_that_is_no_mixture_is_refused(
    tmp_path: Path, base: Path, adapter: Path, prompts: Path
) -> None:
    plain = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    plain.save_pretrained(str(tmp_path / "plain"))
    words = ["--prompts", prompts, "--out", tmp_path / "r.html"]
    with pytest.raises(UsageError, match="the model has no mixture of adapters"):
        call("--adapter", tmp_path / "plain", "--model", base, *words)
    (tmp_path / "plain" / "moa_recipe.json").write_text(json.dumps({"model": str(base)}))
    with pytest.raises(UsageError, match=r"plain cannot be loaded onto .*base: Cannot combine"):
        call("--adapter", adapter, "--compare", tmp_path / "plain", *words)
    assert not (tmp_path / "r.html").exists()


def test_a_second_adapter_of_another_base_or_another_shape_is_refused(
    tmp_path: Path, base: Path, adapter: Path, prompts: Path
) -> None:
    words = ["--adapter", adapter, "--prompts", prompts, "--out", tmp_path / "r.html"]
    second = save_adapter(tmp_path / "second", base, model="elsewhere")
    with pytest.raises(UsageError, match="second was trained on elsewhere, the first adapter runs on"):
        call(*words, "--compare", second)
    call(*words, "--compare", second, "--model", base)  # the user knows that it is the same
    wide = save_base(tmp_path / "wide", hidden_size=64)
    third = save_adapter(tmp_path / "third", wide, model=str(base))
    with pytest.raises(UsageError, match="adapter 'compare' does not fit this model"):
        call(*words, "--compare", third)
