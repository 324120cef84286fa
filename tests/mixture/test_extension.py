"""A kind of expert and a kind of gate from outside the package: nothing in it has to know them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import moa_peft
from moa_peft import ExpertConfig, LoraExpert, MoAConfig, RouterConfig, UsageError, mixture_layers
from moa_peft.bench.subjects import one_by_one
from moa_peft.cli.overrides import load_yaml
from moa_peft.mixture.config import GATES
from moa_peft.mixture.experts import LinearExpert, expert_kinds, register_expert
from moa_peft.mixture.gates import Gate, GateResult, register_gate
from moa_peft.mixture.router import Router
from moa_peft.training.recipe import Recipe, build_peft_config
from tiny import awaken, base_model, tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyExpert(ExpertConfig):
    """Adds a learned vector."""

    kind: ClassVar[str] = "toy-shift"

    targets: Sequence[str]
    """Where."""

    start: float = 0.0
    """What every number of the vector starts at."""

    def site_names(self) -> tuple[str, ...]:
        return tuple(self.targets)

    def build(self, site: Any) -> "ToyChange":
        return ToyChange(self.start, site.out_features)


class ToyChange(LinearExpert):
    """``gate * v``."""

    def __init__(self, start: float, out_features: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.full((out_features,), start))

    def change(self, x: Tensor, base: Tensor, gate: Tensor) -> Tensor:
        return (gate * self.v).to(base.dtype).expand_as(base)


class ToyGate(Gate):
    """Squares of the logits over their sum, with a learned factor; it reads the option "keep" and has a balance loss."""

    options = frozenset({"keep", "balance"})
    default_balance = 0.5

    def __init__(self, inputs: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__(inputs, num_experts, config)
        self.factor = nn.Parameter(torch.full((1,), float(config.keep or 1)))

    def forward(self, logits: Tensor, *read: Tensor) -> GateResult:
        squares = logits.square() + 1e-3
        shares = squares / squares.sum(dim=-1, keepdim=True)
        load = (shares.detach() == shares.detach().amax(dim=-1, keepdim=True)).to(shares.dtype)
        return GateResult(gates=self.factor * shares, load=load, probability=shares)


@pytest.fixture(autouse=True)
def toys() -> None:
    """Register both; `conftest` takes them away again."""
    register_expert(ToyExpert)
    register_gate("toy-squares")(ToyGate)


def config() -> MoAConfig:
    """The toy gate at both places of a router, the toy expert at a fusable projection and at the MLP."""
    copies = RouterConfig(kind="linear", gate="toy-squares")
    experts = [
        ToyExpert(targets=["k_proj", "mlp"], start=0.25),
        LoraExpert(targets=["q_proj"], rank=2, num_experts=3, router=copies),
    ]
    return MoAConfig(experts=experts, router=RouterConfig(kind="linear", gate="toy-squares", keep=3))


def make(base: nn.Module) -> PeftModel:
    model = get_peft_model(base, config())
    assert isinstance(model, PeftModel)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(tokens()).logits


def test_a_toy_expert_adds_its_vector_times_its_gate() -> None:
    model = make(base_model("llama"))
    awaken(model)
    gates: list[Tensor] = []
    layer = mixture_layers(model)[0][1]
    layer.observer = lambda record: gates.append(record.gates) if record.router == "" else None
    mlp = model.get_base_model().model.layers[0].mlp
    seen: list[tuple[Tensor, Tensor]] = []
    mlp.register_forward_hook(lambda module, args, output: seen.append((module.forward(args[0]), output)))
    logits(model)
    [(frozen, changed)], [gate] = seen, gates
    mixture = layer.mixtures()["default"]
    column = mixture.names.index("toy-shift")
    expected = gate[..., column, None] * mixture.experts["toy-shift"].v
    torch.testing.assert_close(changed - frozen, expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 0.01


def test_a_toy_gate_makes_the_gates_of_blocks_and_of_copies_and_its_losses_are_told() -> None:
    model = make(base_model("llama"))
    awaken(model)
    routers = mixture_layers(model)[0][1].mixtures()["default"].routers()
    assert set(routers) == {"", "lora_q_proj"}
    x = torch.randn(2, 5, 32)
    for router in routers.values():
        products = [
            torch.nn.functional.linear(x, one.weight, one.bias) for one in router.logits.projections()
        ]
        squares = router.logits(*products).square() + 1e-3
        routing = router(x)
        expected = router.gate.factor * squares / squares.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(routing.gates, expected)
        assert routing.balance_loss is not None
        assert router.balance == 0.5
    assert {name: router.gate.config.keep for name, router in routers.items()} == {"": 3, "lora_q_proj": None}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_both_train_on_any_family(family: str) -> None:
    model = make(base_model(family))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert sum("factor" in name for name in before) == 4
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses: list[float] = []
    for _ in range(6):
        optimiser.zero_grad()
        loss = model.train()(input_ids=tokens(), labels=tokens()).loss
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    assert [n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])] == []


def test_both_are_saved_and_loaded_by_name_bit_equal(tmp_path: Path) -> None:
    base_model("llama").save_pretrained(tmp_path / "base")
    model = make(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    awaken(model)
    model.save_pretrained(tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert [one["kind"] for one in told["experts"]] == ["toy-shift", "lora"]
    assert told["router"]["gate"] == told["experts"][1]["router"]["gate"] == "toy-squares"
    names = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors")}
    assert {"v", "factor"} <= names
    for again in (
        PeftModel.from_pretrained(base_model("llama"), tmp_path / "adapter"),
        PeftModel.from_pretrained(base_model("llama"), tmp_path / "adapter", low_cpu_mem_usage=True),
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        assert torch.equal(logits(again), logits(model))


RECIPE = """
method: soft-moa
data: rows.json
output_dir: run
mixture:
  router: {kind: linear, gate: toy-squares, keep: 3}
  experts:
    - {kind: toy-shift, targets: [k_proj, mlp], start: 0.25}
    - {kind: lora, targets: [q_proj], rank: 2, num_experts: 3, router: {kind: linear, gate: toy-squares}}
