"""Losses and answers in one pass, against transformers' forward and `generate`."""

from __future__ import annotations

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
from lighten.models.load import set_attention
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
    prompts = [list(own.input_ids[:4]) for own in rows[:4]] + [[7, 8, 9, 10, 11]]
    same = row(system, 0).input_ids
    rows = [Row([*same, *own.input_ids], [*[False] * system, *own.supervised]) for own in rows]
    prompts = [[*same, *prompts[at]] for at in (3, 0, 4, 1, 2)]
    return rows, prompts


def plain_loss(model: PreTrainedModel, own: Any) -> float:
    logits = model(torch.tensor([own.input_ids])).logits[0, :-1].double()
    wanted = torch.tensor(own.supervised[1:])
    targets = torch.tensor(own.input_ids[1:])
    return float(F.cross_entropy(logits[wanted], targets[wanted], reduction="sum"))


def plain_answer(model: PreTrainedModel, prompt: list[int], stops: list[int]) -> list[int]:
    settings = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=stops,
                                pad_token_id=0)  # fmt: skip
    ids = torch.tensor([prompt])
    out: Any = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return [token for token in out[0, len(prompt) :].tolist() if token not in stops]


@needs_kernels
@pytest.mark.parametrize("arch", READ_IN_SLOTS)
@pytest.mark.parametrize("system", [0, 12])
def test_one_pass_measures_what_transformers_does(arch: str, system: int) -> None:
    trained = adapted(arch)
    model, tokenizer = trained.model, tiny_tokenizer()
    assert slotted.obstacle(model) is None
    rows, prompts = examples(system)
    before = model.config._attn_implementation
    passes = {own: one_pass(trained, own) for own in (None, "a")}
    found = {own: subject.run(rows, prompts) for own, subject in passes.items()}
    assert {subject._shared for subject in passes.values()} == {system}
    assert model.config._attn_implementation == before
    for adapter, (losses, answers) in found.items():
        with torch.no_grad(), trained.using(adapter):
            wanted = [plain_loss(model, own) for own in rows]
            stops = stop_tokens(model, tokenizer)
            said = [
                visible(plain_answer(model, prompt, stops), tokenizer, hidden={0, 1})
                for prompt in prompts
            ]
        assert losses.nll == pytest.approx(wanted, rel=1e-4)
        assert losses.tokens == tuple(sum(own.supervised) for own in rows)
        assert answers.texts == said
        assert len(prompts) < answers.tokens <= NEW_TOKENS * len(prompts)
    assert found[None][1].texts != found["a"][1].texts
    assert found[None][0].nll != found["a"][0].nll


@needs_kernels
def test_prompts_that_rows_begin_with_are_read_once() -> None:
    trained = adapted("llama")
    rows, prompts = examples()
    seen = []
    handle = trained.model.get_input_embeddings().register_forward_hook(
        lambda _, arguments, __: seen.append(arguments[0].numel())
    )
    subject = one_pass(trained, max_rows=64, max_tokens=None, at_once=64)
    subject._compared = True  # of what is read for the comparison nothing is counted
    subject._objective._verified = True
    subject.run(rows, prompts)
    handle.remove()
    in_slots = sum(len(own.input_ids) for own in rows[:4]) + len(prompts[2])
    assert in_slots in seen
    assert sum(seen) - in_slots - len(rows[4].input_ids) <= NEW_TOKENS * len(prompts)


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
        said = [plain_answer(trained.model, prompt, stops) for prompt in prompts]
    other = (said[1][2] + 1) % 300 + 3
    follows = [said[0], [*said[1][:2], other, other]]  # the second row answers otherwise
    rows = [
        Row([*prompt, *more], [False] * len(prompt) + [True] * len(more))
        for prompt, more in zip(prompts, follows, strict=True)
    ]
    steps: list[int] = []
    step = slotted.Slotted.step

    def counted(self: Any, tokens: Any, *others: Any) -> Any:
        steps.append(len(tokens))
        return step(self, tokens, *others)

    monkeypatch.setattr(slotted.Slotted, "step", counted)
    subject = one_pass(trained)
    subject._compared = True
    found = subject.run(rows, prompts)[1]
    assert found.texts == [visible(own, tiny_tokenizer(), hidden={0, 1}) for own in said]
    assert len(said[0]) == len(said[1]) == NEW_TOKENS
    assert steps == [1] * (NEW_TOKENS - 2)


@needs_kernels
def test_a_model_that_slots_get_wrong_is_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = adapted("llama")
    right = attention._attend_decode_rows

    def wrong(batch: Any, query: Any, *others: Any) -> None:
        right(batch, query * 1.5, *others)

    monkeypatch.setattr(attention, "_attend_decode_rows", wrong)
    before = trained.model.config._attn_implementation
    with pytest.raises(Disagrees, match="from the model's"):
        one_pass(trained).run(*examples())
    assert trained.model.config._attn_implementation == before


def test_what_has_no_slots_says_why() -> None:
    capped = tiny_model("gemma2")
    set_attention(capped, "sdpa", "cpu")
    assert "eager attention" in str(slotted.obstacle(capped))
    assert slotted.bytes_per_token(tiny_model("llama")) == 2 * 2 * 2 * 8 * 4
    assert slotted.bytes_per_token(tiny_model("gpt2")) == 2 * 2 * 4 * 8 * 4


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
    whole = one_pass(adapted("llama")).run(rows, prompts)
    assert subject.run(rows, prompts)[1].texts == whole[1].texts
