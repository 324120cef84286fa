import pytest

from moa_peft.cli.table import print_table


def test_brackets_are_text_and_nothing_is_broken_to_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_table("runs/[best]", ["model", "loss"], [["[bold]m", "1.5" * 20]], left=("model",))
    lines = [one.split() for one in capsys.readouterr().out.splitlines() if one.strip()]
    assert lines[0] == ["runs/[best]"]
    assert lines[1] == ["model", "loss"]
    assert lines[-1] == ["[bold]m", "1.5" * 20]
