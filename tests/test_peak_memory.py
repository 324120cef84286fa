import subprocess
import sys
from pathlib import Path

import pytest

from moa_peft import peak_memory
from moa_peft.peak_memory import PeakMemory


@pytest.mark.parametrize("resettable", [True, False], ids=["the peak can be reset", "it cannot"])
def test_the_peak_of_memory_is_of_the_run_and_never_of_what_was_before_it(
    resettable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, reset = tmp_path / "status", tmp_path / "clear_refs"
    reset.touch()
    monkeypatch.setattr(peak_memory, "_STATUS", status)
    monkeypatch.setattr(peak_memory, "_RESET", reset)

    def held(now: int, peak: int) -> None:
        status.write_text(f"VmHWM:\t{peak * 1024} kB\nVmRSS:\t{now * 1024} kB\n")

    held(now=300, peak=300 if resettable else 2000)
    memory = PeakMemory(cuda=False)
    assert reset.read_text() == "5"
    held(now=400, peak=900 if resettable else 2000)
    assert memory.mib() == (900 if resettable else None)
    held(now=400, peak=2500)
    assert memory.mib() == 2500


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="this system does not tell a process's memory"
)
def test_the_peak_of_a_new_process_has_what_it_held_and_let_go() -> None:
    program = """
from moa_peft.peak_memory import PeakMemory, _status_mib
memory = PeakMemory(cuda=False)
start = _status_mib('VmRSS')
held = bytearray(200 * 2**20)
held[:: 2**12] = b"x" * len(held[:: 2**12])
del held
print(memory.mib() - start)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 150 < float(done.stdout) < 300
