from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from moa_peft import RouterConfig
from moa_peft.data.row import Row
from moa_peft.data.templates import render_prompt
from moa_peft.data.tokenization import encode, end_token_id
from moa_peft.errors import UsageError
from moa_peft.evaluation.batching import pad_left, plan_batches, positions
from moa_peft.evaluation.generation import generate_batch
from moa_peft.evaluation.questions import as_question
from moa_peft.evaluation.scoring import (
    ChoiceScores,
    TokenQuestion,
    check_lengths,
    score_batch,
    token_question,
)
from oracles import answer_losses, score_choices
from tiny_lm import byte_tokenizer, choice_rows, number_rows, tiny_llama, with_mixture

TOKENIZER = byte_tokenizer()


def questions(count: int) -> list[TokenQuestion]:
    asked = [as_question(row) for row in choice_rows(count)]
    return [token_question(one.row, one.completions, TOKENIZER, "paper") for one in asked]


def plain_scores(model: torch.nn.Module, question: TokenQuestion) -> list[list[float]]:
    """The definition: each prompt with each completion by itself, no cache, no padding, in float64."""
    scores: list[list[float]] = []
    with torch.no_grad():
        for completion in question.completions:
            ids = torch.tensor([[*question.prompt, *completion]])
            logits: Tensor = model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
            start = len(question.prompt)
            scores.append([float(logits[start + place - 1, token]) for place, token in enumerate(completion)])
    return scores


def flat(scores: list[list[list[float]]]) -> Tensor:
    return torch.tensor([value for one in scores for choice in one for value in choice])


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    small = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    gpt2 = GPT2Config(vocab_size=257, n_embd=16, n_layer=2, n_head=2, n_positions=1024, initializer_range=0.3)
    mistral = MistralConfig(**small, **heads, sliding_window=37)  # type: ignore[arg-type]  # mixed values
    return {
        "llama": tiny_llama(),
        "mixture": with_mixture(tiny_llama()),
        "official pooling": with_mixture(
            tiny_llama(), router=RouterConfig(granularity="instance", pooling="official")
        ),
        "positions are learned": GPT2LMHeadModel(gpt2).eval(),
        "window shorter than the prompt": MistralForCausalLM(mistral).eval(),
    }


