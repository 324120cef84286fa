"""What each of two processes does in the distributed tests."""

import faulthandler
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from moa_peft import parameter_groups
from tiny import mixture_model, tokens

RANKS = 2
DDP_CASES = (("llama", "everything"), ("gpt_neox", "sparse-moa"))
FSDP_CASES = tuple(
    (method, dtype) for method in ("soft-moa", "everything") for dtype in (torch.float32, torch.bfloat16)
)

FSDP1_METHODS = ("soft-moa", "everything", "soft-moa-hydra", "extra-kinds")


def global_batch() -> tuple[Tensor, Tensor]:
    """Four rows; the first two, rank 0's, have far fewer answer tokens than the others."""
    ids = tokens(4, 12)
    labels = ids.clone()
    labels[:2, :9] = -100
    labels[2:, :2] = -100
    return ids, labels


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def answer_tokens(labels: Tensor) -> int:
    return int((labels[:, 1:] != -100).sum())


def run_all(rank: int, folder: str) -> None:
    """Do every case in one process group; a file is the meeting point, so no port can be taken by another."""
    faulthandler.dump_traceback_later(
        240, exit=True
    )  # a process that waits for the other must not wait for ever
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    for family, method in DDP_CASES:
        gradients = ddp_gradients(rank, family, method)
        if rank == 0:
            torch.save(gradients, f"{folder}/ddp-{family}-{method}.pt")
    for method, dtype in FSDP_CASES:
        saved = fsdp_train(rank, method, dtype)
        if rank == 0:
            torch.save(saved, f"{folder}/fsdp-{method}-{dtype}.pt")
    for method in FSDP1_METHODS:
        sharded = fsdp1_gradients(rank, method)
        if rank == 0:
            torch.save(sharded, f"{folder}/fsdp1-{method}.pt")
    dist.barrier()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def ddp_gradients(rank: int, family: str, method: str) -> dict[str, Tensor | None]:
    model = mixture_model(family, method).train()
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    ids, labels = global_batch()
    mine = slice(2 * rank, 2 * rank + 2)
    for _ in range(2):  # a second step fails if the first one left a parameter without a gradient
        model.zero_grad()
        loss = summed_loss(parallel(input_ids=ids[mine]).logits, labels[mine])
        (loss * RANKS / answer_tokens(labels)).backward()  # DDP averages over the ranks
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def fsdp_train(rank: int, method: str, dtype: torch.dtype) -> dict[str, Any]:
    model = mixture_model("llama", method, dtype=dtype).train()
    mesh = init_device_mesh("cpu", (RANKS,))
    blocks: Any = model.get_base_model().model.layers
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    groups = parameter_groups(model, learning_rate=0.1, router_lr_factor=2)
    names = {one["name"]: [name for name, _ in one["params"]] for one in groups}
    optimiser = torch.optim.SGD(groups)
    ids, labels = global_batch()
    mine = slice(2 * rank, 2 * rank + 2)
    losses: list[float] = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = (
            summed_loss(model(input_ids=ids[mine]).logits.float(), labels[mine])
            * RANKS
            / answer_tokens(labels)
        )
        loss.backward()
        optimiser.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / RANKS)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    full: dict[str, Any] = get_model_state_dict(model, options=options)
    adapter = get_peft_model_state_dict(model, state_dict=full) if rank == 0 else {}
    return {"adapter": adapter, "logits": logits, "losses": losses, "groups": names}


def fsdp1_gradients(rank: int, method: str) -> dict[str, Any]:
    """Gradients of FSDP1 under the wrap policy that transformers' Trainer takes from PEFT, and with its defaults.

    The Trainer itself never uses FSDP on a CPU: accelerate takes DDP there.
    """
    model = mixture_model("llama", method).train()
    parallel = FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    units = [name for name, one in parallel.named_modules() if isinstance(one, FullyShardedDataParallel)]
    ids, labels = global_batch()
    mine = slice(2 * rank, 2 * rank + 2)
    for _ in range(2):
        parallel.zero_grad()
        loss = summed_loss(parallel(input_ids=ids[mine], use_cache=False).logits, labels[mine])
        (loss * RANKS / answer_tokens(labels)).backward()
    with FullyShardedDataParallel.summon_full_params(parallel, with_grads=True):
        gradients = {
            name.replace("_fsdp_wrapped_module.", ""): None if one.grad is None else one.grad.clone()
            for name, one in parallel.named_parameters()
            if one.requires_grad
        }
    return {"gradients": gradients, "units": units}


def reloaded(method: str, dtype: torch.dtype, adapter: dict[str, Tensor]) -> PeftModel:
    """A fresh single-process model with a saved adapter."""
    model = mixture_model("llama", method, dtype=dtype, awake=False)
    set_peft_model_state_dict(model, adapter)
    return model
