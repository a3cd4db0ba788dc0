"""Every quantised copy of the demo's model, and the comparisons that its sizes are judged by.

    python benchmarks/quantize_gguf.py --setup      # once: llama.cpp's converter and quantiser
    python benchmarks/quantize_table.py             # all parts; the last line is JSON
    python benchmarks/quantize_table.py --only calibrated,qat --run runs/demo

Without `--run` the demo (examples/docstrings) is trained first. Each part is kept when it is done
and not measured again, unless `--fresh` says so or the commit is another one. On 2 cores, about:

- `sizes` (8 min): `lighten quantize` to all formats: sizes, held-out loss, and its own seconds.
- `calibrated` (3 min): INT4 calibrated on the training data against plain rounding in the same
  format: the gap to bfloat16 in held-out loss, one divided by the other, resampled over rows.
- `gguf` (4 min): ours against llama.cpp's converter and quantiser (`quantize_gguf.py`), on the
  demo's merged model.
- `qat` (20 min): the demo trained once more, quantisation-aware, against the demo rounded after
  its training: held-out loss of both as torchao converts them, and the paired difference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine, quantize_gguf

RECIPE = Path(__file__).parents[1] / "examples" / "docstrings" / "recipe.yaml"
TO = ("int8", "nf4", "int4", "gguf:q8_0", "gguf:q4_k_m")
DYNAMIC = "int8-dynamic-act-int4-weight"
RESAMPLES = 2000
ROWS = 200  # held-out rows of the comparisons at most


def demo(folder: Path, changes: dict[str, Any]) -> Any:
    """The demo's run, trained where it is not there yet."""
    import lighten
    from lighten.runs import Run

    if (folder / "run.json").is_file() and Run(folder).info().get("status") == "finished":
        return Run(folder)
    return lighten.train(RECIPE, output_dir=str(folder), resume=(folder / "run.json").is_file(),
                         planned=False, **changes)  # fmt: skip


def sizes(run: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """`lighten quantize` to everything, timed as a user would see it."""
    from lighten.api import quantize

    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="lighten-table-") as scratch:
        result = quantize(
            run, TO, output_dir=scratch, tokens=arguments.tokens, questions=arguments.questions,
            log=lambda line: print(f"  {line}", flush=True),
        )  # fmt: skip
    return {"seconds": time.perf_counter() - began, "formats": result.formats,
            "settings": result.settings, "notes": result.notes}  # fmt: skip


def calibrated(run: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Gap to bfloat16 with calibration over the gap without, and its interval."""
    from lighten.quantization import child
    from lighten.quantization.model_source import calibration_of, evaluation_of, opened

    with tempfile.TemporaryDirectory(prefix="lighten-table-") as place:
        scratch = Path(place)
        (scratch / "store").mkdir()
        with opened(run, scratch / "near") as model:
            rows, record = calibration_of(model)
            held_out = evaluation_of(model, arguments.tokens * 4, 0)
            assert held_out is not None, "the run holds nothing out"
            losses: dict[str, Any] = {}
            costs: dict[str, Any] = {}
            for kind in ("reference", "int4:rounded", "int4"):
                folder = model.folder
                if kind != "reference":
                    folder = scratch / kind.replace(":", "-")
                    folder.mkdir()
                    costs[kind] = child.call(
                        {"do": "make", "name": kind, "kind": kind, "type": "", "label": "m",
                         "model": str(model.folder), "folder": str(folder), "calibration": rows,
                         "group_size": model.group_size}
                    )  # fmt: skip
                measured = child.call(
                    {"do": "measure", "name": kind, "kind": kind, "folder": str(folder),
                     "rows": [asdict(row) for row in held_out.rows], "prompts": [],
                     "prompt": held_out.rows[0].ids[:16], "store": str(scratch / "store"),
                     "rooms": [], "reference": kind == "reference"}
                )["rows"]  # fmt: skip
                losses[kind] = measured["nll"]
                tokens = np.asarray(measured["tokens"], dtype=float)
    plain, ours = (
        np.asarray(losses[kind]) - np.asarray(losses["reference"])
        for kind in ("int4:rounded", "int4")
    )
    draws = np.random.default_rng(0).integers(0, len(plain), (RESAMPLES, len(plain)))
    ratios = ours[draws].sum(1) / plain[draws].sum(1)
    return {
        "gap": float(ours.sum() / plain.sum()),
        "interval": [float(bound) for bound in np.percentile(ratios, [2.5, 97.5])],
        "gap_in_nats": {"int4": float(ours.sum() / tokens.sum()),
                        "int4:rounded": float(plain.sum() / tokens.sum())},
        "tokens": int(tokens.sum()), "calibration": record, "costs": costs,
    }  # fmt: skip


def gguf(run: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Against llama.cpp's own converter and quantiser, on the same merged model."""
    from lighten.quantization.model_source import opened

    turns: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="lighten-table-") as place:
        scratch = Path(place)
        with opened(run, scratch / "near") as model:
            for _ in range(arguments.repeats):
                for name, facts in quantize_gguf.convert(model.folder, scratch, "q4_k_m").items():
                    turns.setdefault(name, []).append(facts)
            quality = quantize_gguf.perplexities(scratch, model.folder, "q4_k_m", arguments.windows)
    of = {
        name: {key: statistics.median(turn[key] for turn in rows) for key in rows[0]}
        for name, rows in turns.items()
    }
    ours, theirs = of["lighten"], of["llama.cpp"]
    return {
        "turns": turns, "perplexity": quality,
        "time": ours["seconds"] / theirs["seconds"],
        "memory": ours["peak_bytes"] / theirs["peak_bytes"],
        "ppl": quality["ours"] / quality["theirs"],
    }  # fmt: skip


