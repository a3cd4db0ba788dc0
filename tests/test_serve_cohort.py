"""The engine of our own: many adapters in one batch, each answer as that adapter's alone."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from lighten.errors import UserError
from lighten.generation import attention, kernels
from lighten.generation.engine import Engine
from lighten.generation.request import Request
from lighten.generation.sampling import Chosen
from lighten.generation.segments import Factors, Segments, Update
from lighten.generation.settings import Sampling
from lighten.models.quantized import Storage, finish
from tests.generation import choose_kernels
from tests.tiny import VOCAB, tiny_model

SERVED = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "gpt2", "opt")
# What float16 factors may move a log-probability by: 11 bits of each number, errors of either sign.
CLOSE = 5e-3
GREEDY = Sampling(temperature=0.0)


def adapter(model: PreTrainedModel, folder: Path, seed: int, **settings: Any) -> Path:
    """An adapter that PEFT wrote, whose update moves every answer."""
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(**config))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(folder)
    return folder


@dataclass
class Answer:
    """What came back of a request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    how: Any = None
    cached: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def chosen(self, chosen: Chosen) -> None:
        self.tokens.append(chosen.token)
        self.logprobs.append(dict(chosen.top))

    def begun(self, cached: int) -> None:
        self.cached = cached

    def ended(self, how: Any) -> None:
        self.how = how
        self.done.set()


def ask(
    engine: Engine,
    prompt: Sequence[int],
    name: str | None,
    *,
    count: int = 6,
    stops: frozenset[int] = frozenset(),
) -> Answer:
    answer = Answer()
    engine.submit(
        Request(
            prompt, name, count, stops, GREEDY, VOCAB, answer.chosen, answer.ended, answer.begun
        )
    )  # fmt: skip
    return answer


def finished(answer: Answer) -> Answer:
    assert answer.done.wait(60)
    if isinstance(answer.how, BaseException):
        raise answer.how
    return answer


