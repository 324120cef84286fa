"""How the package is laid out: imports run one way, and the page on the architecture names what exists."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from moa_peft import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "moa_peft"
PAGE = ROOT / "docs" / "architecture.md"

ORDER = (
    ("cli",),
    ("study", "serving", "integrations"),
    ("inspection", "official", "bench"),
    ("evaluation", "training"),
    ("data", "mixture"),
)
"""The folders from top to bottom: each imports only from lower lines. `docs/architecture.md` shows the same."""

LEVEL = {folder: level for level, folders in enumerate(ORDER) for folder in folders}


def module_name(file: Path) -> str:
    parts = ("moa_peft", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def folder_of(module: str) -> str:
    """The folder of the package that a module lies in; "" for the files beside the folders."""
    parts = MODULES[module].relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imports_of(source: str) -> Iterator[str]:
    """The modules of the package that a file imports, in functions and for type checkers too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names if one.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for one in node.names:
                inside = f"{node.module}.{one.name}"
                yield inside if inside in MODULES else node.module


IMPORTS = {name: set(imports_of(file.read_text(encoding="utf-8"))) - {name} for name, file in MODULES.items()}
FOLDERS = sorted({folder_of(name) for name in MODULES} - {"", "autoload"})


def allowed(folder: str) -> set[str]:
    """The folders that a folder's own docstring lets it import."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")))
    found = re.search(r"^May import: (.+)\.$", docstring or "", re.MULTILINE)
    assert found, f"{folder}/__init__.py does not say what it may import"
    return set(re.findall(r"\w+", found[1])) & LEVEL.keys()


def test_no_module_imports_itself_by_way_of_others() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_what_lives_in_it_and_imports_only_what_it_says(folder: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")))
    assert docstring, f"{folder}/__init__.py does not say what lives there"
    assert len(docstring.splitlines()) == 3
    upwards = {one for one in allowed(folder) if LEVEL[one] <= LEVEL[folder]}
    assert not upwards, f"{folder} may not import {upwards}: they do not lie below it"
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        if folder_of(name) == folder
        for other in IMPORTS[name]
        if folder_of(other) not in {"", folder, *allowed(folder)}
    ]
    assert not wrong, "; ".join(wrong)


def test_the_files_beside_the_folders_import_no_folder() -> None:
    beside = [
        name for name in MODULES if folder_of(name) == "" and name not in ("moa_peft", "moa_peft.__main__")
    ]
    assert {folder_of(other) for name in beside for other in IMPORTS[name]} <= {""}


def test_no_module_takes_from_the_package_s_front_what_it_can_take_from_where_it_lives() -> None:
    """`moa_peft` itself imports what it exports, so a module that imports from it would close a circle."""
    assert {name for name in MODULES if "moa_peft" in IMPORTS[name]} <= {"moa_peft.autoload.sitecustomize"}


def definitions(file: Path) -> set[str]:
    """The functions, classes and methods of a file, methods as Class.method."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
    return found


ITEMS = [
    item
    for item in re.split(r"\n(?=\d+\. |- |\| |\n)", PAGE.read_text(encoding="utf-8") if PAGE.exists() else "")
    if ".py`" in item or "()`" in item
]


def file_named(name: str) -> Path:
    return ROOT / name if name.startswith(("tests/", "docs/")) else PACKAGE / name


@pytest.mark.parametrize("item", ITEMS)
def test_every_file_and_function_of_the_architecture_page_exists(item: str) -> None:
    """A function stands as `name()` or `Class.name()`, in a paragraph, list item or row that names its file."""
    files = [file_named(name) for name in re.findall(r"`([\w/.]+\.py)`", item)]
    assert all(one.is_file() for one in files), [str(one) for one in files if not one.is_file()]
    known = {name for file in files for name in definitions(file)}
    assert set(re.findall(r"`([\w.]+)\(\)`", item)) <= known


def test_the_architecture_page_shows_the_order_of_imports() -> None:
    shown = " -> ".join(", ".join(folders) for folders in ORDER)
    assert shown in PAGE.read_text(encoding="utf-8")


def test_package_citation_and_changelog_are_of_one_version() -> None:
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    released = re.search(
        r"^## ([\d.]+) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert cited
    assert released
    assert cited[1] == released[1] == __version__
