"""Tables on the terminal: all verbs print theirs here."""

from collections.abc import Collection, Sequence


def print_table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[str] = ()
) -> None:
    """Print a table, as wide as it needs to be; brackets in a text are text.

    Args:
        title: What stands above it.
        head: Names of its columns.
        rows: The cells of each row.
        left: Columns that are set to the left; figures stand to the right.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in head:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False)
    natural = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.width = max(console.width, natural)  # figures are not broken to fit
    console.print(table)
