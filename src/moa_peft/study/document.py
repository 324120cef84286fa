"""A document of sections, written as Markdown and as one self-contained HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of texts."""

    head: Sequence[str]
    """Names of the columns."""
    rows: Sequence[Sequence[str]]
    """Cells, as many a row as there are names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A drawing."""

    file: str
    """Name of its file, for Markdown."""
    says: str
    """What it shows, for those who do not see it."""
    svg: str
    """The drawing, an element of HTML."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of a document, in this order."""

    title: str = ""
    """Heading; none for the first part."""
    texts: Sequence[str] = ()
    """Paragraphs of plain text."""
    items: Sequence[str] = ()
    table: Table | None = None
    pictures: Sequence[Picture] = ()


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """Write a document as Markdown; drawings are links to files beside it."""
    blocks = [f"# {title}"]
    for one in sections:
        blocks += [f"## {one.title}"] if one.title else []
        blocks += [_escaped(text) for text in one.texts]
        blocks += ["\n".join(f"- {_escaped(text)}" for text in one.items)] if one.items else []
        blocks += [_markdown_table(one.table)] if one.table is not None else []
        blocks += [f"![{picture.says}]({picture.file})" for picture in one.pictures]
    return "\n\n".join(blocks) + "\n"


def as_html(title: str, sections: Sequence[Section]) -> str:
    """Write a document as one page of HTML that needs no other file."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    page = (resources.files("moa_peft.study") / "report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(page).render(title=title, sections=sections)


def _markdown_table(table: Table) -> str:
    lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
    return "\n".join(f"| {' | '.join(_escaped(one) for one in line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Keep what Markdown would read as markup in words of errors, paths and names."""
    underscore = ("_",) if "__" in text else ()  # a single one is no markup
    for sign in ("\\", "|", "*", "<", "`", *underscore):
        text = text.replace(sign, f"\\{sign}")
    return text
