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
