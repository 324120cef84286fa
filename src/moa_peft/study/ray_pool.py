"""Runs of a study in parallel processes, on this machine or on a cluster, through Ray."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moa_peft.errors import UsageError
from moa_peft.extras import check_installed
from moa_peft.study.data import StudyData
from moa_peft.study.one_run import Order, OtherBaseError, describe, execute
from moa_peft.study.rows import RunRow
from moa_peft.study.runner import Pool


@contextmanager
def ray_pool(*, cpus: int = 1) -> Iterator[tuple[Pool, int]]:
    """Start Ray, or join the cluster that the variable RAY_ADDRESS names, and do runs in its processes.

    A run takes ``cpus`` processors, each a thread, and a GPU where there are any. All machines must see the same folders
    under the same paths.

    Yields:
        What does the runs, and how many it does at once.

    Raises:
        UsageError: If Ray is not installed, or no run fits.
    """
    check_installed("ray")
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        there = ray.cluster_resources()
        gpus = 1 if there.get("GPU", 0) >= 1 else 0
        at_once = int(min(there.get("CPU", 0) // cpus, there["GPU"] if gpus else float("inf")))
        if at_once < 1:
            raise UsageError(
                f"a run takes {cpus} processors, Ray has {there.get('CPU', 0):g}: give --cpus-per-run less"
            )
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_execute)
        yield _pool(remote, cpus), at_once
    finally:
        ray.shutdown()


def _pool(remote: Any, cpus: int) -> Pool:
    import ray
    from ray.exceptions import RayError

    def run(orders: Sequence[Order]) -> Iterator[tuple[Order, RunRow]]:
        data = ray.put(orders[0].data) if orders else None  # once for all: it holds every row of the tests
        waiting = {
            remote.remote(dataclasses.replace(order, data=None), data, str(Path.cwd()), cpus): order
            for order in orders
        }
        while waiting:
            (ended, *_), _ = ray.wait(list(waiting), num_returns=1)
            order = waiting.pop(ended)
            try:
                row = ray.get(ended)
            except (OSError, OtherBaseError) as error:  # Ray's copy has the whole traceback and no errno
                raise getattr(error, "cause", error) from None
            except RayError as error:  # its process died, as for want of memory
                row = describe(order, {}, first_sentence(error))
            yield order, row

    return run


def first_sentence(error: Exception) -> str:
    """What Ray says of an error before it lists the machine's processes and addresses, which belong in no row."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).split('. ')[0].rstrip('.')}"


def _execute(order: Order, data: StudyData, folder: str, cpus: int) -> RunRow:
    """What a process of Ray does: as many threads as processors, in the folder that paths are relative to."""
    import torch

    os.chdir(folder)
    torch.set_num_threads(cpus)
    return execute(dataclasses.replace(order, data=data))
