"""ms-swift's external plug-in: ``--tuner_type moa`` trains a mixture.

In a file of one's own, say moa.py:

    from moa_peft.integrations.ms_swift import register
    register("soft-lora", router={"initial_gate": 0.9})

and then ``swift sft --external_plugins moa.py --tuner_type moa ...``.
"""

from typing import Any

from peft import PeftModel, get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map  # type: ignore[import-not-found]  # users have it
from torch import nn

from moa_peft.training.recipe import DEFAULT_METHOD, mixture_config

TUNER = "moa"


def register(method: str = DEFAULT_METHOD, **mixture: Any) -> None:
    """Make ``--tuner_type moa`` train a method of the family. ms-swift saves and loads the adapter as it does any of PEFT's.

    Args:
        method: One of `moa methods`.
        **mixture: Fields of `MoAConfig` that differ from it.

    Raises:
        UsageError: If the method or a field is unknown, or a value is wrong.
    """
    config = mixture_config(method, mixture)

    class MoATuner(PeftTuner):
        @staticmethod
        def prepare_model(args: Any, model: nn.Module) -> PeftModel:  # noqa: ARG004  # ms-swift's
            return get_peft_model(model, config)

    tuners_map[TUNER] = MoATuner
