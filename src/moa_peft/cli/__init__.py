"""The command `moa`: one file for each verb, which imports what it needs only when it runs.

May import: study, serving, inspection, official, bench, evaluation, training, data, mixture.
"""

import errno
import functools
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from moa_peft.errors import LibraryError, MoAError, UsageError, expanded, library_errors

app = typer.Typer(
    name="moa",
    help="Mixtures of heterogeneous adapters: fine-tune, evaluate and talk to models with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def tell_versions(asked: bool) -> None:
    """Print the versions that a report of a bug needs, and leave."""
    if asked:
        from moa_peft.provenance import LIBRARIES, version_of

        print("\n".join(f"{name} {version_of(name)}" for name in LIBRARIES))
        raise typer.Exit


@app.callback()
def moa(
    version: Annotated[
        bool,
        typer.Option("--version", callback=tell_versions, is_eager=True, help="Say the versions and exit."),
    ] = False,
) -> None:
    """The options of the command itself."""


def register_verbs() -> None:
    """Add every verb to the application."""
    from moa_peft.cli.bench import bench
    from moa_peft.cli.chat import chat
    from moa_peft.cli.compare import compare
    from moa_peft.cli.demo import demo
    from moa_peft.cli.evaluate import evaluate
    from moa_peft.cli.exec_ import exec_
    from moa_peft.cli.export import export
    from moa_peft.cli.import_ import import_
    from moa_peft.cli.inspect import inspect
    from moa_peft.cli.methods import methods
    from moa_peft.cli.serve import serve
    from moa_peft.cli.train import ANY_FIELD, train
    from moa_peft.cli.verify import verify

    for verb in (train, compare):
        app.command(context_settings=ANY_FIELD)(registered(verb))
    for verb in (evaluate, chat, serve, demo, methods, verify, bench, inspect):
        app.command()(registered(verb))
    app.command("import")(registered(import_))
    app.command()(registered(export))
    app.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(
        exec_
    )


def registered(verb: Callable[..., None]) -> Callable[..., None]:
    """Let a verb register the method before it runs, its help does without, and without torch; `~` in paths is expanded."""

    @functools.wraps(verb)
    def run(*words: Any, **options: Any) -> None:
        import_module("moa_peft.mixture.model")
        verb(*words, **{name: _whole_paths(value) for name, value in options.items()})

    return run


def _whole_paths(value: Any) -> Any:
    """Expand the `~` of a path, or of a list of them, that the shell has left, as in --out=~/here."""
    if isinstance(value, list):
        return [_whole_paths(one) for one in value]
    return expanded(value) if isinstance(value, Path) else value


def fail(message: str, code: int) -> None:
    """Print one error to standard error and leave with ``code``."""
    print(f"moa: error: {message}", file=sys.stderr)
    sys.unraisablehook = lambda _: None  # what a library left half-made may complain while it is deleted
    sys.exit(code)


def main() -> None:
    """Run the command line; a user's mistake ends in one line and exit code 2, a fault of ours in a traceback and 1."""
    # Quiet before transformers is imported; a user who wants the noise sets the variable to 0.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± shows a question mark
    register_verbs()
    try:
        check_arguments(sys.argv)
        with library_errors():
            app()
    except LibraryError as error:
        fail(f"{error} (whole traceback: {write_traceback(error)})", 2)
    except UsageError as error:
        fail(str(error), 2)
    except MoAError as error:
        fail(str(error), 1)
    except OSError as error:
        if error.errno is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = (
            "free some space or choose another folder"
            if full
            else "check that it may be read and written, or choose another"
        )
        fail(": ".join([str(error.strerror), *([str(error.filename), hint] if error.filename else [])]), 2)


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse an argument that is not text, as the name of a file in another encoding: it could not be written down.

    Raises:
        UsageError: If one is not; shows it with its bytes escaped.
    """
    for one in arguments:
        try:
            one.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the argument {one!a} is not text in UTF-8: give the file another name"
            ) from error


def write_traceback(error: BaseException) -> str:
    """Write the traceback of an error into a new file in the folder of temporary files; gives its path."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", errors="backslashreplace", prefix="moa-error-", suffix=".txt", delete=False
    ) as file:
        file.writelines(traceback.format_exception(error))
    return file.name
