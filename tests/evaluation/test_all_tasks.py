"""The paper's sixteen tasks, from their real files, on a tiny model: every batch size gives the same."""

from pathlib import Path
from typing import Any

import pytest

from moa_peft.errors import UsageError
from moa_peft.evaluation.code_execution import check_isolation
from moa_peft.evaluation.options import EvaluationOptions
from moa_peft.evaluation.result_key import identify
from moa_peft.evaluation.run import TaskResult, evaluate
from moa_peft.evaluation.tasks import GROUPS, Task, load_tasks
from tiny_lm import byte_tokenizer, tiny_llama, with_mixture

DATA = Path(__file__).parents[2] / "../shared/data"
TOKENIZER = byte_tokenizer()


def tasks(group: str) -> list[Task]:
    if not DATA.is_dir():
        pytest.skip("the data folder is not beside the checkout")
    if group == "code":
        try:
            check_isolation()
        except UsageError as error:
            pytest.skip(str(error))
    return load_tasks(group, data_root=DATA, limit=6)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_no_score_of_the_papers_tasks_depends_on_the_batch_and_a_second_call_changes_nothing(
    group: str, tmp_path: Path
) -> None:
    asked = tasks(group)
    model = with_mixture(tiny_llama(max_position_embeddings=8192))
    known = identify(model)
    few: dict[str, Any] = {} if group == "commonsense" else {"max_new_tokens": 12}

    def run(task: Task, size: int) -> TaskResult:
        options = EvaluationOptions(
            batch_size=size, out=tmp_path / str(size), progress=False, allow_code_execution=True, **few
        )
        return evaluate(model, TOKENIZER, task, options, identity=known)

    for task in asked:
        alone, together = run(task, 1), run(task, 8)
        assert alone.row.key == together.row.key
        assert alone.row.accuracies == together.row.accuracies
        assert alone.row.num_scored == len(task.questions) == 6
        assert alone.losses() == pytest.approx(together.losses(), abs=1e-5)
        for one, other in zip(alone.examples, together.examples, strict=True):
            for name in ("prompt", "output", "extracted", "correct", "stopped", "outcome"):
                assert one.get(name) == other.get(name), (task.name, name)
    before = {one: one.read_bytes() for one in tmp_path.rglob("*.jsonl")}
    assert all(run(task, 8).reused for task in asked)
    assert {one: one.read_bytes() for one in tmp_path.rglob("*.jsonl")} == before
