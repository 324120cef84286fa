"""Pieces of Markdown, and what docstrings say."""

import inspect
import re
from collections.abc import Iterable
from typing import Any


def summary(thing: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def source_paragraph(thing: Any) -> str:
    """The part of a docstring that begins with "Source:", on one line."""
    found = re.search(r"Source: (.*?)(?:\n\n|\Z)", inspect.getdoc(thing) or "", re.DOTALL)
    return linked(" ".join(found.group(1).split())) if found else ""


def linked(text: str) -> str:
    """Turn every arXiv number into a link."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def markdown(text: str) -> str:
    """Turn reStructuredText's literals and Sphinx's default role into Markdown's."""
    return re.sub(r"``(.+?)``", r"`\1`", text)


def cell(text: str) -> str:
    """Make text fit into a cell of a table."""
    return text.replace("|", "\\|")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Write a table."""
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *([cell(one) for one in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fenced(text: str, language: str = "text") -> str:
    """A block of code."""
    return f"```{language}\n{text}\n```"
