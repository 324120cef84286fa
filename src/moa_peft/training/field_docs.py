"""The doc lines of a dataclass's fields, so that help and documentation never repeat them by hand."""

import ast
import inspect
import itertools
import textwrap


def field_docs(config_class: type) -> dict[str, str]:
    """Read the string under each field of a dataclass.

    Args:
        config_class: A dataclass with one string literal under each field, its source at hand.

    Returns:
        The text of each field that has one, on one line, in the order of the fields.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(config_class)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs: dict[str, str] = {}
    for field, below in itertools.pairwise(body):
        is_field = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if is_field and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[union-attr]  # is_field
    return docs
