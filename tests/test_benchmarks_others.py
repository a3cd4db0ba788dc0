"""Each of the other benchmarks runs at tiny size, and counts what it should."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
import torch

from benchmarks import (
    audit_check,
    audit_context,
    engine,
    float32,
    gpu_suite,
    long_rows,
    machine,
    peers_generate,
    quantize_gguf,
)
from lighten.errors import UserError
from lighten.recipe import Recipe
from tests.lessons import lesson
from tests.tiny import save_tiny, tiny_model


def test_long_rows_are_timed_beside_pytorch_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "LOOK_S", 0.1)
    monkeypatch.setattr(long_rows, "SHAPES", {"tiny": (4, 2, 8, 0), "tiny, window": (4, 2, 8, 5)})
    long_rows.main(["--lengths", "16,40", "--repeats", "1", "--dtypes", "float32"])
    ratios = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(ratios) == 4
    assert min(ratios.values()) > 0.0
    stored = json.loads((tmp_path / "trial" / "long_rows.json").read_text(encoding="utf-8"))
    assert stored["cells"][0]["seconds"].keys() == {"ours", "grouped", "repeated", "one thread"}
    q, k, v = (torch.randn(1, heads, 40, 8) for heads in (4, 2, 2))
    for window in (0, 5):
        ours, *theirs = (attend(q, k, v) for attend in long_rows.ways(window, 40).values())
        assert all(torch.allclose(ours, x, atol=1e-5) for x in theirs)


def test_a_result_tells_no_folder_of_this_machine(tmp_path: Path) -> None:
    told = {"data": str(machine.ROOT / "examples" / "a.jsonl"), "rows": (1, [str(tmp_path)])}
    assert machine.portable(told) == {
        "data": "examples/a.jsonl", "rows": [1, [str(tmp_path.relative_to(gettempdir()))]],
    }  # fmt: skip


def test_nf4_of_a_version_that_has_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {k: v for k, v in Recipe.model_fields.items() if k != "load_in_4bit"}
    monkeypatch.setattr(Recipe, "__pydantic_fields__", fields)
    with pytest.raises(UserError, match="load_in_4bit"):
        engine.recipe_of("tiny", ["a"], 1, settings={"load_in_4bit": True})


def test_the_gpu_suite_runs_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["gpu_suite.py", "--out", str(tmp_path), "--device", "cpu", "--tiny", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", command)
    gpu_suite.main()
    stored = json.loads((tmp_path / "gpu_suite.json").read_text(encoding="utf-8"))
    results = stored["models"]["tiny"]
    assert not [row["error"] for row in results["rows"].values() if "error" in row]
    assert not any(row["idle"] for row in results["rows"].values())
    assert stored["left_out"] == []
    # Same start, same rows: PEFT's losses are ours, or there would be no ratio.
    assert results["ratios"]["speed_vs_peft_float32"] is not None
    assert results["ratios"]["time_8, 16 tokens each"] is not None
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"tiny": results["ratios"]}


def test_the_gpu_suite_keeps_rows_that_failed() -> None:
    def full() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows = {"speed, lighten": gpu_suite.attempt(full)}
    assert rows == {"speed, lighten": {"error": "out of memory"}}
    assert gpu_suite.ratios(rows, 1e-2)["speed_vs_peft_float32"] is None


def test_the_gpu_suite_needs_no_installed_package() -> None:
    source = Path(gpu_suite.__file__)
    before = list(sys.path)
    try:
        runpy.run_path(str(source), run_name="looked at")
        assert str(source.parents[1] / "src") in sys.path
    finally:
        sys.path[:] = before


def test_gguf_files_are_compared_on_the_same_tokens(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    greedy = quantize_gguf.greedy(model, tmp_path, ("the question",))
    assert (greedy["tokens"], greedy["unexplained"]) == (quantize_gguf.ANSWER_TOKENS, 0)
    assert greedy["largest_logit_difference"] < 1e-3
    for name in ("ours", "theirs"):
        shutil.copy(tmp_path / "f32.gguf", tmp_path / f"{name}-q8_0.gguf")
    quality = quantize_gguf.perplexities(tmp_path, model, "q8_0", 2)
    assert quality["ours"] == quality["theirs"]
    assert quality["tokens"] == 2 * (quantize_gguf.WINDOW_TOKENS - 1)


def test_an_audit_is_checked() -> None:
    rows = [
        {"group": "training", "name": "plain", "status": "measured", "plan_error": -0.04},
        {"group": "training", "name": "LoRA", "status": "measured", "plan_error": 0.02},
        {"group": "answers", "name": "NF4", "status": "not measured", "why": "budget"},
    ]
    audit = {"rows": rows, "spent_s": 10.0, "status": "finished", "settings": {"budget_s": 11.0}}
    checked = audit_check.check(audit)
    assert (checked["rows_explained"], checked["plan_max_error"]) == (1.0, 0.04)
    assert audit_check.check({**audit, "spent_s": 12.0})["rows_explained"] == 0.0
    silent = {**audit, "rows": [*rows, {**rows[2], "why": None}]}
    assert audit_check.check(silent)["rows_explained"] == 0.75


@pytest.mark.parametrize("limit", [500, 1024, 5000, 70000, 2**17])
def test_the_longest_row_is_found(limit: int) -> None:
    tried: list[int] = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= limit

    longest = audit_context.longest(fits, audit_context.LEAST, 2**17)
    if limit < audit_context.LEAST:
        assert longest is None
    else:
        assert longest is not None
        assert limit / (1 + audit_context.NEAR) - 128 <= longest <= limit
    assert len(tried) == len(set(tried)) <= 14


def test_losses_on_shared_rows_are_compared() -> None:
    ours = [{"tries": [{"tokens": 1024, "loss": 2.0}, {"tokens": 2048, "loss": None}]}]
    theirs = [{"tries": [{"tokens": 1024, "loss": 2.1}, {"tokens": 512, "loss": 9.0}]}]
    assert audit_context.loss_difference(ours, theirs) == pytest.approx(0.1 / 2.1)
    assert audit_context.loss_difference(ours, []) is None


def test_the_peer_of_evaluation_measures_what_we_do(tmp_path: Path) -> None:
    """Losses row by row, and answers, against the same model without any padding."""
    model = tiny_model("llama")
    rows = lesson(steps=1, rows=4)[0]
    losses = peers_generate.losses(model, rows, 3, 0)
    for (ids, mask), loss in zip(rows, losses, strict=True):
        labels = torch.tensor([[i if on else -100 for i, on in zip(ids, mask, strict=True)]])
        mean_loss = model(input_ids=torch.tensor([ids]), labels=labels).loss.detach()
        assert loss == pytest.approx(float(mean_loss) * sum(mask[1:]), rel=1e-4)
    job = {"stops": [2], "pad": 0, "new_tokens": 5, "batch_size": 3}
    prompts = [ids[:9] for ids, _ in rows]
    together = peers_generate.answers(model, prompts, job)
    alone = [peers_generate.answers(model, [prompt], job)[0] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"losses": [2.0, 1.0, 0.6]}, "its losses are up to"),
        ({"dtype": "bfloat16"}, "not both are in float32: bfloat16, float32"),
        ({"moved": 0.0}, "no weight has changed"),
    ],
)
def test_float32_beside_trl_counts_only_where_both_train_alike(
    changes: dict[str, Any], why: str | None
) -> None:
    """The first of three steps takes long: it is in one of the speeds and not in the other."""
    steps = lesson()
    theirs = {"losses": [2.0, 1.0, 0.5], "grad_norms": [1.0, 1.0, 1.0], "moved": 1.0,
              "dtype": "float32", "step_seconds": [4.0, 2.0, 2.0], "peak_bytes": 400}  # fmt: skip
    ours = {**theirs, "step_seconds": [3.0, 1.0, 1.0], "peak_bytes": 100, **changes}
    result = float32.ratios({float32.OURS: [ours], float32.TRL: [theirs]}, steps, 1)
    figures = [result[key] for key in float32.KEYS]
    if why is None:
        assert result["why_not"] is None
        assert figures == pytest.approx([2.0, 1.6, 0.25, 0.0])
    else:
        assert why in result["why_not"]
        assert figures == [None] * 4
