"""What `lighten plan` predicts against what a training really takes, on this processor.

Each configuration is planned from its `config.json` and trained for a dozen steps in a process of
its own. The peak is the kernel's high-water mark above what the process held before the model was
loaded, as every run reports it. The time is the mean of the steps after the first.

Others may share the machine below this one: everything can take twice as long from one second to
the next. So steps and the plan's rates take turns: after each step every kind of operation that the
plan counts is timed once. Both then know the same moments, and what is compared is how the plan
adds up a step, not how fast the machine was when. Beside it stands what the estimators say that
install (`--peers` makes their environment).

`--gpu FILE` plans what `gpu_suite.py` measured on a CUDA device and wrote to that file, on any
machine: allocated and reserved memory, and the time of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import plan_peers
from benchmarks.machine import before_start, in_fresh_process, store

SUPERVISED = 0.5
STEPS = 12  # of memory two would tell all
FOLDER = "plan-models-2"


@dataclass(frozen=True)
class Case:
    """A configuration.

    Attributes:
        model: `grouped`, `large-vocabulary` (made here, random) or `smollm2-135m`.
        rows: Examples of each adapter in a step.
        tokens: Of each.
        settings: What differs from the recipe's defaults.
    """

    model: str
    rows: int
    tokens: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """In words."""
        settings = [f"{key}={value}" for key, value in self.settings.items()]
        return " ".join([self.model, f"{self.rows}x{self.tokens}", *settings])

    def recipe(self, folder: Path) -> dict[str, Any]:
        """The recipe's values."""
        generated = self.model in ARCHITECTURES
        return {
            "model_name_or_path": str(folder / self.model) if generated else self.model,
            "dataset": __file__,  # a file that exists: the rows are given otherwise
            "val_size": 0, "max_steps": STEPS, "lr_scheduler_type": "constant",
            "per_device_train_batch_size": self.rows, "max_length": self.tokens,
            **self.settings,
        }  # fmt: skip


ARCHITECTURES: dict[str, dict[str, Any]] = {
    # Grouped queries, a head of its own.
    "grouped": {
        "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048,
        "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
        "vocab_size": 49152, "tie_word_embeddings": False, "max_position_embeddings": 4096,
    },
    # Gemma 3's shape: most of the parameters are a tied vocabulary of 256k.
    "large-vocabulary": {
        "model_type": "gemma3_text", "hidden_size": 320, "intermediate_size": 1280,
        "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 128, "vocab_size": 262144, "sliding_window": 512,
        "max_position_embeddings": 4096,
    },
}  # fmt: skip
FREE = {"tokens_per_microbatch": None}
SAVING = {"gradient_checkpointing": True}
NF4 = {"load_in_4bit": True}
DOUBLE = {**NF4, "bnb_4bit_use_double_quant": True}
FULL = {"method": "full"}
FOUR = {"lora_r": [8, 8, 8, 8], "seed": [0, 1, 2, 3]}
CASES = (
    Case("grouped", 4, 256), Case("grouped", 8, 256, FREE), Case("grouped", 16, 256, FREE),
    Case("grouped", 4, 512, FREE), Case("grouped", 2, 1024, FREE), Case("grouped", 1, 2048, FREE),
    Case("grouped", 8, 256), Case("grouped", 4, 256, {"lora_r": 64}),
    Case("grouped", 8, 256, {**FREE, **SAVING}), Case("grouped", 2, 1024, {**FREE, **SAVING}),
    Case("grouped", 4, 256, NF4), Case("grouped", 4, 512, {**FREE, **DOUBLE, **SAVING}),
    Case("grouped", 4, 256, FULL), Case("grouped", 4, 512, {**FREE, **FULL, **SAVING}),
    Case("grouped", 1, 256, FOUR), Case("grouped", 2, 512, {**FREE, **FOUR, **SAVING}),
    Case("grouped", 4, 256, {"dtype": "float32"}),
    Case("smollm2-135m", 4, 256), Case("smollm2-135m", 8, 256, FREE),
    Case("smollm2-135m", 4, 512, FREE), Case("smollm2-135m", 4, 512, {**FREE, **SAVING}),
    Case("smollm2-135m", 4, 256, NF4), Case("smollm2-135m", 4, 256, FULL),
    Case("smollm2-135m", 1, 256, FOUR),
    Case("large-vocabulary", 2, 256), Case("large-vocabulary", 4, 256),
    Case("large-vocabulary", 2, 512), Case("large-vocabulary", 4, 256, SAVING),
    Case("large-vocabulary", 2, 256, NF4), Case("large-vocabulary", 2, 256, FULL),
    Case("large-vocabulary", 1, 128, FOUR),
)  # fmt: skip


