"""Every method that trains has a plan: PEFT's own modules are traced as they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lighten import api, models
from lighten.cpu import products
from lighten.machine.devices import named
from lighten.planning.build import stored_dtype
from lighten.planning.trace import plan_recipe
from tests.test_plan_trace import (
    Card,
    folder_of,
    follow,
    really,
    recipe_of,
    same_course,
    steps_of,
)
from tests.tiny import tiny_model

PROMPT = {"num_virtual_tokens": 4}
METHODS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True, "lora_r": 4},
    "DoRA on 4 bits": {"use_dora": True, "lora_r": 4, "load_in_4bit": True},
    "PiSSA": {"init_lora_weights": "pissa", "lora_r": 4},
    "OLoRA": {"init_lora_weights": "olora", "lora_r": 4},
    "a saved head": {"modules_to_save": ["lm_head"], "lora_r": 4},
    "IA3": {"peft": {"peft_type": "IA3"}},
    "LoHa": {"peft": {"peft_type": "LOHA", "r": 4}},
    "LoKr": {"peft": {"peft_type": "LOKR", "r": 4}},
    "VeRA": {"peft": {"peft_type": "VERA", "r": 4}},
    "OFT": {"peft": {"peft_type": "OFT", "oft_block_size": 8}},
    "HRA": {"peft": {"peft_type": "HRA", "r": 4}},
    "norms": {"peft": {"peft_type": "LN_TUNING"}},
    "prompt": {"peft": {"peft_type": "PROMPT_TUNING", **PROMPT}},
    "p-tuning": {"peft": {"peft_type": "P_TUNING", **PROMPT}},
    "prefix": {"peft": {"peft_type": "PREFIX_TUNING", **PROMPT}},
    "tokens": {"peft": {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 5]}},
}
COMPARED = ("DoRA", "IA3", "LoHa", "LoKr", "HRA", "norms", "prefix")


@pytest.mark.parametrize("method", COMPARED)
def test_fake_steps_of_a_method_are_the_real_ones(method: str, tmp_path: Path) -> None:
    recipe = recipe_of(folder_of(tmp_path), **METHODS[method])
    fake, real = follow(recipe, (4, 48)).timeline, really(recipe, (4, 48), "llama", 2)
    assert steps_of(fake) == steps_of(real)


@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
def test_the_peak_with_a_learnt_prompt_is_that_of_real_steps(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "is_slow_on_mkl", lambda: False)  # real kernels are not followed
    # A real step reads its positions, of which a few small tensors come and go.
    recipe = recipe_of(folder_of(tmp_path), **METHODS[method])
    fake, real = follow(recipe, (4, 48)).timeline, really(recipe, (4, 48), "llama", 2)
    assert max(fake.live()) == pytest.approx(max(real.live()), rel=1e-3)


@pytest.mark.parametrize("method", ["DoRA", "IA3", "LoHa", "norms", "prefix"])
def test_repeated_layers_of_a_method_are_the_whole_model(method: str, tmp_path: Path) -> None:
    recipe = recipe_of(folder_of(tmp_path, "llama", 8), **METHODS[method])
    same_course(follow(recipe, (3, 32)), follow(recipe, (3, 32), all_layers=True))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_plan(method: str, tmp_path: Path) -> None:
    plan = api.plan(
        None, model_name_or_path=str(folder_of(tmp_path)), device="t4", max_length=64,
        **METHODS[method],
    )  # fmt: skip
    assert plan.memory.expected > 0
    assert plan.states is not None
    assert plan.states.trained > 0
    mentions_peft = any("PEFT's own modules" in note for note in plan.outside)
    assert mentions_peft == (method != "a saved head")


def test_a_plan_says_which_method_it_is_of(tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path))
    names = {
        "DoRA": "dora", "DoRA on 4 bits": "qdora", "IA3": "ia3", "prefix": "prefix_tuning",
        "PiSSA": "lora",
    }  # fmt: skip
    for method, name in names.items():
        plan = api.plan(None, model_name_or_path=folder, device="t4", max_length=64,
                        **METHODS[method])  # fmt: skip
        assert plan.method == name


@pytest.mark.parametrize("settings", [{"method": "full"}, {"trainable_layers": "last_1"}], ids=str)
def test_disk_counts_the_whole_model_that_a_base_that_learns_becomes(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """A checkpoint has what learns, the result the whole model in the format of the products."""
    recipe = recipe_of(folder_of(tmp_path), dtype="bfloat16", save_total_limit=1, **settings)
    plan = plan_recipe(recipe, Card(2**34))
    total = tiny_model("llama", num_hidden_layers=2).num_parameters()
    states = plan.states
    assert states is not None
    checkpoints = 2 * 3 * states.trained
    assert plan.disk_bytes - (plan.download_bytes or 0) == checkpoints + 2 * total


@pytest.mark.parametrize("whole", [None, "float32"])
def test_files_are_of_the_format_that_the_language_model_of_a_configuration_says(
    whole: str | None,
) -> None:
    """Qwen3.5 says it there alone: its download was planned to be twice as large."""
    config = AutoConfig.for_model("qwen3_5", text_config={"dtype": "bfloat16"}, dtype=whole)
    assert stored_dtype(config) == (torch.bfloat16 if whole is None else torch.float32)


def test_a_sweep_is_said_to_be_left_out(tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path))
    settings: dict[str, Any] = {"model": folder, "device": "t4", "max_length": 16}
    plan = api.plan(**settings, sweep={"lora_r": [4, 8], "learning_rate": [1e-4, 1e-3]})
    assert any("sweep of lora_r, learning_rate is left out" in note for note in plan.notes)
    assert not any("sweep" in note for note in api.plan(**settings).notes)


@pytest.mark.parametrize("device", ["h100", "rtx4090", "t4", "cpu"])
def test_latent_attention_whose_values_are_narrower_than_its_keys_is_planned(
    device: str, tmp_path: Path
) -> None:
    """No flash kernel of a GPU takes it, so it was no plan: DeepSeek, MiniCPM3, Kimi Linear."""
    recipe = recipe_of(folder_of(tmp_path, "deepseek_v3"))
    assert plan_recipe(recipe, named(device)).memory.expected > 0


def test_a_model_that_converts_its_layers_as_they_are_made_is_planned(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path, "inkling_text", head_dim=8, num_experts_per_tok=2, n_routed_experts=4,
        moe_intermediate_size=16,
    )  # fmt: skip
    assert plan_recipe(recipe_of(folder), named("h100")).memory.expected > 0


def test_a_base_in_few_bits_that_is_counted_dense_is_not_refused_for_that(tmp_path: Path) -> None:
    """A layer may dequantise for a moment, or keep what it made for the backward pass."""
    folder = folder_of(tmp_path, layers=8, hidden_size=1024, intermediate_size=8192)
    dense = plan_recipe(recipe_of(folder), Card()).memory
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "awq", "bits": 4, "group_size": 128}
    config.save_pretrained(folder)
    card = Card(dense.low - 1)
    plan = plan_recipe(recipe_of(folder), card)
    assert plan.memory.expected == dense.expected
    assert plan.fits() is None
    weights = models.skeleton(str(folder)).num_parameters()
    assert dense.low - plan.memory.low > 3 * weights  # of the 4 bytes of float32
