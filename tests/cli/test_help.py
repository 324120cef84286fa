"""The help of the command must not wait for torch, and what runs must have the method."""

import subprocess
import sys
from pathlib import Path

import pytest

VERBS = (
    "train",
    "compare",
    "evaluate",
    "chat",
    "demo",
    "methods",
    "verify",
    "bench",
    "inspect",
    "import",
    "export",
    "exec",
)
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


@pytest.mark.parametrize("words", [(), *((verb,) for verb in VERBS)], ids=["moa", *VERBS])
def test_help_imports_none_of_the_heavy_libraries(words: tuple[str, ...]) -> None:
    script = f"""
from moa_peft.cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 0
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert run(script, *words, "--help").splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["moa", "other"])
def test_a_public_name_registers_the_method(name: str) -> None:
    script = """
from moa_peft import MoAConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
print(PEFT_TYPE_TO_CONFIG_MAPPING["MOA"] is MoAConfig)
"""
    assert run(script, name=name).strip() == "True"


def test_importing_the_package_registers_the_method_in_any_other_program() -> None:
    script = """
import moa_peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
print("MOA" in PEFT_TYPE_TO_CONFIG_MAPPING)
"""
    assert run(script, name="train.py").strip() == "True"
    assert run(script).strip() == "False", "the command defers it"


def test_every_public_name_is_found_and_no_other() -> None:
    script = """
import moa_peft
print(all(getattr(moa_peft, name) is not None for name in moa_peft.__all__))
try:
    moa_peft.MoaConfig
except AttributeError as error:
    print(error)
"""
    assert run(script).splitlines() == ["True", "module 'moa_peft' has no attribute 'MoaConfig'"]