@dataclass(frozen=True)
class Processor:
    """This machine's processor as a plan wants its device."""

    name: str = "cpu"
    label: str = "cpu"
    kind: str = "cpu"
    is_here: bool = True
    memory_bytes: int | None = None
    bandwidth: float | None = None
    flops: Mapping[str, float] = field(default_factory=dict)

    def dtype(self, requested: str) -> Any:
        """The format that a run would choose."""
        from lighten.machine.hardware import choose_dtype

        return choose_dtype(requested, "cpu")


def make_models(folder: Path) -> None:
    """Random models in bfloat16, as a hub would hold them; made once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lighten.models import load_tokenizer

    for name, values in ARCHITECTURES.items():
        if (folder / name / "config.json").is_file():
            continue
        torch.manual_seed(0)
        config = AutoConfig.for_model(**values)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
        load_tokenizer("smollm2-135m").save_pretrained(folder / name)


def planned(case: Case, folder: Path, capacity: int) -> dict[str, Any]:
    """What the plan says of a case."""
    import time

    from lighten.planning.trace import plan_recipe
    from lighten.recipe import Recipe

    began = time.perf_counter()
    plan = plan_recipe(
        Recipe.from_values(case.recipe(folder)), Processor(memory_bytes=capacity),
        rows_tokens=(case.rows, case.tokens), supervised=SUPERVISED,
    )  # fmt: skip
    # The folder of a model that was made here is this machine's own business.
    return {**plan.to_dict(), "model": case.model, "seconds_to_plan": time.perf_counter() - began}


def measured(case: Case, folder: Path, scratch: Path) -> dict[str, Any]:
    """What the case really takes, its rates being timed between the steps; `error` if it fails."""
    from lighten.planning import rates
    from lighten.planning.build import config_of
    from lighten.planning.step_time import parts_of, workers_of
    from lighten.planning.steps import follow_recipe
    from lighten.recipe import Recipe

    recipe = Recipe.from_values(case.recipe(folder))
    dtype = Processor().dtype(recipe.compute_dtype)
    traced = follow_recipe(
        recipe, config_of(recipe)[0], dtype, "cpu", rows_tokens=(case.rows, case.tokens),
        supervised=SUPERVISED,
    )  # fmt: skip
    parts, workers = parts_of(traced), workers_of(traced)

    def turn() -> None:
        for alone in (False, True):
            measured_rates = rates.Measured.cached(1 if alone else workers)
            measured_rates.sample(
                work for part in parts if part.alone is alone for work in part.work
            )

    job = {"recipe": case.recipe(folder), "rows": case.rows, "tokens": case.tokens,
           "supervised": SUPERVISED}  # fmt: skip
    return in_fresh_process("plan_worker.py", job, scratch, turn=turn)


def row_of(case: Case, plan: Mapping[str, Any], real: Mapping[str, Any]) -> dict[str, Any]:
    """Predicted beside measured."""
    row: dict[str, Any] = {"case": case.name, "plan": plan, "measured": real}
    if "error" in real:
        return {**row, "error": None, "time_error": None}
    seconds = statistics.mean(real["step_seconds"][1:])
    return {
        **row,
        "error": (plan["memory"]["expected"] + plan["memory"]["mapped"]) / real["peak_bytes"] - 1.0,
        "step_seconds": seconds,
        "time_error": plan["time"]["seconds"] / seconds - 1.0 if plan["time"] else None,
    }


def _outside(row: dict[str, Any]) -> bool:
    """Whether what was measured is less or more than the plan said, mapped pages included."""
    memory = row["plan"]["memory"]
    unmapped = row["measured"]["peak_bytes"] - memory["mapped"]
    return not memory["low"] <= unmapped <= memory["high"]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the last line."""
    errors = [abs(row["error"]) for row in rows if row["error"] is not None]
    times = [abs(row["time_error"]) for row in rows if row["time_error"] is not None]
    lost = [row for row in rows if row["error"] is None]
    return {
        "configurations": len(errors),
        "max_error": max(errors, default=None),
        "mean_error": statistics.mean(errors) if errors else None,
        "outside_low_high": sum(_outside(row) for row in rows if row["error"] is not None),
        "ran_out_though_fitting": sum(row["plan"]["fits"] is True for row in lost),
        "failed": len(lost),
        "time_max_error": max(times, default=None),
        "time_mean_error": statistics.mean(times) if times else None,
        "peers": plan_peers.summary(rows),
    }  # fmt: skip


