"""A run folder as training and evaluation leave it, with made-up figures, for the report."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from lighten import runs
from lighten.recipe import Recipe
from lighten.runs import Run


def write_run(
    folder: Path,
    *,
    steps: int = 60,
    adapters: tuple[str, ...] = ("default",),
    evaluated: bool = True,
    status: str = "finished",
    started: str = "2026-01-01T10:00:00+00:00",
    answer: str = "책 두 권을 추천해요. <script>alert(1)</script>",
    **changes: Any,
) -> Run:
    """Write the folder and open it."""
    data = folder.parent / "data.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    values = {"model_name_or_path": "smollm2-135m", "dataset": str(data), **changes}
    if len(adapters) > 1:
        values["adapters"] = [{"name": name, "lora_r": 2**i} for i, name in enumerate(adapters)]
    recipe = Recipe.from_values({**values, "output_dir": str(folder)})
    runs.write_text(folder / "recipe.yaml", recipe.to_yaml())
    run = Run(folder)
    draw = random.Random(0)
    for step in range(1, steps + 1):
        for place, name in enumerate(adapters):
            loss = 2 + 1.5 * math.exp(-step / 15) + 0.1 * place
            line = {
                "kind": "train", "step": step, "epoch": step / 30, "adapter": name,
                "loss": loss + draw.gauss(0, 0.15), "learning_rate": 1e-3, "grad_norm": 1.0,
                "examples": 16, "supervised_tokens": 190, "tokens": 1200 + draw.randrange(200),
                "seconds": 1.7 + draw.random() / 3, "peak_bytes": int(3e9 + step * 1e6),
                "skipped": False,
            }  # fmt: skip
            runs.append_line(folder / "metrics.jsonl", line)
            if step % 20 == 0:
                runs.append_line(
                    folder / "metrics.jsonl",
                    {"kind": "eval", "step": step, "epoch": step / 30, "adapter": name,
                     "loss": loss + 0.1, "loss_se": 0.08, "supervised_tokens": 1200,
                     "seconds": 4.0},
                )  # fmt: skip
    finished = status == "finished"
    run.update(
        version=1, name=folder.name, status=status, started=started,
        error=None if finished else "stopped by SIGINT", ended="2026-01-01T10:04:00+00:00",
        commit="0123456789abcdef", tree_clean=False,
        machine={"processor": "Some Processor", "cores": 2, "memory_bytes": 25 * 10**9,
                 "gpus": [], "system": "Linux x86_64, Python 3.11.7"},
        versions={"lighten": "0.1.0", "torch": "2.13.0"},
        base={"name": "smollm2-135m", "source": "packaged", "revision": None, "checksum": "ab",
              "parameters": 134515008, "weights_bytes": 269030016, "file_bytes": 98362432},
        data={"path": str(data), "sha256": "cd" * 32, "format": "prompt-completion",
              "train_rows": 2324, "eval_rows": 100, "tokens": 178220, "supervised_tokens": 28051,
              "eval_supervised_tokens": 1285, "truncated": 0, "dropped": 0, "bad_rows": 0,
              "lost_supervised_tokens": 0, "template": {"name": "model", "reason": "its own"}},
        choices=[{"what": "dtype", "value": "bfloat16", "reason": "avx512_bf16"}],
        adapters=[{"name": name, "r": 8, "alpha": 16, "trainable_parameters": 2442240,
                   "file_bytes": 9785000, "steps": steps, "best_step": steps, "eval_loss": 2.1}
                  for name in adapters] if finished else [],
        training={"steps": steps, "seconds": 170.0, "tokens": 122357, "supervised_tokens": 19059,
                  "tokens_per_second": 731.8, "peak_bytes": 3849428992,
                  "method": "kernel high-water mark"},
    )  # fmt: skip
    if evaluated:
        runs.write_json(folder / "evaluation.json", evaluation(adapters, answer))
    return run


def evaluation(adapters: tuple[str, ...], answer: str) -> dict[str, Any]:
    """An `evaluation.json` in which every adapter is better than the base."""

    def estimate(value: float) -> dict[str, float]:
        return {"value": value, "se": value / 20, "low": value * 0.9, "high": value * 1.1}

    def model(name: str, loss: float, chrf: float) -> dict[str, Any]:
        figures = {"loss": loss, "perplexity": math.exp(loss), "chrf": chrf, "bleu": chrf / 4,
                   "exact_match": 0.0}  # fmt: skip
        return {
            "name": name, "adapter": None if name == "base" else name,
            "metrics": {key: estimate(value) for key, value in figures.items()},
            "seconds": 9.0, "generated_tokens": 1800, "generated_tokens_per_second": 200.0,
            "peak_bytes": 900_000_000, "method": "kernel high-water mark",
        }  # fmt: skip

    names = ("loss", "perplexity", "chrf", "bleu", "exact_match")
    return {
        "version": 1, "created": "2026-01-01T10:05:00+00:00",
        "settings": {"max_new_tokens": 40, "interval": "95 % percentile bootstrap over examples",
                     "chat_template": "model", "judge_model": "a-judge-of-70b",
                     "lm_eval": {"chat_template": True}},
        "dataset": {"path": "data/test.jsonl", "rows": 160, "answered": 160},
        "models": [model("base", 3.67, 21.8), *(model(name, 2.5, 29.1) for name in adapters)],
        "differences": [
            {"adapter": name, "metric": metric, "difference": -1.2, "low": -1.4, "high": -1.0,
             "verdict": "no difference found" if metric == "exact_match" else "better"}
            for name in adapters for metric in names
        ],
        "comparisons": [
            {"run": "다른실행_with_a_very_long_name_that_goes_on_and_on_and_on", "model": model,
             "against": against, "metric": metric, "difference": 0.4321, "low": 0.1, "high": 0.9,
             "verdict": "worse"}
            for model in ("base", *adapters) for against in ("base", "theirs")
            for metric in (*names, "a_task, acc")
        ],
        "judged": [
            {"adapter": name, "against": "base", "wins": 77, "losses": 31, "ties": 52,
             "swapped": 41, "unclear": 3, "cut_off": 2, "verdict": "better",
             "rate": estimate(64.375)}
            for name in adapters
        ],
        "tasks": [
            {"task": "a_task", "metric": "acc", "filter": "none", "documents": 24,
             "higher_is_better": True,
             "models": {name: estimate(0.4567) for name in ("base", *adapters)},
             "differences": {name: {"value": 0.0, "low": -0.1, "high": 0.1,
                                    "verdict": "no difference found"} for name in adapters}},
        ],
        "examples": [
            {"file": "test.jsonl", "line": i, "prompt": f"# filecmp\ndef cmp_{i}(f1, f2):",
             "reference": "Compare two files and return the answer.",
             "answers": {"base": "```python\ndef cmp(f1, f2):\n    return f1 == f2\n```",
                         **dict.fromkeys(adapters, f"Compare the two files. {answer}")}}
            for i in range(30)
        ],
    }  # fmt: skip
