"""What the README and the documentation say is so: their code runs, their commands exist, their tables are the package's."""

import importlib
import json
import re
import shlex
import socket
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
)
from typer.testing import CliRunner

from moa_peft import mixture_layers
from moa_peft.cli import app
from moa_peft.cli.overrides import load_yaml, parse_flags
from moa_peft.mixture.config import GATES
from moa_peft.mixture.experts import base, expert_kinds
from moa_peft.mixture.presets import PRESETS
from moa_peft.study.config import studies_of
from moa_peft.training.recipe import Recipe, build_peft_config, merge
from moa_peft.training.trainer_settings import check_trainer, switch_names, trainer_fields
from pictures import model_of, processor_of
from tiny_lm import save_base

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
READS_PICTURES = "HuggingFaceTB/SmolVLM-256M-Instruct"


sys.path.insert(0, str(ROOT / "docs"))
REFERENCE = importlib.import_module("reference")
METHODS = importlib.import_module("method_reference")
COSTS = importlib.import_module("costs")
COMMANDS = importlib.import_module("command_reference")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def with_blocks(language: str) -> list[Any]:
    return [pytest.param(page, id=page.name) for page in PAGES if blocks(page, language)]


def shell_lines(program: str) -> list[Any]:
    """Every call of a program in the shell blocks, as the words after the program's."""
    found: list[Any] = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == program:
                    found.append(pytest.param(words[1:], id=f"{page.name}: {' '.join(words)}"))
    return found


def verbs() -> list[str]:
    return sorted({call.values[0][0] for call in shell_lines("moa")})


def recipe_of(settings: dict[str, Any]) -> Recipe:
    """A recipe whose every field, of moa, of the mixture and of the trainer, is known and of its kind."""
    recipe = Recipe.from_mapping(settings, trainer_fields())
    check_trainer(recipe)
    build_peft_config(recipe)
    return recipe


