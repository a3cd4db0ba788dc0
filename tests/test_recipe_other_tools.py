"""Recipes that come from other tools: they run, or each setting is answered with what to do."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from lighten.models import load_tokenizer
from lighten.recipe import Recipe, RecipeError, aliases, other_tools
from lighten.recipe.fields import RecipeFields
from lighten.training.rows import load_rows

ROWS = '{"prompt": "a", "completion": "b"}\n'
# TRL 1.16's SFTConfig, ModelConfig and ScriptArguments beside transformers' own.
TRL = """
    model_init_kwargs trust_remote_code router_aux_loss_coef chat_template_path dataset_text_field
    dataset_kwargs dataset_num_proc eos_token max_length truncation_mode shuffle_dataset packing
    packing_strategy padding_free pad_to_multiple_of eval_packing completion_only_loss
    assistant_only_loss loss_type activation_offloading pad_token model_name_or_path model_revision
    dtype attn_implementation use_peft lora_r lora_alpha lora_dropout lora_target_modules
    lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit
    load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage dataset_name
    dataset_config dataset_train_split dataset_test_split dataset_streaming
"""
LLAMA_FACTORY = """\
### model
model_name_or_path: m
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: all

### dataset
dataset: rows.jsonl
cutoff_len: 512
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: out
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: false
save_only_model: false
report_to: none

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""
AXOLOTL = """\
base_model: m
datasets:
  - path: rows.jsonl
    type: alpaca
    split: train
    train_on_eos: turn
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: out
adapter: qlora
lora_model_dir:
sequence_len: 512
sample_packing: true
eval_sample_packing: false
pad_to_sequence_len: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
wandb_entity:
wandb_log_model:
gradient_accumulation_steps: 8
micro_batch_size: 1
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0001
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 10
flash_attention: false
warmup_ratio: 0.1
evals_per_epoch: 1
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: <|end_of_text|>
deepspeed:
fsdp:
fsdp_config:
lora_target_modules:
"""


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return {"model_name_or_path": "m", "dataset": str(tmp_path / "rows.jsonl")}


def read(text: str, folder: Path) -> Recipe:
    (folder / "rows.jsonl").write_text(ROWS)
    (folder / "recipe.yaml").write_text(text)
    return Recipe.from_file(folder / "recipe.yaml")


def test_a_recipe_of_llama_factory_s_is_read_as_it_is(tmp_path: Path) -> None:
    recipe = read(LLAMA_FACTORY, tmp_path)
    assert (recipe.lora_r, recipe.lora_target_modules) == (16, "all-linear")
    assert (recipe.max_length, recipe.dtype, recipe.eval_steps) == (512, "bfloat16", 500)
    assert recipe.trust_remote_code
    (notice,) = (notice for notice in recipe.notices if notice.startswith("passed over"))
    assert notice == (
        "passed over, as they change nothing here: stage, do_train, overwrite_cache, "
        "preprocessing_num_workers, dataloader_num_workers, plot_loss, overwrite_output_dir, "
        "save_only_model, ddp_timeout, resume_from_checkpoint"
    )


def test_a_recipe_of_axolotl_s_is_read_as_it_is(tmp_path: Path) -> None:
    recipe = read(AXOLOTL, tmp_path)
    assert (recipe.load_in_4bit, recipe.packing, recipe.dtype) == (True, True, "auto")
    assert (recipe.optim, recipe.num_train_epochs) == ("adamw_bnb_8bit", 3)
    assert recipe.attn_implementation == "sdpa"
    assert recipe.adapter_name_or_path is None


def test_every_setting_of_transformers_and_trl_has_an_answer() -> None:
    known = {
        *RecipeFields.model_fields, *aliases.RENAMED, *aliases.SPECIAL, *other_tools.NAMES
    }  # fmt: skip
    theirs = {field.name for field in fields(TrainingArguments)} | set(TRL.split())
    assert sorted(theirs - known) == []


