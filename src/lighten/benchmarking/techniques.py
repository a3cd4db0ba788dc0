"""What `lighten audit` measures: the plain way, each technique beside it, and all together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lighten.machine.hardware import choose_dtype
from lighten.quantization.targets import missing_tools

# Groups of rows; each has a plain row, which the others are set beside.
TRAINING, LONG, ANSWERS = "training", "long context", "answers"
GROUPS = (TRAINING, LONG, ANSWERS)

# What somebody writes first: every weight learns, in float32, padded rows, all scores of attention.
PLAIN: dict[str, Any] = {
    "method": "full", "dtype": "float32", "attn_implementation": "eager", "packing": False,
    "workers": 1, "tokens_per_microbatch": None, "torch_compile": False,
    "gradient_checkpointing": False, "load_in_4bit": False, "load_in_8bit": False,
    "trainable_layers": None,
}  # fmt: skip
LORA = {**PLAIN, "method": "lora"}
# lighten's own choices, for a run too short for compiling to pay.
CHOSEN: dict[str, Any] = {
    **LORA, "dtype": "auto", "attn_implementation": "sdpa", "packing": "auto", "workers": "auto",
    "tokens_per_microbatch": "auto",
}  # fmt: skip
# Settings that a user has no say in, and why.
DECIDED = {
    **dict.fromkeys(
        [*PLAIN, "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"],
        "each row has its own; leave it out",
    ),
    **dict.fromkeys(("max_steps", "num_train_epochs"), "give --steps"),
    "max_eval_samples": "give --examples",
}
# Formats that answers are measured in, by name on the page: quantiser's target and plan's storage.
FORMATS = {
    "INT8": "int8", "NF4": "nf4", "GGUF q8_0": "gguf:q8_0", "GGUF q4_k_m": "gguf:q4_k_m",
}  # fmt: skip


@dataclass(frozen=True)
class Technique:
    """One row of the audit.

    Attributes:
        name: Unique within its group.
        group: One of `GROUPS`.
        what: What it is, for somebody who has not heard of it.
        value: Rows of high value are measured first.
        settings: Of the recipe (training, long context) or of `answering.run` (answers).
        target: Format that `lighten quantize` writes; None: the model in memory.
        needs: Name of the training row whose adapter it takes.
        obstacle: Why it cannot be measured here; None: nothing is known against it.
    """

    name: str
    group: str
    what: str
    value: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    target: str | None = None
    needs: str | None = None
    obstacle: str | None = None

    @property
    def plain(self) -> bool:
        """Whether the others of its group are set beside it."""
        return self.name == NAME_OF_PLAIN

    @property
    def key(self) -> str:
        """Unique among all rows."""
        return f"{self.group}: {self.name}"


NAME_OF_PLAIN = "plain"
LORA_ROW, TOGETHER, SAVING = "LoRA", "all together", "all together, layers recomputed"


def techniques(device: str, long_tokens: int | None) -> list[Technique]:
    """All rows, in the order of the page.

    Args:
        device: `cpu` or `cuda`.
        long_tokens: Length of the rows of `LONG`; None: they are left out.
    """
    long = [] if long_tokens is None else _long(long_tokens)
    return [*_training(device), *long, *_answers(device)]


def _training(device: str) -> list[Technique]:
    half = choose_dtype("auto", device)
    slow = None if half.value != "float32" else f"{half.reason}: every product would be emulated"
    bits = missing_tools("nf4")
    eager = "attention keeps a score for each pair of tokens"

    def row(name: str, what: str, value: int, settings: Mapping[str, Any],
            obstacle: str | None = None) -> Technique:  # fmt: skip
        return Technique(name, TRAINING, what, value, settings, obstacle=obstacle)

    return [
        row(NAME_OF_PLAIN, f"every weight learns, in float32; padded rows; {eager}", 100, PLAIN),
        row("attention in blocks", "scores are made block by block and never kept (sdpa, ours)",
            80, {**PLAIN, "attn_implementation": "sdpa"}),
        row("half precision", f"products in {half.value}, learning weights kept in float32", 76,
            {**PLAIN, "dtype": half.value}, slow),
        row("layers recomputed", "activations are computed again in the backward pass "
            "(gradient checkpointing)", 74, {**PLAIN, "gradient_checkpointing": True}),
        row("no padding", "rows stand behind each other, cut into micro-batches of equal work",
            60, {**PLAIN, "attn_implementation": "sdpa", "packing": "auto", "workers": "auto",
                 "tokens_per_microbatch": "auto"}),
        row("last 2 layers", "the last two decoder layers learn, the others are frozen", 66,
            {**PLAIN, "trainable_layers": "last_2"}),
        row(LORA_ROW, "small low-rank matrices learn beside frozen weights", 94, LORA),
        row("QLoRA", "LoRA over weights stored in 4 bits (NF4)", 78,
            {**LORA, "load_in_4bit": True}, bits),
        row(TOGETHER, f"LoRA in {half.value}, attention in blocks, no padding: "
            "lighten's own choices", 96, CHOSEN),
        row(SAVING, "the same with layers recomputed: the least memory short of 4 bits", 70,
            {**CHOSEN, "gradient_checkpointing": True}),
        row("all together, compiled", "the same with compiled layers, which a long run pays for",
            20, {**CHOSEN, "torch_compile": True}),
    ]  # fmt: skip


def _long(tokens: int) -> list[Technique]:
    prefix = f"one row of {tokens:,} tokens"

    def row(name: str, what: str, value: int, settings: Mapping[str, Any]) -> Technique:
        settings = {**settings, "max_length": tokens, "per_device_train_batch_size": 1,
                    "gradient_accumulation_steps": 1}  # fmt: skip
        return Technique(name, LONG, f"{prefix}: {what}", value, settings)

    return [
        row(NAME_OF_PLAIN, "the plain way", 86, PLAIN),
        row("attention in blocks", "the plain way without kept scores", 50,
            {**PLAIN, "attn_implementation": "sdpa"}),
        row(TOGETHER, "lighten's own choices", 84, CHOSEN),
        row(SAVING, "with layers recomputed", 82, {**CHOSEN, "gradient_checkpointing": True}),
    ]  # fmt: skip


def _answers(device: str) -> list[Technique]:
    half = choose_dtype("auto", device)
    slow = None if half.value != "float32" else f"{half.reason}: every product would be emulated"
    plain = {"dtype": "float32", "attention": "eager"}
    best = {"dtype": half.value, "attention": "sdpa"}

    def row(name: str, what: str, value: int, settings: Mapping[str, Any],
            **options: Any) -> Technique:  # fmt: skip
        return Technique(name, ANSWERS, what, value, settings, **options)

    rows = [
        row(NAME_OF_PLAIN, "the untouched model in float32, token by token", 98, plain),
        row("attention in blocks", "scores are made block by block and never kept", 40,
            {**plain, "attention": "sdpa"}),
        row("half precision", f"weights and products in {half.value}", 72,
            {**plain, "dtype": half.value}, obstacle=slow),
        row("LoRA beside", f"the adapter of “{TOGETHER}” beside the weights, as it was trained",
            64, {**best, "merged": False}, needs=TOGETHER),
        row("LoRA merged", f"the adapter of “{TOGETHER}” added into the weights", 68,
            {**best, "merged": True}, needs=TOGETHER),
    ]  # fmt: skip
    for name, target in FORMATS.items():
        value = {"gguf:q8_0": 90, "nf4": 58, "int8": 56, "gguf:q4_k_m": 88}[target]
        how = "its own runtime, llama.cpp" if target.startswith("gguf") else "transformers"
        rows.append(row(name, f"the untouched model quantised to {target}, in {how}", value, {},
                        target=target, obstacle=missing_tools(target)))  # fmt: skip
    rows.append(row("LoRA merged, GGUF q8_0", "what was trained, merged and quantised", 87,
                    {"merged": True}, target="gguf:q8_0", needs=TOGETHER,
                    obstacle=missing_tools("gguf:q8_0")))  # fmt: skip
    return rows


def storage_of(target: str) -> tuple[str, str] | None:
    """How `lighten quantize` stores linear layers and other weights; None: it is not planned.

    The scales of NF4 are quantised too; INT8 is for embedding and head, too.
    """
    return {"int8": ("int8", "int8"), "nf4": ("nf4 double", "bfloat16")}.get(target)
