"""What `lora_dropout: 0.1` costs a step, in lighten and in TRL + PEFT at its best settings.

    python benchmarks/train_vs_peers.py --setup   # once: TRL into an environment of its own
    python benchmarks/dropout.py                  # the last line is JSON
    python benchmarks/dropout.py --peers-venv ''  # ours alone

Each run is a process of its own on the very same steps, with and without dropout in turns. A ratio
is that of the seconds of the same step, the median over the steps after warm-up and over repeats;
beside it the smallest and the largest of the repeats' medians. `dropout_vs_none` is ours,
`trl_dropout_vs_none` theirs, null where TRL was not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import contenders as who
from benchmarks import machine
from benchmarks.comparison import Run
from benchmarks.contenders import Contender
from benchmarks.steps import encoded, facts, largest_first, steps_of
from benchmarks.train_vs_peers import PEERS, first_adapter

DROPOUT = 0.1
TRL_BEST = "sdpa, no autocast"  # what train_vs_peers.py finds to be the fastest on processors


def with_dropout(adapter: Path, dropout: float) -> Path:
    """A copy of an adapter whose configuration has so much dropout: TRL's run reads it there."""
    folder = adapter.with_name(f"{adapter.name}-{dropout}")
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"lora_dropout": dropout}), encoding="utf-8")
    return folder


def ratio(runs: dict[float, list[Run]], warmup: int) -> dict[str, float] | None:
    """Seconds of a step with dropout over those without; None where a run failed."""
    if any("error" in run for several in runs.values() for run in several):
        return None
    medians = [
        statistics.median(
            a / b for a, b in zip(dropped["step_seconds"][warmup:],
                                  plain["step_seconds"][warmup:], strict=True)
        )
        for dropped, plain in zip(runs[DROPOUT], runs[0.0], strict=True)
    ]  # fmt: skip
    return {"median": statistics.median(medians), "min": min(medians), "max": max(medians)}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run both engines in turns."""
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        rows = encoded(arguments.model)
        steps = largest_first(steps_of(rows, arguments.steps, grouped=True))
        model, _ = first_adapter(arguments.model, scratch)
        folders = {
            dropout: with_dropout(scratch / "adapter", dropout) for dropout in (0.0, DROPOUT)
        }
        engines: dict[str, Contender] = {"lighten": who.CONTENDERS[who.OURS]}
        if str(arguments.peers_venv) not in ("", "."):
            engines["trl"] = who.CANDIDATES[TRL_BEST]
        runs: dict[str, dict[float, list[Run]]] = {
            name: {dropout: [] for dropout in folders} for name in engines
        }
        for repeat in range(arguments.repeats):
            for name, engine in engines.items():
                for dropout, folder in folders.items():
                    contender, python = engine, str(arguments.peers_venv / "bin" / "python")
                    if name == "lighten":
                        settings = {**engine.settings, "lora_dropout": dropout}
                        contender, python = replace(engine, settings=settings), sys.executable
                    job = contender.job(steps, model, str(folder), arguments.device)
                    run = machine.in_fresh_process(contender.script, job, scratch, python=python)
                    runs[name][dropout].append(run)
                    outcome = run.get("error") or f"{sum(run['step_seconds']):.1f} s"
                    print(f"repeat {repeat + 1}, {name}, dropout {dropout}: {outcome}", flush=True)
    ratios = {name: ratio(several, arguments.warmup) for name, several in runs.items()}
    return {"ratios": ratios, "runs": {name: {str(dropout): of for dropout, of in several.items()}
                                       for name, several in runs.items()},
            "data": facts(steps)}  # fmt: skip


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="first steps that do not count")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers-venv", type=Path, default=PEERS)
    arguments = parser.parse_args()
    before = machine.before_start()
    result = compare(arguments)
    ratios = result["ratios"]
    machine.store(
        f"dropout-{Path(arguments.model).name}-{arguments.device}", result, before,
        {"fewer than 3 repeats": arguments.repeats < 3, "a run failed": None in ratios.values()},
    )  # fmt: skip
    print(json.dumps({
        "dropout_vs_none": ratios["lighten"], "trl_dropout_vs_none": ratios.get("trl"),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
