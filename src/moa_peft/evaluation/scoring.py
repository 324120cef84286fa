"""Log-likelihoods of completions: of the choices of a question, and of the reference answer.

The choices of a question share the forward pass of its prompt and of the tokens that they begin with; what is left of
each choice runs on copies of the prompt's key-value cache. Models with a recurrent state read each choice's whole text.

Sizes: B questions of a batch, R choices with tokens left, K positions with logits, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from moa_peft.data.base_loading import longest_input
from moa_peft.data.row import Row
from moa_peft.data.templates import Template, render_prompt
from moa_peft.data.tokenization import completion_ids, end_token_id, prompt_ids
from moa_peft.errors import UsageError
from moa_peft.evaluation.batching import padded_call, plan_batches, rotary_switch
from moa_peft.mixture.gate_cache import cache_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_BUDGET = 4096
"""Most tokens of a forward pass, padding included."""

LOGIT_BUDGET = 1024
"""Most positions of a batch whose logits are computed: 200 MB in float32 at 49,152 words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenQuestion:
    """A prompt and its possible completions as tokens."""

    prompt: tuple[int, ...]
    """Tokens of the prompt; at least one."""

    completions: tuple[tuple[int, ...], ...]
    """Tokens of each completion, its end token included where that is scored; at least one each."""

    @property
    def num_shared(self) -> int:
        """Tokens that all completions begin with, at least one token of each not counted."""
        columns = zip(*(one[:-1] for one in self.completions), strict=False)
        return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))

    @property
    def num_tokens(self) -> int:
        """Length of the prompt with its longest completion."""
        return len(self.prompt) + max(len(one) for one in self.completions)

    @property
    def num_logits(self) -> int:
        """Positions whose logits are needed."""
        shared = self.num_shared
        return shared + 1 + sum(len(one) - shared - 1 for one in self.completions)


def one_begins_another(completions: Sequence[tuple[int, ...]]) -> bool:
    """Whether one completion begins another, as "answer1" does "answer10": without its end token it could not lose."""
    bare = [one[:-1] for one in completions]
    return any(one != other and other[: len(one)] == one for one in bare for other in bare)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceScores:
    """How likely a model finds each choice of one question."""

    sums: tuple[float, ...]
    """Log-likelihood of each choice, nats: the sum over its tokens; with the end token only where one begins another."""

    means: tuple[float, ...]
    """The same divided by the number of those tokens."""

    @classmethod
    def of(
        cls, token_log_likelihoods: Sequence[Sequence[float]], *, with_end: bool = False
    ) -> "ChoiceScores":
        """Add up the log-likelihoods of tokens; the last of each choice is the end token's, which may count or not."""
        texts = [one if with_end else one[:-1] for one in token_log_likelihoods]
        return cls(
            sums=tuple(sum(one) for one in texts), means=tuple(sum(one) / max(1, len(one)) for one in texts)
        )

    def best(self, *, per_token: bool = False) -> int:
        """The place of the likeliest choice; the first of equals."""
        values = self.means if per_token else self.sums
        return max(range(len(values)), key=values.__getitem__)


def token_question(
    row: Row, completions: Sequence[str], tokenizer: "PreTrainedTokenizerBase", template: Template
) -> TokenQuestion:
    """Tokenise a question and its completions as training does, each completion with the end token.

    Args:
        row: The question.
        completions: Texts of the completions; at least one.
        tokenizer: The base model's.
        template: How the row becomes text.

    Returns:
        The tokens.

    Raises:
        UsageError: If the template cannot be used with the tokenizer, or the tokenizer names no end token.
    """
    end = end_token_id(tokenizer, template)
    return TokenQuestion(
        prompt=tuple(prompt_ids(render_prompt(row, template, tokenizer), tokenizer, template)),
        completions=tuple((*completion_ids(one, tokenizer), end) for one in completions),
    )


def plan(questions: Sequence[TokenQuestion], batch_size: int) -> list[list[int]]:
    """Plan the batches of questions for `score_batch`; places in ``questions``, the longest first."""
    return plan_batches(
        [one.num_tokens for one in questions],
        [one.num_logits for one in questions],
        batch_size=batch_size,
        token_budget=TOKEN_BUDGET,
        logit_budget=LOGIT_BUDGET,
    )


