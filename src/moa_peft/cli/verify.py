"""`moa verify`: reference parity."""

import json
from pathlib import Path
from typing import Annotated

import typer


def verify(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Reference files (*.safetensors).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a file instead.")] = False,
) -> None:
    """Compare our numbers with reference files of the official code.

    Prints one line a file: the largest absolute error of logits and loss, the largest error of any gradient relative
    to its largest entry, greedy tokens that differ, and ok or FAIL (1e-4). A line is marked (float64) or (rounding) where
    rounding in float32 had to be told from a mistake. A file that cannot be compared is an ERROR, with the reason, and the others
    go on.

    Exit code 0 if every file holds, 1 if one failed, 2 if one could not be compared.

    Example: moa verify reference/*.safetensors
    """
    from moa_peft.errors import UsageError
    from moa_peft.official.parity import compare
    from moa_peft.quiet import quiet_libraries

    code = 0
    for path in files:
        row = {"file": str(path), "errors": {}, "failure": "", "rule": None, "ok": False}
        try:
            with quiet_libraries():
                result = compare(path)
            row |= {"errors": result.errors, "rule": result.rule, "ok": result.ok}
            line = result.line()
            code = max(code, 0 if result.ok else 1)
        except UsageError as error:
            row["failure"], line, code = str(error), f"{path.name}  {error}  ERROR", 2
        print(json.dumps(row) if as_json else line, flush=True)
    if code:
        raise typer.Exit(code)
