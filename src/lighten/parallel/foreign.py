"""What accelerate's own configuration asks of the ranks that it starts, by its variables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from lighten.errors import UserError

# Configurations that mean nothing here, or another thing.
UNBUILT = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
# What accelerate would do itself: open an engine, and compute in a format, which is the recipe's.
ITS_OWN = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION")
_FIRST_RANK_READS = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # transformers; FSDP hands out what it read
_NONE = ("", "none", "auto")
# What its DeepSpeed part says of a step: DeepSpeed's name, and what nobody said.
_OF_STEP = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", 1.0),
    "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", 1.0),
}
MEND = (
    "choose plain multi-GPU in accelerate config and set strategy in the recipe, or start with: "
    "lighten train RECIPE --gpus N"
)


def configured_in(variables: Mapping[str, str]) -> dict[str, Any]:
    """What `accelerate launch` was configured for, as recipes of other tools say it.

    Args:
        variables: Of the environment.

    Returns:
        `deepspeed`, or `fsdp` and `fsdp_config`, as `lighten.recipe.foreign` reads them; empty
        where it says nothing.

    Raises:
        UserError: It asks for what is not built.
    """
    for name, what in UNBUILT.items():
        if _on(variables, name):
            raise _refused(f"{what}, which lighten does not build on")
    if _on(variables, "ACCELERATE_USE_FSDP"):
        return _of_fsdp(variables)
    if _on(variables, "ACCELERATE_USE_DEEPSPEED"):
        return {"deepspeed": _of_deepspeed(variables)}
    return {}


@contextmanager
def set_aside(variables: MutableMapping[str, str]) -> Iterator[None]:
    """Inside, accelerate opens no engine: what its configuration asks for is a strategy of ours."""
    held = {name: variables.pop(name) for name in ITS_OWN if name in variables}
    if _FIRST_RANK_READS in variables:
        variables[_FIRST_RANK_READS] = "false"
    try:
        yield
    finally:
        variables.update(held)


def _of_fsdp(variables: Mapping[str, str]) -> dict[str, Any]:
    if _on(variables, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"):
        raise _refused("FSDP with activations in main memory, which is not built")
    word = variables.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if variables.get("FSDP_VERSION", "1") == "1":
        # It asks for the strategy under the newer name, and has a default under the older one.
        older = variables.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").lower()
        fsdp: dict[str, Any] = {"fsdp": older if word == "true" else word, "fsdp_config": {}}
    else:
        fsdp = {"fsdp": True, "fsdp_config": {"reshard_after_forward": word}}
    fsdp["fsdp_config"] |= {
        "activation_checkpointing": variables.get("FSDP_ACTIVATION_CHECKPOINTING", "false"),
        "cpu_offload": variables.get("FSDP_OFFLOAD_PARAMS", "false"),
    }
    return fsdp


def _of_deepspeed(variables: Mapping[str, str]) -> str | dict[str, Any]:
    """The path of its file, or what such a file would hold."""
    if (path := variables.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) not in _NONE:
        return path
    stage = _number("ACCELERATE_DEEPSPEED_ZERO_STAGE", variables, 2)
    zero: dict[str, Any] = {"stage": stage}
    for part in ("optimizer", "param"):
        prefix = f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}"
        path = variables.get(f"{prefix}_NVME_PATH", "none")
        zero[f"offload_{part}"] = {
            "device": variables.get(f"{prefix}_DEVICE", "none"),
            "nvme_path": None if path in _NONE else path,
        }
    config: dict[str, Any] = {"zero_optimization": zero}
    for variable, (name, unsaid) in _OF_STEP.items():
        if (value := _number(variable, variables, unsaid)) != unsaid:
            config[name] = value
    return config


def _number(name: str, variables: Mapping[str, str], unsaid: float) -> float:
    word = variables.get(name, "").lower()
    if word in _NONE:
        return unsaid
    try:
        value = float(word)
    except ValueError:
        raise _refused(f"{name} {word}, which is not a number") from None
    return int(value) if value.is_integer() else value


def _on(variables: Mapping[str, str], name: str) -> bool:
    return variables.get(name, "").lower() in ("1", "true", "yes")


def _refused(what: str) -> UserError:
    return UserError(f"accelerate's configuration asks for {what}; {MEND}")