@torch.inference_mode()
def score_batch(model: Any, questions: Sequence[TokenQuestion]) -> list[list[list[float]]]:
    """Compute the log-likelihood of every token of every completion.

    A question's values do not depend on the rest of the batch beyond the rounding of the model's dtype; sums are
    float32 and above whatever that is.

    Args:
        model: A causal language model of transformers, bare or in PEFT's wrapper, in evaluation mode.
        questions: The batch.

    Returns:
        Nats, by question, completion and token.
    """
    switch = rotary_switch(model)
    is_turned = switch is not None and any(one.num_tokens > switch for one in questions)
    if is_turned and sum(len(one.completions) for one in questions) > 1:
        return _scores_of_whole_texts(model, questions, at_once=1)
    shared = [one.num_shared for one in questions]
    begun = [[*one.prompt, *one.completions[0][:count]] for one, count in zip(questions, shared, strict=True)]
    call = padded_call(model, begun, keep=max(shared) + 1, prompts=[len(one.prompt) for one in questions])
    rest = [
        (place, choice)
        for place, one in enumerate(questions)
        for choice, completion in enumerate(one.completions)
        if len(completion) > shared[place] + 1
    ]
    outcome = model(**call, use_cache=bool(rest))
    scores = _scores_of_begun(outcome.logits, questions, shared)
    if not rest:
        return scores
    name, cache = cache_of(outcome)
    if cache is None or _has_states(cache):
        return _scores_of_whole_texts(model, questions, at_once=len(questions))
    tails = [list(questions[place].completions[choice][shared[place] :]) for place, choice in rest]
    found = _scores_of_tails(model, name, cache, call["attention_mask"], [place for place, _ in rest], tails)
    for (place, choice), values in zip(rest, found, strict=True):
        scores[place][choice] += values
    return scores


def mean_loss(token_log_likelihoods: Sequence[float]) -> float:
    """The mean negative log-likelihood of tokens, nats."""
    return -sum(token_log_likelihoods) / len(token_log_likelihoods)


def check_lengths(model: Any, lengths: Sequence[int]) -> None:
    """Check that a model can read sequences of these lengths.

    Args:
        model: As for `score_batch`.
        lengths: Tokens of each sequence, those still to be generated included.

    Raises:
        UsageError: If one is longer than the model's positions.
    """
    most = longest_input(model)
    longest = max(lengths, default=0)
    if most is not None and longest > most:
        raise UsageError(
            f"row {lengths.index(longest) + 1} takes {longest} tokens, the model reads {most}: leave such rows out, "
            "choose a model that reads more, or lower max_new_tokens"
        )


def _scores_of_begun(
    logits: Tensor, questions: Sequence[TokenQuestion], shared: Sequence[int]
) -> list[list[list[float]]]:
    """Score the tokens that completions share and the first in which they may differ; logits [B, K, V]."""
    width = logits.shape[1]
    totals = logits.float().logsumexp(dim=-1)  # [B, K]
    scores: list[list[list[float]]] = []
    for row, (question, count) in enumerate(zip(questions, shared, strict=True)):
        places = torch.arange(width - count - 1, width - 1)
        words = torch.tensor(question.completions[0][:count], dtype=torch.long)
        common = (logits[row, places, words].float() - totals[row, places]).tolist()
        firsts = torch.tensor([one[count] for one in question.completions])
        differing = (logits[row, -1, firsts].float() - totals[row, -1]).tolist()
        scores.append([[*common, value] for value in differing])
    return scores


def _has_states(cache: Any) -> bool:
    """Whether a cache holds recurrent states, those of MiniMax beside its layers."""
    linear = any(isinstance(one, LinearAttentionCacheLayerMixin) for one in cache.layers)
    return linear or hasattr(cache, "linear_cache")


def _scores_of_whole_texts(
    model: Any, questions: Sequence[TokenQuestion], *, at_once: int
) -> list[list[list[float]]]:
    """Score each completion with its prompt in front, where no cache of the prompt can be gone on from.

    That of a recurrent state goes on by one token at a time alone.
    """
    texts = [
        TokenQuestion(prompt=one.prompt, completions=(completion,))
        for one in questions
        for completion in one.completions
    ]
    found: dict[int, list[float]] = {}
    for batch in plan(texts, at_once):
        for place, (values,) in zip(batch, score_batch(model, [texts[one] for one in batch]), strict=True):
            found[place] = values
    scores = iter([found[place] for place in range(len(texts))])
    return [[next(scores) for _ in one.completions] for one in questions]


def _scores_of_tails(
    model: Any, name: str, cache: Any, mask: Tensor, owners: Sequence[int], tails: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Score what follows the first token of each tail, on copies of its question's cache. Changes the cache."""
    device = mask.device
    chosen = torch.tensor(owners, device=device)
    cache.reorder_cache(chosen)
    seen = mask[chosen]  # [R, T]
    longest = max(len(one) for one in tails) - 1
    padded = [[*one, *([0] * (longest + 1 - len(one)))] for one in tails]
    tokens = torch.tensor(padded, device=device)  # [R, longest + 1]
    mask = torch.cat([seen, seen.new_ones(len(tails), longest)], dim=1)  # padding comes after what is scored
    logits = model(
        input_ids=tokens[:, :-1],
        attention_mask=mask,
        position_ids=seen.sum(dim=-1, keepdim=True) + torch.arange(longest, device=device),
        use_cache=True,
        **{name: cache},
    ).logits.float()  # [R, longest, V]
    values = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1) - logits.logsumexp(dim=-1)
    return [row[: len(one) - 1] for row, one in zip(values.tolist(), tails, strict=True)]
