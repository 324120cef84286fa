"""The help of the command must not wait for torch, and what runs must have the method."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from moa_peft import __version__

VERBS = (
    "train", "compare", "evaluate", "chat", "demo", "methods", "verify", "bench", "inspect", "import", "export", "exec",
)  # fmt: skip
HEAVY = ("torch", "peft", "transformers", "trl", "datasets", "numpy")


def run(script: str, *words: str, name: str = "moa") -> str:
    """Run a script as the command would: with the name of one that lies beside this Python."""
    command = str(Path(sys.executable).parent / name)
    before = f"import sys; sys.argv = {[command, *words]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", before + script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_help_imports_any_of_the_heavy_libraries() -> None:
    script = f"""
from moa_peft.cli import app, register_verbs
register_verbs()
for words in [[], *([verb] for verb in {VERBS})]:
    try:
        app([*words, "--help"])
    except SystemExit as end:
        assert end.code == 0, words
    print("heavy:", words, [name for name in {HEAVY} if name in sys.modules])
"""
    told = [line for line in run(script).splitlines() if line.startswith("heavy:")]
    assert len(told) == 1 + len(VERBS)
    assert [line for line in told if not line.endswith("[]")] == []


def test_the_versions_are_told_without_importing_what_they_are_of() -> None:
    script = f"""
from moa_peft.cli import app
try:
    app(["--version"])
except SystemExit as end:
    assert end.code == 0
assert not [name for name in {HEAVY} if name in sys.modules]
"""
    told = dict(line.split() for line in run(script).splitlines())
    assert told["moa-peft"] == __version__
    assert told["torch"] == version("torch")


@pytest.mark.slow
def test_the_command_registers_the_method_at_the_first_public_name_all_of_which_are_found() -> None:
    script = """
import moa_peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
print("MOA" in PEFT_TYPE_TO_CONFIG_MAPPING)
from moa_peft import MoAConfig
print(PEFT_TYPE_TO_CONFIG_MAPPING["MOA"] is MoAConfig)
print(all(getattr(moa_peft, name) is not None for name in moa_peft.__all__))
try:
    moa_peft.MoaConfig
except AttributeError as error:
    print(error)
"""
    missing = "module 'moa_peft' has no attribute 'MoaConfig'"
    assert run(script).splitlines() == ["False", "True", "True", missing], "the command defers it"


@pytest.mark.slow
def test_importing_the_package_registers_the_method_in_any_other_program() -> None:
    script = """
import moa_peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
print("MOA" in PEFT_TYPE_TO_CONFIG_MAPPING and PEFT_TYPE_TO_CONFIG_MAPPING["MOA"] is moa_peft.MoAConfig)
"""
    assert run(script, name="train.py").strip() == "True"
