# ruff: noqa: ARG001  # Sphinx gives its listeners more than they need
"""Settings of the documentation. Nothing is fetched while it is built, and nothing when it is read."""

import importlib.metadata
import re
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore", message=".*checkpointing.* is deprecated", category=FutureWarning)

project = "moa-peft"
author = "The moa-peft developers"
copyright = author  # noqa: A001  # Sphinx's name
release = version = importlib.metadata.version("moa-peft")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml"]
exclude_patterns = ["_build", "method_notes"]
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
default_role = "py:obj"
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
html_math_renderer = "mathml"

html_theme = "furo"
html_title = "moa-peft"
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sphinx = False

_MARK = re.compile(r"^\*\(`make docs` puts `(\w+)` here\.\)\*$", re.MULTILINE)


def _fill_in(app: Any, page: str, source: list[str]) -> None:
    """Replace every mark of a page by the reference that the package itself gives."""
    from reference import GENERATED

    source[0] = _MARK.sub(lambda mark: GENERATED[mark.group(1)](), source[0])


def _written_by_code(app: Any, env: Any, *changes: Any) -> list[str]:
    """The pages with marks: they depend on the package, so they are read again in every build."""
    return [
        page for page in env.found_docs if _MARK.search(Path(env.doc2path(page)).read_text(encoding="utf-8"))
    ]


_plain: dict[str, list[str]] = {}


def _keep(app: Any, what: str, name: str, *args: Any) -> None:
    """Put a field's doc line aside: napoleon would take what stands before a colon for a type."""
    if what in ("attribute", "property"):
        _plain[name] = list(args[-1])


def _put_back(app: Any, what: str, name: str, *args: Any) -> None:
    if name in _plain:
        args[-1][:] = _plain.pop(name)


def setup(app: Any) -> None:
    """Connect what fills in the generated parts, and what guards the fields' doc lines."""
    app.connect("autodoc-process-docstring", _keep, priority=400)  # napoleon is at 500
    app.connect("autodoc-process-docstring", _put_back, priority=600)
    app.connect("source-read", _fill_in)
    app.connect("env-get-outdated", _written_by_code)
