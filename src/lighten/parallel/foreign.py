"""What accelerate's own configuration asks of the ranks that it starts, by its variables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

from lighten.errors import UserError

# Configurations that mean nothing here, or another thing.
UNBUILT = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
# What accelerate would do itself: open an engine, and compute in a format, which is the recipe's.
_ITS_OWN = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION")
_FIRST_RANK_READS = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # transformers; FSDP hands out what it read
_NONE = ("", "none", "auto")
# What its DeepSpeed part says of a step: our setting, and what it writes where nobody said it.
_OF_STEP = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", 1.0),
    "ACCELERATE_GRADIENT_CLIPPING": ("max_grad_norm", 1.0),
}


def strategy_of(variables: Mapping[str, str]) -> str | None:
    """The strategy that `accelerate launch` was configured for; None: it says nothing.

    Raises:
        UserError: It asks for what is not built, or would be another thing here.
    """
    for name, what in UNBUILT.items():
        if _on(variables, name):
            raise _refused(f"{what}, which lighten does not build on")
    try:
        if _on(variables, "ACCELERATE_USE_FSDP"):
            return _of_fsdp(variables)
        if _on(variables, "ACCELERATE_USE_DEEPSPEED"):
            return _of_deepspeed(variables)
    except ValueError as error:
        raise _refused(str(error)) from error
    return None


def settings_of(variables: Mapping[str, str]) -> dict[str, float]:
    """Settings of a recipe that accelerate's DeepSpeed part was configured for, by name.

    Raises:
        UserError: One is not a number.
    """
    settings = {}
    for variable, (name, unsaid) in _OF_STEP.items():
        word = variables.get(variable, "").lower()
        if not _on(variables, "ACCELERATE_USE_DEEPSPEED") or word in _NONE:
            continue
        try:
            value = float(word)
        except ValueError:
            raise _refused(f"{name} {word}, which is not a number") from None
        if value != unsaid:
            settings[name] = int(value) if value.is_integer() else value
    return settings


@contextmanager
def set_aside(variables: MutableMapping[str, str]) -> Iterator[None]:
    """Inside, accelerate opens no engine: what its configuration asks for is a strategy of ours."""
    held = {name: variables.pop(name) for name in _ITS_OWN if name in variables}
    if _FIRST_RANK_READS in variables:
        variables[_FIRST_RANK_READS] = "false"
    try:
        yield
    finally:
        variables.update(held)


def _of_fsdp(variables: Mapping[str, str]) -> str:
    from lighten.recipe import foreign  # help is shown without it

    if _on(variables, "FSDP_OFFLOAD_PARAMS"):
        raise ValueError("FSDP with parameters in main memory, which is not built")
    if _on(variables, "FSDP_ACTIVATION_CHECKPOINTING"):
        raise ValueError("FSDP's activation checkpointing: set gradient_checkpointing: true in the "
                         "recipe, and this to false")  # fmt: skip
    version = variables.get("FSDP_VERSION", "1")
    if version == "2" and "FSDP_RESHARD_AFTER_FORWARD" in variables:
        return "fsdp" if _on(variables, "FSDP_RESHARD_AFTER_FORWARD") else "zero2"
    word = variables.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").lower()
    if word not in foreign.SHARDING:
        raise ValueError(f"FSDP with {word.upper()}, which is not built")
    return foreign.SHARDING[word]


def _of_deepspeed(variables: Mapping[str, str]) -> str:
    from lighten.recipe import foreign

    if (path := variables.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) not in _NONE:
        raise ValueError(f"DeepSpeed by {path}: name the file in the recipe, deepspeed: {path}, "
                         "and choose plain multi-GPU in accelerate config")  # fmt: skip
    for part in ("OPTIMIZER", "PARAM"):
        device = variables.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE", "none")
        if device in _NONE:
            continue
        setting = {"OPTIMIZER": "offload_optimizer", "PARAM": "offload_params"}[part]
        raise ValueError(f"DeepSpeed with {setting.rstrip('s')}: set {setting}: {device} in the "
                         "recipe")  # fmt: skip
    stage = variables.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("0", "1", "2", "3"):
        raise ValueError(f"DeepSpeed's stage {stage}, which is none of 0, 1, 2, 3")
    return foreign.STAGES[int(stage)]


def _on(variables: Mapping[str, str], name: str) -> bool:
    return variables.get(name, "").lower() in ("1", "true", "yes")


def _refused(what: str) -> UserError:
    return UserError(
        f"accelerate's configuration asks for {what}; choose plain multi-GPU in accelerate config "
        "and set strategy in the recipe, or start with: lighten train RECIPE --gpus N"
    )
