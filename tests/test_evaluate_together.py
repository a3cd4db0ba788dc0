"""Losses and answers in one pass, against transformers' forward and `generate`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel

from lighten.adapters import AdapterSpec, attach
from lighten.data import LearntAnswers
from lighten.data.special import visible
from lighten.evaluation import together
from lighten.evaluation.generate import stop_tokens
from lighten.evaluation.together import Disagrees, Pass
from lighten.generation import attention, kernels, slotted
from lighten.models.attention_setting import set_attention
from tests.test_train_step import Row, row
from tests.tiny import tiny_model, tiny_tokenizer

READ_IN_SLOTS = ("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "phi3", "gpt2", "opt",
                 "mixtral")  # fmt: skip
NEW_TOKENS = 6
needs_kernels = pytest.mark.skipif(kernels.obstacle() is not None, reason=str(kernels.obstacle()))


def adapted(arch: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with an adapter that moves every answer."""
    model = tiny_model(arch, dtype=dtype)
    set_attention(model, "sdpa", "cpu")
    trained = attach(model, [AdapterSpec("a", r=2, alpha=8)])
    torch.manual_seed(1)
    for parameter in trained.parameters("a").values():
        nn.init.normal_(parameter, std=0.2)
    return trained


def one_pass(trained: Any, adapter: str | None = "a", **changes: Any) -> Pass:
    return Pass(trained.model, tiny_tokenizer(), trained, adapter, LearntAnswers(), **{
        "max_new_tokens": NEW_TOKENS, "max_rows": 3, "max_tokens": 64, "at_once": 4, **changes,
    })  # fmt: skip


def examples(system: int = 0) -> tuple[list[Any], list[list[int]]]:
    """Rows of several lengths with the prompts they begin with; one of each stands alone.

    Args:
        system: Tokens that all of them begin with.
    """
    rows = [row(length, length - 4, seed=length) for length in (9, 30, 14, 6, 22)]
    prompts = [list(example.input_ids[:4]) for example in rows[:4]] + [[7, 8, 9, 10, 11]]
    system_tokens = row(system, 0).input_ids
    rows = [
        Row([*system_tokens, *example.input_ids], [*[False] * system, *example.supervised])
        for example in rows
    ]
    prompts = [[*system_tokens, *prompts[index]] for index in (3, 0, 4, 1, 2)]
    return rows, prompts


def plain_loss(model: PreTrainedModel, example: Any) -> float:
    logits = model(torch.tensor([example.input_ids])).logits[0, :-1].double()
    supervised = torch.tensor(example.supervised[1:])
    targets = torch.tensor(example.input_ids[1:])
    return float(F.cross_entropy(logits[supervised], targets[supervised], reduction="sum"))


def plain_answer(model: PreTrainedModel, prompt: list[int], stops: list[int]) -> list[int]:
    settings = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=stops,
                                pad_token_id=0)  # fmt: skip
    ids = torch.tensor([prompt])
    generated: Any = model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=settings
    )
    return [token for token in generated[0, len(prompt) :].tolist() if token not in stops]


@needs_kernels
@pytest.mark.parametrize("arch", READ_IN_SLOTS)
@pytest.mark.parametrize("system", [0, 12])
def test_one_pass_measures_what_transformers_does(arch: str, system: int) -> None:
    trained = adapted(arch)
    model, tokenizer = trained.model, tiny_tokenizer()
    assert slotted.obstacle(model) is None
    rows, prompts = examples(system)
    attention_before = model.config._attn_implementation
    passes = {adapter: one_pass(trained, adapter) for adapter in (None, "a")}
    results = {adapter: subject.run(rows, prompts) for adapter, subject in passes.items()}
    assert {subject._shared for subject in passes.values()} == {system}
    assert model.config._attn_implementation == attention_before
    for adapter, (losses, answers) in results.items():
        with torch.no_grad(), trained.using(adapter):
            expected_losses = [plain_loss(model, example) for example in rows]
            stops = stop_tokens(model, tokenizer)
            expected_texts = [
                visible(plain_answer(model, prompt, stops), tokenizer, hidden={0, 1})
                for prompt in prompts
            ]
        assert losses.nll == pytest.approx(expected_losses, rel=1e-4)
        assert losses.tokens == tuple(sum(example.supervised) for example in rows)
        assert answers.texts == expected_texts
        assert len(prompts) < answers.tokens <= NEW_TOKENS * len(prompts)
    assert results[None][1].texts != results["a"][1].texts
    assert results[None][0].nll != results["a"][0].nll


@needs_kernels
def test_prompts_that_rows_begin_with_are_read_once() -> None:
    trained = adapted("llama")
    rows, prompts = examples()
    tokens_read = []
    handle = trained.model.get_input_embeddings().register_forward_hook(
        lambda _, arguments, __: tokens_read.append(arguments[0].numel())
    )
    subject = one_pass(trained, max_rows=64, max_tokens=None, at_once=64)
    subject._compared = True  # of what is read for the comparison nothing is counted
    subject._objective._verified = True
    subject.run(rows, prompts)
    handle.remove()
    in_slots = sum(len(example.input_ids) for example in rows[:4]) + len(prompts[2])
    assert in_slots in tokens_read
    assert sum(tokens_read) - in_slots - len(rows[4].input_ids) <= NEW_TOKENS * len(prompts)


