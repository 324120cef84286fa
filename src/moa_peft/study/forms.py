"""The form of a study's values, as files bring them: text, lists of names, mappings. A sentence for each that is wrong."""

from collections.abc import Mapping, Sequence


def wrong_text(name: str, value: object) -> list[str]:
    """Say that a value is no text, or empty."""
    return [] if isinstance(value, str) and value else [f"{name} is {value!r}: give text"]


def wrong_names(name: str, value: object) -> list[str]:
    """Say that a value is neither a list of names nor text with commas between them."""
    listed = [value] if isinstance(value, str) else value
    if isinstance(listed, Sequence) and listed and not any(wrong_text(name, one) for one in listed):
        return []
    return [f"{name} is {value!r}: give names, as a list or with commas between"]


def wrong_fields(name: str, value: object) -> list[str]:
    """Say that a value is no mapping, or that one of its keys is no name."""
    if not isinstance(value, Mapping):
        return [f"{name} is {value!r}: give fields, each as NAME: VALUE"]
    return [f"{name} has the key {key!r}: give a name" for key in value if not isinstance(key, str)]


def wrong_entries(methods: object) -> list[str]:
    """Say that a value is no list of methods, or which of its entries is neither a name nor a mapping."""
    form = "each with method: NAME"
    if not isinstance(methods, Sequence) or isinstance(methods, str):
        return [f"methods is {methods!r}: give a list of entries, {form}"]
    return [
        f"methods holds {one!r}: give entries, {form}"
        for one in methods
        if not isinstance(one, str | Mapping) or not one
    ]
