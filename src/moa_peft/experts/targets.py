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
    beside = [one for one in ("attention", "mlp") if one in targets and one not in allowed]
    if beside:
        wrong.append(f"targets names {' and '.join(beside)}: give projections, as {', '.join(allowed)}")
    if len(set(targets)) < len(targets):
        wrong.append(f"targets names a projection twice: {', '.join(targets)}")
    return wrong