def qat(run: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """The demo trained for 8-bit activations and 4-bit weights, against it rounded afterwards."""
    from lighten.evaluation import metrics
    from lighten.evaluation.bootstrap import Resamples

    aware = demo(Path(f"{run.folder}-qat"), {**_settings(run), "qat": DYNAMIC})
    groups = aware.recipe().qat_group_size
    losses = {
        "unquantised": _losses(run, None, arguments),
        "ptq": _losses(run, groups, arguments),
        "qat": _losses(aware, groups, arguments),
    }
    counts = {name: metrics.likelihood_statistics(loss.nll, loss.tokens)
              for name, loss in losses.items()}  # fmt: skip
    draws = Resamples(len(counts["qat"]), RESAMPLES, 0)
    difference = draws.difference(counts["qat"], counts["ptq"], metrics.FROM_SUMS["loss"])
    return {
        "loss": {name: loss.loss for name, loss in losses.items()},
        "difference": difference.value, "low": difference.low, "high": difference.high,
        "rows": len(counts["qat"]), "group_size": groups, "converted": aware.info()["qat"],
        "seconds": {"plain": run.info()["training"]["seconds"],
                    "qat": aware.info()["training"]["seconds"]},
    }  # fmt: skip


def _settings(run: Any) -> dict[str, Any]:
    """What a given run was trained with, for the other one."""
    settings = run.recipe().completed()
    for name in ("output_dir", "qat", "qat_group_size"):
        settings.pop(name)
    return {name: value for name, value in settings.items() if not isinstance(value, dict)}


def _losses(run: Any, groups: int | None, arguments: argparse.Namespace) -> Any:
    """Held-out loss by row, the weights and activations rounded in groups of so many."""
    from lighten import adapters
    from lighten.engine.loss import Objective
    from lighten.engine.validation import held_out
    from lighten.evaluation.evaluation import held_out_examples
    from lighten.machine import hardware
    from lighten.models import limits_of
    from lighten.training import held_out_data
    from lighten.training.base import load_base

    recipe, device = run.recipe(), hardware.choose_device().value
    base = load_base(recipe, device)
    examples = held_out_examples(recipe, run.info()["data"]["sha256"])
    encoded = held_out_data.encoded(
        recipe, examples, base.tokenizer, limits_of(base.model), arguments.rows
    )
    trained = adapters.load(base.model, run.adapters(), qat_group_size=groups)
    assert encoded.rows is not None
    return held_out(
        Objective(base.model, trained, fast=True), encoded.rows.rows, trained.names[0],
        max_rows=8, max_tokens=1024, device=base.model.device,
    )  # fmt: skip


PARTS: dict[str, Callable[[Any, argparse.Namespace], dict[str, Any]]] = {
    "sizes": sizes, "calibrated": calibrated, "gguf": gguf, "qat": qat,
}  # fmt: skip


@contextmanager
def stored_parts(path: Path, key: dict[str, Any], fresh: bool) -> Any:
    """Parts that are done already, written after each; those of another commit or run are not."""
    from lighten.runs import write_json

    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not fresh else {}
    parts = stored.get("parts", {}) if stored.get("key") == key else {}

    def add(name: str, result: dict[str, Any]) -> None:
        parts[name] = result
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / ".gitignore").write_text("*\n", encoding="ascii")
        write_json(path, {"key": key, "parts": parts})

    yield parts, add


