"""Fused projections: each of q, k, v, gate and up keeps an expert and a gate of its own."""

import pytest
import torch
from torch import Tensor, nn

from moa_peft import mixture_layers
from moa_peft.mixture.sites import LinearSite
from tiny import GATED, mixture_model, tokens


def rows_of(family: str, name: str, outputs: int) -> list[int]:
    """Rows of the fused weight that are one projection, by the families' own conventions (4 heads, phi3: 2 k/v heads)."""
    if family == "gpt_neox":  # head by head: q, k, v of head 0, then of head 1 ...
        size = outputs // 12
        return [head * 3 * size + GATED.index(name) * size + i for head in range(4) for i in range(size)]
    if name in ("gate_proj", "up_proj"):
        half = outputs // 2
        return list(range(half)) if name == "gate_proj" else list(range(half, outputs))
    shares = {"phi3": (4, 2, 2), "gpt2": (4, 4, 4)}[family]
    unit, place = outputs // sum(shares), GATED.index(name)
    return list(range(unit * sum(shares[:place]), unit * sum(shares[: place + 1])))


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "gpt2"])
def test_a_fused_layer_equals_the_same_weights_split_into_separate_linears(family: str) -> None:
    model = mixture_model(family, "everything")
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    gates: list[Tensor] = []
    [(_, layer), _] = mixture_layers(model)
    layer.observer = lambda record: gates.append(record.gates)
    mixture = layer.mixtures()["default"]
    fused = [p for p in mixture.places if isinstance(p.site, LinearSite) and p.site.slot is not None]
    assert len(fused) == (5 if family == "phi3" else 3)
    for place in fused:
        assert isinstance(place.site, LinearSite)
        place.site.module.register_forward_hook(
            lambda _, args, out, path=place.site.path: seen.__setitem__(path, (args[0], out))
        )
    with torch.no_grad():
        model(tokens(2, 5))
        for place in fused:
            assert isinstance(place.site, LinearSite)
            x, output = seen[place.site.path]
            weight = (
                place.site.module.weight
                if isinstance(place.site.module, nn.Linear)
                else place.site.module.weight.T
            )
            rows = rows_of(family, place.site.name, output.shape[-1])
            separate = nn.functional.linear(x, weight[rows])
            bias = place.site.module.bias
            separate = separate if bias is None else separate + bias[rows]
            lora = mixture.experts[place.name]
            gate = gates[0][..., place.column : place.column + 1]
            separate = separate + gate * lora.scale * (x @ lora.A.T @ lora.B.T)
            torch.testing.assert_close(output[..., rows], separate, rtol=1e-5, atol=1e-5)
