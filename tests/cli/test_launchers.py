import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TINY = runpy.run_path(str(Path(__file__).parents[1] / "training" / "tiny.py"))
MODULE = [sys.executable, "-m", "moa_peft"]


@pytest.mark.slow
def test_two_processes_of_a_launcher_train_what_one_trains_with_batches_twice_as_large(
    tmp_path: Path,
) -> None:
    model, rows = TINY["write_model"](tmp_path / "model"), TINY["write_rows"](tmp_path / "rows.json")
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    runs = {"one": (MODULE, 4), "two": ([*launched, "-m", "moa_peft"], 2)}
    held_out = TINY["write_rows"](tmp_path / "held_out.json", 11)  # no whole batches for two processes
    losses, weights, judged = {}, {}, {}
    for name, (command, batch) in runs.items():
        flags = {
            "model": model, "data": rows, "max_length": 96, "max_steps": 3, "logging_steps": 1, "learning_rate": 0.01,
            "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1, "output_dir": tmp_path / name,
            "validation": held_out, "per_device_eval_batch_size": 4,
        }  # fmt: skip
        words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        done = subprocess.run(
            [*command, "train", *words, "--use_cpu", "--json"],
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (said,) = done.stdout.splitlines()  # one process speaks
        (row,) = (tmp_path / name / "results.jsonl").read_text().splitlines()
        assert json.loads(said)["steps"] == 3
        losses[name], judged[name] = json.loads(row)["final_loss"], json.loads(row)["validation_loss"]
        weights[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-3)
    assert judged["two"] == pytest.approx(judged["one"], rel=1e-4)
    assert weights["two"].keys() == weights["one"].keys()
    for name, one in weights["one"].items():
        torch.testing.assert_close(weights["two"][name], one, rtol=0.05, atol=2e-3, msg=name)
