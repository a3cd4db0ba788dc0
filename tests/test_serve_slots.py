"""What our engine keeps of prompts: answers are those of a cold engine, bit for bit."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lighten.generation.engine import Engine
from lighten.generation.request import Request
from tests.generation import choose_kernels
from tests.test_serve_cohort import GREEDY, Answer, adapter, as_rows, ask, expected, finished
from tests.tiny import VOCAB, tiny_model

BLOCK = 16


def words(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(5, VOCAB), k=count)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: adapter(tiny_model("llama"), root / name, seed) for seed, name in enumerate("ab")}


def opened(folders: dict[str, Path], slots: int, *, reuse: bool = True) -> Engine:
    torch.manual_seed(0)
    engine = Engine(
        tiny_model("llama"), max_sequences=slots, max_tokens=128, prefill_tokens=BLOCK,
        prefix_caching=reuse,
    )  # fmt: skip
    for name, folder in folders.items():
        engine.load_adapter(name, folder)
    return engine


@pytest.fixture
def engine(folders: dict[str, Path]) -> Iterator[Engine]:
    warm = opened(folders, 4)
    yield warm
    warm.close(10)


def cold(folders: dict[str, Path], prompt: Sequence[int], name: str | None) -> Answer:
    alone = opened(folders, 1, reuse=False)
    answer = finished(ask(alone, prompt, name))
    alone.close(10)
    return answer


def test_who_asks_in_turn_finds_what_was_read_before(engine: Engine) -> None:
    """One client, two adapters and the base, and slots to spare: none takes another's place."""
    prompt = words(40, 1)
    for place in range(3):
        for name in ("a", "b", None):
            assert finished(ask(engine, prompt, name)).cached == (32 if place else 0)


def test_a_beginning_that_many_share_ends_nobodys_prompt(
    engine: Engine, folders: dict[str, Path]
) -> None:
    """Conversations with one system message, each longer than it."""
    system = words(BLOCK, 2)
    talks = [[*system, *words(40, seed)] for seed in (3, 4, 5)]
    first = [finished(ask(engine, talk, "a")) for talk in talks]
    assert [answer.cached for answer in first] == [0, BLOCK, BLOCK]
    again = [finished(ask(engine, talk, "a")) for talk in talks]
    assert [answer.cached for answer in again] == [48, 48, 48]
    for talk, *answers in zip(talks, first, again, strict=True):
        alone = cold(folders, talk, "a")
        for answer in answers:
            assert (answer.tokens, answer.logprobs) == (alone.tokens, alone.logprobs)


def test_what_an_answer_under_way_has_read_is_taken_over(
    engine: Engine, folders: dict[str, Path]
) -> None:
    begin = words(3 * BLOCK, 6)
    first = ask(engine, [*begin, 7], "b", count=70)
    while not first.tokens:
        assert not first.done.wait(0.001)
    others = {name: ask(engine, [*begin, 8], name) for name in ("b", "a")}
    assert finished(others["b"]).cached == 3 * BLOCK
    assert finished(others["a"]).cached == 0
    assert len(finished(first).tokens) == 70
    for name, answer in others.items():
        alone = cold(folders, [*begin, 8], name)
        assert (answer.tokens, answer.logprobs) == (alone.tokens, alone.logprobs)


def test_where_all_slots_are_full_the_one_used_longest_ago_is_overwritten(engine: Engine) -> None:
    prompts = [words(20, seed) for seed in range(10, 15)]
    for prompt in (*prompts[:4], prompts[0], prompts[4]):
        finished(ask(engine, prompt, None))
    cached = [finished(ask(engine, prompt, None)).cached for prompt in (prompts[0], *prompts[2:])]
    assert cached == [BLOCK] * 4
    assert finished(ask(engine, prompts[1], None)).cached == 0


def test_a_question_does_not_wait_until_a_long_document_is_read() -> None:
    """Nor does the document wait for ever: a block of the oldest prompt is read in each step."""
    engine = Engine(tiny_model("llama"), max_tokens=1024, prefill_tokens=128)
    begun: list[str] = []
    ended = threading.Semaphore(0)
    together = threading.Event()
    engine._inbox.put(together.wait)  # type: ignore[arg-type]
    for name, length in (("document", 600), ("question", 20), ("letter", 260)):
        engine.submit(Request(
            words(length, length), None, 1, frozenset(), GREEDY, None,
            lambda _, name=name: begun.append(name),  # type: ignore[misc]
            lambda _: ended.release(),
        ))  # fmt: skip
    together.set()
    for _ in range(3):
        assert ended.acquire(timeout=60)
    engine.close(10)
    assert begun == ["question", "letter", "document"]


def test_prompts_that_come_together_are_read_once(engine: Engine, folders: dict[str, Path]) -> None:
    """Several answers to one, and others that begin so; what another adapter reads is another's."""
    begin = words(2 * BLOCK, 20)
    asked = [
        ([*begin, 5], "a"), ([*begin, 5], "a"), ([*begin[:BLOCK], 6, *begin], "a"),
        ([*begin, 5], None),
    ]  # fmt: skip
    taken = threading.Event()
    engine._inbox.put(taken.wait)  # type: ignore[arg-type]
    answers = [ask(engine, prompt, name) for prompt, name in asked]
    taken.set()
    assert [finished(answer).cached for answer in answers] == [0, 2 * BLOCK, BLOCK, 0]
    for (prompt, name), answer in zip(asked, answers, strict=True):
        alone = cold(folders, prompt, name)
        assert (answer.tokens, answer.logprobs) == (alone.tokens, alone.logprobs)


def test_who_waits_for_a_prompt_that_is_given_up_reads_it(engine: Engine) -> None:
    prompt = words(100, 21)
    taken = threading.Event()
    engine._inbox.put(taken.wait)  # type: ignore[arg-type]
    first, cancels = Answer(), list[Callable[[], None]]()
    request = Request(
        prompt, "a", 6, frozenset(), GREEDY, None, first.chosen, first.ended,
        lambda _: cancels[0](),
    )  # fmt: skip
    cancels.append(engine.submit(request))
    second = ask(engine, [*prompt, 9], "a")
    taken.set()
    assert finished(second).cached == BLOCK  # what was read of it until then
    assert (first.how, len(second.tokens)) == ("cancelled", 6)


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "pytorch"])
@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        # Whose attention is not told of the window that its mask has.
        ("phimoe", {"sliding_window": 8}),
        ("qwen2_moe", {
            "use_sliding_window": True, "sliding_window": 8, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        }),
        # Whose layers attend twice, with other values.
        ("diffllama", {}),
        # Whose layers run again and again in one forward, each time on other keys and values.
        ("hrm_text", {"head_dim": 8, "embedding_scale": 1.0}),
    ],
    ids=["phimoe", "qwen2_moe", "diffllama", "hrm_text"],
)  # fmt: skip
def test_slots_keep_what_each_turn_of_a_layer_sees(
    arch: str, changes: dict[str, Any], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the window, a prompt read in pieces and two answers beside each other."""
    choose_kernels(monkeypatch, compiled=compiled)
    model = tiny_model(arch, attn_implementation="eager", **changes)
    reference = copy.deepcopy(model)
    engine = Engine(model, max_sequences=2, max_tokens=64, prefill_tokens=BLOCK)
    prompts = [words(length, length) for length in (40, 11)]
    answers = [ask(engine, prompt, None, count=8) for prompt in prompts]
    for prompt, answer in zip(prompts, map(finished, answers), strict=True):
        rows = expected(reference, prompt, answer)
        torch.testing.assert_close(as_rows(answer), rows, atol=1e-4, rtol=1e-4)
    engine.close(10)
