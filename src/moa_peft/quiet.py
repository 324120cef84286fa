"""Other libraries' chatter, held back so that a person sees the run."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_CHATTY = r"(transformers|trl|peft|accelerate|datasets|torch|huggingface_hub)(\.|$)"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back the libraries' warnings and progress bars inside the block; errors and moa's own words pass."""
    import datasets
    from transformers.utils import logging as transformers_logging

    loggers = [
        logging.getLogger(name) for name in ("trl", "accelerate", "peft", "datasets", "torch.distributed")
    ]
    levels = [one.level for one in loggers]
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    dataset_bars = datasets.are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=_CHATTY)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if not dataset_bars:
            datasets.enable_progress_bars()
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