"""


def test_a_recipe_names_both(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    recipe = Recipe.from_mapping(load_yaml(tmp_path / "recipe.yaml"), set())
    built = build_peft_config(recipe)
    assert isinstance(built, MoAConfig)
    assert (built.experts, built.router) == (config().experts, config().router)


def test_a_config_survives_json() -> None:
    written = json.loads(json.dumps(config().to_dict()))
    assert MoAConfig.from_peft_type(**written).to_dict() == config().to_dict()


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherLora(LoraExpert):
    """A LoRA under another name: a plain bottleneck that can be gated together with its neighbour."""

    kind: ClassVar[str] = "other-lora"


def test_kinds_that_share_their_gates_are_never_gated_as_neighbours() -> None:
    """q's second expert had the gate of its neighbour's kind."""
    register_expert(OtherLora)
    experts = [
        LoraExpert(targets=["q_proj"]),
        OtherLora(targets=["q_proj"]),
        LoraExpert(targets=["o_proj"]),
    ]
    model = get_peft_model(
        base_model("llama"), MoAConfig(experts=experts, router=RouterConfig(gate_of="kind"))
    )
    awaken(model)
    together = logits(model)
    with one_by_one(model):
        torch.testing.assert_close(together, logits(model), atol=1e-5, rtol=1e-5)


def test_the_fields_of_both_are_checked_like_the_packages_own() -> None:
    with pytest.raises(UsageError, match="unknown field of expert 'toy-shift' 'strt': did you mean 'start'"):
        MoAConfig(experts=[{"kind": "toy-shift", "targets": ["mlp"], "strt": 1}])
    with pytest.raises(UsageError, match="start is 'x': give a number"):
        ToyExpert(targets=["mlp"], start="x")
    with pytest.raises(UsageError, match="target is 2: the gate 'toy-squares' has none"):
        RouterConfig(gate="toy-squares", target=2)
    with pytest.raises(UsageError, match="unknown gate 'toy-square': did you mean 'toy-squares'"):
        RouterConfig(gate="toy-square")
    with pytest.raises(UsageError, match="'toy-shift': unknown target of llama 'mpl'"):
        get_peft_model(base_model("llama"), MoAConfig(experts=[ToyExpert(targets=["mpl"])]))


class Penalised(ToyGate):
    """Asks each token to pay for its logits."""

    default_balance = 0.0
    factor_of_penalty = 3.0

    @classmethod
    def has_penalty(cls, config: RouterConfig) -> bool:
        return True

    def forward(self, logits: Tensor, *read: Tensor) -> GateResult:
        penalty = self.factor_of_penalty * logits.square().mean(dim=-1, keepdim=True)
        return GateResult(gates=logits.softmax(dim=-1), penalty=penalty)


class Forgetful(Penalised):
    """Does not say so."""

    @classmethod
    def has_penalty(cls, config: RouterConfig) -> bool:
        return False


class WithoutLoad(Forgetful):
    """Has a balance loss made of nothing."""

    default_balance = 0.1

    def forward(self, logits: Tensor, *read: Tensor) -> GateResult:
        return GateResult(gates=logits.softmax(dim=-1))


def test_a_penalty_reaches_the_routers_gradient_without_a_balance_loss_too() -> None:
    """It was added only where the gate had a balance loss as well."""
    register_gate("penalised")(Penalised)
    torch.manual_seed(0)
    router = Router(6, 3, RouterConfig(kind="linear", gate="penalised")).train()
    router.loss_scale = 1.0
    x = torch.randn(2, 5, 6)
    router(x).gates.sum().backward()  # a constant: what is left is the penalty's gradient
    weight = router.get_parameter("logits.linear_weight")
    found = weight.grad
    assert found is not None
    again = weight.detach().clone().requires_grad_()
    (3 * (x @ again.T).square().mean(dim=-1)).mean().backward()
    torch.testing.assert_close(found, again.grad)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (Forgetful, "gives a penalty that nothing asks for: let its has_penalty"),
        (WithoutLoad, "gives no load and probability, which its balance loss is made of"),
    ],
)
def test_a_loss_that_a_gate_would_lose_is_refused(gate: type[Gate], message: str) -> None:
    register_gate("wrong")(gate)
    with pytest.raises(UsageError, match=message):
        Router(6, 3, RouterConfig(kind="linear", gate="wrong")).train()(torch.randn(1, 2, 6))


def test_what_cannot_be_registered_is_refused_at_once() -> None:
    """Two experts of a kind with "__" in its name became one."""

    class Doubled(ToyExpert):
        kind: ClassVar[str] = "toy__shift"

    with pytest.raises(UsageError, match="expert kind 'toy__shift': give a name without dots and double und"):
        register_expert(Doubled)
    with pytest.raises(UsageError, match="is no Gate: give a class that inherits"):
        register_gate("plain")(nn.Linear)  # pyright: ignore[reportArgumentType]  # the mistake


def test_the_usual_types_of_fields_can_be_declared() -> None:
    """Lists and mappings of numbers were refused, their defaults too."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Fields(ToyExpert):
        sizes: Sequence[int] = (4, 8)
        rates: Sequence[float] = (0.1, 1)
        shares: Mapping[str, float] = field(default_factory=lambda: {"a": 0.5})
        share: float | int = 0.5

    Fields(targets=["mlp"])
    for name, wrong, message in (
        ("sizes", (0.5,), "give whole numbers"),
        ("rates", ("x",), "give numbers"),
        ("shares", {1: 2}, "give a mapping of names"),
        ("share", float("inf"), "give a number"),
    ):
        with pytest.raises(UsageError, match=f"{name} is .*: {message}"):
            Fields(targets=["mlp"], **{name: wrong})


