"""`moa inspect`: what the router does, on one page."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from moa_peft.cli.overrides import Dtype, Model, ModelInitKwargs, parse_mapping
from moa_peft.errors import UsageError, unknown

if TYPE_CHECKING:
    from moa_peft.data.row import Row

TEMPLATES = ("paper", "chat", "none")


def inspect(
    adapter: Annotated[str, typer.Option(help="Adapter folder, or its name on the hub.")],
    out: Annotated[
        Path, typer.Option(help="The page to write, a .html file; one that is there is replaced.")
    ],
    prompts: Annotated[Path | None, typer.Option(help="Text file with a prompt on each line.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows whose questions are the prompts; what moa train takes as data.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of --data. Default: validation.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many prompts, from the start.")] = None,
    compare: Annotated[
        str | None, typer.Option(help="A second adapter on the same base, for the same prompts.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every number to this .json file as well.")
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(help="Write the figures as PNG files into this folder as well; needs matplotlib."),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="paper, chat or none (the prompts alone). Default: what the adapter was trained with, else paper."
        ),
    ] = None,
    model: Model = None,
    batch_size: Annotated[
        int, typer.Option(help="Most prompts in a forward pass; no number depends on it.")
    ] = 8,
    dtype: Dtype = None,
    model_init_kwargs: ModelInitKwargs = None,
) -> None:
    """Show what the router and the experts of an adapter do on real prompts.

    Writes one page that opens from disk and loads nothing: every expert in every layer, the tokens of the prompts with
    their gates, thresholds, loads, how alike the experts are, and in two sentences what stands out.

    \b
    Examples:
      moa inspect --adapter runs/first --data demo --limit 20 --out report.html
      moa inspect --adapter runs/first --prompts questions.txt --out report.html --json stats.json
      moa inspect --adapter runs/seed0 --compare runs/seed1 --data demo --limit 20 --out both.html
    """  # noqa: D301  # the backspace keeps the lines of the examples apart
    from moa_peft.evaluation.loading import add_adapter, choose_template, load, read_adapter
    from moa_peft.inspection.html_report import check_outputs

    check_outputs(out, json_file, png)
    folders = [read_adapter(one) for one in (adapter, compare) if one is not None]
    chosen = choose_template(template, folders[0], "paper")
    if chosen not in TEMPLATES:
        raise UsageError(unknown("template", chosen, TEMPLATES))
    if template is None and len({one.template or "paper" for one in folders}) > 1:
        print(
            f"note    both read the prompts in the template {chosen!r}; one was trained with another",
            file=sys.stderr,
        )
    rows = _rows(prompts, data, split, limit)

    if batch_size < 1:
        raise UsageError(f"--batch-size is {batch_size}: give at least 1")
    from tqdm import tqdm

    from moa_peft.inspection.html_report import write_outputs
    from moa_peft.inspection.inspection import SECOND, about_adapter, check_same_base, inspect_model
    from moa_peft.inspection.prompts import as_prompt, tokenise
    from moa_peft.quiet import quiet_libraries

    init_kwargs = parse_mapping("--model-init-kwargs", model_init_kwargs)
    with quiet_libraries():
        if len(folders) > 1:
            check_same_base(folders[0], folders[1], model, init_kwargs)
        loaded = load(model, folders[0], dtype=dtype, init_kwargs=init_kwargs)
        names = ["default", SECOND][: len(folders)]
        for name, folder in zip(names[1:], folders[1:], strict=True):
            add_adapter(loaded.model, folder, name)
        shown_as = cast("Any", None if chosen == "none" else chosen)
        texts = tokenise([as_prompt(one, shown_as, loaded.tokenizer) for one in rows], loaded.tokenizer)
        about = {
            name: about_adapter(loaded.model, name, folder, loaded.base_model)
            | {"base_settings": loaded.base_settings}
            | {"prompts": str(prompts or data), "template": chosen}
            for name, folder in zip(names, folders, strict=True)
        }
        with tqdm(total=len(texts), unit="prompt", file=sys.stderr) as bar:
            found = inspect_model(loaded.model, texts, about, batch_size=batch_size, progress=bar.update)
    written = write_outputs(found, out, json_file, png)
    for name, finding in found.findings.items():
        prefix = f"{about[name]['adapter']}: " if len(names) > 1 else ""
        for sentence in finding.sentences:
            print(prefix + sentence)
    for what, path in written:
        print(f"{what:<8}{path}")


def _rows(prompts: Path | None, data: str | None, split: str | None, limit: int | None) -> "list[Row]":
    from moa_peft.data.loading import load_rows, refuse_split_of_file
    from moa_peft.data.row import Row
    from moa_peft.inspection.prompts import read_prompts

    if (prompts is None) == (data is None):
        raise UsageError(
            "give either --prompts FILE, a prompt on each line, or --data NAME, as in --data demo"
        )
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}: give at least 1, or leave it out to read all prompts")
    if data is not None:
        if split is not None:
            refuse_split_of_file(data, split)
        return load_rows(data, split=split or "validation", limit=limit)
    assert prompts is not None, "one of both is given"
    return [Row(instruction=one, input="", output="", answer="") for one in read_prompts(prompts)[:limit]]
