"""The recipe: names people know, every problem told at once, every setting read by something."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from lighten.recipe import Recipe, RecipeError, yaml_lines
from lighten.recipe.fields import EvaluateOptions, RecipeFields
from lighten.recipe.swept import gathered

SOURCE = Path(__file__).parents[1] / "src" / "lighten"


@pytest.fixture
def values(chat_file: Path) -> dict[str, Any]:
    return {"model_name_or_path": "m", "dataset": str(chat_file)}


def write_recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_file_reads_numbers_as_people_write_them(tmp_path: Path, chat_file: Path) -> None:
    path = write_recipe(
        tmp_path,
        f"model_name_or_path: m\ndataset: {chat_file}\nlearning_rate: 1e-4\nlora_alpha: 32\n"
        "adam_epsilon: 1E-8\nlora_dropout: .1\n",
    )
    recipe = Recipe.from_file(path, {"lora_r": 4, "evaluate.max_examples": 7})
    assert (recipe.learning_rate, recipe.lora_alpha, recipe.lora_dropout) == (1e-4, 32, 0.1)
    assert (recipe.lora_r, recipe.evaluate.max_examples) == (4, 7)
    assert recipe.evaluate.batch_size == EvaluateOptions().batch_size


def test_paths_mean_the_recipes_folder_if_they_are_there(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = write_recipe(tmp_path, "model_name_or_path: smollm2-135m\ndataset: data\n")
    recipe = Recipe.from_file(path)
    assert recipe.dataset == str(tmp_path / "data")
    assert recipe.model_name_or_path == "smollm2-135m"
    assert recipe.name == tmp_path.name
    assert recipe.run_folder == Path("runs") / tmp_path.name


def test_paths_may_be_python_s(chat_file: Path, tmp_path: Path) -> None:
    settings = {"model": tmp_path / "m", "dataset": chat_file}
    recipe = Recipe.from_values(settings, {"output_dir": tmp_path / "run"})
    assert recipe.model_name_or_path == str(tmp_path / "m")
    assert (recipe.dataset, recipe.run_folder) == (str(chat_file), tmp_path / "run")
    several = Recipe.from_values({**settings, "dataset": [chat_file, str(chat_file) + "#2"]})
    assert several.dataset == [str(chat_file), f"{chat_file}#2"]
    with pytest.raises(RecipeError, match=r"dataset: .*give a file") as error:
        Recipe.from_values({**settings, "dataset": [{"text": "a row itself"}] * 1000})
    assert len(str(error.value)) < 500


def test_every_problem_is_told_at_once_with_key_value_line_and_mend(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        "model_name_or_path: m\ndataset: nowhere.jsonl\nlora_rr: 3\nmax_length: long\ndtype: int3\n"
        "evaluate:\n  max_exampels: 3\nlora_r: 0\n",
    )
    with pytest.raises(RecipeError) as error:
        Recipe.from_file(path, {"learning_rate": -1})
    messages = str(error.value).splitlines()
    assert f"{path}:3: lora_rr is not a setting; did you mean lora_r?" in messages
    assert any(row.startswith(f"{path}:4: max_length: 'long' does not do") for row in messages)
    assert f"{path}:5: dtype: 'int3' does not do; use 'auto', 'float32', 'bfloat16' or 'float16'" \
        in messages  # fmt: skip
    assert any("evaluate.max_exampels is not a setting; did you mean max_examples" in r
               for r in messages)  # fmt: skip
    assert any(row.startswith(f"{path}:8: lora_r: 0") for row in messages)
    assert any(row.startswith("command line: learning_rate: -1") for row in messages)


def test_each_problem_names_the_place_where_its_setting_was_said(
    tmp_path: Path, chat_file: Path
) -> None:
    """By another tool's name too, and none of the command line a line of the file."""
    head = f"model_name_or_path: m/m\ndataset: {chat_file}\n"
    path = write_recipe(tmp_path, f"{head}cutoff_len: long\nfp16: maybe\nevaluate:\n  seed: 1\n")
    with pytest.raises(RecipeError) as error:
        Recipe.from_file(path, {"bf16": "perhaps", "evaluate.seed": "x"})
    messages = str(error.value).splitlines()
    for place in (f"{path}:3: max_length: 'long'", f"{path}:4: fp16: 'maybe'",
                  "command line: bf16: 'perhaps'", "command line: evaluate.seed: 'x'"):  # fmt: skip
        assert any(message.startswith(f"{place} does not do") for message in messages), messages
    path = write_recipe(tmp_path, f"{head}warmup_ratio: 0.1\nsweep:\n  lora_rr: [8]\n")
    with pytest.raises(RecipeError) as error:
        Recipe.from_file(path, {"warmup_steps": 3})
    assert f"{path}:3: warmup_ratio has no effect" in str(error.value)
    assert f"{path}:5: sweep.lora_rr is not a setting" in str(error.value)
    path = write_recipe(tmp_path, f"{head}lora_rank: [8, x]\nquantize:\n  to: [int8, int9]\n")
    with pytest.raises(RecipeError) as error:
        Recipe.from_file(path)
    assert f"{path}:3: lora_r.1: 'x' does not do" in str(error.value)
    with pytest.raises(RecipeError, match=r"command line: quantize\.to\.0: 'int7' does not do"):
        Recipe.from_file(path, {"quantize.to": "int7", "lora_rank": 8})
    assert f"{path}:5: quantize.to.1: 'int9' does not do" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluate": "chrf"}, "evaluate: 'chrf' does not do; use settings by name: {NAME: VALUE}"),
        ({"adapters": ["r8"]}, "adapters.0: 'r8' does not do; use settings by name: {NAME: VALUE}"),
        ({"load_in_4bit": "ja"}, "load_in_4bit: 'ja' does not do; use true or false"),
        ({"packing": "Auto"}, "packing: 'Auto' does not do; use true or false, or 'auto'"),
        ({"added_tokens": "<x>"}, "added_tokens: '<x>' does not do; use a list: [A, B]"),
        ({"lora_r": [8, "x"]}, "lora_r.1: 'x' does not do; input should be a valid integer, unable "
         "to parse string as an integer"),
        ({"lora_r": {"min": 8, "max": 32}}, "lora_r: {'min': 8, 'max': 32} does not do; use one "
         "value, or sweep it: sweep: {lora_r: {min: ..., max: ...}}"),
        ({"quantize": {"to": "int9"}}, "quantize.to.0: 'int9' does not do; use int8, "
         "int8:bitsandbytes, nf4, int4, int4:rounded, int8-dynamic-act-int4-weight or gguf:TYPE "
         "(gguf:q4_k_m)"),
        ({"trainable_layers": "2"}, "trainable_layers: '2' does not do; use last_N, such as "
         "last_2"),
        ({"init_lora_weights": "eva"}, "init_lora_weights: 'eva' does not do; use true, false, "
         "gaussian, orthogonal, olora, pissa or pissa_niter_N"),
        ({"adapters": [{"name": "a/b"}]}, "adapters.0.name: 'a/b' does not do; use letters, "
         "digits, _, ., = and -, beginning with a letter, digit or _"),
    ],
)  # fmt: skip
def test_a_value_of_another_form_is_told_once_in_words_of_a_recipe(
    values: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.from_values({**values, **settings})
    assert str(error.value) == f"recipe: {message}"


def test_a_section_that_is_left_empty_asks_for_nothing(tmp_path: Path, chat_file: Path) -> None:
    path = write_recipe(
        tmp_path, f"model: m/m\ndataset: {chat_file}\nevaluate:\nquantize:\nsweep:\n  # lora_r: 8\n"
    )
    assert Recipe.from_file(path).evaluate == EvaluateOptions()
    assert Recipe.from_file(path, {"evaluate.seed": 3}).evaluate.seed == 3


def test_a_setting_that_is_left_empty_asks_for_nothing_by_any_of_its_names(
    tmp_path: Path, chat_file: Path
) -> None:
    head = f"model: m/m\ndataset: {chat_file}\n"
    path = write_recipe(tmp_path, f"{head}learning_rate:\ncutoff_len:\nevaluate:\n  seed:\n")
    recipe = Recipe.from_file(path)
    assert (recipe.learning_rate, recipe.max_length, recipe.evaluate.seed) == (2e-4, 1024, 0)
    said = "left empty, which asks for nothing; what holds: learning_rate: 0.0002, max_length: 1024"
    assert said in recipe.notices
    assert Recipe.from_file(path, {"method": "full"}).learning_rate == 2e-5
    over = {"learning_rate": 3e-4, "evaluate.seed": 5}
    changed = Recipe.from_file(path, over)
    assert (changed.learning_rate, changed.evaluate.seed) == (3e-4, 5)
    path = write_recipe(tmp_path, f"{head}lr: 3e-4\nsave_total_limit:\nmax_grad_norm:\n")
    kept = Recipe.from_file(path, {"learning_rate": None, "evaluate.seed": None})
    assert (kept.learning_rate, kept.evaluate.seed) == (3e-4, 0)
    assert (kept.save_total_limit, kept.max_grad_norm) == (None, None)  # which mean something
    assert not any("left empty" in notice for notice in kept.notices)
    path = write_recipe(tmp_path, "model_name_or_path:\ndataset:\nmax_length:\n")
    with pytest.raises(RecipeError) as error:
        Recipe.from_file(path)
    assert str(error.value).splitlines() == [
        f"{path}:3: max_length is empty, with which TRL cuts no row; give the most tokens that a "
        "row may have",
        f"{path}:1: model_name_or_path is missing; add it",
        f"{path}:2: dataset is missing; add it",
    ]


def test_a_recipe_of_the_folder_above_names_its_run_for_that_folder(
    tmp_path: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`runs/..` would be the folder that one stands in."""
    project = tmp_path / "project"
    (project / "sub").mkdir(parents=True)
    write_recipe(project, f"model: m/m\ndataset: {chat_file}\n")
    for here, path in ((project / "sub", "../recipe.yaml"), (project, "recipe.yaml"),
                       (tmp_path, "project/recipe.yaml")):  # fmt: skip
        monkeypatch.chdir(here)
        assert Recipe.from_file(path).run_folder == Path("runs/project")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert Recipe.from_file("~/project/recipe.yaml").name == "project"
    monkeypatch.chdir(project / "sub")
    assert Recipe.from_values({"model": ".", "dataset": ".."}).name == "sub-project"


def test_numbers_and_lists_may_be_numpys(values: dict[str, Any]) -> None:
    plain = {**values, "lora_r": [4, 8], "learning_rate": 1e-3, "sweep": {"lora_alpha": [4, 8]}}
    of_numpy = {**values, "lora_r": np.array([4, 8]), "learning_rate": np.float64(1e-3),
                "sweep": {"lora_alpha": [np.int64(4), np.int64(8)]}}  # fmt: skip
    recipe = Recipe.from_values(of_numpy)
    assert recipe.to_yaml() == Recipe.from_values(plain).to_yaml()
    assert gathered({"lora_r": np.array([4, 8]), "seed": range(2)}) == {
        "sweep.lora_r": [4, 8], "sweep.seed": [0, 1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_r: 8\nlora_r: 9\n", r":2: lora_r stands twice, first on line 1"),
        (
            "adapters:\n- name: a\n  lora_r: 8\n  lora_r: 9\n",
            r":4: adapters\.0\.lora_r stands twice",
        ),
        ("a: [1\n", r"recipe\.yaml:2 is not valid YAML"),
        ("- 1\n", "it must hold settings"),
        ("lora_r: 8\n---\nseed: 1\n", r":2 is not valid YAML: a second document begins there"),
        ("no: 3\n", r":1: no is not a setting"),
        ("evaluate:\n  on: 3\n", r":2: evaluate\.on is not a setting"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_file(write_recipe(tmp_path, text))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"warmup_ratio": 0.1, "warmup_steps": 3},
            "warmup_ratio has no effect beside warmup_steps",
        ),
        (
            {"attn_implementation": "flash_attention_2", "dtype": "float32"},
            "attn_implementation: flash_attention_2 computes no float32: use sdpa",
        ),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "use constant_with_warmup"),
        ({"lr_scheduler_kwargs": {"min_lr": 1e-5}}, "linear has no min_lr; it takes none"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "needs the lowest learning rate, or its share: .*min_lr_rate: 0.1",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "1e-3"}},
            r"min_lr: 0.001 has to be below learning_rate \(0.0002\)",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "two"}},
            "power: 'two' does not do; write a number above 0",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs the steps of its end"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type: .*does not do"),
        ({"val_size": 1.5}, "val_size: .*a share below 1 or a whole number, not 1.5"),
        ({"val_size": float("inf")}, "val_size: .*inf does not do"),
        ({"val_size": 0, "eval_steps": 3}, "eval_steps needs held-out data"),
        ({"eval_steps": 2.5}, "eval_steps: 2.5 does not do; write a whole number of steps or a"),
        ({"save_steps": 0}, "save_steps: 0 does not do; input should be greater than 0"),
        ({"save_total_limit": 0}, "save_total_limit: 0 does not do"),
        ({"logging_steps": "0,5"}, "logging_steps: '0,5' does not do; write 0.5, with a point"),
        ({"val_size": 0, "load_best_model_at_end": True}, "load_best_model_at_end needs held-out"),
        ({"early_stopping_threshold": 0.1}, "without early_stopping_patience"),
        ({"save_every": "soon"}, "save_every: .*write a time such as 90s, 30m or 2h"),
        ({"save_every": "0s"}, "save_every: .*write a time such as"),
        ({"save_every": True}, "save_every: .*it needs a value, not true or false"),
        ({"save_every": "-5m"}, "save_every: .*write a time such as"),
        ({"lora_r": [1, 2], "seed": [1, 2, 3]}, "lora_r has 2, seed has 3"),
        ({"lora_r": []}, "is an empty list"),
        ({"adapters": [{"name": "a"}], "lora_r": [1, 2]}, "adapters: spells the cohort out"),
        ({"adapters": [{"name": "a"}, {"name": "a"}]}, "two are called 'a'"),
        ({"adapters": [{"name": "Ko"}, {"name": "ko"}]}, "'Ko' and 'ko' are one folder"),
        ({"adapters": [{"name": "\uac00"}, {"name": "\u1100\u1161"}]}, "are one folder"),
        ({"adapters": [{"name": "base"}]}, "'base' is what the untouched model is called"),
        ({"adapters": [{"name": "../a"}]}, "adapters.0.name"),
        ({"dataset": "nowhere.jsonl"}, "'nowhere.jsonl' does not exist"),
        ({"lora_r": True}, "lora_r: True does not do.*it needs a value"),
        ({"learning_rate": float("inf")}, "learning_rate: inf does not do"),
        ({"num_epochs": 1, "epochs": 5}, "epochs and num_epochs both set the same thing"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "cannot both be true"),
        ({"quantization_bit": 4, "load_in_8bit": True}, "cannot both be true"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type has no effect without load_in_4bit"),
        ({"load_in_8bit": True, "use_bnb_nested_quant": True}, "has no effect without load_in_4"),
        ({"bnb_4bit_compute_dtype": "float32"}, "has no effect without load_in_4bit"),
        (
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16", "dtype": "bfloat16"},
            "the whole base computes in one format",
        ),
        ({"quantization_bit": 5}, "quantization_bit: 5 does not do; use 4 or 8"),
        ({"adapter": "ia3"}, "adapter: 'ia3' does not do; use lora or qlora"),
        ({"adapter": "prefix"}, "or another method of PEFT's as peft"),
        ({"adapter": "qlora", "load_in_4bit": False}, "adapter and load_in_4bit both set"),
        ({"quant_method": "hqq", "quantization_bit": 4}, "only bitsandbytes is there"),
        ({"quant_method": "bnb"}, "set load_in_4bit or load_in_8bit"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern: .*'\(' is no regular expression"),
        ({"adapters": [{"name": "a", "alpha_pattern": {"*q": 4}}]}, "is no regular expression"),
        ({"train_on_inputs": "never"}, "train_on_inputs: 'never' does not do; use true or false"),
        ({"bf16": "float16"}, "bf16: 'float16' does not do; use true or false"),
    ],
)
def test_settings_that_contradict_each_other_are_errors(
    values: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_values({**values, **changes})


ALIASES: list[tuple[dict[str, Any], str, Any]] = [
    ({"max_seq_length": 5}, "max_length", 5),
    ({"cutoff_len": 5}, "max_length", 5),
    ({"sequence_len": 5}, "max_length", 5),
    ({"micro_batch_size": 3}, "per_device_train_batch_size", 3),
    ({"num_epochs": 2}, "num_train_epochs", 2),
    ({"lr": 1e-3}, "learning_rate", 1e-3),
    ({"lr_scheduler": "cosine"}, "lr_scheduler_type", "cosine"),
    ({"lora_rank": 4}, "lora_r", 4),
    ({"lora_target": "all"}, "lora_target_modules", "all-linear"),
    ({"lora_target_linear": True}, "lora_target_modules", "all-linear"),
    ({"lora_target": "q_proj, v_proj"}, "lora_target_modules", ["q_proj", "v_proj"]),
    ({"lora_target": "q_proj"}, "lora_target_modules", ["q_proj"]),
    ({"lora_target": "mlp"}, "lora_target_modules", "mlp"),
    (
        {"lora_target": "q_proj,layers.0.mlp.up_proj"},
        "lora_target_modules",
        ["q_proj", "layers.0.mlp.up_proj"],
    ),
    ({"lora_target": r".*\.[qv]_proj{1,2}"}, "lora_target_modules", r".*\.[qv]_proj{1,2}"),
    ({"max_steps": -1, "num_train_epochs": 2}, "max_steps", None),
    ({"torch_dtype": "float32"}, "dtype", "float32"),
    ({"bf16": True}, "dtype", "bfloat16"),
    ({"train_on_inputs": "false"}, "completion_only_loss", True),
    ({"bf16": "auto"}, "dtype", "auto"),
    ({"fp16": True}, "dtype", "float16"),
    ({"flash_attn": "fa2"}, "attn_implementation", "flash_attention_2"),
    ({"val_set_size": 0.2}, "val_size", 0.2),
    ({"train_on_inputs": True}, "completion_only_loss", False),
    ({"train_on_inputs": "no"}, "completion_only_loss", True),
    ({"train_on_inputs": "Off"}, "assistant_only_loss", True),
    ({"train_on_inputs": 0}, "assistant_only_loss", True),
    ({"bf16": "yes"}, "dtype", "bfloat16"),
    ({"train_on_inputs": True}, "assistant_only_loss", False),
    ({"quantization_bit": 4}, "load_in_4bit", True),
    ({"quantization_bit": "8"}, "load_in_8bit", True),
    ({"quant_bits": 4, "quant_method": "bnb"}, "load_in_4bit", True),
    ({"quantization": "4bit"}, "load_in_4bit", True),
    ({"quantization": "8-bit", "quantization_method": "bitsandbytes"}, "load_in_8bit", True),
    ({"adapter": "qlora"}, "load_in_4bit", True),
    ({"use_bnb_nested_quant": True, "load_in_4bit": True}, "bnb_4bit_use_double_quant", True),
    ({"double_quantization": True, "load_in_4bit": True}, "bnb_4bit_use_double_quant", True),
    ({"quantization_type": "fp4", "load_in_4bit": True}, "bnb_4bit_quant_type", "fp4"),
    ({"model_revision": "main"}, "revision", "main"),
    ({"lora_modules_to_save": ["lm_head"]}, "modules_to_save", ["lm_head"]),
    ({"additional_target": "embed_tokens,lm_head"}, "modules_to_save", ["embed_tokens", "lm_head"]),
    ({"lora_modules_to_save": "lm_head"}, "modules_to_save", ["lm_head"]),
    ({"activation_offloading": True}, "activation_offload", True),
    ({"activation_checkpointing": True}, "gradient_checkpointing", True),
    (
        {
            "activation_checkpointing_kwargs": {"use_reentrant": False},
            "gradient_checkpointing": True,
        },
        "gradient_checkpointing_kwargs",
        {"use_reentrant": False},
    ),
    ({"use_gradient_checkpointing": True}, "gradient_checkpointing", True),
    ({"peft_use_dora": True}, "use_dora", True),
    ({"peft_use_rslora": True}, "use_rslora", True),
    ({"peft_init_lora_weights": "gaussian"}, "init_lora_weights", "gaussian"),
    ({"chat_template_path": "chatml"}, "chat_template", "chatml"),
    ({"train_on_prompt": True}, "completion_only_loss", False),
    ({"flash_attention": True}, "attn_implementation", "flash_attention_2"),
    ({"sdp_attention": True}, "attn_implementation", "sdpa"),
    ({"eager_attention": "yes"}, "attn_implementation", "eager"),
    ({"eval_strategy": False}, "val_size", 0),
    ({"evaluation_strategy": "no"}, "val_size", 0),
    ({"eval_strategy": "epoch"}, "eval_steps", None),
    ({"save_strategy": "epoch"}, "save_steps", None),
]


@pytest.mark.parametrize(
    "changes",
    [{"adapter": "lora"}, {"quantization": "none"}, {"bf16": "no"}, {"fp16": None},
     {"lora_target_linear": "off"}, {"train_on_inputs": None},
     {"adapter": "lora", "load_in_8bit": True},
     {"adapter": "qlora", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
     {"flash_attention": False}],
)  # fmt: skip
def test_what_says_nothing_new_changes_nothing(
    values: dict[str, Any], changes: dict[str, Any]
) -> None:
    load_settings = {
        key: value for key, value in changes.items() if key.startswith(("load_in", "bnb_"))
    }
    changed = Recipe.from_values({**values, **changes}).completed()
    assert changed == Recipe.from_values({**values, **load_settings}).completed()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "auto"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16"}, "float16"),
        ({"load_in_4bit": True, "dtype": "float32"}, "float32"),
        ({"load_in_4bit": True, "dtype": "float32", "bnb_4bit_compute_dtype": "float32"},
         "float32"),
    ],
)  # fmt: skip
def test_the_base_computes_in_one_format(
    values: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    assert Recipe.from_values({**values, **changes}).compute_dtype == expected


def test_a_completed_quantised_recipe_reads_again(values: dict[str, Any]) -> None:
    recipe = Recipe.from_values({**values, "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"})
    assert Recipe.from_values(recipe.completed()).completed() == recipe.completed()
    plain = Recipe.from_values(Recipe.from_values(values).completed())
    assert not plain.load_in_4bit


@pytest.mark.parametrize(("changes", "name", "expected"), ALIASES)
def test_aliases_are_translated_with_a_notice(
    values: dict[str, Any], changes: dict[str, Any], name: str, expected: Any
) -> None:
    recipe = Recipe.from_values({**values, **changes})
    assert getattr(recipe, name) == expected
    assert any(next(iter(changes)) in notice and name in notice for notice in recipe.notices)


def test_model_and_data_have_aliases_too(chat_file: Path) -> None:
    recipe = Recipe.from_values({"base_model": "m", "datasets": [{"path": str(chat_file)}]})
    assert (recipe.model_name_or_path, recipe.dataset) == ("m", str(chat_file))
    recipe = Recipe.from_values({"model": "m", "data": {"train": str(chat_file)}})
    assert recipe.dataset == str(chat_file)


@pytest.mark.parametrize(
    "line",
    ["dataset: rows.jsonl", "train_file: rows.jsonl", "datasets: [{path: rows.jsonl}]",
     "data: {train: rows.jsonl}", "dataset: 'rows.jsonl#3'"],
)  # fmt: skip
def test_data_beside_a_recipe_are_seen_from_its_folder(line: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = Recipe.from_file(write_recipe(tmp_path, f"model: m\n{line}\n"))
    assert recipe.dataset in (str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.jsonl#3"))


def test_names_are_a_list_one_alone_or_words_with_commas(values: dict[str, Any]) -> None:
    for said, names in (
        ("wandb, tensorboard", ["wandb", "tensorboard"]), (["none", "wandb"], ["wandb"]),
        ("none", []), (None, []),
    ):  # fmt: skip
        assert Recipe.from_values({**values, "report_to": said}).report_to == names
    for said in (5, True):
        for settings in (
            {"report_to": said}, {"sweep": {"reference": said}}, {"sweep": {"grid": said}},
        ):  # fmt: skip
            with pytest.raises(RecipeError, match=r"(report_to|reference|sweep): .* does not do"):
                Recipe.from_values({**values, **settings})


def test_what_evaluation_reads_lies_beside_its_recipe(tmp_path: Path, chat_file: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "general.txt").write_text("text")
    text = f"model: m\ndataset: {chat_file}\nevaluate:\n  include_path: tasks\n  forgetting: "
    for said, placed in (("general.txt", str(tmp_path / "general.txt")), ("builtin", "builtin")):
        options = Recipe.from_file(write_recipe(tmp_path, f"{text}{said}\n")).evaluate
        assert (options.include_path, options.forgetting) == (str(tmp_path / "tasks"), placed)


def test_a_deepspeed_file_lies_beside_its_recipe(
    tmp_path: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for stage, folder in ((2, "."), (3, "..")):
        Path(folder, "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    path = write_recipe(tmp_path, f"model: m\ndataset: {chat_file}\ndeepspeed: zero.json\n")
    Path("zero2").mkdir()
    assert Recipe.from_file(path).strategy == "zero3"
    # Said on the command line it is the working directory's; what is missing there is, too.
    plain = write_recipe(tmp_path, f"model: m\ndataset: {chat_file}\n")
    assert Recipe.from_file(plain, {"deepspeed": "zero.json"}).strategy == "zero2"
    assert Recipe.from_file(plain, {"deepspeed": "zero2"}).strategy == "zero2"
    path = write_recipe(tmp_path, f"model: m\ndataset: {chat_file}\ndeepspeed: zero.json\n")
    (tmp_path / "zero.json").unlink()
    assert Recipe.from_file(path).strategy == "zero2"


def test_an_alias_beside_its_canonical_name_is_an_error(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="lr and learning_rate both set the same thing"):
        Recipe.from_values({**values, "lr": 1e-3, "learning_rate": 1e-4})


def test_trap25_a_rank_sweep_keeps_alpha_over_rank(values: dict[str, Any]) -> None:
    cohort = Recipe.from_values({**values, "lora_r": [4, 8, 64]}).cohort()
    assert [adapter.name for adapter in cohort] == ["r4", "r8", "r64"]
    assert {adapter.lora_alpha / adapter.lora_r for adapter in cohort} == {2.0}
    same_alpha = Recipe.from_values({**values, "lora_r": [4, 8], "lora_alpha": 16}).cohort()
    assert [adapter.lora_alpha for adapter in same_alpha] == [16, 16]


def test_a_changed_recipe_keeps_its_name(tmp_path: Path, chat_file: Path) -> None:
    path = write_recipe(tmp_path, f"model: m\ndataset: {chat_file}\n")
    recipe = Recipe.from_file(path)
    changed = recipe.changed({"learning_rate": 1e-3})
    assert (changed.name, changed.learning_rate) == (recipe.name, 1e-3)
    assert changed.notices == recipe.notices


def test_a_recipe_changed_to_another_method_learns_at_that_ones_rate(
    values: dict[str, Any],
) -> None:
    adapters = Recipe.from_values(values)
    whole = adapters.changed({"method": "full"})
    assert whole.learning_rate == Recipe.from_values({**values, "method": "full"}).learning_rate
    assert whole.changed({"method": "lora"}).learning_rate == adapters.learning_rate
    chosen = Recipe.from_values({**values, "learning_rate": 1e-3})
    assert chosen.changed({"method": "full"}).learning_rate == 1e-3


def test_a_cohort_is_named_for_what_differs(values: dict[str, Any]) -> None:
    def names(**changes: Any) -> list[str]:
        return [adapter.name for adapter in Recipe.from_values({**values, **changes}).cohort()]

    assert names() == ["default"]
    assert names(lora_r=[8, 8], seed=[1, 2]) == ["seed1", "seed2"]
    assert names(learning_rate=[1e-4, 3e-4]) == ["lr0.0001", "lr0.0003"]
    assert names(lora_r=[8, 8]) == ["adapter-1", "adapter-2"]
    spelled = [{"name": "small", "lora_r": 2}, {"name": "big", "learning_rate": 1e-3}]
    cohort = Recipe.from_values({**values, "adapters": spelled}).cohort()
    assert [(adapter.name, adapter.lora_r, adapter.learning_rate) for adapter in cohort] == [
        ("small", 2, 2e-4), ("big", 8, 1e-3),
    ]  # fmt: skip


def test_the_completed_recipe_reads_back_the_same(values: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.from_values({**values, "lora_r": [4, 8], "report_to": "none"})
    read_back = Recipe.from_file(write_recipe(tmp_path, recipe.to_yaml()))
    assert read_back.completed() == recipe.completed()


def test_the_schema_has_every_field_with_its_help() -> None:
    schema = json.loads(json.dumps(Recipe.json_schema()))
    assert set(schema["properties"]) == set(RecipeFields.model_fields)
    assert all(field.get("description") for field in schema["properties"].values())


def test_the_schema_takes_what_a_recipe_may_say() -> None:
    """An editor underlines what it does not take."""
    schema = Recipe.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    base = {"model_name_or_path": "m/m", "dataset": "d.jsonl"}
    readme = (SOURCE.parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = [yaml_lines.parse(text) for text in re.findall(r"```yaml\n(.*?)```", readme, re.S)]
    assert any("sweep" in block for block in blocks)
    short = {
        "report_to": "none", "modules_to_save": "lm_head", "max_time": 300, "save_every": 60.5,
        "evaluate": {"extra_metrics": "rouge1", "tasks": "a"}, "quantize": {"to": "int8"},
        "sweep": {"reference": "base", "budget": 60, "lora_r": 8, "seed": [0, 1],
                  "learning_rate": {"min": 1e-4, "max": 1e-3, "count": 3}},
    }  # fmt: skip
    empty = {"evaluate": None, "sweep": None}
    for said in (*blocks, short, empty, {"report_to": ["none"]}):
        assert [error.message for error in check.iter_errors({**base, **said})] == []
    wrong = ({"lora_rr": 8}, {"sweep": {"lora_rr": [8]}}, {"sweep": {"dataset": {"a": 1}}},
             {"max_time": True}, {"report_to": 3}, {"eval_steps": 0},
             {"evaluate": {"max_exampels": 3}})  # fmt: skip
    for said in wrong:
        assert list(check.iter_errors({**base, **said})), said


def test_reading_a_recipe_does_not_load_torch(values: dict[str, Any]) -> None:
    code = (
        "import sys, json; from lighten.recipe import Recipe\n"
        f"Recipe.from_values({values!r}); Recipe.json_schema()\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_trap52_every_setting_is_read_by_something() -> None:
    attributes_read: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        if path.parent.name == "recipe":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                attributes_read.add(node.attr)
    unread = (set(RecipeFields.model_fields) | set(EvaluateOptions.model_fields)) - attributes_read
    # `adapters` is read through Recipe.cohort(), output_dir through Recipe.run_folder,
    # trainable_layers through Recipe.last_layers, the last through Recipe.compute_dtype.
    assert unread <= {"output_dir", "trainable_layers", "bnb_4bit_compute_dtype"}, unread


@pytest.mark.parametrize("written", [0, 0.0, "0", None])
def test_a_gradient_norm_of_0_clips_nothing_as_in_transformers(
    values: dict[str, Any], written: Any
) -> None:
    assert Recipe.from_values({**values, "max_grad_norm": written}).max_grad_norm is None
    assert Recipe.from_values({**values, "max_grad_norm": 0.5}).max_grad_norm == 0.5
