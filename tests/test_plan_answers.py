"""The plan of a model that answers, against what a tiny one really holds."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from lighten import models
from lighten.evaluation.engine import open_engine
from lighten.generation.linears import packs
from lighten.generation.request import Request
from lighten.generation.settings import Sampling
from lighten.planning import answers, process_overhead
from lighten.planning.answers import answer_peak, resident_after
from lighten.planning.memory import TOKENIZER_FACTOR
from lighten.planning.process_overhead import AnswerContext
from lighten.planning.storage_tracker import StorageTracker
from tests.tiny import VOCAB, save_tiny, tiny_config

PROCESS_BYTES, MODEL_BYTES = 1_000, 400


@pytest.fixture(autouse=True)
def process_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    context = AnswerContext(PROCESS_BYTES, MODEL_BYTES)
    monkeypatch.setattr(answers, "answer_context", lambda: context)


def held(folder: Path, attention: str, dtype: str, rows: int, tokens: int) -> tuple[int, int]:
    """Bytes of weights, and the most that a prompt and two tokens hold beside them."""
    base = models.load(str(folder), attn_implementation=attention, dtype=dtype)
    weights = sum({p.data_ptr(): p.nbytes for p in base.model.parameters()}.values())
    cache = {models.cache_argument(base.model): DynamicCache(config=base.model.config)}
    ids = torch.ones(rows, tokens, dtype=torch.int64)
    with torch.inference_mode(), StorageTracker() as tracker:
        for _ in range(3):
            model: Any = base.model
            logits = model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache).logits
            ids = logits[:, -1:].argmax(-1)
    return weights, max(tracker.timeline.live())


@pytest.mark.parametrize(
    ("moment", "attention", "dtype", "rows", "tokens", "changes"),
    [
        ("layer", "sdpa", "float32", 3, 40, {"intermediate_size": 1024}),
        ("layer", "eager", "bfloat16", 1, 64, {"intermediate_size": 1024}),
        ("attention", "eager", "float32", 2, 200, {}),
        ("logits", "sdpa", "bfloat16", 16, 1, {"vocab_size": 20_000}),
    ],
)
def test_the_widest_moment_of_a_prompt(
    moment: str, attention: str, dtype: str, rows: int, tokens: int, changes: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    """By the tensors that are alive, of a model in which one of the moments outweighs the rest."""
    folder = save_tiny(tmp_path / "model", **changes)
    config = tiny_config("llama", **changes)
    number = 4 if dtype == "float32" else 2
    sizes = answers.moments(config, rows, tokens, number, attention)
    assert max(sizes, key=sizes.__getitem__) == moment
    weights, beside = held(folder, attention, dtype, rows, tokens)
    planned = answer_peak(
        str(folder), dtype=dtype, attention=attention, prompt_tokens=tokens, new_tokens=2, rows=rows
    )
    tokenizer = int(TOKENIZER_FACTOR * (folder / "tokenizer.json").stat().st_size)
    process = PROCESS_BYTES + tokenizer + answers.kernel_bytes(dtype, attention, 2)
    assert planned - process - weights == pytest.approx(beside, rel=0.25)


def test_each_answered_token_makes_two_kernels_of_eager_half_precision(tiny_folder: Path) -> None:
    """As measured for SmolLM2 on an EPYC: 320 MiB after 8 tokens, 348 after 32; flat in float32."""

    def peak(new_tokens: int, dtype: str, attention: str) -> int:
        return answer_peak(
            str(tiny_folder), dtype=dtype, attention=attention, prompt_tokens=8,
            new_tokens=new_tokens,
        )  # fmt: skip

    more = peak(32, "bfloat16", "eager") - peak(8, "bfloat16", "eager")
    assert more == pytest.approx(28 * 2**20, rel=0.1)
    for dtype, attention in (("bfloat16", "sdpa"), ("float32", "eager")):
        assert peak(32, dtype, attention) - peak(8, dtype, attention) < 2**20


def test_on_a_gpu_the_process_is_not_counted(tiny_folder: Path) -> None:
    here, there = (
        answer_peak(str(tiny_folder), dtype="float32", prompt_tokens=8, new_tokens=2, device=device,
                    adapter_bytes=7)
        for device in ("cpu", "cuda")
    )  # fmt: skip
    tokenizer = int(TOKENIZER_FACTOR * (tiny_folder / "tokenizer.json").stat().st_size)
    assert here - there == PROCESS_BYTES + tokenizer


@pytest.mark.parametrize("tied", [True, False])
def test_our_engine_holds_slots_and_a_packed_head(tied: bool, tmp_path: Path) -> None:
    """As large as its cache is after an answer, and the head beside the embedding that it is."""
    folder = save_tiny(tmp_path / "model", tie_word_embeddings=tied, max_position_embeddings=2048)
    dtype = "bfloat16"  # the file has float32: weights are no mapped file's
    base = models.load(str(folder), dtype=dtype)
    config = base.model.config
    number = 2
    engine = open_engine(base, {}, slots=3)
    ended = threading.Event()
    engine.submit(Request([5] * 600, None, 8, frozenset(), Sampling(temperature=0.0), None,
                          lambda _: None, lambda *_: ended.set()))  # fmt: skip
    assert ended.wait(60)
    cache = engine.memory_bytes["cache"] * (768 + 512) // 768  # it grew to 768 tokens from 512
    engine.close()
    planned, in_transformers = (
        answer_peak(str(folder), dtype=dtype, prompt_tokens=600, new_tokens=8, slots=slots)
        for slots in (3, None)
    )
    numbers = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    plain_cache = config.num_hidden_layers * 608 * numbers * number
    packed = tied and packs(torch.empty(0, dtype=torch.bfloat16))
    head = VOCAB * config.hidden_size * number if packed else 0
    # Of prompts 512 tokens are read at a time.
    layer = (2 * config.hidden_size + 3 * config.intermediate_size) * number
    expected = cache - plain_cache + head - layer * (600 - 512)
    assert planned - in_transformers == pytest.approx(expected, abs=1)


def test_what_stays_of_a_quantised_model(tiny_folder: Path) -> None:
    """INT8 is for embeddings too; NF4 for linear layers, its scales quantised."""
    model = models.skeleton(str(tiny_folder))
    every = sum(parameter.numel() for parameter in model.parameters())
    linear = sum(
        parameter.numel() for name, parameter in model.named_parameters() if "proj" in name
    )
    assert resident_after(str(tiny_folder), storage="int8", rest="int8") == every + MODEL_BYTES
    expected = linear * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * (every - linear) + MODEL_BYTES
    planned = resident_after(str(tiny_folder), storage="nf4 double", rest="bfloat16")
    assert planned == pytest.approx(expected, abs=1)


def test_what_a_process_takes_that_answers_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        figures = '{"bytes": 20000000, "model_bytes": 14000000}'
        return subprocess.CompletedProcess(command, 0, f"a warning\n{figures}\n", "")

    monkeypatch.setattr(process_overhead.subprocess, "run", run)
    path = tmp_path / "answers.json"
    first = process_overhead.answer_context(path)
    assert first == process_overhead.answer_context(path) == AnswerContext(20_000_000, 14_000_000)
    ((*_, what),) = commands
    assert what == "answering"
    # A file of an older version lacks one of them.
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["model_bytes"]
    path.write_text(json.dumps(record), encoding="utf-8")
    assert process_overhead.answer_context(path) == first
    assert len(commands) == 2

    def fails(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(process_overhead.subprocess, "run", fails)
    unmeasured = process_overhead.answer_context(tmp_path / "other.json")
    assert unmeasured == process_overhead.UNMEASURED_ANSWER


def test_falcons_grouped_keys_are_kept_for_each_head(tmp_path: Path) -> None:
    """By transformers, which answers: our engine does not take Falcon."""
    folder = save_tiny(tmp_path / "falcon", "falcon", new_decoder_architecture=True, num_kv_heads=2)
    base: Any = models.load(str(folder), dtype="float32").model
    cache = DynamicCache(config=base.config)
    name = models.cache_argument(base)
    base(input_ids=torch.ones(1, 16, dtype=torch.int64), use_cache=True, **{name: cache})
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    few, more = (
        answer_peak(str(folder), dtype="float32", prompt_tokens=8, new_tokens=tokens)
        for tokens in (8, 24)
    )
    assert more - few == kept
