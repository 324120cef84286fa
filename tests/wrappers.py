"""A training run under each wrapper, by transformers' Trainer on a CPU: what each of its processes does."""

import faulthandler
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.fsdp import FullStateDictConfig
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from moa_peft import UsageError, parameter_groups
from tiny import FAMILIES, METHODS, awaken, tokens

RANKS = 2
STEPS = 3
BATCH = 4


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """How a run is wrapped."""

    ran: str
    """What was run, for the documentation."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of `TrainingArguments`."""
    processes: DistributedType | None = None
    """What accelerate takes the two processes for; None for one process."""
    dtype: torch.dtype = torch.float32
    """Of the frozen model."""
    quantization: Callable[[], Any] | None = None
    """Makes the argument of ``from_pretrained``."""
    prepare: Callable[[Trainer], object] = lambda trainer: None
    autocast: torch.dtype | None = None
    package: str | None = None
    """What has to be installed."""

    def load(self, base: Path, **arguments: Any) -> Any:
        """The frozen model."""
        if self.quantization is not None:
            arguments["quantization_config"] = self.quantization()
        return AutoModelForCausalLM.from_pretrained(base, dtype=self.dtype, **arguments)

    def calls(self) -> AbstractContextManager[Any]:
        """What a call outside of the trainer has to be in."""
        return nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)


def fsdp(version: int, **settings: Any) -> Wrapper:
    """Both processes load the same weights: accelerate broadcasts them (FSDP1's sync_module_states) by way of a device only."""
    config = {"version": version, **({"sync_module_states": False} if version == 1 else {})}
    return Wrapper(
        ran=f"`fsdp=True, fsdp_config={config}`",
        processes=DistributedType.MULTI_GPU,  # accelerate leaves FSDP out where it knows that it is on a CPU
        arguments={"fsdp": True, "fsdp_config": config},
        **settings,
    )


def zero(**settings: object) -> Wrapper:
    """DeepSpeed clips gradients unless it is told not to."""
    config = {
        "zero_optimization": settings, "gradient_clipping": 0.0, "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    return Wrapper(
        ran=f"`zero_optimization: {settings}`",
        processes=DistributedType.DEEPSPEED,
        arguments={"deepspeed": config},
        package="deepspeed",
    )


def checkpointing(*, use_reentrant: bool) -> Wrapper:
    kwargs = {"use_reentrant": use_reentrant}
    return Wrapper(
        ran=f"`gradient_checkpointing=True, gradient_checkpointing_kwargs={kwargs}`",
        arguments={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs},
    )


def compile_whole(trainer: Trainer) -> None:
    torch._dynamo.reset()
    trainer.model.compile(fullgraph=True, backend="aot_eager")


