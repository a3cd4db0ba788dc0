"""What `--to` names: the formats a model is quantised to, and what each needs to be installed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lighten.errors import MissingExtra, UserError, require_package

if TYPE_CHECKING:
    from lighten.runs import Run

DYNAMIC = "int8-dynamic-act-int4-weight"
GROUP_SIZE = 32  # of its weights: the smallest that XNNPACK takes, and so the nearest
# Kind by name, with the module that makes or loads it and the extra that brings that module.
KINDS = {
    "int8": ("torchao", "quantize"),
    "int8:bitsandbytes": ("bitsandbytes", "quant"),
    "nf4": ("bitsandbytes", "quant"),
    "int4": ("auto_round", "quantize"),
    "int4:rounded": ("auto_round", "quantize"),
    DYNAMIC: ("torchao", "quantize"),
}
_ALSO = {"int8:torchao": "int8", "llm.int8": "int8:bitsandbytes", "nf4:double": "nf4",
         "8da4w": DYNAMIC}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One format.

    Attributes:
        name: As the table shows it.
        kind: One of `KINDS`, or `gguf`.
        type: llama.cpp's type of a GGUF file.
    """

    name: str
    kind: str
    type: str = ""

    @property
    def folder(self) -> str:
        """Of its files, under `exports`."""
        return re.sub(r"[^\w.]+", "-", self.name)

    @property
    def calibrated(self) -> bool:
        """Whether it looks at data."""
        return self.kind == "int4"


def dynamic_group_size(run: Run | None) -> int:
    """Weights of a scale of 8da4w: those that a run was trained for, else the usual."""
    groups = None if run is None else run.recipe().qat_groups
    return groups or GROUP_SIZE


def parse(words: Sequence[str] | str) -> list[Target]:
    """Targets from a list, or from words with commas.

    Raises:
        UserError: A format is unknown, or there is none.
    """
    names = [words] if isinstance(words, str) else list(words)
    parts = [part.strip().lower() for name in names for part in str(name).split(",")]
    targets = {target.name: target for part in parts if part for target in [_target(part)]}
    if not targets:
        raise UserError(f"--to names no format; use {', '.join(KINDS)} or gguf:TYPE")
    return list(targets.values())


def _target(name: str) -> Target:
    name = _ALSO.get(name, name)
    if name in KINDS:
        return Target(name, name)
    kind, _, type_name = name.partition(":")
    if kind != "gguf":
        raise UserError(f"--to: {name!r} is not one of {', '.join(KINDS)} or gguf:TYPE")
    from lighten.quantization.gguf_types import file_type

    type_name = type_name or "q8_0"
    file_type(type_name)
    return Target(f"gguf:{type_name}", "gguf", type_name)


def require_tools(targets: Sequence[Target]) -> None:
    """What makes the formats is installed.

    Raises:
        MissingExtra: Something is not.
    """
    for target in targets:
        needed = [KINDS[target.kind]] if target.kind in KINDS else [
            ("gguf", "gguf"), ("xllamacpp", "gguf")
        ]  # fmt: skip
        for module, extra in needed:
            require_package(module, extra)


def missing_tools(target: str) -> str | None:
    """What is not installed that makes a format, with the command that installs it; or None."""
    try:
        require_tools(parse(target))
    except MissingExtra as error:
        return str(error)
    return None
