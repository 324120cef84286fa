"""What a file of adapter weights may hold: weights of the adapter, all of them numbers, and nothing that changes the frozen model.

PEFT copies whatever a file holds into the parameter of that name.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moa_peft.errors import UsageError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What adapters are trained and saved in."""
KEY_PREFIX = "base_model.model."
"""What PEFT puts before the names of an adapter's weights."""
_WRAPPERS = ("base_layer", "original_module")
"""Where PEFT's wrappers hold the frozen module."""


def check_values(weights: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that no training leaves.

    Args:
        weights: By name.
        what: The adapter, for the error.

    Raises:
        UsageError: If one holds NaN or infinity, is of a dtype that adapters are not trained in, or has no plain storage.
    """
    for name, one in weights.items():
        if one.is_meta or one.layout != torch.strided:
            raise UsageError(
                f"{what} holds {name} without numbers of its own, or sparse: train or copy it again"
            )
        if one.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise UsageError(
                f"{what} holds {name} in {one.dtype}: adapters are of {known}; train or copy it again"
            )
        if not torch.isfinite(one).all():
            raise UsageError(f"{what} holds numbers that are not finite, in {name}: train or copy it again")


def split_frozen(
    model: Any, weights: Mapping[str, Tensor], config: Any, what: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tell an adapter's weights from those of the frozen model, which no file may change.

    PEFT saves whole embeddings beside an adapter when tokens were added to the vocabulary, frozen ones too. They must be
    the model's own, up to the rounding of a dtype, but for the rows of those tokens.

    Args:
        model: The base model, bare or in PEFT's wrapper.
        weights: Of the file.
        config: The adapter's, of PEFT: what it trains whole (modules_to_save, bias), and the base model's revision.
        what: The adapter, for the error.

    Returns:
        The weights that the frozen model does not have, and the embeddings with rows of added tokens: the model's own rows,
        then the file's.

    Raises:
        UsageError: If a weight differs from the frozen model's.
    """
    frozen = {_bare(name): one for name, one in model.state_dict().items()}
    own = {
        name: one for name, one in weights.items() if _bare(name) not in frozen or _is_trained(name, config)
    }
    changed = {
        name: one for name, one in weights.items() if name not in own and not _same(frozen[_bare(name)], one)
    }
    num_rows = _own_vocabulary(model, config.revision) if changed else 0
    rows: dict[str, Tensor] = {}
    has_others = len(getattr(model, "peft_config", ())) > 1  # they share the frozen model as it is
    for name, one in changed.items():
        if has_others and "original_module" in name:
            continue  # the adapter has its own copy of this module
        before = frozen[_bare(name)]
        if before.shape[1:] == one.shape[1:] and before.shape != one.shape:
            raise UsageError(
                f"{what} holds {one.shape[0]} rows of {name}, the base model has {before.shape[0]}: the vocabulary was resized "
                f"for its training, so call resize_token_embeddings({one.shape[0]}) on the base model first"
            )
        has_more = not has_others and num_rows < before.shape[0] == model.config.get_text_config().vocab_size
        if not (has_more and before.shape == one.shape and _same(before[:num_rows], one[:num_rows])):
            raise UsageError(
                f"{what} holds another {name} than the frozen base model has, which no adapter may change: use the base "
                "model that it was trained on; a module that was trained as a whole belongs into modules_to_save"
            )
        rows[name] = torch.cat([before[:num_rows], one.to(before)[num_rows:]])
    return own, rows


def is_saved_whole(path: str, modules_to_save: Sequence[str] | None) -> bool:
    """Whether a module or one around it is in ``modules_to_save``, which PEFT compares with the endings of names."""
    parts = path.split(".")
    around = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(name.endswith(saved) for name in around for saved in modules_to_save or ())


def _bare(name: str) -> str:
    """A weight's name in the base model."""
    return ".".join(one for one in name.removeprefix(KEY_PREFIX).split(".") if one not in _WRAPPERS)


def _is_trained(name: str, config: Any) -> bool:
    if name.endswith(".bias") and getattr(config, "bias", "none") != "none":
        return True
    saved = getattr(config, "modules_to_save", None)
    return "original_module" not in name.split(".") and is_saved_whole(_bare(name), saved)


def _same(own: Tensor, given: Tensor) -> bool:
    """Whether two weights are equal, or one is the other in its own dtype."""
    if own.shape != given.shape:
        return False
    given = given.to(own.device)
    return torch.equal(given.to(own.dtype), own) or torch.equal(own.to(given.dtype), given)


def _own_vocabulary(model: Any, revision: str | None) -> int:
    """Tokens in the base model's own vocabulary, from where it was loaded; all of them if that cannot be read."""
    config = model.config
    with contextlib.suppress(OSError, ValueError):
        config = type(config).from_pretrained(config._name_or_path, revision=revision)
    return int(config.get_text_config().vocab_size)


def check_fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], adapter_name: str) -> None:
    """Compare a checkpoint's weights with the model's, by name and size.

    Raises:
        UsageError: If weights are missing, unknown or of other sizes.
    """
    missing, extra = expected.keys() - given.keys(), given.keys() - expected.keys()
    if any(".router.gate.threshold_" in key for key in missing):
        raise UsageError(
            f"adapter {adapter_name!r} has no weights of the threshold that its config has: they are another method's, such as Soft "
            "MoA's for Sparse MoA; load them with their own config"
        )
    if any(".router.gate.threshold_" in key for key in extra):
        raise UsageError(
            f"adapter {adapter_name!r} has a learned threshold but its config has none: the weights are another method's, such as "
            "Sparse MoA's for Soft MoA; load them with their own config"
        )
    wrong = [f"{key} is missing" for key in sorted(missing)] + [f"{key} is unknown" for key in sorted(extra)]
    wrong += [
        f"{key} is {list(given[key].shape)}, the model's is {list(expected[key].shape)}"
        for key in sorted(expected.keys() & given.keys())
        if given[key].shape != expected[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UsageError(
            f"adapter {adapter_name!r} does not fit this model: {'; '.join(wrong[:3])}{more}. It belongs to another "
            "base model or another config: see base_model_name_or_path in its adapter_config.json"
        )
