"""Which modules of a base an adapter changes, matched as PEFT matches them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from transformers import PreTrainedModel

from lighten.adapters.frozen import is_linear
from lighten.adapters.spec import AdapterSpec
from lighten.errors import UserError

ALL_LINEAR = "all-linear"
# Names of layers that read the same tensor in the architectures at hand.
TOGETHER = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"query", "key", "value"}),
)


def low_rank_paths(model: PreTrainedModel, spec: AdapterSpec) -> list[str]:
    """Paths of the linear modules that the adapter changes, in the model's order.

    Raises:
        UserError: Nothing matches (trap 27), or a match is not a linear layer.
    """
    head = model.get_output_embeddings()
    linear = [path for path, module in model.named_modules() if is_linear(module)]
    if spec.target_modules == ALL_LINEAR:
        found = [path for path in linear if model.get_submodule(path) is not head]
    else:
        found = [path for path, _ in model.named_modules() if _matches(path, spec.target_modules)]
    whole = saved_paths(model, spec)
    found = [p for p in found if not any(p == w or p.startswith(f"{w}.") for w in whole)]
    if not found:
        raise UserError(
            f"adapter {spec.name!r}: lora_target_modules {_shown(spec.target_modules)} matches no "
            f"module of {type(model).__name__}; its linear layers are "
            f"{', '.join(sorted({path.rpartition('.')[2] for path in linear}))}"
        )
    for path in found:
        module = model.get_submodule(path)
        if not is_linear(module):
            raise UserError(
                f"adapter {spec.name!r}: lora_target_modules matches {path}, a "
                f"{type(module).__name__}, but low-rank updates go on linear layers; use "
                f"modules_to_save to train it whole"
            )
    return found


def sibling_paths(paths: Iterable[str]) -> list[list[str]]:
    """Of the given modules, those that read the same tensor, together; lone ones are left out."""
    groups: dict[tuple[str, int], list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        for number, names in enumerate(TOGETHER):
            if name in names:
                groups.setdefault((parent, number), []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def saved_paths(model: PreTrainedModel, spec: AdapterSpec) -> list[str]:
    """Paths of the modules that the adapter trains as whole copies, in the model's order.

    Raises:
        UserError: A name in `modules_to_save` matches nothing.
    """
    paths = [path for path, _ in model.named_modules() if path]
    for wanted in spec.modules_to_save:
        if not any(_ends_with_any(path, (wanted,)) for path in paths):
            raise UserError(
                f"adapter {spec.name!r}: modules_to_save names {wanted!r}, but "
                f"{type(model).__name__} has no such module"
            )
    return [path for path in paths if _ends_with_any(path, spec.modules_to_save)]


def shortest_names(model: PreTrainedModel, paths: Iterable[str]) -> list[str]:
    """The paths as PEFT's `target_modules`: last components if they say exactly the same."""
    wanted = set(paths)
    suffixes = sorted({path.rpartition(".")[2] for path in wanted})
    matched = {path for path, _ in model.named_modules() if _ends_with_any(path, suffixes)}
    return suffixes if matched == wanted else sorted(wanted)


def _matches(path: str, targets: str | tuple[str, ...]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return _ends_with_any(path, targets)


def _ends_with_any(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _shown(targets: str | tuple[str, ...]) -> str:
    return repr(targets) if isinstance(targets, str) else repr(list(targets))