def expected(model: Any, prompt: Sequence[int], answer: Answer) -> Tensor:
    """Log-probabilities of the whole text at once, [tokens of the answer, words]."""
    ids = torch.tensor([[*prompt, *answer.tokens]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)


def as_rows(answer: Answer) -> Tensor:
    return torch.tensor([[row[word] for word in range(VOCAB)] for row in answer.logprobs])


GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [
    torch.randint(5, VOCAB, (length,), generator=GENERATOR).tolist()
    for length in (3, 23, 1, 40, 7, 12, 30, 2)
]
NAMES = ("a", None, "b", "a", "c", None, "b", "c")
SETTINGS: dict[str, dict[str, Any]] = {
    "a": {},
    "b": {"use_rslora": True, "r": 8, "rank_pattern": {r"layers\.0\.mlp\.down_proj": 2},
          "alpha_pattern": {r"h\.1\.mlp\.c_fc": 3, r"layers\.1\.self_attn\.o_proj": 3}},
}  # fmt: skip


def opened(model: PreTrainedModel, folders: dict[str, Path]) -> tuple[PeftModel, Engine]:
    """Adapters a, b and c in PEFT and in our engine."""
    reference = PeftModel.from_pretrained(copy.deepcopy(model), folders["a"], adapter_name="a")
    for name in ("b", "c"):
        reference.load_adapter(folders[name], adapter_name=name)
    reference.eval()
    engine = Engine(model, max_sequences=5, max_tokens=64, prefill_tokens=9)
    for name, folder in folders.items():
        engine.load_adapter(name, folder)
    return reference, engine


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "pytorch"])
@pytest.mark.parametrize("arch", SERVED)
def test_trap_33_a_mixed_batch_answers_as_each_adapter_alone(
    arch: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts beyond the sliding window, read in pieces, against PEFT in float32."""
    choose_kernels(monkeypatch, compiled=compiled)
    # PEFT's own choice of layers is the model's plain attention; eager is exact about windows.
    model = tiny_model(arch, attn_implementation="eager")
    target = "c_attn" if arch == "gpt2" else "qkv_proj" if arch == "phi3" else "v_proj"
    settings = {**SETTINGS, "c": {"target_modules": [target]}}
    folders = {
        name: adapter(model, tmp_path / name, seed, **settings[name])
        for seed, name in enumerate(settings)
    }
    reference, engine = opened(model, folders)
    answers = [ask(engine, prompt, name) for prompt, name in zip(PROMPTS, NAMES, strict=True)]
    for prompt, name, answer in zip(PROMPTS, NAMES, map(finished, answers), strict=True):
        assert (answer.how, len(answer.tokens)) == ("length", 6)
        if name is None:
            with reference.disable_adapter():
                reference_rows = expected(reference, prompt, answer)
        else:
            reference.set_adapter(name)
            reference_rows = expected(reference, prompt, answer)
        close = 1e-4 if name is None else CLOSE
        torch.testing.assert_close(as_rows(answer), reference_rows, atol=close, rtol=1e-4)
        assert answer.tokens == as_rows(answer).argmax(-1).tolist()
    engine.close(10)


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "pytorch"])
@pytest.mark.parametrize(
    ("arch", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gemma2", {}), ("gpt2", {})],
    ids=["own head", "tied head", "bent logits", "gpt2"],
)
def test_an_adapted_head_answers_as_in_peft(
    arch: str, changes: dict[str, Any], compiled: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Prompts that wait beside answers under way: the head reads fewer rows than other layers.

    Against factors that float16 rounded as the engine keeps them: a head's update reaches the
    logits whole, and their rounding is `CLOSE`'s.
    """
    choose_kernels(monkeypatch, compiled=compiled)
    model = tiny_model(arch, attn_implementation="eager", **changes)
    assert (arch == "llama" and not changes) != model.config.tie_word_embeddings
    target = "c_attn" if arch == "gpt2" else "v_proj"
    targets = {"a": ["lm_head"], "b": [target, "lm_head"], "c": [target]}
    folders = {
        name: adapter(model, tmp_path / name, seed, target_modules=modules)
        for seed, (name, modules) in enumerate(targets.items())
    }
    reference, engine = opened(model, folders)
    with torch.no_grad():
        for parameter_name, parameter in reference.named_parameters():
            if "lora_" in parameter_name:
                parameter.copy_(rounded(parameter))
    answers = [ask(engine, prompt, name) for prompt, name in zip(PROMPTS, NAMES, strict=True)]
    for prompt, name, answer in zip(PROMPTS, NAMES, map(finished, answers), strict=True):
        if name is None:
            with reference.disable_adapter():
                reference_rows = expected(reference, prompt, answer)
        else:
            reference.set_adapter(name)
            reference_rows = expected(reference, prompt, answer)
            with reference.disable_adapter():  # it does something
                assert (expected(reference, prompt, answer) - reference_rows).abs().max() > 0.05
        torch.testing.assert_close(as_rows(answer), reference_rows, atol=1e-4, rtol=1e-4)
    engine.close(10)


def test_a_head_saved_with_an_adapter_has_to_be_the_bases(tmp_path: Path) -> None:
    """PEFT saves it with the factors; where tokens were added in rows to spare, it is another."""
    folder = adapter(tiny_model("llama"), tmp_path / "a", 1, target_modules=["lm_head"])
    other = tiny_model("llama")
    with torch.no_grad():
        other.lm_head.weight[-1] += 0.5
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(tiny_model("llama", dtype=dtype), max_tokens=64)
        engine.load_adapter("a", folder)
        with pytest.raises(UserError, match=r"lm_head of its own, other than this base's"):
            engine.load_adapter("b", adapter(other, tmp_path / "b", 1, target_modules=["lm_head"]))
        assert engine.adapters == ("a",)
        engine.close(10)


def rounded(x: Tensor) -> Tensor:
    """A matrix as float16 keeps it over its largest number."""
    largest = x.abs().max()
    return (x / largest).half().double() * largest


# Widths that fill no tile, and that fill some.
WIDTHS = pytest.mark.parametrize(("inputs", "outputs"), [(37, (19, 24)), (64, (32, 77))])
FORMATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def updates_on(inputs: int, outputs: tuple[int, int]) -> tuple[Any, dict[str, Update]]:
    """Factors of three adapters by place, whose ranks fill no tile, and what keeps them."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    first, second = outputs
    adapters = {
        "a": {0: Factors(random(5, inputs), random(first, 5), 0.5)},
        "b": {0: Factors(random(3, inputs) * 1e-6, random(first, 3) * 1e6, 2.0),
              1: Factors(random(9, inputs), random(second, 9), 0.1)},
        "c": {},
    }  # fmt: skip
    columns = (slice(0, first), slice(first, first + second))
    device = torch.device("cpu")
    return adapters, {k: Update(v, columns, inputs, device) for k, v in adapters.items()}


@pytest.mark.parametrize("path", ["kernel", "pytorch", "pytorch on the kernel's tiles"])
@FORMATS
@WIDTHS
def test_rows_take_what_the_products_say(
    dtype: torch.dtype, inputs: int, outputs: tuple[int, int], path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Segments of a block, of less and of more, rows of no adapter."""
    if path != "pytorch" and kernels.library() is None:
        pytest.skip(f"no kernels: {kernels.obstacle()}")
    if path == "pytorch":
        monkeypatch.setattr(kernels, "library", lambda: None)
    adapters, updates = updates_on(inputs, outputs)
    if path != "kernel":
        monkeypatch.setattr(kernels, "takes", lambda x: False)
    segments = Segments(("a", "b", "c", "a"), (1, 4, 14, 15), (4, 14, 15, 17))
    torch.manual_seed(4)
    x, y = torch.randn(18, inputs).to(dtype), torch.randn(18, sum(outputs)).to(dtype)
    expected_y = y.double()
    for name, start, stop in zip(segments.names, segments.starts, segments.stops, strict=True):
        for place, factors in adapters[name].items():
            columns = slice(0, outputs[0]) if place == 0 else slice(outputs[0], None)
            low = x[start:stop].double() @ rounded(factors.A).T
            expected_y[start:stop, columns] += low @ rounded(factors.B).T * factors.scale
    segments.add(y, x, updates)
    relative = 1e-5 if dtype == torch.float32 else 2**-8
    # PyTorch's products round the factors and what is between the two to bfloat16 as well.
    atol = relative if path == "kernel" else relative * float(expected_y.abs().max())
    torch.testing.assert_close(y.double(), expected_y, atol=atol, rtol=relative)
    for row in (0, 14, 17):
        assert torch.equal(y[row].double(), expected_y[row])


@pytest.fixture(params=[True, False], ids=["this processor", "any processor"])
def built(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels for all that this processor has, and without its wide instructions."""
    if not request.param:
        flags = tuple(flag for flag in kernels.FLAGS if flag != "-march=native")
        monkeypatch.setattr(kernels, "FLAGS", flags)
    kernels._loaded.cache_clear()
    yield
    kernels._loaded.cache_clear()


@FORMATS
@WIDTHS
@pytest.mark.parametrize("threads", [1, 4])  # these have few rows each: smaller blocks
def test_the_kernel_adds_to_a_row_the_same_bits_whatever_is_beside_it(
    dtype: torch.dtype, inputs: int, outputs: tuple[int, int], built: None, threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if kernels.library() is None:
        pytest.skip(f"no kernels: {kernels.obstacle()}")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    _, updates = updates_on(inputs, outputs)
    torch.manual_seed(5)
    x, y = torch.randn(11, inputs).to(dtype), torch.randn(11, sum(outputs)).to(dtype)

    segments: dict[int, Segments] = {}

    def added(starts: Sequence[int]) -> Tensor:
        """By segments that end where the next begins, all of one adapter."""
        stops = (*starts[1:], len(x))
        result = y.clone()
        count = len(starts)
        if count in segments:
            segments[count].move(starts, stops)
        else:
            segments[count] = Segments(("b",) * count, tuple(starts), stops)
        segments[count].add(result, x, updates)
        return result

    alone = added(range(11))
    assert not torch.equal(alone, y)
    for starts in ((0,), (0, 3, 5), (0, 1, 8), (0, 5)):  # blocks of one to eight rows
        assert torch.equal(added(starts), alone)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    model = tiny_model("llama")
    folders = [adapter(model, tmp_path / name, seed) for seed, name in enumerate("ab")]
    tiny_engine = Engine(model, max_sequences=3, max_tokens=48, prefill_tokens=16)
    for folder in folders:
        tiny_engine.load_adapter(folder.name, folder)
    yield tiny_engine
    tiny_engine.close(10)


def test_a_kept_prefix_is_that_of_the_same_adapter_alone(engine: Engine, tmp_path: Path) -> None:
    """Warm caches, another adapter, and an adapter loaded anew under its name."""
    prompt = PROMPTS[1]
    cold = {name: finished(ask(engine, prompt, name)).tokens for name in ("a", "b", None)}
    assert len({tuple(tokens) for tokens in cold.values()}) == 3
    for _ in range(3):
        for name in (None, "b", "a"):
            longer = [*prompt, *cold[name]]
            assert finished(ask(engine, prompt, name)).tokens == cold[name]
            continued = finished(ask(engine, longer[:-2], name, count=2)).tokens
            assert continued == cold[name][-2:]
    replacement = adapter(tiny_model("llama"), tmp_path / "other", 17)
    engine.load_adapter("a", replacement)
    anew = finished(ask(engine, prompt, "a")).tokens
    assert anew != cold["a"]
    engine.load_adapter("c", replacement)
    assert finished(ask(engine, prompt, "c")).tokens == anew


@pytest.mark.parametrize("storage", [None, Storage("nf4"), Storage("int8")], ids=str)
@FORMATS
def test_an_answer_is_bit_for_bit_the_adapters_alone(
    dtype: torch.dtype, storage: Storage | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random adapters, prompts that begin alike, warm caches, adapters loaded anew meanwhile."""
    if kernels.library() is None:
        pytest.skip(
            f"no kernels, and PyTorch's attention depends on the batch: {kernels.obstacle()}"
        )
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16 products, and PyTorch's depend on the batch")
    random.seed(11)
    monkeypatch.setattr(attention, "BLOCK", 16)  # these prompts are short
    folders = {
        name: adapter(tiny_model("llama"), tmp_path / name, seed)
        for seed, name in enumerate("abcd")
    }
    begins = [random.choices(range(5, VOCAB), k=40) for _ in range(3)]
    prompts = [
        random.choice(begins)[: random.randrange(12, 40)] + random.choices(range(5, VOCAB), k=end)
        for end in (1, 2, 9, 1, 17, 5)
    ]

    def answers(**settings: Any) -> Engine:
        torch.manual_seed(0)
        model = tiny_model("llama").to(dtype)
        finish(model, storage, dtype, "cpu")
        return Engine(model, max_tokens=96, **settings)

    lone = answers(max_sequences=1, prefill_tokens=512, prefix_caching=False)
    alone = {}
    for name in (None, *folders):
        if name is not None:
            lone.load_adapter(name, folders[name])
        for place, prompt in enumerate(prompts):
            answer = finished(ask(lone, prompt, name))
            alone[name, place] = answer.tokens, answer.logprobs
        if name is not None:
            lone.unload_adapter(name)
    lone.close(10)
    many = answers(max_sequences=5, prefill_tokens=40)
    now = {"a": "a", "b": "b"}
    for name in now:
        many.load_adapter(name, folders[name])
    submitted = []
    for number in range(60):
        if number % 9 == 8:  # another content under the name, in its place or after unloading
            name, content = random.choice("ab"), random.choice("abcd")
            if number % 2:
                many.unload_adapter(name)
            many.load_adapter(name, folders[content])
            now[name] = content
        name, place = random.choice((None, "a", "b")), random.randrange(len(prompts))
        submitted.append((name and now[name], place, ask(many, prompts[place], name)))
    results = [(content, place, finished(answer)) for content, place, answer in submitted]
    assert [
        (content, place) for content, place, answer in results
        if (answer.tokens, answer.logprobs) != alone[content, place]
    ] == []  # fmt: skip
    assert any(answer.cached for *_, answer in results)
    many.close(10)


def test_answers_under_way_end_with_the_adapter_they_began_with(
    engine: Engine, tmp_path: Path
) -> None:
    alone = finished(ask(engine, PROMPTS[0], "a", count=30)).tokens
    replacement = adapter(tiny_model("llama"), tmp_path / "other", 17)
    answers = [ask(engine, PROMPTS[0], "a", count=30) for _ in range(6)]
    engine.load_adapter("a", replacement)
    engine.unload_adapter("b")
    assert [finished(answer).tokens for answer in answers] == [alone] * 6
    with pytest.raises(UserError, match="no adapter is called 'b'"):
        ask(engine, PROMPTS[0], "b")
    with pytest.raises(UserError, match="no adapter is called 'b'"):
        engine.unload_adapter("b")
    assert engine.adapters == ("a",)


def test_an_adapter_that_two_take_out_at_once_is_missed_by_one_of_them(engine: Engine) -> None:
    """The engine's thread is not theirs: it answers on."""
    begin = threading.Event()
    engine._inbox.put(begin.wait)  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as pool:
        gone = [pool.submit(engine.unload_adapter, "a") for _ in range(2)]
        while engine._inbox.qsize() < 2:
            time.sleep(0.001)
        begin.set()
        errors = [future.exception() for future in gone]
    assert {type(error) for error in errors} == {type(None), UserError}
    assert finished(ask(engine, PROMPTS[0], "b")).how == "length"


def test_memory_of_replaced_adapters_is_given_back(engine: Engine, tmp_path: Path) -> None:
    before = engine.memory_bytes["adapters"]
    for _ in range(3):
        finished(ask(engine, PROMPTS[0], "a"))
        engine.load_adapter("a", tmp_path / "b")
    groups = set(engine._groups.values())
    assert engine.memory_bytes["adapters"] == before
    assert {len(group.updates) for group in groups} == {2}


def test_an_adapter_that_memory_has_no_room_for_leaves_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's memory would stay taken by one that nothing names."""

    def full(*_: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine._each_group[-1], "add", full)
    with pytest.raises(UserError, match="no memory for the adapter"):
        engine.load_adapter("more", tmp_path / "b")
    assert {len(group.updates) for group in engine._each_group} == {2}
    assert "more" not in engine.adapters


def test_an_answer_ends_where_it_must(engine: Engine) -> None:
    answer = finished(ask(engine, PROMPTS[3], "a", count=100))
    assert (answer.how, len(answer.tokens)) == ("length", 48 - len(PROMPTS[3]))
    place = next(i for i, token in enumerate(answer.tokens) if token not in answer.tokens[:i])
    stopped = finished(ask(engine, PROMPTS[3], "a", stops=frozenset({answer.tokens[place]})))
    assert (stopped.how, stopped.tokens) == ("stop", answer.tokens[:place])
    with pytest.raises(UserError, match=r"48 tokens; with its answer at most 48"):
        ask(engine, [5] * 48, "a")
    with pytest.raises(UserError, match="no tokens"):
        ask(engine, [], "a")


def test_a_cancelled_answer_ends_and_gives_its_slot_back(engine: Engine) -> None:
    answers = []
    for _ in range(5):  # two of them wait
        answer = Answer()
        cancel = engine.submit(
            Request([5, 6], "a", 40, frozenset(), GREEDY, None, answer.chosen, answer.ended)
        )
        answers.append((answer, cancel))
    for _, cancel in answers:
        cancel()
    assert all(answer.done.wait(10) for answer, _ in answers)
    assert {answer.how for answer, _ in answers} <= {"cancelled", "length"}
    assert finished(ask(engine, PROMPTS[0], "b")).how == "length"
    assert engine.load == (0, 0)


def test_closing_answers_what_was_taken_and_refuses_more(engine: Engine) -> None:
    answers = [ask(engine, PROMPTS[0], "a", count=20) for _ in range(5)]
    engine.close(30)
    assert all(len(answer.tokens) == 20 for answer in answers)
    with pytest.raises(UserError, match="stopped"):
        ask(engine, PROMPTS[0], "a")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "lm_head"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"bias": "lora_only"}, "bias"),
    ],
)
def test_what_cannot_be_served_unmerged_is_refused(
    settings: dict[str, Any], message: str, engine: Engine, tmp_path: Path
) -> None:
    folder = adapter(tiny_model("llama"), tmp_path / "more", 5, **settings)
    with pytest.raises(UserError, match=message) as refused:
        engine.load_adapter("more", folder)
    assert "--as merged" in str(refused.value)
    assert engine.adapters == ("a", "b")


