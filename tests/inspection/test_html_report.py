"""The page in a real browser, opened from disk: it works by mouse and by keyboard, asks nothing, and complains of nothing."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moa_peft.data.row import Row
from moa_peft.inspection.agreement import AgreementStatistics
from moa_peft.inspection.html_report import page
from moa_peft.inspection.inspection import inspect_model
from moa_peft.inspection.prompts import as_prompt, tokenise
from moa_peft.provenance import provenance
from tiny_lm import byte_tokenizer, tiny_llama, with_mixture

TEXTS = (
    "What is 7 times 8?",
    "<img src=x onerror=alert(1)> & <script>document.title='no'</script>",
    "a" * 30,
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NEEDS_BROWSER = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no chromium here; Debian's package has one"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    model, tokenizer = with_mixture(tiny_llama()), byte_tokenizer()
    rows = [Row(instruction=one, input="", output="", answer="") for one in TEXTS]
    texts = tokenise([as_prompt(one, "paper", tokenizer) for one in rows], tokenizer)
    found = inspect_model(
        model, texts, {"default": {"adapter": "runs/<i>first</i>", "config": {"a": "</pre>"}}}
    )
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page(found, provenance()), encoding="utf-8")
    return file, found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "CI installs chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield one
        one.close()


@pytest.fixture
def opened(request: pytest.FixtureRequest, browser: Any, report: tuple[Path, Any]) -> Iterator[Any]:
    """The page, light unless a test asks for dark; afterwards it must have asked for nothing and said nothing."""
    said: list[str] = []
    asked: list[str] = []
    scheme = getattr(request, "param", "light")
    tab = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 900})
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    tab.on("request", lambda one: asked.append(one.url))
    tab.goto(report[0].as_uri())
    yield tab
    assert said == []
    assert asked == [report[0].as_uri()]
    tab.close()


@NEEDS_BROWSER
def test_the_shown_gate_is_the_one_computed_in_python_for_every_choice(
    opened: Any, report: tuple[Path, Any]
) -> None:
    found = report[1]
    for number, layer, token in ((0, 1, 3), (1, 0, 130), (2, 1, 140)):
        prompt = found.prompts[number]
        opened.select_option("#prompt", str(number))
        opened.select_option("#layer", str(layer))
        for place, name in enumerate(("lora_q_proj", "lora_down_proj", "parallel_adapter", "prompt")):
            opened.select_option("#expert", name)
            opened.click(f'#tokens [data-token="{token}"]')
            gates = next(gates for where, gates in prompt.gates.items() if where.layer == layer)
            shown = opened.inner_text("#gate")
            assert float(shown) == pytest.approx(float(gates[token, place]), abs=0.0005 + 0.5 / 4095)
            title = opened.get_attribute(f'#tokens [data-token="{token}"]', "title")
            assert title.endswith(f"gate {shown}")
            assert f"{name} in layer {layer}" in opened.inner_text("#readout")


@NEEDS_BROWSER
def test_a_cell_of_the_heat_map_chooses_and_the_arrow_keys_move_on(opened: Any) -> None:
    opened.click('#heat [data-place="2,0"]')
    assert opened.input_value("#layer") == "0"
    assert opened.input_value("#expert") == "parallel_adapter"
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("ArrowUp")
    assert (opened.input_value("#layer"), opened.input_value("#expert")) == ("1", "lora_down_proj")
    assert opened.evaluate("document.activeElement.dataset.place") == "1,1"
    assert opened.get_attribute('#heat [data-place="1,1"]', "aria-pressed") == "true"
    assert opened.locator('#heat [tabindex="0"]').count() == 1
    opened.focus('#tokens [tabindex="0"]')
    before = int(opened.evaluate("document.activeElement.dataset.token"))
    opened.keyboard.press("ArrowRight")
    assert f"token {before + 1}," in opened.inner_text("#readout")


@NEEDS_BROWSER
def test_every_figure_is_drawn_and_markup_in_texts_is_inert(opened: Any) -> None:
    for measure in opened.eval_on_selector_all("#measure option", "all => all.map((one) => one.value)"):
        opened.select_option("#measure", measure)
        assert opened.locator("#heat td.cell").count() == 8
    opened.uncheck("#stretch")
    opened.click("#token-table summary")
    opened.wait_for_selector(
        "#token-table tbody tr"
    )  # the table is filled when the browser tells that it is open
    assert opened.locator("#token-table tbody tr").count() == opened.locator("#tokens > span").count()
    assert opened.locator("#curves svg").count() == 4
    opened.select_option("#prompt", "1")
    assert "<img src=x onerror=alert(1)>" in opened.inner_text("#tokens")
    assert opened.locator("img, i:not([aria-hidden])").count() == 0
    assert opened.title() == "What the router does"
    assert "runs/<i>first</i>" in opened.inner_text("header.top")


@NEEDS_BROWSER
def test_the_agreement_starts_at_a_figure_that_has_values(
    browser: Any, report: tuple[Path, Any], tmp_path: Path
) -> None:
    """Beside an instance router it showed the correlation of gates, of which there is none."""
    agreement = AgreementStatistics(
        layer=0, router="", names=("a",), gate_correlation=(None,), gate_difference=(None,), change_cka=(0.5,)
    )
    file = tmp_path / "report.html"
    found = dataclasses.replace(report[1], agreement=(agreement,))
    file.write_text(page(found, provenance()), encoding="utf-8")
    tab = browser.new_page()
    tab.goto(file.as_uri())
    assert tab.input_value("#agreement-measure") == "change_cka"
    assert tab.inner_text("#agreement td.cell") == ".50"
    tab.close()


@NEEDS_BROWSER
@pytest.mark.parametrize("opened", ["light", "dark"], indirect=True)
def test_words_can_be_read_on_every_shade(opened: Any) -> None:
    """Contrast of at least 4.5 to 1 in each cell, in light and dark."""
    ratios = opened.evaluate(
        """() => {
          const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
          const light = (colour) => {
            context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((one) => one / 255).map((one) => (one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          return [...document.querySelectorAll("#heat td.shade, #tokens .shade")].map((cell) => {
            const style = getComputedStyle(cell), [a, b] = [light(style.backgroundColor), light(style.color)];
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          });
        }"""
    )
    assert min(ratios) > 4.5


def test_the_page_names_nothing_outside_itself_and_allows_nothing(report: tuple[Path, Any]) -> None:
    text = report[0].read_text(encoding="utf-8")
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", text) == ["data:,", "#experts"]
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'" in text
    data = re.search(r'id="data">(.*?)</script>', text)
    assert data is not None
    assert not set("<>&") & set(data.group(1))
    assert json.loads(data.group(1))["prompts"][1]["start"].startswith("<img src=x")


@pytest.mark.slow
def test_the_page_and_the_numbers_in_the_documentation_are_of_one_inspection() -> None:
    folder = Path(__file__).parents[2] / "docs" / "static" / "inspect"
    numbers = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    text = (folder / "demo.html").read_text(encoding="utf-8")
    found = re.search(r'id="data">(.*?)</script>', text)
    assert found is not None
    shown = json.loads(found.group(1))["adapters"][0]["routers"]
    finding = numbers["adapters"]["default"]
    assert len(shown) == len(finding["routers"]) == 30
    for one, other in zip(shown, finding["routers"], strict=True):
        assert one["mean_gate"] == pytest.approx(other["mean_gate"], rel=1e-3)
    assert all(sentence in text for sentence in finding["sentences"])
    assert numbers["dirty"] is False