@pytest.mark.parametrize("name", [one for one in models() if one != "official pooling"])
def test_shared_prompts_give_the_scores_of_each_choice_by_itself(name: str) -> None:
    model, asked = models()[name], questions(7)
    found = score_batch(model, asked)
    for one, expected in zip(found, [plain_scores(model, question) for question in asked], strict=True):
        assert [len(choice) for choice in one] == [len(choice) for choice in expected]
        torch.testing.assert_close(flat([one]), flat([expected]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixture", "official pooling"])
def test_scores_and_choices_do_not_depend_on_the_batch_size(name: str) -> None:
    model, asked = models()[name], questions(13)
    alone, together = score_choices(model, asked, batch_size=1), score_choices(model, asked, batch_size=8)
    assert [one.best() for one in alone] == [one.best() for one in together]
    assert len({one.best() for one in alone}) > 1, "the test says nothing when all choices are the same"
    for one, other in zip(alone, together, strict=True):
        assert one.sums == pytest.approx(other.sums, abs=1e-5)
        assert one.means == pytest.approx(other.means, abs=1e-5)


def test_choices_of_one_token_and_of_several_are_scored_alike() -> None:
    prompt = (5, 6, 7)
    asked = TokenQuestion(prompt=prompt, completions=((9,), (8, 3, 4), (8,), (8, 3, 256)))
    assert asked.num_shared == 0
    model = tiny_llama()
    torch.testing.assert_close(
        flat([score_batch(model, [asked])[0]]), flat([plain_scores(model, asked)]).float()
    )


def test_the_end_token_does_not_count_for_a_choice() -> None:
    scores = ChoiceScores.of([[-1.0, -2.0, -100.0], [-4.0, -0.5]])
    assert scores.sums == (-3.0, -4.0)
    assert scores.means == (-1.5, -4.0)
    assert scores.best() == 0
    assert ChoiceScores(sums=(-2.0, -1.0), means=(-0.5, -1.0)).best(per_token=True) == 0
    assert ChoiceScores(sums=(-2.0, -1.0), means=(-0.5, -1.0)).best() == 1
    assert ChoiceScores(sums=(-1.0, -1.0), means=(-1.0, -1.0)).best() == 0


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_answer_loss_is_the_training_loss_of_its_row_alone(batch_size: int) -> None:
    model, rows = with_mixture(tiny_llama()), number_rows(5)
    losses = answer_losses(model, TOKENIZER, rows, batch_size=batch_size)
    for row, loss in zip(rows, losses, strict=True):
        prompt = render_prompt(row, "paper", TOKENIZER)
        example = encode(prompt, row.output, TOKENIZER, template="paper", end=end_token_id(TOKENIZER))
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        with torch.no_grad():
            expected = float(model(input_ids=ids, labels=labels).loss)
        assert loss == pytest.approx(expected, abs=1e-5)


def test_no_more_logits_are_computed_than_the_answers_need() -> None:
    model, asked = tiny_llama(), questions(4)
    widths: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    score_batch(model, asked)
    assert max(widths) <= max(one.num_logits for one in asked) < min(len(one.prompt) for one in asked)


def test_the_output_layer_reads_whole_tensors_on_a_cpu() -> None:
    """A product with a slice copies the output layer's weight for each row."""
    whole: list[bool] = []
    model = tiny_llama()
    model.lm_head.register_forward_pre_hook(lambda _, inputs: whole.append(inputs[0].is_contiguous()))
    score_batch(model, questions(3))
    generate_batch(model, [[1, 2], [3, 4, 5]], max_new_tokens=2, ends=())
    assert len(whole) > 3
    assert all(whole)


def test_a_row_that_is_too_long_is_named() -> None:
    row = Row(instruction="why " * 300, input="", output="so", answer="")
    with pytest.raises(UsageError, match=r"row 2 takes 1\d{3} tokens, the model reads 1024"):
        answer_losses(tiny_llama(), TOKENIZER, [*number_rows(1), row])


def test_a_model_without_a_stated_length_reads_anything() -> None:
    config = SimpleNamespace(get_text_config=SimpleNamespace)
    check_lengths(SimpleNamespace(config=config), [10**6])


def test_batches_hold_every_place_once_and_keep_their_budgets() -> None:
    lengths, kept = [3, 50, 7, 7, 20, 1, 400, 9], [1, 9, 2, 2, 3, 1, 30, 2]
    batches = plan_batches(lengths, kept, batch_size=3, token_budget=60, logit_budget=10)
    assert sorted(place for batch in batches for place in batch) == list(range(8))
    for batch in batches:
        assert len(batch) <= 3
        if len(batch) > 1:
            assert len(batch) * max(lengths[place] for place in batch) <= 60
            assert len(batch) * max(kept[place] for place in batch) <= 10
    assert batches[0] == [6]
    assert batches == plan_batches(lengths, kept, batch_size=3, token_budget=60, logit_budget=10)
    roomy = {"batch_size": 9, "token_budget": 999, "logit_budget": 999}
    assert plan_batches([30, 30, 30], [1, 1, 1], **(roomy | {"token_budget": 60})) == [[0, 1], [2]]
    assert plan_batches([5, 5, 5], [2, 3, 3], **(roomy | {"logit_budget": 6})) == [[0, 1], [2]]
    assert plan_batches([5, 5, 5], [1, 4, 1], **(roomy | {"logit_budget": 8})) == [[0, 1], [2]]
    assert len(plan_batches(lengths, kept, batch_size=8, token_budget=10**6, logit_budget=10**6)) == 1


def test_padding_stands_on_the_left_and_positions_count_real_tokens() -> None:
    ids, mask = pad_left([[4, 5, 6], [7]], torch.device("cpu"))
    assert ids.tolist() == [[4, 5, 6], [0, 0, 7]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions(mask).tolist() == [[0, 1, 2], [0, 0, 0]]
