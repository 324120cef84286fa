"""Gates: they turn a router's logits into weights. Each kind is a module, found by the name it is registered under.

A new kind is one class:

    @register_gate("mine")
    class MyGate(Gate):
        def forward(self, logits): return GateResult(gates=...)

Sizes: B rows, T tokens of a row, D inputs of the router, E experts.
"""

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_peft.errors import UsageError
from moa_peft.mixture.config import GATES, RouterConfig
from moa_peft.mixture.gate_functions import (
    learned_threshold,
    sigmoid_gates,
    sparse_gates,
    sparsegen_gates,
    sparsity_penalty,
    threshold_gates,
    top_k_gates,
)

OPTIONS = ("initial_gate", "threshold", "keep", "noise", "target", "sparsity", "balance")
"""The fields of a `RouterConfig` that belong to some gates and not to others."""


class Projection(NamedTuple):
    """A linear layer of a router, as parameters of the module that it belongs to.

    It is no module of its own: sharding gathers a module's weights when the module is called, and this one never is, since its
    product is made together with those of everything else that reads the input.
    """

    weight: Tensor
    """[H, D]."""
    bias: Tensor | None
    """[H]."""


def add_projection(module: nn.Module, name: str, inputs: int, outputs: int, *, bias: bool = True) -> None:
    """Give a module the parameters ``<name>_weight``, as torch initialises a linear layer's, and ``<name>_bias``, zero or None."""
    weight = nn.Parameter(torch.empty(outputs, inputs))
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    module.register_parameter(f"{name}_weight", weight)
    module.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(outputs)) if bias else None)


def projection(module: nn.Module, name: str) -> Projection:
    """Give the parameters that `add_projection` has added, as they are now."""
    return Projection(getattr(module, f"{name}_weight"), getattr(module, f"{name}_bias"))


class GateResult(NamedTuple):
    """What a gate makes of the logits of a call."""

    gates: Tensor
    """Float32, [..., E]."""
    threshold: Tensor | None = None
    """Float32, broadcastable to [..., 1], where the gate has one."""
    load: Tensor | None = None
    """Float32, [..., E], without gradient: 1 where a token is given to an expert. For the balance loss."""
    probability: Tensor | None = None
    """Float32, [..., E]: the differentiable share beside ``load``."""
    penalty: Tensor | None = None
    """Float32, [..., 1]: what the gate asks each token to pay; see `Gate.has_penalty`."""


class Gate(nn.Module):
    """One kind of gate. It may hold parameters; it keeps no state between calls and branches on no tensor's values.

    Args:
        inputs: D, what the router reads.
        num_experts: E.
        config: The router's config.
    """

    options: ClassVar[frozenset[str]] = frozenset()
    """Those of `OPTIONS` that this kind reads; the others are refused."""
    default_balance: ClassVar[float] = 0.0
    """Coefficient of the balance loss where the config says None: the one of the method's paper or code."""

    def __init__(self, inputs: int, num_experts: int, config: RouterConfig) -> None:  # noqa: ARG002  # for subclasses
        super().__init__()
        self.config = config

    @classmethod
    def problems(cls, config: RouterConfig) -> list[str]:
        """What is wrong with a router's options for this gate, a sentence each."""
        return [
            f"{name} is {getattr(config, name)!r}: the gate {config.gate!r} has none"
            for name in OPTIONS
            if name not in cls.options and getattr(config, name) not in (None, False)
        ]

    @classmethod
    def has_penalty(cls, config: RouterConfig) -> bool:  # noqa: ARG003  # for subclasses
        """Whether `forward` gives a ``penalty``; it is given if and only if this is so."""
        return False

    def projections(self) -> tuple[Projection, ...]:
        """Linear layers of this gate that read what the router reads, as they are now; `forward` is given their outputs."""
        return ()

    def forward(self, logits: Tensor, *read: Tensor) -> GateResult:
        """Weigh the experts.

        Args:
            logits: Float32, [..., E], what the router makes of its input.
            *read: Float32, [..., K] each, the output of each of `projections`.
        """
        raise NotImplementedError

    def untrained(self) -> list[nn.Parameter]:
        """Parameters that the config declares untrained."""
        return []

    @classmethod
    def initial_logit(cls, config: RouterConfig) -> float:  # noqa: ARG003  # for subclasses
        """What the bias of the logits starts at."""
        return 0.0


Kind = TypeVar("Kind", bound=type[Gate])


