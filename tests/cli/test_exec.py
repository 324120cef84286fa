import os
import subprocess
import sys
from pathlib import Path

import pytest

from moa_peft.cli.exec_ import AUTOLOAD, exec_, with_autoload
from moa_peft.errors import UsageError
from moa_peft.extras import EXTRAS, require


def run(code: str, environment: dict[str, str], *flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.slow
def test_a_process_knows_the_method_as_soon_as_it_imports_peft_and_pays_nothing_before() -> None:
    """Libraries look for PEFT's spec before they import it, so the hook must be in every spec that is found."""
    code = (
        "import sys, importlib.util\n"
        "assert 'moa_peft' not in sys.modules and 'peft' not in sys.modules\n"
        "importlib.util.find_spec('peft'); importlib.util.find_spec('peft')\n"
        "import transformers\n"
        "assert 'moa_peft' not in sys.modules, 'it was imported before it was needed'\n"
        "import peft\n"
        "print(peft.PeftType('MOA').value, 'MOA' in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)\n"
        "print(peft.__spec__.name, peft.__spec__.submodule_search_locations == list(peft.__path__))\n"
        "import importlib; assert importlib.resources.files('peft').is_dir()"
    )
    done = run(code, with_autoload(os.environ))
    assert (done.returncode, done.stdout.split()) == (0, ["MOA", "True", "peft", "True"]), done.stderr
    assert not done.stderr


@pytest.mark.slow
def test_children_inherit_it_and_the_machines_own_module_of_that_name_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.ran = True\n")
    environment = with_autoload(os.environ)
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    child = "import sys, peft; print(sys.ran, peft.PeftType('MOA').value)"
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}], check=True)"
    assert run(code, environment).stdout.split() == ["True", "MOA"]


def test_a_python_without_this_package_says_so_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "peft.py").write_text("here = 1\n")
    environment = {"PYTHONPATH": os.pathsep.join([str(AUTOLOAD), str(tmp_path)])}
    done = run("import peft; print(peft.here)", environment, "-S")
    assert done.stdout.split() == ["1"], done.stderr
    # without the site module nothing is installed and no sitecustomize runs: import it as the site module would
    done = run("import sitecustomize, peft; print(peft.here)", environment, "-S")
    assert done.stdout.split() == ["1"]
    assert "has no moa-peft: its adapters are unknown here" in done.stderr


def test_the_folder_and_the_programs_beside_the_interpreter_come_first_once() -> None:
    once = with_autoload({"PATH": "/bin", "PYTHONPATH": "/mine", "HOME": "/h"})
    assert once["PYTHONPATH"] == f"{AUTOLOAD}{os.pathsep}/mine"
    assert once["PATH"] == f"{Path(sys.executable).parent}{os.pathsep}/bin"
    assert with_autoload(once) == once
    assert with_autoload({})["PYTHONPATH"] == str(AUTOLOAD)


def test_a_command_takes_the_place_of_this_process_with_its_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda *words: calls.append(words))
    exec_(["python", "-c", "pass"])
    ((program, words, environment),) = calls
    assert Path(program).parent == Path(sys.executable).parent
    assert words == [program, "-c", "pass"]
    assert environment["PYTHONPATH"].startswith(str(AUTOLOAD))


def test_a_command_that_is_missing_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *words, **options: None)
    with pytest.raises(UsageError, match="there is no command 'nosuch': give the path of a program"):
        exec_(["nosuch"])
    with pytest.raises(
        UsageError, match=r"there is no command 'lm-eval': .*pip install -c constraints.txt '.\[eval\]'"
    ):
        exec_(["lm-eval"])


def test_a_script_whose_interpreter_is_gone_is_named_with_what_helps(tmp_path: Path) -> None:
    script = tmp_path / "moved"
    script.write_text("#!/nosuch/python\n")
    script.chmod(0o755)
    with pytest.raises(UsageError, match=r"moved cannot be run: No such file .* install it again"):
        exec_([str(script)])


@pytest.mark.parametrize("module", EXTRAS["eval"])
def test_a_missing_module_of_an_extra_is_named_with_what_brings_it(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UsageError, match=rf"scoring needs {module}.*: .*pip install -c constraints.txt '.\[eval\]'"
    ):
        require(module, "scoring")


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_a_command_of_trl_that_would_train_plain_lora_is_refused_before_it_runs(command: str) -> None:
    with pytest.raises(UsageError, match=f"trl {command} trains the whole model, or plain LoRA"):
        exec_(["trl", command, "--model_name_or_path", "m", "--use_peft"])
