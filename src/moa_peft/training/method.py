"""From a recipe to the PEFT config of its method."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moa_peft.training.merge import merge
from moa_peft.training.recipe import Recipe

if TYPE_CHECKING:
    from peft import PeftConfig


def build_peft_config(recipe: Recipe) -> "PeftConfig":
    """Make the config of the recipe's method with the recipe's changes.

    Args:
        recipe: Its ``method`` is the start, its ``mixture`` the changes.

    Returns:
        A config that `peft.get_peft_model` takes.

    Raises:
        UsageError: If the method or a field is unknown, or a value is wrong.
    """
    from moa_peft import MoAConfig

    changes: dict[str, Any] = dict(recipe.mixture)
    if isinstance(
        changes.get("experts"), Mapping
    ):  # experts.0.rank changes one entry of the method's own list
        experts = MoAConfig.preset(recipe.method).to_dict()["experts"]
        changes["experts"] = merge({"experts": experts}, {"experts": changes["experts"]})["experts"]
    return MoAConfig.preset(recipe.method, **changes)