def main() -> None:
    """Plan, measure, print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", action="store_true", help="make the estimators' environment")
    parser.add_argument("--only", help="cases whose name holds this text")
    parser.add_argument("--gpu", type=Path, help="a file that gpu_suite.py wrote")
    parser.add_argument("--device", default="h100", help="the device of that file")
    options = parser.parse_args()
    if options.gpu:
        on_gpu(options.gpu, options.device)
        return
    if options.peers:
        plan_peers.install()
        return
    import psutil

    from lighten.machine.hardware import cache_folder

    before = before_start()
    folder = cache_folder() / FOLDER
    make_models(folder)
    capacity = psutil.virtual_memory().available
    rows = []
    cases = [case for case in CASES if not options.only or options.only in case.name]
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases:
            real = measured(case, folder, Path(scratch))
            row = row_of(case, planned(case, folder, capacity), real)
            row["peers"] = plan_peers.estimates(case, folder)
            rows.append(row)
            show(row)
    result = {"supervised": SUPERVISED, "table": rows, **summary(rows)}
    partly = len(cases) < len(CASES)
    store("plan_accuracy", result, before, {"cases were left out": partly})
    print(json.dumps(summary(rows)))


def on_gpu(path: Path, device: str) -> None:
    """Plan the suite's rows, and print and store predicted beside measured."""
    from lighten import runs
    from lighten.machine import hardware

    commit, clean = hardware.commit()
    suite = json.loads(path.read_text(encoding="utf-8"))
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        for model, measurements in suite["models"].items():
            folder = Path(scratch) / model
            folder.mkdir()
            config = {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                **measurements["shape"],
            }
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
            for name, real in measurements["rows"].items():
                if row := gpu_row(f"{model}: {name}", real, folder, device):
                    table.append(row)
                    print(f"{row['case']:60} " + "  ".join(
                        f"{key.removesuffix('_error')} {row[key]:+.1%}" for key in GPU_ERRORS
                    ), flush=True)  # fmt: skip
    result: dict[str, Any] = {
        "suite": {key: suite[key] for key in ("commit", "machine", "versions")}, "table": table,
    }  # fmt: skip
    line: dict[str, Any] = {"configurations": len(table)}
    for key in GPU_ERRORS:
        errors = [abs(row[key]) for row in table]
        line[f"max_{key}"], line[f"mean_{key}"] = max(errors), statistics.mean(errors)
    # Nothing was timed here: it is as good on a busy machine.
    result = {"commit": commit, "tree_clean": clean, **result, **line}
    runs.write_json(Path(__file__).parent / "results" / f"plan_accuracy-{device}.json", result)
    print(json.dumps(line))


GPU_ERRORS = ("allocated_error", "reserved_error", "time_error")


def gpu_row(case: str, real: Mapping[str, Any], folder: Path, device: str) -> dict[str, Any] | None:
    """Predicted beside measured; None for a peer's row, a failed one, or one of compiled layers."""
    from benchmarks import engine
    from lighten.machine.devices import named
    from lighten.planning.trace import plan_recipe

    request = real.get("asked")
    if request is None or real["choices"].get("compilation") == "on":
        return None
    lengths = request["lengths"]
    if len(set(lengths)) > 1:  # a plan is told how many rows of how many tokens
        return None
    # The suite gives more rows to a micro-batch than a plan would believe of one adapter's.
    settings = {**request["settings"]}
    if len(request["adapters"]) == 1:
        settings["per_device_train_batch_size"] = len(lengths)
    recipe = engine.recipe_of(str(folder), request["adapters"], 3, settings=settings)
    plan = plan_recipe(
        recipe, named(device), rows_tokens=(len(lengths), lengths[0]), supervised=0.75
    ).to_dict()
    memory = plan["memory"]
    parts = {part["name"]: part["bytes"] for part in memory["parts"]}
    reserved = memory["expected"] - parts["device context"]
    seconds = statistics.median(real["step_seconds"])
    return {
        "case": case, "allocated_bytes": real["allocated_bytes"],
        "reserved_bytes": real["reserved_bytes"], "step_seconds": seconds,
        "planned": {"allocated": memory["allocated"], "reserved": reserved,
                    "seconds": plan["time"]["seconds"], "parts": parts},
        "allocated_error": memory["allocated"] / real["allocated_bytes"] - 1.0,
        "reserved_error": reserved / real["reserved_bytes"] - 1.0,
        "time_error": plan["time"]["seconds"] / seconds - 1.0,
    }  # fmt: skip


def show(row: Mapping[str, Any]) -> None:
    """One line of the table."""
    if row["error"] is None:
        print(f"{row['case']:75} failed: {row['measured']['error'].strip().splitlines()[-1]}")
        return
    plan, real = row["plan"], row["measured"]
    stages = real["stages"]
    print(
        f"{row['case']:75} {real['peak_bytes'] / 2**20:7.0f} MiB, predicted "
        f"{plan['memory']['expected'] / 2**20:7.0f} ({row['error']:+.1%}, {plan['memory']['when']})"
        f"  {row['step_seconds']:5.2f} s, predicted {plan['time']['seconds']:5.2f}"
        f" ({row['time_error']:+.0%})  planned in {plan['seconds_to_plan']:.1f} s"
        f"  loading {stages['loading'] / 2**20:.0f}, steps "
        + " ".join(f"{peak / 2**20:.0f}" for peak in stages["steps"])
        + "".join(f"  {name} {error:+.0%}" for name, error in plan_peers.errors(row).items()),
        flush=True,
    )


if __name__ == "__main__":
    main()
