"""The engine on a CUDA machine that has only PyTorch, transformers, peft and accelerate.

    python benchmarks/gpu_suite.py --out FOLDER            # under 8 minutes on one H100
    python benchmarks/gpu_suite.py --out FOLDER --device cpu --tiny

Models of real shapes are built from their configuration with random weights, directly on the
device, so that nothing is downloaded. Everything runs in one process, each measurement on a base
made anew, with the allocator emptied and its peak reset. `gpu_suite.json` is rewritten after every
measurement: what ran out of memory or failed stays in it, and so does what a time limit left out.
The package need not be installed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import cohort_worker, engine, machine, plain_peft
from benchmarks.cohort_worker import MANY_ROWS, Lessons
from benchmarks.comparison import AGREEMENT
from benchmarks.steps import Row
from lighten import runs
from lighten.errors import UserError
from lighten.machine import hardware
from lighten.machine.hardware import PeakMemory
from lighten.models import quantized
from lighten.models.attention_setting import set_attention

# Llama 3.2 1B and Llama 2 7B.
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
        "max_position_embeddings": 256, "tie_word_embeddings": False,
    },
}  # fmt: skip
# Rows and longest row of a step; lengths spread evenly from half of it to all of it.
SPEED = {"1b": (16, 1024), "7b": (8, 1024), "tiny": (4, 16)}
MEMORY = {
    "1b": ((1, 512), (8, 512), (8, 2048), (16, 4096)),
    "7b": ((1, 512), (8, 512), (8, 2048), (16, 2048)),
    "tiny": ((1, 16), (2, 16)),
}
# Tokens per adapter and step of a cohort.
COHORT_TOKENS = {"1b": (64, 512), "7b": (64, 512), "tiny": (16,)}
WARMUP = 2  # steps


class Suite:
    """The measurements of one model on one device.

    Args:
        name: Of the shape.
        shape: Of its configuration.
        arguments: Of the command line.
        scratch: A folder that is thrown away.
    """

    def __init__(
        self, name: str, shape: Mapping[str, Any], arguments: argparse.Namespace, scratch: Path
    ) -> None:
        self.name, self.shape, self.scratch = name, shape, scratch
        self.device, self.steps = arguments.device, arguments.steps
        self.dtype = dtype_of(arguments)

    def model(self, *, dtype: str | None = None, four_bits: bool = False) -> Any:
        """The random model, the same every time; its making does not count in any peak."""
        self._forget()
        torch.manual_seed(0)
        config = LlamaConfig(**self.shape)
        compute = getattr(torch, dtype or self.dtype)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(
                config, dtype=compute, attn_implementation="sdpa"
            )
        if four_bits:
            quantized.finish(model, quantized.choose(True, False, "nf4", False), compute,
                             self.device)  # fmt: skip
        model.requires_grad_(False)
        self._forget()
        return model.eval()

    def _forget(self) -> None:
        gc.collect()
        if self.device != "cpu":
            # cuBLAS keeps a piece of whatever large segment was free, which then cannot be given
            # back: the next measurement would begin with memory that no process of its own has.
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def lessons(
        self, names: list[str], rows: int, longest: int, *, even: bool, steps: int | None = None
    ) -> Lessons:
        """Random rows, three quarters supervised; `even` gives all of them the longest length."""
        generator = np.random.default_rng(0)

        def row(place: int) -> Row:
            shortest = longest if even else longest // 2
            length = shortest + (longest - shortest) * (place + 1) // rows
            ids = generator.integers(3, self.shape["vocab_size"], length).tolist()
            return ids, [i >= length // 4 for i in range(length)]

        count = steps or self.steps + WARMUP
        return {name: [[row(i) for i in range(rows)] for _ in range(count)] for name in names}

    def ours(self, lessons: Lessons, **settings: Any) -> dict[str, Any]:
        """Train the lessons by lighten."""
        memory = PeakMemory(self.device)
        steps = len(next(iter(lessons.values())))
        # So many rows per batch would look like a run long enough to compile layers for.
        settings = {
            "per_device_train_batch_size": MANY_ROWS, "torch_compile": False, **settings,
        }  # fmt: skip
        recipe = engine.recipe_of("random", list(lessons), steps, settings=settings)
        full = recipe.method == "full"
        if full:  # one member, of the recipe's own naming
            lessons = {recipe.cohort()[0].name: next(iter(lessons.values()))}
        model = self.model(
            dtype="float32" if full else None, four_bits=bool(settings.get("load_in_4bit"))
        )
        set_attention(model, "sdpa", self.device)
        base = engine.base_in_memory(model, self.dtype)
        setup = engine.set_up(recipe, lessons, self.device, base)
        result = engine.train(setup, lessons, self.scratch, memory)
        lengths = [[len(ids) for ids, _ in lesson[0]] for lesson in lessons.values()]
        # What a plan has to be told to predict this row (benchmarks/plan_accuracy.py --gpu).
        request = {"adapters": list(lessons), "lengths": lengths[0], "settings": settings}
        facts = self._facts(result, result["step_seconds"], memory, lessons)
        return {**facts, "asked": request, "choices": result["choices"]}

    def peft(
        self, lessons: Lessons, adapters: str, *, checkpointing: bool, four_bits: bool = False
    ) -> dict[str, Any]:
        """PEFT in a plain loop on the first of the lessons.

        Args:
            lessons: What to learn.
            adapters: `float32` as PEFT keeps them, or `bfloat16` with the base: quicker, and
                with an optimiser that rounds.
            checkpointing: Recompute layers in the backward pass.
            four_bits: An NF4 base.
        """
        memory = PeakMemory(self.device)
        name = next(iter(lessons))
        config = LoraConfig(
            r=engine.RANK, lora_alpha=2 * engine.RANK, target_modules="all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        model = get_peft_model(
            self.model(four_bits=four_bits),
            config,
            adapter_name=name,
            autocast_adapter_dtype=adapters == "float32",
        )
        set_peft_model_state_dict(model, self._start(name), adapter_name=name)
        result = plain_peft.train(
            model, {name: lessons[name]}, self.device, engine.OPTIMISER,
            checkpointing=checkpointing,
        )  # fmt: skip
        return self._facts(result, result["step_seconds"][name], memory, {name: lessons[name]})

    def _start(self, name: str) -> dict[str, Any]:
        """The first weights that lighten gives an adapter, without a base in memory."""
        from lighten import adapters
        from lighten.adapters import AdapterSpec

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**self.shape))
        # Attached to shapes alone, the factors would be shapes too: only they are made here.
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(
                    torch.empty(1).expand(module.weight.shape), requires_grad=False
                )
        cohort = adapters.attach(model, [AdapterSpec(name, r=engine.RANK, seed=0)])
        return {key: value.detach() for key, value in cohort.parameters(name).items()}

    def _facts(
        self, result: Mapping[str, Any], seconds: list[float], memory: PeakMemory, lessons: Lessons
    ) -> dict[str, Any]:
        tokens = sum(len(ids) for steps in lessons.values() for ids, _ in steps[0])
        peak = memory.read()
        timed_seconds = seconds[min(WARMUP, len(seconds) - 1) :]
        return {
            "tokens_per_step": tokens, "tokens_per_s": tokens / statistics.median(timed_seconds),
            "step_seconds": timed_seconds, "losses": result["losses"],
            "idle": cohort_worker.idle(result), "allocated_bytes": peak["peak_bytes"],
            "reserved_bytes": peak.get("reserved_bytes"),
        }  # fmt: skip

    def measurements(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """What there is to measure, by name."""
        calls: dict[str, Callable[[], dict[str, Any]]] = {}
        rows, longest = SPEED[self.name]
        lessons = self.lessons(["a0"], rows, longest, even=False)
        calls["speed, lighten"] = partial(self.ours, lessons)
        if self.name != "tiny":  # compiling takes longer than all of a tiny model's rows
            calls["speed, lighten, compiled"] = partial(self.ours, lessons, torch_compile=True)
        for adapters in ("float32", "bfloat16"):
            name = f"speed, peft, {adapters} adapters"
            calls[name] = partial(self.peft, lessons, adapters, checkpointing=False)
        for tokens in COHORT_TOKENS[self.name]:
            for size in (1, 2, 4, 8):
                names = [f"a{i}" for i in range(size)]
                lesson_set = self.lessons(names, max(1, tokens // 128), min(tokens, 128), even=True)
                calls[f"cohort of {size}, {tokens} tokens each"] = partial(self.ours, lesson_set)
        for rows, longest in MEMORY[self.name]:
            lesson_set = self.lessons(["a0"], rows, longest, even=True, steps=2)
            for saving in (False, True):
                label = f"{rows} x {longest}" + (", checkpointing" if saving else "")
                calls[f"memory, lighten, {label}"] = partial(
                    self.ours, lesson_set, gradient_checkpointing=saving
                )
                calls[f"memory, peft, {label}"] = partial(
                    self.peft, lesson_set, "float32", checkpointing=saving
                )
        rows, longest = MEMORY[self.name][1]
        lesson_set = self.lessons(["a0"], rows, longest, even=True, steps=WARMUP + 2)
        saving_too = {"gradient_checkpointing": True}
        if self.name != "7b":  # its weights, gradients and moments in float32 take 105 GiB
            calls[f"memory, lighten, {rows} x {longest}, full"] = partial(
                self.ours, lesson_set, method="full", **saving_too
            )
            calls[f"memory, lighten, {rows} x {longest}, full, 8-bit AdamW"] = partial(
                self.ours, lesson_set, method="full", optim="adamw_8bit", **saving_too
            )
        for saving in (False, True):
            label = f"{rows} x {longest}, NF4" + (", checkpointing" if saving else "")
            calls[f"memory, lighten, {label}"] = partial(
                self.ours, lesson_set, load_in_4bit=True, gradient_checkpointing=saving
            )
            calls[f"memory, peft, {label}"] = partial(
                self.peft, lesson_set, "float32", checkpointing=saving, four_bits=True
            )
        for size in (1, 8):
            names = [f"a{i}" for i in range(size)]
            lesson_set = self.lessons(names, 1, 64, even=True)
            calls[f"cohort of {size}, 64 tokens each, NF4"] = partial(
                self.ours, lesson_set, load_in_4bit=True
            )
        return calls


def dtype_of(arguments: argparse.Namespace) -> str:
    """The format of the bases: what lighten chooses on this GPU, float16 on a T4."""
    return "float32" if arguments.tiny else hardware.choose_dtype("auto", arguments.device).value


def context_bytes(device: str) -> int | None:
    """What the process, if it is alone there, holds of the device beside PyTorch's memory."""
    if device == "cpu":
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The measurement, or why there is none."""
    try:
        return call()
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except (RuntimeError, ValueError, UserError) as error:  # one row must not cost the others
        return {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}


def ratios(rows: Mapping[str, Mapping[str, Any]], allowed: float) -> dict[str, float | None]:
    """Ours over PEFT's, and cohorts over runs one after another.

    Null where one is missing, has not trained, or has other losses.

    Args:
        rows: What was measured, by name.
        allowed: How far two losses of the same step may be apart, relative.
    """

    def over(figure: str, numerator: str, denominator: str) -> float | None:
        a, b = rows.get(numerator, {}), rows.get(denominator, {})
        if a.get("idle", True) or b.get("idle", True) or not b[figure]:
            return None
        shared = [name for name in a["losses"] if name in b["losses"]]
        difference = cohort_worker.largest_difference(
            {name: a["losses"][name] for name in shared}, b["losses"]
        )
        return float(a[figure] / b[figure]) if difference <= allowed else None

    figures = {
        f"speed_{kind}vs_peft_{adapters}": over(
            "tokens_per_s", f"speed, lighten{suffix}", f"speed, peft, {adapters} adapters"
        )
        for kind, suffix in (("", ""), ("compiled_", ", compiled"))
        for adapters in ("float32", "bfloat16")
    }
    for name in rows:
        kind, _, rest = name.partition(", lighten, ")
        if kind == "memory":
            key = f"memory_vs_peft, {rest}"
            figures[key] = over("allocated_bytes", name, f"memory, peft, {rest}")
        elif name.startswith("cohort of ") and not name.startswith("cohort of 1,"):
            size, _, rest = name.removeprefix("cohort of ").partition(", ")
            # As many tokens per adapter: the ratio of times is that of the speeds, inverted.
            figures[f"time_{size}, {rest}"] = over("tokens_per_s", f"cohort of 1, {rest}", name)
    return figures


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON file")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it works")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=5, help="per measurement, after warm-up")
    parser.add_argument("--limit-s", type=float, default=450.0, help="start nothing after this")
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --tiny shows that the suite works")
    began = time.monotonic()
    engine.before_loading()
    shapes = TINY if arguments.tiny else {name: SHAPES[name] for name in arguments.models}
    dtype = dtype_of(arguments)
    commit, clean = hardware.commit()
    report: dict[str, Any] = {
        "benchmark": "gpu_suite", "commit": commit, "tree_clean": clean, "tiny": arguments.tiny,
        "device": arguments.device, "steps": arguments.steps, "lora_r": engine.RANK,
        "machine": hardware.machine().to_dict(), "versions": hardware.versions(),
        "matmul_flops_per_s": (
            None if arguments.tiny else machine.matmul_rate(arguments.device, dtype)
        ),
        "models": {}, "left_out": [],
    }  # fmt: skip
    path = arguments.out / "gpu_suite.json"
    with tempfile.TemporaryDirectory() as scratch:
        suites = {
            name: Suite(name, shape, arguments, Path(scratch)) for name, shape in shapes.items()
        }
        for model, suite in suites.items():
            rows: dict[str, Any] = {}
            report["models"][model] = {"shape": suite.shape, "dtype": dtype, "rows": rows}
            for name, call in suite.measurements().items():
                if time.monotonic() - began > arguments.limit_s:
                    report["left_out"].append(f"{model}: {name}")
                    continue
                rows[name] = attempt(call)
                status = rows[name].get("error") or (
                    f"{rows[name]['tokens_per_s']:.0f} tokens/s, "
                    f"{rows[name]['allocated_bytes'] / 2**30:.2f} GiB"
                )
                print(f"{model}: {name}: {status}", flush=True)
                report["models"][model]["ratios"] = ratios(rows, AGREEMENT[dtype])
                report["seconds"] = time.monotonic() - began
                report["context_bytes"] = context_bytes(arguments.device)
                runs.write_json(path, report)
    print(f"written to {path}")
    print(json.dumps({model: result["ratios"] for model, result in report["models"].items()}))


if __name__ == "__main__":
    main()
