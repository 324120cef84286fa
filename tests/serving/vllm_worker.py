"""Runs vLLM for a test, in a process of its own: vLLM changes the classes of transformers. Standard input says what, in JSON.

``engines``: arguments of `LLM`; ``rounds``: lists of prompts as token ids, each served at once; ``tokens``: most new ones.
``timed``: engines by name, each timed ``times`` times, in turn; then ``tokens`` says how many each of ``prompts`` wants.
``refused``: engines that should not start.
"""

import json
import os
import sys
import time
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]  # in an environment of its own


def engine(asked: dict[str, Any]) -> Any:
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 32}
    return LLM(**{**defaults, "disable_log_stats": False, **asked})


def answers(llm: Any, prompts: list[list[int]], sampling: Any) -> list[dict[str, Any]]:
    outputs = llm.generate([{"prompt_token_ids": one} for one in prompts], sampling, use_tqdm=False)
    found = [one.outputs[0] for one in outputs]
    return [
        {
            "tokens": list(one.token_ids),
            "logprobs": [{str(key): top.logprob for key, top in step.items()} for step in one.logprobs or []],
        }
        for one in found
    ]


def counters(llm: Any) -> dict[str, float]:
    return {one.name: one.value for one in llm.get_metrics() if hasattr(one, "value")}


def refusals(asked: list[dict[str, Any]]) -> list[str]:
    said = []
    for one in asked:
        try:
            engine(one)
        except Exception as error:  # noqa: BLE001  # whatever vLLM makes of ours
            said.append(str(error))
        else:
            said.append("")
    return said


def timed(
    llms: dict[str, Any], prompts: list[list[int]], sampling: Any, times: int
) -> dict[str, list[float]]:
    """Tokens a CPU second of each engine, in turn; the first round of each is not counted."""
    found: dict[str, list[float]] = {name: [] for name in llms}
    for turn in range(times + 1):
        for name, llm in llms.items():
            start = time.process_time()
            made = answers(llm, prompts, sampling)
            if turn:
                found[name].append(sum(len(one["tokens"]) for one in made) / (time.process_time() - start))
    return found


def main() -> None:
    asked = json.load(sys.stdin)
    result: Any
    if "refused" in asked:
        result = refusals(asked["refused"])
    elif "timed" in asked:
        llms = {name: engine(one) for name, one in asked["timed"].items()}
        whole = [SamplingParams(temperature=0, max_tokens=one, ignore_eos=True) for one in asked["tokens"]]
        result = timed(llms, asked["prompts"], whole, asked["times"])
    else:
        greedy = SamplingParams(temperature=0, max_tokens=asked["tokens"], logprobs=5)
        llms = [engine(one) for one in asked["engines"]]  # deleting one would end what all share
        result = [
            {
                "rounds": [answers(one, prompts, greedy) for prompts in asked["rounds"]],
                "counters": counters(one),
            }
            for one in llms
        ]
    sys.stdout.write("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
