"""Which modules of a base an adapter changes, matched as PEFT matches them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from lighten.adapters.decoder import decoder_layers, stacked_experts
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
# Models of which PEFT adapts this layer nowhere (0.21.2, `_check_lora_target_modules_mamba`).
_MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_MAMBAS_LAST = "out_proj"
# Linear layers of a decoder layer: those under its attention, and the rest.
GROUPS = ("attention", "mlp")


def low_rank_paths(model: PreTrainedModel, spec: AdapterSpec) -> list[str]:
    """Paths of the linear modules that the adapter changes, in the model's order.

    Raises:
        UserError: Nothing matches (trap 27), or a match is not a linear layer.
    """
    head = model.get_output_embeddings()
    linear = [path for path, module in model.named_modules() if is_linear(module)]
    foreign = foreign_names(model, linear)
    if spec.target_modules == ALL_LINEAR:
        paths = [path for path in linear if model.get_submodule(path) is not head]
        paths = [path for path in paths if _name(path) not in foreign]
    else:
        if not isinstance(spec.target_modules, str) and ALL_LINEAR in spec.target_modules:
            raise UserError(
                f"adapter {spec.name!r}: {ALL_LINEAR} stands by itself, not in a list; use "
                f"lora_target_modules: {ALL_LINEAR}, which holds every other name"
            )
        targets = without_groups(model, spec.target_modules)
        paths = [path for path, _ in model.named_modules() if _matches(path, targets)]
        if taken := sorted(foreign & set(map(_name, paths))):
            raise UserError(
                f"adapter {spec.name!r}: lora_target_modules reaches {', '.join(taken)} of "
                f"{type(model).__name__}, where PEFT {foreign_reason(model)}, so that nothing else "
                f"could load what they learn; use {ALL_LINEAR}, which leaves them out"
            )
        if stacked := _names_of_experts(model, spec.target_modules, linear):
            raise UserError(
                f"adapter {spec.name!r}: lora_target_modules names {', '.join(stacked)}, but the "
                f"experts of {type(model).__name__} are stacked in one tensor each layer; leave "
                "them out, or train the experts through peft: {peft_type: LORA, "
                "target_parameters: [...]}"
            )
    copy_paths = saved_paths(model, spec)
    paths = [p for p in paths if not any(p == w or p.startswith(f"{w}.") for w in copy_paths)]
    if not paths:
        raise UserError(
            f"adapter {spec.name!r}: lora_target_modules {_format(spec.target_modules)} matches no "
            f"module of {type(model).__name__}; its linear layers are "
            f"{', '.join(sorted({path.rpartition('.')[2] for path in linear}))}"
        )
    for path in paths:
        module = model.get_submodule(path)
        if not is_linear(module):
            raise UserError(
                f"adapter {spec.name!r}: lora_target_modules matches {path}, a "
                f"{type(module).__name__}, but low-rank updates go on linear layers; use "
                f"modules_to_save to train it whole"
            )
    return paths


def foreign_names(model: PreTrainedModel, paths: Iterable[str]) -> set[str]:
    """Last names of linear modules on which PEFT would load no low-rank update of ours.

    In models whose experts are stacked it takes the names of what an expert has for the experts'
    own, wherever they stand: updates of a shared expert or a dense layer are lost. In some models
    with Mamba layers it refuses these layers' last product, which a kernel may pass by.
    """
    names = set(map(_name, paths))
    if getattr(model.config, "model_type", None) in _MAMBAS:
        return names & {_MAMBAS_LAST}
    if not any(map(stacked_experts, decoder_layers(model))):
        return set()
    return set(filter(functools.partial(_means_experts, model), names))


def _names_of_experts(
    model: PreTrainedModel, targets: str | tuple[str, ...], linear: Iterable[str]
) -> list[str]:
    """Names that mean the stacked experts alone: of an expert's layers before it was stacked."""
    if isinstance(targets, str) or not any(map(stacked_experts, decoder_layers(model))):
        return []
    rest = set(targets) - set(map(_name, linear)) - set(GROUPS)
    return sorted(name for name in rest if _means_experts(model, name))


def foreign_reason(model: PreTrainedModel) -> str:
    """Why PEFT would load none on the names of `foreign_names`."""
    if getattr(model.config, "model_type", None) in _MAMBAS:
        return "takes no low-rank update"
    return "takes these names for those of the stacked experts"