def scale_and_cast(trainer: Trainer) -> None:
    """What accelerate does for fp16 on other devices; on a CPU it refuses."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.model.forward = torch.autocast("cpu", torch.float16)(trainer.model.forward)


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def int8_weights() -> TorchAoConfig:
    return TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig(version=2))


PLAIN = Wrapper(ran="nothing else")
WRAPPERS: dict[str, Wrapper] = {
    "DDP": Wrapper(
        ran="`ddp_find_unused_parameters=False`",
        processes=DistributedType.MULTI_CPU,
        arguments={"ddp_find_unused_parameters": False},
    ),
    "FSDP1": fsdp(1),
    "FSDP2": fsdp(2),
    "FSDP2 of a bfloat16 base": fsdp(2, dtype=torch.bfloat16),
    "DeepSpeed ZeRO-2": zero(stage=2),
    "DeepSpeed ZeRO-3": zero(stage=3, stage3_param_persistence_threshold=0),
    "Gradient checkpointing": checkpointing(use_reentrant=False),
    "Gradient checkpointing, reentrant": checkpointing(use_reentrant=True),
    "bf16 autocast": Wrapper(ran="`bf16=True`", arguments={"bf16": True}, autocast=torch.bfloat16),
    "fp16 autocast": Wrapper(
        ran='`torch.autocast("cpu", torch.float16)`, `torch.amp.GradScaler`',
        prepare=scale_and_cast,
        autocast=torch.float16,
    ),
    "torch.compile": Wrapper(
        ran='forward and backward, `model.compile(fullgraph=True, backend="aot_eager")`',
        prepare=compile_whole,
    ),
    "bitsandbytes nf4": Wrapper(
        ran='`load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True`',
        quantization=nf4,
        package="bitsandbytes",
    ),
    "bitsandbytes 8-bit": Wrapper(
        ran="`load_in_8bit=True`",
        quantization=lambda: BitsAndBytesConfig(load_in_8bit=True),
        package="bitsandbytes",
    ),
    "torchao int8": Wrapper(ran="`Int8WeightOnlyConfig()`", quantization=int8_weights, package="torchao"),
}


def rows() -> tuple[Tensor, Tensor]:
    """Ids and labels of all steps; every second row has far fewer answer tokens."""
    ids = tokens(STEPS * BATCH, 12)
    labels = ids.clone()
    labels[::2, :9] = -100
    labels[1::2, :2] = -100
    return ids, labels


class GroupedTrainer(Trainer):
    """Plain gradient descent, so that every change is a gradient; routers learn twice as fast."""

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:  # type: ignore[override]  # as `AdapterTrainer` has it
        groups = parameter_groups(model, learning_rate=args.learning_rate, router_lr_factor=2)
        return torch.optim.SGD, {"params": groups, "lr": args.learning_rate}


def settings(wrapper: Wrapper, out: Path) -> TrainingArguments:
    if wrapper.processes is None:
        where = {"use_cpu": True, "per_device_train_batch_size": BATCH}
    else:
        configured = {"use_configured_state": True}
        where = {"accelerator_config": configured, "per_device_train_batch_size": BATCH // RANKS}
    return TrainingArguments(
        output_dir=str(out), max_steps=STEPS, learning_rate=0.01, lr_scheduler_type="constant", max_grad_norm=0.0,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        **where, **wrapper.arguments,
    )  # fmt: skip


def train(
    wrapper: Wrapper, family: str, method: str, base: Path, out: Path, frozen: object | None = None
) -> None:
    """Train, save the adapter into a folder as users do, and beside it the losses and the first rows' logits.

    Args:
        wrapper: How the run is wrapped.
        family: Of `tiny.FAMILIES`.
        method: Of `tiny.METHODS`.
        base: Folder of the frozen model.
        out: Folder of the results.
        frozen: A model to train instead of the one that the wrapper loads.
    """
    arguments = settings(
        wrapper, out
    )  # DeepSpeed's are at work as soon as they are made, also where a model is loaded
    model = get_peft_model(frozen or wrapper.load(base), METHODS[method](FAMILIES[family]))
    awaken(model)
    ids, labels = rows()
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    trainer = GroupedTrainer(
        model=model, args=arguments, train_dataset=dataset, data_collator=default_data_collator
    )
    wrapper.prepare(trainer)
    trainer.train()
    # what FSDP1 offloads to the CPU it does not copy on a CPU, and then frees
    staying = FullStateDictConfig(rank0_only=True)
    with mock.patch("torch.distributed.fsdp.FullStateDictConfig", return_value=staying):
        trainer.save_model(str(out))
    wrapped: Any = trainer.model_wrapped
    wrapped.eval()
    with torch.no_grad():
        logits = wrapped(input_ids=ids[:BATCH], use_cache=False).logits
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.save({"losses": losses, "logits": logits.float()}, out / "run.pt")


def reloaded(wrapper: Wrapper, base: Path, out: Path) -> Tensor:
    """The first rows' logits with the adapter that a run has saved, on a fresh model."""
    model = PeftModel.from_pretrained(wrapper.load(base), out).eval()
    with torch.no_grad(), wrapper.calls():
        return model(input_ids=rows()[0][:BATCH], use_cache=False).logits.float()


def run_all(rank: int, folder: str, runs: Sequence[tuple[str, str, str]]) -> None:
    """Do every run of two processes in one process group; a file is the meeting point, so no port can be taken by another."""
    faulthandler.dump_traceback_later(480, exit=True)  # a process may wait for the other, but not for ever
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "DS_ACCELERATOR": "cpu",
    }  # no port is opened
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    try:
        get_peft_model(
            PLAIN.load(Path(folder, "llama"), tp_plan="auto"), METHODS["soft-moa"](FAMILIES["llama"])
        )
    except UsageError as error:
        Path(folder, f"tensor-parallel-{rank}").write_text(str(error))
    for name, family, method in runs:
        with mock.patch.dict(os.environ):  # accelerate leaves its settings there
            take_for(WRAPPERS[name].processes)
            train(WRAPPERS[name], family, method, Path(folder, family), Path(folder, name, family, method))
    dist.barrier()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def take_for(kind: DistributedType | None) -> None:
    """Have accelerate take this process group for one of another kind."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state |= {"distributed_type": kind, "device": torch.device("cpu")}
    if kind == DistributedType.DEEPSPEED:
        importlib.import_module("deepspeed").init_distributed("gloo")