def figures(parts: dict[str, Any]) -> dict[str, Any]:
    """The last line; what was not measured is null."""
    table = parts.get("sizes", {})
    rows = {row["name"]: row for row in table.get("formats", [])}
    gap, files, aware = (parts.get(name, {}) for name in ("calibrated", "gguf", "qat"))
    return {
        "sizes": {name: round(row["ratio"], 4) for name, row in rows.items()} or None,
        "quantize_seconds": table.get("seconds"),
        "nf4_resident": rows["nf4"]["resident_bytes"] / rows["bfloat16"]["resident_bytes"]
        if "nf4" in rows
        else None,
        "q4_vs_llamacpp_ppl": files.get("ppl"),
        "calibrated_gap": gap.get("gap"),
        "calibrated_gap_interval": gap.get("interval"),
        "gguf_time": files.get("time"),
        "gguf_memory": files.get("memory"),
        "qat_vs_ptq": {name: aware[name] for name in ("difference", "low", "high")}
        if aware
        else None,
    }


def main() -> None:
    """Measure the parts that are wanted, print, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--run", type=Path, help="a finished run of one adapter")
    parser.add_argument("--fresh", action="store_true", help="measure what is done already again")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--rows", type=int, default=ROWS, help="held-out rows of the qat part")
    parser.add_argument("--repeats", type=int, default=3, help="of the gguf part")
    parser.add_argument("--windows", type=int, default=40, help="of the gguf part's text")
    arguments = parser.parse_args()
    requested = [name.strip() for name in arguments.only.split(",") if name.strip()]
    if unknown := [name for name in requested if name not in PARTS]:
        parser.error(f"--only: {unknown[0]} is not one of {', '.join(PARTS)}")
    if "gguf" in requested:
        quantize_gguf.library()  # told before anything long starts
    before = machine.before_start()
    folder = arguments.run or machine.RESULTS / "trial" / "runs" / "demo"
    run = demo(folder, {})
    key = {
        "commit": before["commit"], "run": str(folder), "started": run.info()["started"],
        **{name: getattr(arguments, name)
           for name in ("tokens", "questions", "rows", "repeats", "windows")},
    }  # fmt: skip
    path = machine.RESULTS / "trial" / "quantize_table_parts.json"
    with stored_parts(path, key, arguments.fresh) as (parts, add):
        for name in requested:
            if name not in parts:
                print(f"{name} ...", flush=True)
                began = time.perf_counter()
                add(name, PARTS[name](run, arguments))
                print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        headline = figures(parts)
        for row in parts.get("sizes", {}).get("formats", []):
            loss, seconds = row.get("loss", float("nan")), row.get("made_seconds", 0)
            print(f"{row['name']:14} {row['file_bytes'] / 1e6:8.1f} MB {row['ratio']:6.3f} "
                  f"loss {loss:.4f} {seconds:6.1f} s")  # fmt: skip
        machine.store(
            "quantize_table",
            {"parts": parts, "figures": headline, "run": run.info()},
            before,
            {
                "parts are missing": set(parts) != set(PARTS),
                "fewer than 3 repeats": arguments.repeats < 3,
                "fewer tokens or rows": arguments.tokens < 2048 or arguments.rows < ROWS,
            },
        )
    print(json.dumps(headline))


if __name__ == "__main__":
    main()
