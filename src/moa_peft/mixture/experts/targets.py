"""What kinds that name projections check alike."""

from collections.abc import Sequence


def target_problems(targets: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """Say what is wrong with an expert's ``targets``, whatever the model.

    Args:
        targets: As the user gave them; a text instead of a list is a mistake.
        allowed: Names for the advice; the model itself says which it has.

    Returns:
        A sentence for each problem.
    """
    if isinstance(targets, str):
        return [f"targets is the text {targets!r}: give a list, as in [{targets!r}]"]
    wrong: list[str] = []
    if not targets:
        wrong.append(f"targets is empty: give some of {', '.join(allowed)}")
    beside = [one for one in targets if one in ("attention", "mlp") and one not in allowed]
    wrong += [f"targets names {one!r}: give some of {', '.join(allowed)}" for one in beside]
    if len(set(targets)) < len(targets):
        wrong.append(f"targets names a projection twice: {', '.join(targets)}")
    return wrong
