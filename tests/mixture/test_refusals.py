"""Models and placements that no mixture can work with: refused by name, with the reason, and the model stays as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from moa_peft import (
    LoraExpert,
    MoAConfig,
    MoALayer,
    ParallelAdapterExpert,
    RouterConfig,
    RunError,
    UsageError,
    mixture_layers,
)
from tiny import awaken, base_model, mixture_model, tokens


def parts(model: nn.Module) -> list[str]:
    """Names of a model's modules, and how many hooks each has."""
    return [
        f"{name} {len(one._forward_hooks)} {len(one._forward_pre_hooks)} {getattr(one, 'config', None) is None}"
        for name, one in model.named_modules()
    ]


def test_a_tensor_parallel_model_is_refused() -> None:
    base = base_model("llama")
    base._tp_size = 2
    before = parts(base)
    with pytest.raises(UsageError, match=r"tensor-parallel over 2 ranks \(tp_plan\).*use FSDP"):
        get_peft_model(base, MoAConfig.preset("soft-moa"))
    assert parts(base) == before
    base._tp_size = 1
    assert get_peft_model(base, MoAConfig.preset("soft-moa"))(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_an_offloaded_model_is_refused(where: str, tmp_path: Path, note_run: Callable[..., None]) -> None:
    base = base_model("llama")
    if where == "disk":
        disk_offload(base, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        cpu_offload(base, execution_device=torch.device("cpu"))
    before = parts(base)
    with pytest.raises(UsageError, match="offloaded to the disk or the CPU") as refused:
        get_peft_model(base, MoAConfig.preset("soft-moa"))
    assert parts(base) == before
    assert base(tokens()).logits.isfinite().all()
    names = {"disk": "Disk offload", "cpu": "CPU offload"}
    note_run(names[where], "llama soft-moa", ran=f"`accelerate.{where}_offload`", refused=str(refused.value))


def test_a_model_without_values_is_not_an_offloaded_one() -> None:
    with torch.device("meta"):
        model = get_peft_model(
            type(base_model("llama"))(base_model("llama").config), MoAConfig.preset("soft-moa")
        )
    assert all(one.is_meta for one in model.parameters())


BERT = {
    "vocab_size": 97,
    "pad_token_id": 0,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
T5 = {"vocab_size": 97, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}


@pytest.mark.usefixtures("any_peft")
@pytest.mark.parametrize("add", [PreTrainedModel.add_adapter, get_peft_model])
@pytest.mark.parametrize(
    ("kind", "sizes", "task"),
    [
        ("BertForSequenceClassification", BERT, "SEQ_CLS"),
        ("EuroBertForTokenClassification", BERT, "TOKEN_CLS"),
        ("BertForMaskedLM", BERT, "CAUSAL_LM"),
        ("T5ForConditionalGeneration", T5, "CAUSAL_LM"),
        ("T5ForSequenceClassification", T5, "SEQ_CLS"),
    ],
)
def test_a_model_with_an_encoder_is_refused(
    kind: str, sizes: dict[str, int], task: str, add: Callable[..., Any]
) -> None:
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**sizes))
    before = parts(model)
    with pytest.raises(UsageError, match=r"(bert|t5) is an encoder, or has one beside its decoder"):
        add(model, MoAConfig.preset("soft-moa", task_type=task))
    assert parts(model) == before
    model.add_adapter(
        LoraConfig(target_modules=".*(query|q|q_proj)")
    )  # nothing is left that would stand in its way
    assert list(model.peft_config) == ["default"]


@pytest.mark.usefixtures("any_peft")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_a_refused_adapter_leaves_a_native_model_with_those_it_had() -> None:
    model = base_model("llama")
    wrong = MoAConfig.preset("soft-moa", layers_to_transform=[7])
    for had in ([], ["first"]):
        before = parts(model)
        with pytest.raises(UsageError, match=r"layers \[7\] do not exist"):
            model.add_adapter(wrong, adapter_name="second")
        assert parts(model) == before
        assert list(getattr(model, "peft_config", {})) == had
        assert model._hf_peft_config_loaded is bool(had)
        if not had:
            model.add_adapter(MoAConfig.preset("soft-moa"), adapter_name="first")


@pytest.mark.usefixtures("any_peft")
@pytest.mark.parametrize("where", ["every block", "the second block"])
@pytest.mark.parametrize("had", [True, False], ids=["second", "first"])
def test_an_adapter_that_is_refused_while_its_blocks_are_built_leaves_none_of_them(
    where: str, had: bool
) -> None:
    """PEFT took what was left for an adapter, and trained the whole base model with the next one."""
    base = base_model("llama")
    right = MoAConfig.preset("topk-moe-lora")
    model = get_peft_model(base, right) if had else base
    before = parts(base)
    more = [ParallelAdapterExpert(layers=[0])] if where == "the second block" else []
    wrong = MoAConfig(
        experts=[LoraExpert(targets=["q_proj"]), *more], router=RouterConfig(gate="top-k", keep=2)
    )
    with pytest.raises(UsageError, match="keep is 2: there are 1 experts"):
        model.add_adapter("wrong", wrong) if had else get_peft_model(model, wrong)
    assert parts(base) == before
    model = model if had else get_peft_model(base, right)
    assert list(model.peft_config) == ["default"]
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert trained
    assert all(".moa_mixture.default." in name for name in trained)
    assert model(tokens()).logits.isfinite().all()


def test_an_adapter_whose_blocks_cannot_all_be_built_leaves_none_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error that is not ours, as of memory, left the first blocks with an adapter that nothing named."""
    base = base_model("llama")
    before, built = parts(base), []

    def one_block(self: MoALayer, *given: Any) -> None:
        if built:
            raise MemoryError
        built.append(1)
        add_mixture(self, *given)

    add_mixture = MoALayer.add_mixture
    monkeypatch.setattr(MoALayer, "add_mixture", one_block)
    with pytest.raises(MemoryError):
        get_peft_model(base, MoAConfig.preset("soft-moa"))
    assert parts(base) == before


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_an_adapter_in_place_of_another_leaves_nothing_of_it(tmp_path: Path) -> None:
    """Its blocks that the new one has not were trained and saved, and the file could not be loaded."""
    base = base_model("llama")
    get_peft_model(base, MoAConfig.preset("soft-lora"))
    config = MoAConfig(experts=[LoraExpert(targets=["v_proj"], rank=2)], layers_to_transform=[1])
    model = get_peft_model(base, config)
    assert [name for name, _ in mixture_layers(model)] == ["base_model.model.model.layers.1.moa"]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    assert torch.equal(model.eval()(tokens()).logits, again(tokens()).logits)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_a_refused_adapter_leaves_the_one_of_its_name_at_work() -> None:
    model = mixture_model("llama", "soft-moa")
    expected = model(tokens()).logits
    wrong = MoAConfig(
        experts=[LoraExpert(targets=["q_proj"]), ParallelAdapterExpert(layers=[0])],
        router=RouterConfig(gate="top-k", keep=2),
    )
    with pytest.raises(UsageError, match="keep is 2"):
        get_peft_model(model.get_base_model(), wrong)
    assert torch.equal(model(tokens()).logits, expected)


def test_a_block_that_stands_twice_in_a_model_is_refused() -> None:
    """Its adapter was trained and saved, and could not be loaded."""
    base = base_model("llama")
    base.model.layers[1] = base.model.layers[0]
    with pytest.raises(UsageError, match=r"model.layers holds a block twice"):
        get_peft_model(base, MoAConfig.preset("soft-lora"))


def test_a_refused_second_adapter_leaves_the_first_its_padding() -> None:
    """The watch of the tokens is one for all blocks, and went with the layers of the refused adapter."""
    model = get_peft_model(
        base_model("llama"), MoAConfig.preset("instance-moa", layers_to_transform=[0])
    ).eval()
    awaken(model)
    ids = tokens()
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    @torch.no_grad()
    def logits() -> Tensor:
        return model(padded, attention_mask=mask, position_ids=positions).logits

    before = logits()
    experts = [
        LoraExpert(targets=["q_proj"]),
        LoraExpert(targets=["k_proj"]),
        ParallelAdapterExpert(layers=[0]),
    ]
    with pytest.raises(UsageError, match="keep is 3: there are 2 experts"):
        model.add_adapter("wrong", MoAConfig(experts=experts, router=RouterConfig(gate="top-k", keep=3)))
    assert torch.equal(logits(), before)


def test_mixtures_are_not_combined_into_one() -> None:
    model = mixture_model("llama", "soft-moa")
    with pytest.raises(UsageError, match="add_weighted_adapter: mixtures cannot be combined into one"):
        model.add_weighted_adapter(["default"], [1.0], "both")


def test_data_parallel_replicas_are_refused(note_run: Callable[..., None]) -> None:
    """Without two devices `nn.DataParallel` copies nothing; what it calls of each module when it does is called here."""
    model = mixture_model("llama", "soft-moa")
    expected = model(tokens()).logits
    [refusing, *others] = [one for one in model.modules() if isinstance(one, MoALayer)]
    assert others
    with pytest.raises(
        RunError, match=r"nn\.DataParallel cannot run a mixture.*accelerate launch"
    ) as refused:
        refusing._replicate_for_data_parallel()
    assert torch.equal(model(tokens()).logits, expected)
    ran = "what it calls of a module before it copies it to a second GPU"
    note_run("nn.DataParallel", "llama soft-moa", ran=ran, refused=str(refused.value))
