import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moa_peft.cli.train import plan_text
from moa_peft.data.loading import load_rows
from moa_peft.data.row import Row, rows_md5
from moa_peft.errors import UsageError
from moa_peft.training.prepare import prepare
from moa_peft.training.recipe import Recipe
from moa_peft.training.rows import hold_out, read_rows


def row(number: int) -> Row:
    return Row(instruction=f"add {number} and 1", input="", output=str(number + 1), answer="")


def test_rows_held_out_are_a_seeded_draw_and_both_parts_keep_their_order() -> None:
    rows = [row(number) for number in range(20)]
    train, held_out = hold_out(rows, 0.25, seed=3)
    assert len(held_out) == 5
    assert sorted([*train, *held_out], key=rows.index) == rows
    assert train == sorted(train, key=rows.index)
    assert held_out == sorted(held_out, key=rows.index)
    assert hold_out(rows, 0.25, seed=3) == (train, held_out)
    assert hold_out(rows, 0.25, seed=4) != (train, held_out)


def test_at_least_one_row_is_held_out_and_one_left() -> None:
    rows = [row(number) for number in range(3)]
    assert len(hold_out(rows, 0.01, seed=0)[1]) == 1
    with pytest.raises(UsageError, match="validation holds out 3 of 3 rows: nothing is left to train on"):
        hold_out(rows, 0.9, seed=0)


def test_the_md5_depends_on_contents_and_order_but_not_on_the_file(tmp_path: Path) -> None:
    rows = [row(1), row(2)]
    (tmp_path / "a.json").write_text(json.dumps([dataclasses.asdict(one) for one in rows]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in rows))
    md5 = rows_md5(rows)
    assert (
        rows_md5(load_rows(str(tmp_path / "a.json"))) == rows_md5(load_rows(str(tmp_path / "b.jsonl"))) == md5
    )
    assert rows_md5(rows[::-1]) != md5
    for change in ({"output": "x"}, {"system": "x"}):
        assert rows_md5([dataclasses.replace(rows[0], **change), rows[1]]) != md5
    assert md5 == "420c5ee3b0eab2e46b221a5836629d0f", "recipes that state one would be refused"


def test_held_out_rows_may_come_from_a_source_of_their_own(
    recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in (("train", 5), ("validation", 2)):
        rows = [dataclasses.asdict(row(number)) for number in range(count)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    rows = read_rows(recipe_of(data=str(folder), validation=str(folder), limit=4))
    assert [len(rows.train), len(rows.validation or ())] == [4, 2]
    assert rows.recipe.data_md5 == rows_md5(rows.train)
    assert rows.recipe.validation_md5 == rows_md5(rows.validation or [])
    with pytest.raises(
        UsageError, match=r"MD5 [0-9a-f]+, the recipe's validation_md5 is abc: give the same val"
    ):
        read_rows(recipe_of(data=str(folder), validation=str(folder), validation_md5="abc"))
    assert len(read_rows(recipe_of(data=str(folder), data_split="validation")).train) == 2


def test_rows_that_are_not_those_of_the_recipe_are_refused(recipe_of: Callable[..., Recipe]) -> None:
    md5 = read_rows(recipe_of()).recipe.data_md5
    assert read_rows(recipe_of(data_md5=md5)).recipe.data_md5 == md5
    with pytest.raises(
        UsageError, match=f"the rows of .* have MD5 [0-9a-f]+, the recipe's data_md5 is {md5}"
    ):
        read_rows(recipe_of(data_md5=md5, limit=3))


def test_rows_that_are_too_long_are_counted_and_so_are_those_that_lose_their_end(
    recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.json"
    long = Row(instruction="add 1 and 1 " * 50, input="", output="2", answer="")
    held_out.write_text(json.dumps([dataclasses.asdict(one) for one in (row(1), long, long)]))
    rows = tmp_path / "rows.json"
    loses_its_end = Row(instruction="add", input="", output="2 " * 500, answer="")
    rows.write_text(json.dumps([dataclasses.asdict(one) for one in (row(1), long, loses_its_end)]))
    plan = prepare(recipe_of(data=str(rows), validation=str(held_out))).plan
    assert (plan.rows_kept, plan.rows_dropped, plan.rows_cut) == (2, 1, 1)
    assert (plan.validation_rows, plan.validation_rows_dropped) == (1, 2)
    assert (
        " 2 rows (1 dropped: their answers start after max_length; 1 cut: their answers end after max_length)"
        ", 1 held out (2 dropped: their answers start after max_length)\n"
    ) in plan_text(plan)
