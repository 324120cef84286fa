"""Registers the method with PEFT in any Python process whose PYTHONPATH holds this folder; `moa exec` puts it there.

PEFT has no entry point for methods from outside, so an adapter of this package is unknown to a tool that does not
import it. Python imports a module of this name at every start. It costs next to nothing where PEFT is not imported:
all that is done at once is to watch for that import.
"""

import importlib.machinery
import importlib.util
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_HERE = os.path.dirname(os.path.abspath(__file__))


class _AfterPeft:
    """Loads PEFT as its own loader does, and then this package, which registers the method."""

    def __init__(self, loader: "Loader") -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        return self._loader.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        self._loader.exec_module(module)
        try:
            import moa_peft  # noqa: F401
        except ModuleNotFoundError as error:
            if error.name != "moa_peft":
                raise
            print(
                f"moa exec: {sys.executable} has no moa-peft: its adapters are unknown here", file=sys.stderr
            )


class _PeftFinder:
    """Puts `_AfterPeft` into every spec of PEFT that is asked for: libraries look for one before they import it."""

    @classmethod
    def find_spec(
        cls, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != "peft":
            return None
        for finder in sys.meta_path:
            if finder is cls or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is None:
                continue
            if spec.loader is not None and not isinstance(spec.loader, _AfterPeft):
                spec.loader = _AfterPeft(spec.loader)  # type: ignore[assignment]  # it passes on what it lacks
            return spec
        return None


def _run_the_one_hidden_by_this() -> None:
    """Run the machine's own module of this name, which Python would have imported in the place of this one."""
    elsewhere = [one for one in sys.path if os.path.abspath(one or os.curdir) != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _PeftFinder)
_run_the_one_hidden_by_this()