def test_what_is_a_setting_here_is_not_told_to_be_none() -> None:
    ours = {*RecipeFields.model_fields, *aliases.RENAMED, *aliases.SPECIAL}
    assert not ours & set(other_tools.NAMES)


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"neftune_noise_alpha": 5}, "recipe: neftune_noise_alpha is not a setting; it is not "
                                     "built, remove it"),
        ({"stage": "dpo"}, "stage is not a setting; remove it; examples are what is learnt from"),
        ({"metric_for_best_model": "rouge"}, "the best has the lowest validation loss"),
        ({"resume_from_checkpoint": True}, "--resume goes on from the newest checkpoint"),
        ({"device": "cuda"}, "device is not a setting; by default a GPU is used where there is"),
        ({"do_train": False}, "do_train is not a setting; remove it; lighten train trains"),
        ({"dataloader_drop_last": True}, "no row is left out"),
        ({"data_seed": 0}, "set seed, which orders the rows too"),
        ({"roles_to_train": ["user"]}, "the assistant's turns are learnt, but for those with "
                                       "train: false in the row"),
        ({"push_to_hub": True}, "lighten push uploads what lighten export writes"),
        ({"warmup_steps": 2.5}, "warmup_steps: 2.5 does not do"),
        ({"additional_target": 3}, "modules_to_save: 3 does not do"),
        ({"dataset_mixer": {"a/b": 1.0}}, "dataset_mixer is not a setting; set dataset to a list"),
        ({"dataset_split": "train"}, "name#500 takes the first 500 rows"),
        ({"full_finetuning": True}, "full_finetuning is not a setting; set method: full"),
        ({"evals_per_epoch": 4}, "set eval_steps, or remove it for one an epoch"),
        ({"eval_strategy": "steps"}, "eval_strategy: steps needs eval_steps beside it; add it"),
        ({"save_strategy": "epoch", "save_steps": 5}, "save_strategy: epoch and save_steps "
                                                      "contradict each other; keep one"),
        ({"save_strategy": False}, "a run resumes from its checkpoints"),
        ({"save_strategy": "best"}, "load_best_model_at_end: the best"),
        ({"logging_strategy": "epoch"}, "remove it: logging_steps says how often"),
        ({"eval_strategy": "often"}, "use steps, epoch or no"),
        ({"eval_strategy": "no", "eval_dataset": "rows"}, "'no' and eval_dataset contradict"),
        ({"eval_strategy": "no", "eval_steps": 5}, "'no' and eval_steps contradict each other"),
        ({"eval_strategy": "no", "val_size": 0.1}, "both set the same thing"),
        ({"adapter": None}, "recipe: adapter is empty, which trains the whole base in Axolotl; set "
                            "method: full, or adapter: lora"),
        ({"rope_theta": 1e6}, "rope_theta is not a setting; remove it; the model's own files"),
        ({"use_dft_loss": True}, "use_dft_loss is not a setting; it is not built, remove it"),
        ({"layers_to_transform": [1]}, "set lora_target_modules to a regular expression"),
        ({"test_datasets": ["a"]}, "test_datasets is not a setting; set eval_dataset"),
        ({"sdp_attention": 7}, "sdp_attention: 7 does not do; use true or false"),
    ],
)  # fmt: skip
def test_what_is_not_here_is_told_with_what_to_do(
    values: dict[str, Any], changes: dict[str, Any], answer: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_values({**values, **changes})
    assert answer in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"metric_for_best_model": "eval_loss", "greater_is_better": False},
        {"push_to_hub": False, "hub_model_id": None, "hub_strategy": "every_save"},
        {"eval_strategy": "steps", "eval_steps": 5}, {"logging_strategy": "steps"},
        {"neftune_noise_alpha": None, "label_smoothing_factor": 0.0, "tf32": "false"},
        {"roles_to_train": ["assistant"], "train_on_eos": "turn"},
        {"eval_strategy": None, "metric_for_best_model": None, "data_seed": None},
        {"auto_find_batch_size": False, "shuffle_dataset": False, "lora_bias": False},
        {"cutoff_len": None, "flash_attn": None, "quant_method": None, "datasets": None},
        {"adapter": None, "method": "lora"},
    ],
)  # fmt: skip
def test_what_is_so_here_too_changes_nothing(
    values: dict[str, Any], changes: dict[str, Any]
) -> None:
    ours = {key: value for key, value in changes.items() if key == "eval_steps"}
    changed = Recipe.from_values({**values, **changes}).completed()
    assert changed == Recipe.from_values({**values, **ours}).completed()


