import sys

import pytest

from moa_peft import provenance


def test_rows_that_are_written_beside_the_source_do_not_make_it_dirty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A study whose rows are committed called its own source changed, because its results were."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(provenance, "_git", lambda *words: asked.append(words) or "")
    assert provenance.provenance()["dirty"] is False
    (status,) = [words for words in asked if words[0] == "status"]
    assert status[-2:] == ("--", "src")


def test_the_command_names_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["/somewhere/bin/moa", "bench", "train", "--out", "/home/me/rows.jsonl", "a/b"]
    )
    assert provenance.provenance()["command"] == "moa bench train --out rows.jsonl a/b"
