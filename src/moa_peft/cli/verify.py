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
    to its largest entry, greedy tokens that differ, and ok or FAIL. Exit code 0 only if every file holds (1e-4).

    Example: moa verify golden/*.safetensors
    """
    from moa_peft.official.verify import compare
    from moa_peft.quiet import quiet_libraries

    failed = False
    for path in files:
        with quiet_libraries():
            result = compare(path)
        failed |= not result.ok
        if as_json:
            row = {"file": str(path), "errors": result.errors, "failure": result.failure, "ok": result.ok}
            print(json.dumps(row), flush=True)
        else:
            print(result.line(), flush=True)
    if failed:
        raise typer.Exit(1)
