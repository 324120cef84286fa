"""Laying changes over settings."""

from collections.abc import Mapping
from typing import Any

from moa_peft.errors import UsageError


def merge(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay changes over settings: mappings are merged, everything else is replaced.

    A mapping with whole numbers as keys changes single entries of a list, as ``--mixture.experts.0.rank 16`` does.

    Args:
        settings: What there is, as from a file.
        changes: What goes over it, as from flags.

    Returns:
        A new mapping; neither argument is changed.

    Raises:
        UsageError: If a list has no entry of the given number.
    """
    merged = dict(settings)
    for key, value in changes.items():
        merged[key] = _merged(key, merged.get(key), value)
    return merged


def _merged(name: str, old: Any, new: Any) -> Any:
    if not isinstance(new, Mapping):
        return new
    if isinstance(old, Mapping):
        return merge(old, new)
    if isinstance(old, list) and new and all(str(key).isdecimal() for key in new):
        entries = list(old)
        for key, value in new.items():
            if int(key) >= len(entries):
                raise UsageError(f"{name}.{key} does not exist: {name} has entries 0 to {len(entries) - 1}")
            entries[int(key)] = _merged(f"{name}.{key}", entries[int(key)], value)
        return entries
    return new
