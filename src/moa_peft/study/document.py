"""A document of sections, written as Markdown and as one self-contained HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #d0d0d0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; margin: 1rem 0; }
figure { margin: 1rem 0; }
svg { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
{% if section.title %}<h2>{{ section.title }}</h2>
{% endif %}
{% for text in section.texts %}<p>{{ text }}</p>
{% endfor %}
{% if section.items %}<ul>
{% for text in section.items %}<li>{{ text }}</li>
{% endfor %}</ul>
{% endif %}
{% if section.table %}<div class="wide"><table>
<thead><tr>{% for cell in section.table.head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in section.table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endif %}
{% for picture in section.pictures %}<figure role="img" aria-label="{{ picture.says }}">{{ picture.svg | safe }}</figure>
{% endfor %}
{% endfor %}
</body>
</html>
"""


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
    return environment.from_string(_PAGE).render(title=title, sections=sections)


def _markdown_table(table: Table) -> str:
    lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
    return "\n".join(f"| {' | '.join(_escaped(one) for one in line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Keep what Markdown would read as markup in words of errors, paths and names."""
    for sign in ("\\", "|", "*", "_", "<", "`"):
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\\_", "_") if "__" not in text else text