def _means_experts(model: PreTrainedModel, name: str) -> bool:
    from peft import LoraConfig  # it takes a second and more to import

    try:
        from peft.utils.transformers_weight_conversion import (
            convert_peft_config_for_transformers as convert,
        )
    except ImportError:  # PEFT before 0.19
        return False
    config = LoraConfig(target_modules=[name])
    try:
        convert(config, model, conversions=None)
    except ValueError:  # one name of several that are one tensor now
        return True
    return name not in (config.target_modules or ())


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def sibling_paths(paths: Iterable[str]) -> list[list[str]]:
    """Of the given modules, those that read the same tensor, together; lone ones are left out."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(input_name(path), []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def input_name(path: str) -> str:
    """What modules that read the same tensor have in common; whichever of them have adapters."""
    parent, _, name = path.rpartition(".")
    for names in TOGETHER:
        if name in names:
            return f"{parent}.{min(names)}"
    return path


def without_groups(model: PreTrainedModel, targets: str | Iterable[str]) -> str | tuple[str, ...]:
    """The targets with `attention` and `mlp` replaced by the paths they mean.

    A linear layer that is itself called so is meant before the group.

    Raises:
        UserError: A group has no linear layer in this model.
    """
    linear = [path for path, module in model.named_modules() if is_linear(module)]
    groups = [name for name in GROUPS if not any(_ends_with_any(p, (name,)) for p in linear)]
    if isinstance(targets, str):
        return tuple(group_paths(model, targets)) if targets in groups else targets
    names: list[str] = []
    for target in targets:
        names += group_paths(model, target) if target in groups else [target]
    return tuple(names)


def group_paths(model: PreTrainedModel, group: str) -> list[str]:
    """Paths of the linear layers under the decoder layers' attention, or of the others there.

    Raises:
        UserError: There is none.
    """
    layers = decoder_layers(model)
    paths = [
        path
        for path, module in model.named_modules()
        if is_linear(module)
        and (parents := _parents_within(model, path, layers)) is not None
        and any(map(_is_attention, parents)) == (group == "attention")
    ]
    foreign = foreign_names(model, paths)
    paths = [path for path in paths if _name(path) not in foreign]
    if not paths:
        raise UserError(
            f"lora_target_modules: {group}: the decoder layers of {type(model).__name__} have no "
            "such linear layers; fused experts are reached through peft: {peft_type: LORA, "
            "target_parameters: [...]}"
        )
    return paths


def _parents_within(
    model: PreTrainedModel, path: str, layers: Iterable[nn.Module]
) -> list[tuple[str, nn.Module]] | None:
    """Names and modules above a path inside its decoder layer; None outside of all of them."""
    parts = path.split(".")
    chain = [(part, model.get_submodule(".".join(parts[: i + 1]))) for i, part in enumerate(parts)]
    for place, (_, module) in enumerate(chain):
        if any(module is layer for layer in layers):
            return chain[place + 1 : -1]
    return None


def _is_attention(named: tuple[str, nn.Module]) -> bool:
    name, module = named
    return "attn" in name.lower() or "attention" in type(module).__name__.lower()


def saved_paths(model: PreTrainedModel, spec: AdapterSpec) -> list[str]:
    """Paths of the modules that the adapter trains as whole copies, in the model's order.

    Raises:
        UserError: A name in `modules_to_save` matches nothing.
    """
    paths = [path for path, _ in model.named_modules() if path]
    for name in spec.modules_to_save:
        if not any(_ends_with_any(path, (name,)) for path in paths):
            raise UserError(
                f"adapter {spec.name!r}: modules_to_save names {name!r}, but "
                f"{type(model).__name__} has no such module"
            )
    return [path for path in paths if _ends_with_any(path, spec.modules_to_save)]


def shortest_names(model: PreTrainedModel, paths: Iterable[str]) -> list[str]:
    """The paths as PEFT's `target_modules`: last components if they say exactly the same."""
    targets = set(paths)
    suffixes = sorted({path.rpartition(".")[2] for path in targets})
    matched = {path for path, _ in model.named_modules() if _ends_with_any(path, suffixes)}
    return suffixes if matched == targets else sorted(targets)


def _matches(path: str, targets: str | tuple[str, ...]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return _ends_with_any(path, targets)


def _ends_with_any(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _format(targets: str | tuple[str, ...]) -> str:
    return repr(targets) if isinstance(targets, str) else repr(list(targets))
