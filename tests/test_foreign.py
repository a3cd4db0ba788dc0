"""Schedules of DeepSpeed's and settings of transformers' FSDP: read where they mean the same."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lighten.engine.schedule import learning_rate_factor
from lighten.recipe import Recipe, RecipeError

RATE, WARMUP, STEPS = 3e-4, 5, 40
PARAMS: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_max_lr": RATE},
    "WarmupDecayLR": {"warmup_max_lr": RATE, "total_num_steps": STEPS},
    "WarmupCosineLR": {"cos_min_ratio": 0.1, "total_num_steps": STEPS},
}


def recipe(data: Path, **settings: Any) -> Recipe:
    return Recipe.from_values({"model_name_or_path": "x", "dataset": str(data), **settings})


def scheduled(data: Path, name: str, **params: Any) -> Recipe:
    chosen = {"warmup_type": "linear", "warmup_num_steps": WARMUP, **PARAMS[name], **params}
    config = {"scheduler": {"type": name, "params": chosen}}
    rate = {} if "warmup_max_lr" in chosen else {"learning_rate": RATE}
    return recipe(data, deepspeed=config, max_steps=STEPS, **rate)


def rates(chosen: Recipe) -> list[float]:
    """Of each step, as lighten has them."""
    assert chosen.warmup_steps is not None
    return [chosen.learning_rate * learning_rate_factor(
        step, STEPS, chosen.warmup_steps, chosen.lr_scheduler_type, chosen.lr_scheduler_kwargs
    ) for step in range(STEPS)]  # fmt: skip


def by_formula(name: str, iteration: int) -> float:
    """What DeepSpeed's class gives after so many of its steps (0.19.8, runtime/lr_schedules.py)."""
    if iteration < WARMUP:
        return RATE * iteration / WARMUP
    if name == "WarmupLR":
        return RATE
    if name == "WarmupDecayLR":
        return RATE * max(0.0, (STEPS - iteration) / (STEPS - WARMUP))
    progress = min(1.0, (iteration - WARMUP + 1) / (STEPS - WARMUP))
    lowest = PARAMS[name]["cos_min_ratio"]
    return RATE * (lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2)


def require_same(name: str, ours: list[float], theirs: list[float]) -> None:
    """Ours beside the rates of DeepSpeed's steps, of which the first two are 0."""
    assert theirs[:2] == [0.0, 0.0]
    assert ours[: WARMUP - 1] == pytest.approx(theirs[2 : WARMUP + 1])  # two steps earlier
    # The cosine is the same step by step; a linear way down ends a step earlier, at 0.
    later = {"WarmupLR": 0, "WarmupDecayLR": 1, "WarmupCosineLR": 0}[name]
    tail = slice(WARMUP + 1 + later, STEPS)
    assert ours[WARMUP + 1 : STEPS - later] == pytest.approx(theirs[tail])


@pytest.mark.parametrize("name", PARAMS)
def test_a_linear_warm_up_and_what_follows_it_are_deepspeed_s(name: str, chat_file: Path) -> None:
    chosen = scheduled(chat_file, name)
    assert chosen.learning_rate == RATE
    assert any("two steps earlier" in notice for notice in chosen.notices)
    # The first optimiser's step comes before the scheduler's first.
    theirs = [0.0, *(by_formula(name, step - 1) for step in range(1, STEPS))]
    require_same(name, rates(chosen), theirs)