def test_a_recipe_of_unsloth_s_settings_reads(tmp_path: Path) -> None:
    """The names of `unsloth-cli.py`, which are those of its notebooks."""
    notebook = """\
        model_name: m
        max_seq_length: 2048
        dtype: null
        load_in_4bit: true
        dataset: rows.jsonl
        r: 16
        lora_alpha: 16
        lora_dropout: 0
        bias: none
        use_gradient_checkpointing: unsloth
        random_state: 3407
        use_rslora: false
        loftq_config: null
        full_finetuning: false
        optim: adamw_8bit
        max_steps: 60
        dataset_num_proc: 2
    """
    recipe = read(textwrap.dedent(notebook), tmp_path)
    assert (recipe.model_name_or_path, recipe.lora_r, recipe.seed) == ("m", 16, 3407)
    assert (recipe.max_length, recipe.dtype, recipe.gradient_checkpointing) == (2048, "auto", True)
    assert "r is called lora_r here; read as lora_r: 16" in recipe.notices


def test_what_axolotl_s_datasets_ask_for_and_is_not_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read(
            AXOLOTL.replace("split: train", "split: train[:10%]\n    roles_to_train: [user]"),
            tmp_path,
        )
    assert "datasets: split is not read; set dataset to the file itself, or" in str(caught.value)
    assert "datasets: roles_to_train is not read; remove it; the assistant's" in str(caught.value)


@pytest.mark.parametrize(
    "packing",
    [{"packing": True}, {"packing": True, "packing_strategy": "bfd"}, {"neat_packing": True},
     {"sample_packing": "true"}],
)  # fmt: skip
def test_packing_says_what_a_step_holds_and_what_would_be_as_in_other_tools(
    values: dict[str, Any], tiny_folder: Path, packing: dict[str, Any]
) -> None:
    values = {**values, "model_name_or_path": str(tiny_folder), "max_length": 64, "val_size": 0,
              "per_device_train_batch_size": 4}  # fmt: skip

    def notes(recipe: Recipe) -> list[str]:
        rows = load_rows(recipe, load_tokenizer(str(tiny_folder)))
        length = len(rows.train.rows[0].input_ids)
        told = [note for note in rows.notes if note.startswith("packing: ")]
        assert all(
            f"4 rows here, of {length} tokens on average; TRL, LLaMA-Factory and Axolotl fill "
            f"4 blocks of 64 tokens"
            in note
            and f"per_device_train_batch_size: {round(4 * 64 / length)} would" in note
            for note in told
        )
        return told

    recipe = Recipe.from_values({**values, **packing})
    assert len(notes(recipe)) == 1
    assert len(notes(recipe.changed({"seed": 1}))) == 1
    assert not any("passed over" in notice for notice in recipe.notices)
    for other in ({}, {"padding_free": True}, {"packing": "auto"}, {"packing": False}):
        recipe = Recipe.from_values({**values, **other})
        assert notes(recipe) == notes(recipe.changed({"seed": 1})) == []
    assert len(notes(recipe.changed({"packing": True}))) == 1


def test_a_strategy_of_packing_is_passed_over_without_packing(values: dict[str, Any]) -> None:
    for packing in ({}, {"packing": False}):
        (notice,) = Recipe.from_values({**values, **packing, "packing_strategy": "bfd"}).notices
        assert notice == "passed over, as they change nothing here: packing_strategy"
    with pytest.raises(RecipeError, match="packing_strategy: 'wrapped' does not do; remove it: ro"):
        Recipe.from_values({**values, "packing": True, "packing_strategy": "wrapped"})


