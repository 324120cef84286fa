"""Where and with what a run was made, for its row of results."""

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE_FILE = "moa_recipe.json"
"""What training leaves in an adapter's folder: the recipe, with the base model's name and the template."""

LIBRARIES = ("moa-peft", "torch", "transformers", "peft", "trl", "accelerate")


def provenance(*, cuda: bool | None = None) -> dict[str, Any]:
    """Say what is needed to repeat a run beside its recipe.

    Args:
        cuda: Whether it runs on a GPU; None for where there is one.

    Returns:
        ``versions``, ``commit`` and ``dirty`` (of the source checkout; None for an installed package), ``command`` (from
        `command_line`), ``device``, ``threads``, ``taken_at`` (UTC, ISO 8601).
    """
    import torch

    cuda = torch.cuda.is_available() if cuda is None else cuda
    commit = _git("rev-parse", "HEAD")
    # of the code alone: rows of results are tracked too
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", "src")
    return {
        "versions": {"python": platform.python_version()} | {one: version_of(one) for one in LIBRARIES},
        "commit": commit,
        "dirty": None if commit is None or changes is None else bool(changes),
        "command": command_line(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()}, {_instructions()})",
        "threads": torch.get_num_threads(),
        "taken_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """The command line of this process, of absolute paths the last part: where they lie is nobody else's."""
    return shlex.join(Path(one).name if Path(one).is_absolute() else one for one in sys.argv)


def _instructions() -> str:
    """What decides how fast a processor of its kind is: its vector instructions, and whether torch has fast bfloat16 on them."""
    import torch

    known = torch.backends.cpu.get_cpu_capability()
    return f"{known} with bfloat16" if has_fast_bfloat16() else known


def has_fast_bfloat16() -> bool:
    """Whether torch has fast products of bfloat16 on this processor, as its compiler asks."""
    import torch

    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def version_of(distribution: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", root, *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
