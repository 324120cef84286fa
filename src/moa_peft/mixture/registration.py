"""Makes the method known to PEFT, which has no entry point for methods from outside.

PEFT refuses names that are not members of its enum `PeftType`, and code that reads ``peft_type.value`` breaks on plain
strings, so the enum gets one more real member.
"""

from typing import Any

import peft
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from moa_peft.errors import RunError

PEFT_TYPE_NAME = "MOA"


def add_peft_type() -> None:
    """Add the member ``MOA`` to PEFT's enum, once."""
    if PEFT_TYPE_NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, PEFT_TYPE_NAME)
    member._name_ = PEFT_TYPE_NAME
    member._value_ = PEFT_TYPE_NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]  # as enum's own machinery sets it
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]  # as enum's own machinery sets it
    PeftType._member_names_.append(PEFT_TYPE_NAME)
    PeftType._member_map_[PEFT_TYPE_NAME] = member
    PeftType._value2member_map_[PEFT_TYPE_NAME] = member
    type.__setattr__(PeftType, PEFT_TYPE_NAME, member)


def register(config_class: Any, model_class: Any) -> None:
    """Register the method with PEFT, once.

    Args:
        config_class: `MoAConfig`.
        model_class: `MoAModel`.

    Raises:
        RunError: If this version of PEFT is too old.
    """
    if not hasattr(BaseTuner, "_remove_adapter_name_from_key"):
        raise RunError(
            f"PEFT {peft.__version__} does not ask a method how its weights are named, so it could not load the adapters that it "
            "saves: install peft 0.21.2 or newer, whatever else asks for an older one"
        )
    if getattr(PeftType, PEFT_TYPE_NAME) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=PEFT_TYPE_NAME.lower(), config_cls=config_class, model_cls=model_class, prefix="moa_"
        )