@pytest.mark.parametrize(
    ("changes", "double"),
    [
        ({"quantization_bit": 4}, True), ({"quant_bits": 4}, True),
        ({"quantization": "4bit"}, True),
        ({"adapter": "qlora"}, True), ({"adapter": "qlora", "load_in_4bit": True}, True),
        ({"load_in_4bit": True}, False), ({"quantization_bit": 8}, False),
        ({"quantization_bit": 4, "double_quantization": False}, False),
        ({"use_bnb_nested_quant": False, "adapter": "qlora"}, False),
    ],
)  # fmt: skip
def test_scales_of_4_bits_are_quantised_where_the_setting_s_tool_does_so(
    values: dict[str, Any], changes: dict[str, Any], double: bool
) -> None:
    recipe = Recipe.from_values({**values, **changes})
    assert recipe.bnb_4bit_use_double_quant is double
    told = [notice for notice in recipe.notices if "quantises the scales too there" in notice]
    assert len(told) == double
    single = Recipe.from_values({**values, **changes}, {"bnb_4bit_use_double_quant": False})
    assert not single.bnb_4bit_use_double_quant


@pytest.mark.parametrize(
    ("entry", "answer"),
    [
        ("type: {format: 'Q: {instruction}', field_instruction: q, field_output: output}",
         "datasets: a type of one's own is not read; remove it, set dataset_columns: "
         "{instruction: q}, and set chat_template to the prompt's format"),
        ("type: {system_prompt: Be brief}", "is not read; remove it, and set chat_template to the"),
        ("type: completion\n    field: body", "max_length is not split here as it is there; "
                                             "remove it, and set dataset_columns: {text: body}"),
        ("type: completion", "set dataset_columns: {text: text} to learn each row's text whole"),
        ("type: input_output", "write rows of segments as input_ids and labels"),
    ],
)  # fmt: skip
def test_formats_of_axolotl_s_that_are_not_here_are_refused(
    tmp_path: Path, entry: str, answer: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        read(AXOLOTL.replace("type: alpaca", entry), tmp_path)
    assert answer in str(caught.value)
    assert "datasets: field is not read" not in str(caught.value)


def test_a_type_of_axolotl_s_says_no_format_here_and_that_is_told(tmp_path: Path) -> None:
    told = "prompts are written by the chat template, not in Axolotl's format of that name"
    for kind, count in (
        ("alpaca", 1), ("sharegpt", 1), ("chat_template", 0), ("chat_template.argilla", 0),
        ("", 0),
    ):  # fmt: skip
        recipe = read(AXOLOTL.replace("type: alpaca", f"type: {kind}"), tmp_path)
        notices = [notice for notice in recipe.notices if told in notice]
        assert len(notices) == count
        assert all(f"datasets: type: {kind} is passed over" in notice for notice in notices)


def test_an_axolotl_recipe_without_adapter_trains_the_whole_base_once_that_is_said(
    tmp_path: Path,
) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "recipe.yaml").write_text("base_model: m\ndatasets: rows.jsonl\nadapter:\n")
    assert Recipe.from_file(tmp_path / "recipe.yaml", {"method": "full"}).method == "full"
    assert Recipe.from_file(tmp_path / "recipe.yaml", {"fine_tune_type": "lora"}).method == "lora"
    with pytest.raises(RecipeError, match="adapter is empty, which trains the whole base"):
        Recipe.from_file(tmp_path / "recipe.yaml")


