"""From the tokens of an answer to its text, piece by piece."""

from collections.abc import Collection, Sequence
from typing import Any

_UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that are no whole character yet."""


_JOINED = 8
"""So many tokens before an answer may join its first."""


class AnswerText:
    """Turns new tokens into new text, and ends the answer where it ends.

    Args:
        tokenizer: The model's.
        ends: Tokens that end an answer; they are no part of its text.
        stops: Texts that end it; neither are they.
        before: The tokens that it goes on from, where it is the rest of a text: some tokenizers write a word without its space
            where nothing stands before it.

    Attributes:
        reason: Why the answer has ended, in OpenAI's words; None while it goes on.
        count: Tokens so far, an end token included.
    """

    def __init__(
        self, tokenizer: Any, ends: Collection[int], stops: Sequence[str], before: Sequence[int] = ()
    ) -> None:
        self.reason: str | None = None
        self.count = 0
        self._tokenizer, self._ends, self._stops = tokenizer, ends, stops
        self._ids = list(before[-_JOINED:])
        # the last tokens that were written, which the next ones may join; a prompt may end within a character
        ends = range(len(self._ids), -1, -1)
        whole = (one for one in ends if not self._decode(self._ids[:one]).endswith(_UNFINISHED))
        self._from, self._to = 0, next(whole)
        self._held = ""  # may be the beginning of a stop

    def add(self, ids: Sequence[int]) -> str:
        """Take new tokens; gives the text that is settled by them."""
        for one in ids:
            self.count += 1
            if one in self._ends:
                return self.finish("stop")
            self._ids.append(one)
        return self._settled(self._new_text(is_last=False))

    def finish(self, reason: str) -> str:
        """End the answer; gives the rest of its text."""
        text = self._settled(self._new_text(is_last=True))
        if self.reason is not None:  # at a stop
            return text
        self.reason = reason
        return text + self._held

    def _new_text(self, *, is_last: bool) -> str:
        before = self._decode(self._ids[self._from : self._to])
        whole = self._decode(self._ids[self._from :])
        if whole.endswith(_UNFINISHED) and not is_last:
            return ""
        if whole != before:  # tokens without a text, such as special ones, leave the others where they are
            self._from, self._to = self._to, len(self._ids)
        return whole[len(before) :]

    def _settled(self, text: str) -> str:
        self._held += text
        found = [self._held.find(one) for one in self._stops if one in self._held]
        if found:
            self.reason = "stop"
            return self._held[: min(found)]
        longest = max((len(one) for one in self._stops), default=1) - 1
        parts = (self._held[-size:] for size in range(min(longest, len(self._held)), 0, -1))
        kept = next((one for one in parts if any(stop.startswith(one) for stop in self._stops)), "")
        settled = self._held[: len(self._held) - len(kept)]
        self._held = kept
        return settled

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