def test_a_name_cannot_be_taken_twice() -> None:
    with pytest.raises(UsageError, match=r"expert 'toy-shift' is already registered by .*test_extension"):
        register_expert(ToyExpert)
    with pytest.raises(UsageError, match=r"gate 'toy-squares' is already registered by .*test_extension"):
        register_gate("toy-squares")(ToyGate)
    with pytest.raises(UsageError, match=r"gate 'softmax' is already registered by moa_peft\.mixture\.gates"):
        register_gate("softmax")(ToyGate)
    assert GATES["toy-squares"] is ToyGate


def test_a_process_that_has_not_registered_a_name_says_so() -> None:
    written = config().to_dict()
    del GATES["toy-squares"]
    with pytest.raises(UsageError, match="unknown gate 'toy-squares': known: "):
        MoAConfig.from_peft_type(**written)


SOURCES = {
    path.relative_to(Path(moa_peft.__file__).parent).as_posix(): path.read_text(encoding="utf-8")
    for path in Path(moa_peft.__file__).parent.rglob("*.py")
}


@pytest.mark.parametrize("kind", ["ia3", "vera", "sequential_adapter", "dora"])
def test_a_kind_inside_the_package_is_named_in_its_own_file_and_in_two_that_export_it(kind: str) -> None:
    """The third file that a kind may touch is the tests' table, `tiny`."""
    config_class = expert_kinds()[kind]
    own = config_class.__module__.removeprefix("moa_peft.").replace(".", "/") + ".py"
    words = (config_class.__name__, f'"{kind}"', f"'{kind}'", config_class.__module__)
    naming = {path for path, text in SOURCES.items() if any(word in text for word in words)}
    assert naming == {own, "mixture/experts/__init__.py", "__init__.py"}
