"""Paths as users write them."""

from pathlib import Path


def expanded(path: str | Path) -> Path:
    """Write a leading ``~`` out; that of a user whom nobody knows stays, and is then found missing like any other."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
