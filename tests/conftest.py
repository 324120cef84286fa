"""What every test gets."""

from collections.abc import Iterator
from typing import Any

import pytest

from moa_peft.mixture.config import GATES
from moa_peft.mixture.experts import base


@pytest.fixture(autouse=True)
def what_a_test_registers_goes_with_it() -> Iterator[None]:
    """Other tests enumerate the kinds of experts and gates."""
    registries: tuple[dict[str, Any], ...] = (base._KINDS, GATES)
    before = [dict(one) for one in registries]
    yield
    for registry, known in zip(registries, before, strict=True):
        registry.clear()
        registry.update(known)