@pytest.fixture
def tiny_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder of its own, no network, and a tiny model in the place of the one on the hub."""
    folders = {HUB_NAME: save_base(tmp_path / "base", chat=True), READS_PICTURES: tmp_path / "pictures"}
    model_of("idefics3").save_pretrained(folders[READS_PICTURES])
    processor_of("idefics3").save_pretrained(folders[READS_PICTURES])

    def instead(loader: Any) -> Any:
        return lambda name, **options: loader(folders.get(name, name), **options)

    def refuse(*words: object) -> None:
        raise AssertionError("the page's code went to the network")

    models = (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForImageTextToText)
    for one in (*models, AutoTokenizer, AutoProcessor):
        monkeypatch.setattr(one, "from_pretrained", instead(one.from_pretrained))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(base, "_KINDS", expert_kinds())  # what a page registers goes with the page
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize("page", with_blocks("python"))
def test_the_python_code_of_a_page_runs_from_top_to_bottom(
    page: Path, tiny_hub: None, capsys: pytest.CaptureFixture[str]
) -> None:
    session: dict[str, Any] = {"__name__": f"page_{page.stem}"}
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{page.name}, python block {number}", "exec"), session)
    if page.name == "README.md":
        assert sorted(one.name for one in Path("my-adapter").iterdir()) == [
            "README.md", "adapter_config.json", "adapter_model.safetensors",
        ]  # fmt: skip
        assert isinstance(session["model"], PeftModel)
        assert len(mixture_layers(session["model"])) == 2
        assert capsys.readouterr().out.startswith("The sky is blue because")


def test_a_kind_of_expert_written_as_the_documentation_shows_is_trained_and_saved(tiny_hub: None) -> None:
    session: dict[str, Any] = {"__name__": "page_extending"}
    for block in blocks(ROOT / "docs" / "extending.md", "python"):
        exec(block, session)
    names = set(mixture_layers(session["again"])[0][1].mixtures()["default"].names)
    assert names == {"rescale_k_proj", "rescale_v_proj", "rescale_down_proj", "lora_q_proj"}
    learned = [one.grad for name, one in session["model"].named_parameters() if name.endswith(".s")]
    assert len(learned) == 6
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in learned)


@pytest.mark.parametrize("words", shell_lines("moa"))
def test_a_command_of_a_page_exists_with_every_option_it_is_given(words: list[str]) -> None:
    commands = COMMANDS.command_group().commands
    assert words[0] in commands
    context = commands[words[0]].make_context(f"moa {words[0]}", words[1:])
    if words[0] == "train":
        config = context.params["config"]
        settings = load_yaml(ROOT / config) if config is not None else {}
        recipe_of(merge(settings, parse_flags(context.args, switch_names())))
    elif words[0] == "compare":
        studies_of(
            load_yaml(ROOT / context.params["config"]), parse_flags(context.args), context.params["domain"]
        )
    else:
        assert not context.args


@pytest.mark.parametrize("verb", verbs())
def test_a_verb_of_a_page_explains_itself(verb: str) -> None:
    COMMANDS.command_group()  # registers the verbs
    told = CliRunner().invoke(app, [verb, "--help"])
    assert told.exit_code == 0
    assert "Usage" in told.output


def test_the_command_methods_runs_and_lists_every_method() -> None:
    assert "methods" in verbs()
    COMMANDS.command_group()
    told = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "300"})
    assert told.exit_code == 0
    assert [name for name in PRESETS if f"{name}: " not in told.output] == []
    assert "site: top-k (keep 2) over the 8 copies, for each token, linear router" in told.output


def test_the_command_methods_tells_each_methods_routing_and_copies_to_machines() -> None:
    COMMANDS.command_group()
    rows = {row["method"]: row for row in json.loads(CliRunner().invoke(app, ["methods", "--json"]).output)}
    assert list(rows) == list(PRESETS)
    places = {
        name: [(one["scope"], one["granularity"], one["gate"], one["weighs"]) for one in row["routing"]]
        for name, row in rows.items()
    }
    assert places == {
        "soft-lora": [("block", "token", "sigmoid", "experts")],
        "soft-moa": [("block", "token", "sigmoid", "experts")],
        "sparse-moa": [("block", "token", "sigmoid", "experts")],
        "soft-moa-hydra": [
            ("block", "token", "sigmoid", "experts"), ("site", "token", "softmax", "3 copies"),
        ],
        "instance-moa": [("block", "instance", "sigmoid", "experts")],
        "unipeft": [("block", "instance", "sigmoid", "kinds")],
        "molora": [("site", "token", "softmax", "8 copies")],
        "hydralora": [("site", "token", "softmax", "8 copies")],
        "topk-moe-lora": [("site", "token", "top-k", "8 copies")],
        "adamole": [("site", "token", "threshold", "8 copies")],
        "lora": [],
        "parallel-adapter": [],
        "prompt-tuning": [],
    }  # fmt: skip
    assert rows["sparse-moa"]["routing"][0]["options"] == {"threshold": "learned"}
    assert rows["molora"]["experts"] == ["8 x lora at q_proj, k_proj, v_proj, o_proj, down_proj"]
    assert rows["lora"]["experts"] == ["lora at q_proj, k_proj, v_proj, o_proj, down_proj"]


@pytest.mark.parametrize("words", shell_lines("make"))
def test_a_make_target_of_a_page_exists(words: list[str]) -> None:
    (target,) = words
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_the_yaml_of_a_page_is_a_recipe(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
        recipe_of({"data": "rows.json", "output_dir": "run", **load_yaml(tmp_path / "recipe.yaml")})


@pytest.mark.parametrize("page", REFERENCE.TABLES)
def test_the_tables_of_a_page_are_generated(page: str) -> None:
    """`python docs/reference.py` writes them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert REFERENCE.with_tables(page, text) == text


def test_every_method_has_its_equations_in_the_documentation() -> None:
    assert sorted(one.stem for one in METHODS.METHOD_NOTES.glob("*.md")) == sorted(PRESETS)
    assert [name for name in PRESETS if METHODS.method_note(name).count("$$") not in (2, 4)] == []


def test_a_methods_note_has_its_numbers_counted_in() -> None:
    assert [name for name in PRESETS if "<!--" in METHODS.method_note(name)] == []
    note = METHODS.method_note("unipeft")
    assert "17,565,280" in note
    assert "131,104" in note  # 32 blocks of one gate of 4096 weights and a bias, dead in the official code