def test_an_adapter_of_another_base_is_refused(engine: Engine, tmp_path: Path) -> None:
    wider = adapter(tiny_model("llama", hidden_size=64), tmp_path / "wider", 5)
    with pytest.raises(UserError, match="another model"):
        engine.load_adapter("wider", wider)
    deeper = adapter(tiny_model("llama", num_hidden_layers=3), tmp_path / "deeper", 5)
    with pytest.raises(UserError, match=r"layers\.2"):
        engine.load_adapter("deeper", deeper)


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0,
                                       "rope_theta": 10000.0}}, "rotary"),
        ("falcon", {}, "attention"),
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 4}, "sinks"),
    ],
)  # fmt: skip
def test_bases_that_slots_would_get_wrong_are_refused(
    arch: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Engine(tiny_model(arch, **changes))


@pytest.mark.parametrize("window", [None, 8])
def test_a_base_that_masks_by_itself_is_refused_and_stays_as_it_was(window: int | None) -> None:
    model = tiny_model("doge", attn_implementation="eager", sliding_window=window)
    before = model(torch.tensor([PROMPTS[1]])).logits
    with pytest.raises(UserError, match="a mask of its own"):
        Engine(model)
    assert torch.equal(model(torch.tensor([PROMPTS[1]])).logits, before)


def test_a_router_may_ask_its_weight_for_the_format() -> None:
    model = tiny_model("hunyuan_v1_moe", attn_implementation="eager")
    reference, engine = copy.deepcopy(model), Engine(model, max_sequences=1, max_tokens=64)
    answer = finished(ask(engine, PROMPTS[1], None))
    rows = expected(reference, PROMPTS[1], answer)
    torch.testing.assert_close(as_rows(answer), rows, atol=1e-4, rtol=1e-4)
    engine.close(10)