def test_the_command_line_and_the_file_are_seen_together(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "fsdp.json").write_text('{"activation_checkpointing": true, "version": null}')
    (tmp_path / "zero.json").write_text(json.dumps({"scheduler": {
        "type": "WarmupDecayLR", "params": {"total_num_steps": 40, "warmup_type": "linear"},
    }}))  # fmt: skip
    path = tmp_path / "recipe.yaml"
    for text, overrides, name, expected in (
        ("eval_steps: 500", {"eval_strategy": "steps"}, "eval_steps", 500),
        ("eval_strategy: steps", {"eval_steps": 100}, "eval_steps", 100),
        ("save_steps: 5", {"save_strategy": "epoch"}, "save_steps", None),
        ("fsdp: true", {"fsdp_config": str(tmp_path / "fsdp.json")},
         "gradient_checkpointing", True),
        ("max_steps: 40", {"deepspeed": str(tmp_path / "zero.json")}, "learning_rate", 0.001),
    ):  # fmt: skip
        path.write_text(f"model: m\ndataset: rows.jsonl\n{text}\n")
        assert getattr(Recipe.from_file(path, overrides), name) == expected


def test_a_mistyped_name_is_recognised_where_the_right_one_is_accepted(
    values: dict[str, Any],
) -> None:
    for typed, meant in (
        ("dataloader_num_worker", "dataloader_num_workers"), ("lora_rnak", "lora_rank"),
        ("sequence_length", "sequence_len"), ("warmup", "warmup_ratio"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=rf"did you mean {meant}\?"):
            Recipe.from_values({**values, typed: 2})


def test_no_suggestion_leads_into_a_second_error(values: dict[str, Any]) -> None:
    refused = set(other_tools.NAMES) - other_tools.PASSED_OVER
    for name in (*(f"{name}s" for name in sorted(refused)), "rope_freq", "badam_mode", "lora"):
        with pytest.raises(RecipeError) as caught:
            Recipe.from_values({**values, name: 2})
        meant = re.search(r"did you mean (\w+)\?", str(caught.value))
        assert meant is None or meant[1] not in refused, str(caught.value)
    for name in ("rope_freq", "badam_mode", "lora", "eval_on_starts"):
        with pytest.raises(RecipeError, match=f"{name} is not a setting; see: lighten schema"):
            Recipe.from_values({**values, name: 2})


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_pure_bf16_is_told_holds_for_either_method(
    values: dict[str, Any], method: str
) -> None:
    with pytest.raises(RecipeError, match="dtype: bfloat16; weights that learn stay float32 here"):
        Recipe.from_values({**values, "method": method, "pure_bf16": True})


def test_the_table_of_defaults_has_ours_and_those_of_transformers() -> None:
    page = (Path(__file__).parents[1] / "docs" / "other-tools.md").read_text(encoding="utf-8")
    table = page[page.index("| setting | here |") :].split("\n\n")[0].splitlines()[2:]
    theirs = {field.name: field.default for field in fields(TrainingArguments)}
    theirs |= {"warmup_ratio": theirs["warmup_steps"], "gradient_checkpointing": True}
    compared = 0
    for line in table:
        name, ours, _, llama_factory, _ = (cell.strip() for cell in line.strip("|").split("|"))
        name, field = name.strip("`"), RecipeFields.model_fields[name.strip("`")]
        if ours.startswith("`"):
            assert float_or_text(ours.split("`")[1]) == float_or_text(field.default), name
        else:
            assert field.default is None, name
        if name in theirs and llama_factory.startswith("`"):  # which has transformers' own
            value = theirs[name]
            value = getattr(value, "value", value)
            assert float_or_text(llama_factory.strip("`")) == float_or_text(value), name
            compared += 1
    assert len(table) > 15
    assert compared > 5


def float_or_text(value: Any) -> float | str:
    """A number however it is written, or a word as YAML writes it."""
    try:
        return float(value) if not isinstance(value, bool) else str(value).lower()
    except ValueError:
        return str(value)


@pytest.mark.parametrize("steps", [0, 3, 0.1])
def test_steps_of_warm_up_are_a_number_or_a_share(values: dict[str, Any], steps: float) -> None:
    for written in (steps, str(steps)):
        read_steps = Recipe.from_values({**values, "warmup_steps": written}).warmup_steps
        assert (read_steps, type(read_steps)) == (steps, type(steps))
