"""Who trains in `train_vs_peers.py`, with which settings and on which of the two sets of steps."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.engine import OPTIMISER, RANK
from benchmarks.steps import ROWS_PER_STEP

TRL = "trl==1.16.0"
# What `lighten.train` decides for itself in a run of thousands of steps in 16 bits, and must be
# told in a short one that stands for it. The 60-step runs decide for themselves.
LONG_RUN: dict[str, Any] = {"torch_compile": True}
GROUPED, SHUFFLED = "grouped", "shuffled"


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        engine: `lighten`, or the peer whose script trains.
        settings: Of the recipe, or of `SFTConfig`.
        data: Which set of steps: like lengths together, or TRL's own random rows.
        part: What of the benchmark `--only` can name.
        dtype: Of a peer's weights.
        attention: Of a peer; None leaves it to transformers.
        accumulate: Micro-batches that a peer cuts a step into.
        rounding: The format of the products, where it is not that of the weights.
        rounded: The format that a peer's weights are rounded to before they become `dtype`.
        learns: False is the control.
        once: Measured once, however many repeats the others have.
    """

    engine: str
    settings: dict[str, Any] = field(default_factory=dict)
    data: str = GROUPED
    part: str = "best"
    dtype: str = "auto"
    attention: str | None = None
    accumulate: int = 1
    rounding: str | None = None
    rounded: str | None = None
    learns: bool = True
    once: bool = False

    @property
    def script(self) -> str:
        """The worker's file."""
        return "worker.py" if self.engine == "lighten" else f"peers_{self.engine}.py"

    def job(self, lessons: Any, model: str, adapter: str, device: str) -> dict[str, Any]:
        """What the worker reads."""
        shared = {"model": model, "device": device, "optimiser": OPTIMISER}
        if self.engine == "lighten":
            return {
                **shared, "lessons": {"default": lessons}, "start": {"default": adapter},
                "learns": self.learns,
                "settings": {"per_device_train_batch_size": ROWS_PER_STEP, **self.settings},
            }  # fmt: skip
        options = {"attn_implementation": self.attention} if self.attention else {}
        return {
            **shared, "steps": lessons, "adapter": adapter, "dtype": self.dtype, "rank": RANK,
            "rounded": self.rounded,
            "model_options": options, "options": self.settings, "accumulate": self.accumulate,
        }  # fmt: skip

    def checkpointed(self) -> Contender:
        """The same with layers recomputed in the backward pass."""
        settings = {**self.settings, "gradient_checkpointing": True}
        return replace(self, settings=settings, part="checkpointed")


OURS, OURS_SAVING = "lighten", "lighten, checkpointing"
OURS_SHUFFLED = "lighten, shuffled"
REFERENCE = "trl, float32 products"
REFERENCE_SHUFFLED = "trl, float32 products, shuffled"
FLOAT32 = "trl, float32, shuffled"
DEFAULTS = "trl, defaults, shuffled"
BEST, BEST_SAVING = "trl, best", "trl, best, checkpointing"
# Float32 arithmetic on the very weights that a row trains on, by its set of steps and their format.
# That a base was rounded is no doing of whoever trains on it.
REFERENCES = {
    (GROUPED, "bfloat16"): REFERENCE,
    (SHUFFLED, "bfloat16"): REFERENCE_SHUFFLED,
    (SHUFFLED, "float32"): FLOAT32,
}
# TRL with rounded products on each set of steps.
ROUNDED = {GROUPED: BEST, SHUFFLED: DEFAULTS}

EXACT: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False}
CONTENDERS: dict[str, Contender] = {
    # Without checkpointing, which changes no loss and only takes longer.
    REFERENCE: Contender("trl", EXACT, dtype="float32", rounded="bfloat16", once=True),
    REFERENCE_SHUFFLED: Contender(
        "trl", EXACT, SHUFFLED, "defaults", dtype="float32", rounded="bfloat16", once=True
    ),
    OURS: Contender("lighten", LONG_RUN),
    OURS_SAVING: Contender("lighten", LONG_RUN).checkpointed(),
    OURS_SHUFFLED: Contender("lighten", LONG_RUN, SHUFFLED, "defaults"),
    # `SFTConfig()`: weights as stored, bfloat16 autocast, checkpointing, loss in chunks.
    DEFAULTS: Contender("trl", {}, SHUFFLED, "defaults", rounding="bfloat16"),
    FLOAT32: Contender("trl", {"bf16": False}, SHUFFLED, "defaults", dtype="float32", once=True),
}
# They start as the others and never move: if their losses pass too, agreement says nothing.
CONTROLS = {data: Contender("lighten", data=data, learns=False) for data in (GROUPED, SHUFFLED)}
# What may be TRL's fastest way here: all rows of a step at once first, then in four micro-batches.
# Packing and padding-free rows need FlashAttention 2 or 3.
CANDIDATES: dict[str, Contender] = {
    f"{attention}, {'autocast' if autocast else 'no autocast'}": Contender(
        "trl", {"gradient_checkpointing": False, "bf16": autocast}, dtype="bfloat16",
        attention=attention,
    )
    for attention, autocast in itertools.product(("sdpa", "eager"), (True, False))
}  # fmt: skip
SPLIT = 4
# Further columns, where the package is in the peers' environment.
OPTIONAL: dict[str, Contender] = {
    "unsloth": Contender("unsloth", {"gradient_checkpointing": False}, dtype="bfloat16"),
    "torchtune": Contender("torchtune", dtype="bfloat16"),
}


def split(name: str) -> tuple[str, Contender]:
    """A candidate with its step cut into small micro-batches, and what that is called."""
    contender = replace(CANDIDATES[name], accumulate=SPLIT)
    return f"{name}, {ROWS_PER_STEP // SPLIT} rows x {SPLIT}", contender


def set_up(peers: Path) -> None:
    """Make the peers' environment, with this environment's versions of what both use."""
    from lighten.machine import hardware

    versions = hardware.versions()
    shared = [
        f"{name}=={versions[name].partition('+')[0]}"
        for name in ("torch", "transformers", "peft", "accelerate", "numpy")
    ]
    subprocess.run([sys.executable, "-m", "venv", str(peers)], check=True)
    pip = [str(peers / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, TRL, "psutil", *shared], check=True)


def installed(peers: Path) -> dict[str, str | None]:
    """Version of each optional peer in the peers' environment, None where it is not installed."""
    code = (
        "import importlib.metadata as m, json\n"
        "def version(name):\n"
        "    try:\n"
        "        return m.version(name)\n"
        "    except m.PackageNotFoundError:\n"
        "        return None\n"
        f"print(json.dumps({{name: version(name) for name in {list(OPTIONAL)!r}}}))"
    )
    process = subprocess.run(
        [str(peers / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True
    )
    versions: dict[str, str | None] = json.loads(process.stdout)
    return versions