HIDDEN, INNER, KV, BLOCKS = 4096, 14336, 1024, 32
# Sizes of LLaMA-3.1-8B, and what the products of the equations make of them: an addition to the frozen model for each
# token, once in a long sequence and once in a decoding step, two operations for each weight that a token meets.
LORA_IN_AND_OUT = 4 * HIDDEN + INNER + (3 * HIDDEN + 2 * KV)  # of q, k, v, o, down
ADAPTER = 2 * HIDDEN * 16 + HIDDEN  # the second bias is a column of its product
PROMPT, PROMPT_PROJECTED = 2 * 10 * HIDDEN, 10 * HIDDEN * 2 * KV
COUNTED_BY_HAND = {
    "lora": (16 * LORA_IN_AND_OUT, 0),
    "parallel-adapter": (ADAPTER, 0),
    "prompt-tuning": (PROMPT, PROMPT_PROJECTED),
    "molora": (64 * LORA_IN_AND_OUT + 8 * (4 * HIDDEN + INNER), 0),
    "hydralora": (8 * (4 * HIDDEN + INNER) * 2 + 64 * (3 * HIDDEN + 2 * KV), 0),
    "sparse-moa": (8 * LORA_IN_AND_OUT + ADAPTER + 2 * HIDDEN * 24 + 24 * 6 + HIDDEN, 0),
    "soft-lora": (8 * (LORA_IN_AND_OUT + 2 * (HIDDEN + INNER)) + 7 * HIDDEN, 0),
    "soft-moa": (8 * LORA_IN_AND_OUT + ADAPTER + 2 * HIDDEN * 28 + 28 * 7 + PROMPT, PROMPT_PROJECTED),
}
"""By method: weights that each token meets in a block, and weights met once in each call that is no decoding step."""


@pytest.mark.parametrize("method", COUNTED_BY_HAND)
def test_the_operations_of_a_method_are_those_of_its_equations(method: str) -> None:
    added = COSTS.added_operations(method)
    for_each_token, for_each_call = COUNTED_BY_HAND[method]
    assert added.sequence == 2 * BLOCKS * (for_each_token + for_each_call / COSTS.SEQUENCE)
    assert added.decoding == 2 * BLOCKS * for_each_token  # what is met once a call is kept for the steps


def test_the_gates_of_an_instance_are_counted_once_and_not_in_a_decoding_step() -> None:
    instance, token = COSTS.added_operations("instance-moa"), COSTS.added_operations("soft-moa")
    router = 2 * BLOCKS * (2 * HIDDEN * 28 + 28 * 7)
    mean = 2 * BLOCKS * HIDDEN  # of the prompt's tokens, a product with their mask
    assert token.sequence - instance.sequence == router - router / COSTS.SEQUENCE - mean
    assert token.decoding - instance.decoding == router


def test_the_frozen_models_operations_are_two_for_each_weight_and_those_of_the_attention() -> None:
    in_blocks = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * INNER
    attention = 2 * COSTS.SEQUENCE * HIDDEN
    frozen = COSTS.frozen_operations().sequence
    assert frozen == 2 * (BLOCKS * (in_blocks + attention) + 128256 * HIDDEN)


def test_every_registered_gate_stands_in_the_documentation_with_its_source() -> None:
    rows = [row.split(" | ") for row in REFERENCE.gates().splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == [f"`{name}`" for name in GATES]
    assert [row[0] for row in rows if "arXiv" not in row[-1]] == []


@pytest.mark.parametrize("page", [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")])
def test_every_local_link_of_a_page_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / link).is_file()] == []


def test_the_picture_is_drawn_for_light_and_dark_pages_and_says_what_it_shows() -> None:
    file = ROOT / "docs" / "images" / "idea.svg"
    picture = ElementTree.parse(file).getroot()
    names = [one.tag.rpartition("}")[2] for one in picture]
    assert names[:3] == ["title", "desc", "style"]
    assert "prefers-color-scheme: dark" in file.read_text(encoding="utf-8")
    assert not re.search(r"(href|url\()\s*=?\s*[\"']?https?:", file.read_text(encoding="utf-8"))
