"""The files of an inspection: looked after before any work is done, then written whole or not at all."""

import json
import tempfile
from pathlib import Path

from moa_peft.errors import UsageError
from moa_peft.inspection.inspection import Inspection
from moa_peft.provenance import provenance
from moa_peft.training.output_folder import write_text


def check_outputs(out: Path, json_file: Path | None, png: Path | None) -> None:
    """See that all files can be written; folders that are missing are made.

    Raises:
        UsageError: If a name is not that of such a file, a folder cannot be made or written to, or matplotlib is missing.
    """
    for flag, file, suffix in (("--out", out, ".html"), ("--json", json_file, ".json")):
        if file is None:
            continue
        if file.is_dir() or file.suffix != suffix:
            raise UsageError(
                f"{flag} is {file}: give a file whose name ends in {suffix}, as in report{suffix}"
            )
        _check_folder(flag, file.parent)
    if png is not None:
        if png.suffix or png.is_file():
            raise UsageError(f"--png is {png}: give a folder, as in figures")
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise UsageError(
                "--png needs matplotlib: pip install 'moa-peft[report]', or leave it out"
            ) from error
        _check_folder("--png", png)


def write_outputs(
    found: Inspection, out: Path, json_file: Path | None, png: Path | None
) -> list[tuple[str, Path]]:
    """Write an inspection.

    Args:
        found: The inspection.
        out: The page.
        json_file: Where the statistics go; None for nowhere.
        png: The folder of figures; None for none.

    Returns:
        What was written, and where.
    """
    from moa_peft.inspection.html_report import as_object, page

    made = provenance()
    written = [("page", out)]
    html, statistics = page(found, made), json.dumps(as_object(found, made), allow_nan=False)
    write_text(out, html)
    if json_file is not None:
        write_text(json_file, statistics + "\n")
        written.append(("numbers", json_file))
    if png is not None:
        from moa_peft.inspection.figures import write_figures

        written += [("figure", one) for one in write_figures(found, png)]
    return written


def _check_folder(flag: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{flag}: {folder} cannot be written to ({error.strerror}): choose another folder"
        ) from error