@needs_kernels
def test_an_answer_that_the_row_holds_is_not_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = adapted("llama")
    with torch.no_grad():
        trained.model.get_output_embeddings().weight *= 1000  # sure of every token
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    stops = stop_tokens(trained.model, tiny_tokenizer())
    with torch.no_grad(), trained.using("a"):
        expected_answers = [plain_answer(trained.model, prompt, stops) for prompt in prompts]
    other_token = (expected_answers[1][2] + 1) % 300 + 3
    # The second row answers otherwise.
    continuations = [
        expected_answers[0],
        [*expected_answers[1][:2], other_token, other_token],
    ]
    rows = [
        Row([*prompt, *continuation], [False] * len(prompt) + [True] * len(continuation))
        for prompt, continuation in zip(prompts, continuations, strict=True)
    ]
    steps: list[int] = []
    step = slotted.Slotted.step

    def count_step(self: Any, tokens: Any, *arguments: Any) -> Any:
        steps.append(len(tokens))
        return step(self, tokens, *arguments)

    monkeypatch.setattr(slotted.Slotted, "step", count_step)
    subject = one_pass(trained)
    subject._compared = True
    answers = subject.run(rows, prompts)[1]
    assert answers.texts == [
        visible(expected, tiny_tokenizer(), hidden={0, 1}) for expected in expected_answers
    ]
    assert len(expected_answers[0]) == len(expected_answers[1]) == NEW_TOKENS
    assert steps == [1] * (NEW_TOKENS - 2)
    # What the loss says is no work of answering, and has no part in its speed.
    assert (answers.tokens, answers.decoded) == (2 * NEW_TOKENS, NEW_TOKENS - 2)
    assert answers.tokens_per_s == (NEW_TOKENS - 2) / answers.seconds
    subject = one_pass(trained)
    subject._compared = True
    known = subject.run(rows[:1], prompts[:1])[1]
    assert (known.tokens, known.tokens_per_s) == (NEW_TOKENS, None)


@needs_kernels
def test_a_model_that_slots_get_wrong_is_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = adapted("llama")
    attend = attention._attend_decode_rows

    def attend_wrongly(batch: Any, query: Any, *arguments: Any) -> None:
        attend(batch, query * 1.5, *arguments)

    monkeypatch.setattr(attention, "_attend_decode_rows", attend_wrongly)
    attention_before = trained.model.config._attn_implementation
    with pytest.raises(Disagrees, match="from the model's"):
        one_pass(trained).run(*examples())
    assert trained.model.config._attn_implementation == attention_before


@needs_kernels
def test_what_is_no_number_answers_nothing_that_the_row_says() -> None:
    trained = adapted("llama")
    rows, prompts = examples()
    broken = rows[0].input_ids[2]  # of the shortest prompt that a row begins with
    others = {token for example in rows[1:] for token in example.input_ids}
    assert broken not in others | {token for prompt in prompts[2:] for token in prompt}
    with torch.no_grad():
        trained.model.get_input_embeddings().weight[broken] = math.nan
    losses, answers = one_pass(trained).run(rows, prompts)
    assert [math.isnan(loss) for loss in losses.nll] == [True, False, False, False, False]
    stops = stop_tokens(trained.model, tiny_tokenizer())
    with torch.no_grad(), trained.using("a"):
        expected = [plain_answer(trained.model, prompt, stops) for prompt in prompts]
    assert answers.texts == [visible(ids, tiny_tokenizer(), hidden={0, 1}) for ids in expected]
    with torch.no_grad():  # of all rows: they are measured apart
        trained.parameters("a")[next(iter(trained.parameters("a")))].fill_(math.nan)
    with pytest.raises(Disagrees):
        one_pass(trained).run(rows, prompts)


def test_what_has_no_slots_says_why() -> None:
    capped = tiny_model("gemma2")
    set_attention(capped, "sdpa", "cpu")
    assert "eager attention" in str(slotted.obstacle(capped))
    assert slotted.bytes_per_token(tiny_model("llama")) == 2 * 2 * 2 * 8 * 4
    assert slotted.bytes_per_token(tiny_model("gpt2")) == 2 * 2 * 4 * 8 * 4


@needs_kernels
def test_a_prompt_that_fills_the_positions_is_not_read() -> None:
    """Its model has no embedding of what comes behind them; its answer is empty."""
    trained = adapted("gpt2")
    rows, prompts = examples()
    losses, answers = one_pass(trained).run(rows, prompts)
    full, longer = ([7 + place % 99 for place in range(length)] for length in (256, 300))
    others, with_long = one_pass(trained).run(rows, [*prompts, full, longer])
    assert others.nll == pytest.approx(losses.nll, rel=1e-5)
    assert with_long.texts == [*answers.texts, "", ""]
    assert (with_long.tokens, with_long.shortened) == (answers.tokens, 2)


@needs_kernels
def test_waves_hold_what_memory_allows_and_the_longest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, prompts = examples()
    subject = one_pass(adapted("llama"), at_once=2)
    jobs = together._jobs(rows, prompts, [NEW_TOKENS] * len(prompts))
    assert [len(wave) for wave in subject._waves(jobs)] == [5]
    # Of the two longest 30 tokens' worth fit less than two times; then three of 14 fit.
    token = slotted.bytes_per_token(subject.model)
    monkeypatch.setattr(together, "CACHE_BYTES", 45 * token)
    waves = list(subject._waves(jobs))
    assert [[job.tokens for job in wave] for wave in waves] == [[30, 14], [11, 10, 10]]
    one_wave = one_pass(adapted("llama")).run(rows, prompts)
    assert subject.run(rows, prompts)[1].texts == one_wave[1].texts
