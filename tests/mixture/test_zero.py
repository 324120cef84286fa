"""DeepSpeed ZeRO on two processes without a GPU; where deepspeed is installed."""

import importlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from ranks import RANKS
from tiny import mixture_model, tokens

pytestmark = pytest.mark.slow
METHODS = ("soft-moa", "everything", "extra-kinds")


def train(rank: int, port: int, stage: int, folder: str) -> None:
    """Give every gradient of a second step, of each method; both processes have the same batch."""
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
    }
    os.environ |= addresses
    torch.set_num_threads(1)
    deepspeed: Any = importlib.import_module("deepspeed")  # no dependency of this project
    full_gradient = deepspeed.utils.safe_get_full_grad

    deepspeed.init_distributed("gloo")
    for method in METHODS:
        model = mixture_model("llama", method).train()
        ids = tokens(4, 8)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.0),
            config={
                "train_micro_batch_size_per_gpu": len(ids),
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            },
        )
        found: dict[str, Tensor] = {}
        for _ in range(2):
            engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
            found = {n: full_gradient(p) for n, p in model.named_parameters() if p.requires_grad}
            engine.step()
        if rank == 0:
            torch.save(found, f"{folder}/{method}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_gives_the_gradients_of_a_single_process(stage: int, tmp_path: Path) -> None:
    """Stage 3 replaces the dictionaries of parameters, and gathers a weight when it is read inside a module's call."""
    pytest.importorskip("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train, (port, stage, str(tmp_path)), nprocs=RANKS)
    for method in METHODS:
        model = mixture_model("llama", method).train()
        ids = tokens(4, 8)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        theirs = torch.load(tmp_path / f"{method}.pt")
        for name, one in model.named_parameters():
            if one.requires_grad:
                assert one.grad is not None, name
                assert theirs[name] is not None, name
                limit = 1e-4 * max(one.grad.abs().max().item(), 1e-3)
                assert (theirs[name] - one.grad).abs().max().item() <= limit, name