def register_gate(name: str) -> Callable[[Kind], Kind]:
    """Make a kind of gate known under ``name``; use it as a decorator of the class.

    Raises:
        UsageError: If another class has registered the name, or the class is no `Gate`.
    """

    def add(gate: Kind) -> Kind:
        if not (isinstance(gate, type) and issubclass(gate, Gate)):
            raise UsageError(
                f"{gate!r} is no Gate: give a class that inherits from moa_peft.mixture.gates.Gate"
            )
        if name in GATES:
            raise UsageError(
                f"gate {name!r} is already registered by {GATES[name].__module__}: choose another name"
            )
        GATES[name] = gate
        return gate

    return add


@register_gate("sigmoid")
class SigmoidGate(Gate):
    """Soft MoA; with ``threshold``, Sparse MoA. Source: MoA, arXiv 2506.05928."""

    options = frozenset({"initial_gate", "threshold"})

    @classmethod
    def problems(cls, config: RouterConfig) -> list[str]:
        """What is wrong with the options, a sentence each."""
        wrong = super().problems(config)
        if config.initial_gate is not None and not 0 < config.initial_gate < 1:
            wrong.append(f"initial_gate is {config.initial_gate}: it must lie in (0, 1)")
        elif config.initial_gate not in (None, 0.5) and not config.bias:
            wrong.append(f"initial_gate is {config.initial_gate}: it is set by the bias, and bias is false")
        return wrong

    @classmethod
    def initial_logit(cls, config: RouterConfig) -> float:
        """The logit of the initial gate."""
        gate = 0.5 if config.initial_gate is None else config.initial_gate
        return math.log(gate / (1 - gate))

    def __init__(self, inputs: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__(inputs, num_experts, config)
        self.learned = config.threshold is not None and config.threshold.maximum is not None
        if self.learned:
            add_projection(self, "threshold", inputs, 1)

    def projections(self) -> tuple[Projection, ...]:
        """The learned threshold's."""
        return (projection(self, "threshold"),) if self.learned else ()

    def forward(self, logits: Tensor, *read: Tensor) -> GateResult:
        """Weigh each expert for itself; see `Gate.forward`."""
        scores = sigmoid_gates(logits)
        sparse = self.config.threshold
        threshold = self._threshold(logits, *read)
        if sparse is None or threshold is None:
            return GateResult(gates=scores)
        gates = sparse_gates(scores, threshold, bandwidth=sparse.bandwidth, at_least_one=sparse.at_least_one)
        return GateResult(gates=gates, threshold=threshold)

    def untrained(self) -> list[nn.Parameter]:
        """The parameters of the official dead threshold."""
        sparse = self.config.threshold
        return list(self.parameters()) if sparse is not None and sparse.gradient == "none" else []

    def _threshold(self, logits: Tensor, *read: Tensor) -> Tensor | None:
        sparse = self.config.threshold
        if sparse is None:
            return None
        if sparse.constant is not None:
            return logits.new_full((1,) * logits.dim(), sparse.constant)
        assert sparse.maximum is not None, "ThresholdConfig has either a constant or a maximum"
        threshold = learned_threshold(read[0], sparse.maximum)
        return threshold.detach() if sparse.gradient == "none" else threshold


@register_gate("softmax")
class SoftmaxGate(Gate):
    """All experts, weights that sum to 1. Source: MoLoRA, arXiv 2309.05444; HydraLoRA, arXiv 2404.19245."""

    def forward(self, logits: Tensor, *read: Tensor) -> GateResult:  # noqa: ARG002  # the base's signature
        """Weigh by the softmax; see `Gate.forward`."""
        return GateResult(gates=logits.softmax(dim=-1))


@register_gate("top-k")
class TopKGate(Gate):
    """The ``keep`` best experts of each token, with optional noise while training.

    Source: Shazeer et al., arXiv 1701.06538, equations 3-5; the balance loss is Switch's, with the official MoA code's
    coefficient.
    """

    options = frozenset({"keep", "noise", "balance"})
    default_balance = 0.001

    def __init__(self, inputs: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__(inputs, num_experts, config)
        keep = config.keep or 1
        if keep > num_experts:
            raise UsageError(f"keep is {keep}: there are {num_experts} experts to choose from")
        self.keep = keep
        if config.noise:
            add_projection(self, "noise", inputs, num_experts)

    @classmethod
    def problems(cls, config: RouterConfig) -> list[str]:
        """What is wrong with the options, a sentence each."""
        wrong = super().problems(config)
        if config.keep is None or config.keep < 1:
            wrong.append(
                f"keep is {config.keep}: say how many experts top-k keeps for each token, as in keep=2"
            )
        return wrong

    def projections(self) -> tuple[Projection, ...]:
        """The noise's, while training."""
        return (projection(self, "noise"),) if self.config.noise and self.training else ()

    def forward(self, logits: Tensor, *read: Tensor) -> GateResult:
        """Weigh the best by the softmax over them; see `Gate.forward`."""
        if read:
            width = F.softplus(read[0])
            logits = logits + torch.randn_like(logits) * width
        gates = top_k_gates(logits, self.keep)
        load = (gates.detach() > 0).to(gates.dtype)
        return GateResult(gates=gates, load=load, probability=logits.softmax(dim=-1))


@register_gate("threshold")
class AdaptiveGate(Gate):
    """Softmax minus a learned threshold below 1 / E, clipped at 0, renormalised.

    Source: AdaMoLE, arXiv 2405.00361, with the official MoA code's balance loss and coefficient.
    """

    options = frozenset({"balance"})
    default_balance = 0.001

    def __init__(self, inputs: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__(inputs, num_experts, config)
        add_projection(self, "threshold", inputs, 1)

    def projections(self) -> tuple[Projection, ...]:
        """The threshold's."""
        return (projection(self, "threshold"),)

    def forward(self, logits: Tensor, *read: Tensor) -> GateResult:
        """Weigh by what lies above the threshold; see `Gate.forward`."""
        # a sigmoid rounds to 1: nothing would lie above the threshold
        below = 1 - 2 * torch.finfo(logits.dtype).eps
        threshold = learned_threshold(read[0], below / logits.shape[-1])
        margin = logits.softmax(dim=-1) - threshold
        load = (margin.detach() > 0).to(margin.dtype)
        return GateResult(gates=threshold_gates(margin), threshold=threshold, load=load, probability=margin)


@register_gate("sparsegen")
class SparsegenGate(Gate):
    """A projection onto the simplex whose sparsity each token chooses; differentiable throughout.

    Source: LD-MoLE, arXiv 2509.25684, after Laha et al., arXiv 1810.11975. Departures: the concentration lambda comes
    from one linear map of each router (``lambda = 0.9 - softplus(w x + b + const)``, 0 at first, which is sparsemax)
    instead of a shared network; it stays below 0.9, for 1 - lambda divides the logits, rounding and all; and the
    balance loss has the coefficient of the other gates.
    """

    options = frozenset({"target", "sparsity", "balance"})
    default_balance = 0.001
    default_sparsity: ClassVar[float] = 0.01
    most_concentrated: ClassVar[float] = 0.9

    def __init__(self, inputs: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__(inputs, num_experts, config)
        if config.target is not None and config.target > num_experts:
            raise UsageError(f"target is {config.target}: there are {num_experts} experts")
        add_projection(self, "concentration", inputs, 1)
        nn.init.zeros_(self.get_parameter("concentration_weight"))

    @classmethod
    def problems(cls, config: RouterConfig) -> list[str]:
        """What is wrong with the options, a sentence each."""
        wrong = super().problems(config)
        if config.target is not None and config.target < 1:
            wrong.append(f"target is {config.target}: at least 1 expert is on")
        if config.sparsity is not None and config.target is None:
            wrong.append(
                f"sparsity is {config.sparsity}: it needs a target, the number of experts to pull towards"
            )
        if config.sparsity is not None and not config.sparsity >= 0:
            wrong.append(f"sparsity is {config.sparsity}: it must be at least 0")
        return wrong

    @classmethod
    def has_penalty(cls, config: RouterConfig) -> bool:
        """Whether there is a number of experts to pull towards."""
        return config.target is not None and config.sparsity != 0

    def projections(self) -> tuple[Projection, ...]:
        """The concentration's."""
        return (projection(self, "concentration"),)

    def forward(self, logits: Tensor, *read: Tensor) -> GateResult:
        """Weigh by the projection; see `Gate.forward`."""
        most = self.most_concentrated
        start = math.log(math.expm1(most))  # its softplus is ``most``, so that lambda starts at 0
        concentration = most - F.softplus(read[0] + start)
        gates = sparsegen_gates(logits, concentration)
        load = (gates.detach() > 0).to(gates.dtype)
        weights = GateResult(gates=gates, load=load, probability=logits.softmax(dim=-1))
        if self.config.target is None or not self.has_penalty(self.config):
            return weights
        penalty = sparsity_penalty(logits, concentration, self.config.target)
        factor = self.default_sparsity if self.config.sparsity is None else self.config.sparsity
        return weights._replace(penalty=factor * penalty)