@pytest.mark.parametrize("name", PARAMS)
def test_deepspeed_itself_gives_these_rates(
    name: str, chat_file: Path, request: pytest.FixtureRequest
) -> None:
    logging.disable(logging.WARNING)
    request.addfinalizer(lambda: logging.disable(logging.NOTSET))
    schedules = pytest.importorskip(
        "deepspeed.runtime.lr_schedules", reason="DeepSpeed is not installed: pip install deepspeed"
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    scheduler = getattr(schedules, name)(
        optimizer, warmup_num_steps=WARMUP, warmup_type="linear", **PARAMS[name]
    )
    theirs = []
    for _ in range(STEPS):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert theirs[1:] == pytest.approx([by_formula(name, step) for step in range(STEPS - 1)])
    require_same(name, rates(scheduled(chat_file, name)), theirs)


def test_what_a_schedule_leaves_open_is_the_recipe_s(chat_file: Path) -> None:
    chosen = scheduled(chat_file, "WarmupDecayLR", warmup_max_lr="auto", warmup_num_steps="auto",
                       warmup_min_lr="auto", total_num_steps="auto",
                       last_batch_iteration=-1)  # fmt: skip
    assert (chosen.lr_scheduler_type, chosen.warmup_steps) == ("linear", None)
    assert chosen.learning_rate == Recipe.model_fields["learning_rate"].default
    assert scheduled(chat_file, "WarmupLR", warmup_num_steps=1).warmup_steps == 2  # as there
    unsaid = {"type": "WarmupDecayLR", "params": {"warmup_type": "linear"}}
    chosen = recipe(chat_file, deepspeed={"scheduler": unsaid})
    assert (chosen.warmup_steps, chosen.learning_rate) == (1000, 0.001)  # its defaults
    unsaid = {"type": "WarmupCosineLR", "params": {"warmup_type": "linear"}}
    chosen = recipe(chat_file, deepspeed={"scheduler": unsaid})
    assert chosen.lr_scheduler_kwargs == {"min_lr_rate": 0.0001}
    plain = scheduled(chat_file, "WarmupCosineLR", cos_min_ratio=0)
    assert (plain.lr_scheduler_type, plain.lr_scheduler_kwargs) == ("cosine", {})


@pytest.mark.parametrize(("name", "params", "message"), [
    ("WarmupLR", {"warmup_type": "log"}, "by the step's logarithm where its warmup_type is log"),
    ("WarmupLR", {"warmup_min_lr": 1e-6}, "warmup_min_lr is 1e-06, and .* begins at 0"),
    ("WarmupLR", {"total_num_steps": 40}, "WarmupLR has no total_num_steps; correct it"),
    ("WarmupLR", {"warmup_max_lr": 1e-3, "warmup_num_steps": "many"}, "warmup_steps"),
    ("WarmupLR", {"last_batch_iteration": 10}, "WarmupLR has no last_batch_iteration; correct it"),
    ("WarmupDecayLR", {"total_num_steps": 41}, "total_num_steps is 41, and the learning rate ends"),
    ("WarmupCosineLR", {"cos_min_ratio": "low"}, "min_lr_rate: 'low' does not do"),
    ("WarmupCosineLR", {"warmup_min_ratio": 0.1}, "warmup_min_ratio is 0.1"),
])  # fmt: skip
def test_a_schedule_of_another_course_is_told(
    name: str, params: dict[str, Any], message: str, chat_file: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        scheduled(chat_file, name, **params)


@pytest.mark.parametrize(("scheduler", "message"), [
    ({"type": "OneCycle"}, "scheduler OneCycle has no equal here; set lr_scheduler_type"),
    # As transformers' own example has it: by the logarithm.
    ({"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                                     "warmup_num_steps": "auto"}}, "add warmup_type: linear to it"),
    ("WarmupLR", "scheduler is 'WarmupLR', where DeepSpeed has settings in braces"),
])  # fmt: skip
def test_a_schedule_that_ours_is_not_is_told(scheduler: Any, message: str, chat_file: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(chat_file, deepspeed={"scheduler": scheduler})


@pytest.mark.parametrize(("fsdp", "config", "strategy", "recomputes"), [
    (True, {"fsdp_version": 2, "fsdp_reshard_after_forward": False}, "zero2", False),
    (True, {"reshard_after_forward": "true", "activation_checkpointing": "true"}, "fsdp", True),
    (True, {"version": 1, "reshard_after_forward": "no_shard"}, "ddp", False),
    ("full_shard auto_wrap", {"min_num_params": 0, "xla": False, "xla_fsdp_settings": {},
                              "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                              "activation_checkpointing": False}, "fsdp", False),
    ("auto_wrap", {"transformer_layer_cls_to_wrap": "GPT2Block", "cpu_offload": "false",
                   "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": True,
                   "sync_module_states": True, "use_orig_params": True,
                   "backward_prefetch": "backward_pre", "forward_prefetch": False,
                   "limit_all_gathers": True, "state_dict_type": "FULL_STATE_DICT"}, "fsdp", False),
    # Axolotl's examples, and accelerate's words in them.
    (["full_shard", "auto_wrap"],
     {"fsdp_limit_all_gathers": True, "fsdp_sync_module_states": True, "fsdp_offload_params": False,
      "fsdp_use_orig_params": False, "fsdp_cpu_ram_efficient_loading": True,
      "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_state_dict_type": "FULL_STATE_DICT",
      "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
      "fsdp_backward_prefetch_policy": "BACKWARD_PRE", "fsdp_sharding_strategy": "FULL_SHARD"},
     "fsdp", False),
    (True, {"sharding_strategy": 2}, "zero2", False),
    (True, {"sharding_strategy": "FULL_SHARD", "reshard_after_forward": True, "version": 2,
            "final_state_dict_type": "FULL_STATE_DICT", "cpu_offload_pin_memory": False},
     "fsdp", False),
])  # fmt: skip
def test_settings_of_transformers_fsdp_are_read(
    fsdp: Any, config: dict[str, Any], strategy: str, recomputes: bool, chat_file: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "fsdp.json").write_text(json.dumps(config))
    for source in (config, str(tmp_path / "fsdp.json")):
        chosen = recipe(chat_file, fsdp=fsdp, fsdp_config=source)
        assert chosen.strategy == strategy
        assert chosen.gradient_checkpointing is recomputes


@pytest.mark.parametrize(("settings", "message"), [
    ({"fsdp": True, "fsdp_config": {"cpu_offload": True}},
     "offload_params: cpu moves weights that learn"),
    ({"fsdp": True, "fsdp_config": {"min_num_params": 2000}}, "ranks gather decoder layers, what"),
    ({"fsdp": True, "fsdp_config": {"xla": True}}, "no training on TPUs"),
    ({"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
     "use FULL_STATE_DICT, or remove it"),
    ({"fsdp": True, "fsdp_config": {"auto_wrap_policy": "NO_WRAP"}}, "use TRANSFORMER_BASED_WRAP"),
    ({"fsdp": True, "fsdp_config": {"version": 3}}, "version: 3 has no equal here; use 2"),
    ({"fsdp": True, "fsdp_config": {"version": 1, "reshard_after_forward": "hybrid_shard"}},
     "'hybrid_shard' of FSDP 1 is not built"),
    ({"fsdp": True, "fsdp_config": {"reshard_after_forward": "full_shard"}}, "use true or false"),
    ({"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaMLP"]}},
     "LlamaMLP is no class of decoder layers"),
    ({"fsdp": True, "fsdp_config": {"sharding": 1}}, "no sharding; correct it"),
    ({"fsdp": True, "fsdp_config": {"sharding_strategy": "HYBRID_SHARD"}},
     "sharding_strategy: 'HYBRID_SHARD' of FSDP 1 is not built; use full_shard"),
    ({"fsdp": "full_shard", "fsdp_config": {"sharding_strategy": "SHARD_GRAD_OP"}},
     "full_shard and fsdp_config: sharding_strategy contradict"),
    ({"fsdp": True, "fsdp_config": {"mixed_precision_policy": "bf16"}}, "dtype says what is comp"),
    ({"fsdp": "full_shard", "fsdp_config": {"reshard_after_forward": False}}, "contradict"),
    ({"fsdp": True, "gradient_checkpointing": False,
      "fsdp_config": {"activation_checkpointing": True}}, "both set the same thing"),
    ({"fsdp_config": {"version": 2}}, "fsdp_config has no effect without fsdp; add fsdp: true"),
    ({"fsdp": True, "fsdp_config": "nowhere.json"}, "nowhere.json cannot be read"),
])  # fmt: skip
def test_settings_of_fsdp_that_ours_are_not_are_told(
    settings: dict[str, Any], message: str, chat_file: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(chat_file, **settings)


@pytest.mark.parametrize("nothing", ["", False, "false", None])
def test_an_engine_that_is_left_empty_is_none(nothing: Any, chat_file: Path) -> None:
    """As of `--deepspeed "$CONFIG"` where there is no such variable."""
    assert recipe(chat_file, deepspeed=nothing, fsdp=nothing).strategy == "auto"


def test_axolotl_asks_for_fsdp_by_its_version(chat_file: Path) -> None:
    config = {"offload_params": False, "cpu_ram_efficient_loading": True,
              "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT",
              "transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "reshard_after_forward": True,
              "activation_checkpointing": True}  # fmt: skip
    chosen = recipe(chat_file, fsdp_version=2, fsdp_config=config)
    assert (chosen.strategy, chosen.gradient_checkpointing) == ("fsdp", True)
    chosen = recipe(chat_file, fsdp_version=2, fsdp_config={"reshard_after_forward": False},
                    fsdp_final_state_dict_type="FULL_STATE_DICT")  # fmt: skip
    assert chosen.strategy == "zero2"
    assert recipe(chat_file, fsdp_version=2).strategy == "auto"
