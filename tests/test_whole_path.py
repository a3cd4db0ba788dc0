"""Every architecture through the whole path, and every setting felt somewhere in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lighten
from lighten import adapters, models
from lighten.adapters import AdapterSpec, attach, files
from lighten.recipe.fields import EvaluateOptions, RecipeFields
from lighten.runs import Run
from tests.tiny import ARCHITECTURES, CHATML, save_tiny, tiny_model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_trains_evaluates_reports_and_loads_in_peft(
    arch: str, chat_file: Path, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", arch)
    run = lighten.train(
        model=str(folder), dataset=str(chat_file), output_dir=str(tmp_path / "run"), max_steps=4,
        lora_r=[2, 4], learning_rate=1e-2, val_size=0.2, progress=False,
        gradient_checkpointing=True,
    )  # fmt: skip
    losses = [m["loss"] for m in run.metrics() if m["kind"] == "train" and m["adapter"] == "r4"]
    assert losses[-1] < losses[0]
    evaluation = lighten.evaluate(run, max_examples=4, max_new_tokens=3)
    assert evaluation.metric("r4", "loss")["value"] < evaluation.metric("base", "loss")["value"]
    assert lighten.report(run).stat().st_size > 10_000

    ids = torch.tensor([[5, 9, 14, 200, 31]])
    base = models.load(str(folder), dtype="float32")
    cohort = adapters.load(base.model, run.adapters())
    with torch.no_grad(), cohort.using("r4"):
        logits = cohort.model(input_ids=ids).logits
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(plain, str(run.adapters()["r4"])).eval()
    with torch.no_grad():
        assert torch.allclose(logits, peft_model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, chat_file: Path) -> dict[str, Any]:
    """A model, data of both kinds with one long and one broken row, and a recipe that feels all."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "model")
    save_tiny(folder / "other", seed=1)
    rows = [json.loads(line) for line in chat_file.read_text().splitlines()]
    rows += [{"prompt": f"q {i} " * 4, "completion": f"a {i}"} for i in range(8)]
    rows.append({"prompt": "long", "completion": "answer " * 60})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "broken.jsonl").write_text("\n".join([*map(json.dumps, rows), "{"]))
    (folder / "eval.jsonl").write_text(json.dumps({"prompt": "x", "completion": "y"}))
    foreign = {"prompt": "x", "completion": "ZQ#XJ%K&" * 12}
    (folder / "foreign.jsonl").write_text(json.dumps(foreign))
    random = AdapterSpec(r=4, alpha=8, init_lora_weights=False)
    for name, data in files.contents(attach(tiny_model("llama"), [random]), "default").items():
        (folder / "start").mkdir(exist_ok=True)
        (folder / "start" / name).write_bytes(data)
    (folder / "plain.jinja").write_text(CHATML.replace("<|im_start|>", "<|im_start|>> "))
    return {
        "folder": folder,
        "settings": {
            "model_name_or_path": str(folder / "model"), "dataset": str(folder / "data.jsonl"),
            "dtype": "float32", "max_length": 150, "max_steps": 4, "eval_steps": 2,
            "save_steps": 2, "save_total_limit": 5, "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2, "learning_rate": 3e-2, "weight_decay": 0.01,
            "lora_r": 4, "lora_dropout": 0.05, "val_size": 0.2, "max_grad_norm": 0.8,
            "evaluate": {"max_examples": 6, "max_new_tokens": 3},
        },
    }  # fmt: skip


def fingerprint(settings: dict[str, Any], output: Path) -> dict[str, Any]:
    """All that a run and its evaluation left, but for times, sizes of memory and places."""
    run: Run = lighten.train(**{"progress": False, "output_dir": str(output), **settings})
    folder = run.folder
    lighten.evaluate(run)
    info, evaluation = run.info(), run.evaluation()
    assert evaluation is not None
    timed = {"seconds", "peak_bytes"}
    return {
        "metrics": [{k: v for k, v in m.items() if k not in timed} for m in run.metrics()],
        "data": info["data"],
        "choices": info["choices"],
        "base": info["base"],
        "adapters": info["adapters"],
        "weights": {
            name: hashlib.sha256(
                b"".join(v.numpy().tobytes() for v in load_file(
                    path / "adapter_model.safetensors").values())
            ).hexdigest()
            for name, path in run.adapters().items()
        },
        "config": [(p / "adapter_config.json").read_text() for p in run.adapters().values()],
        "checkpoints": sorted(p.name for p in (folder / "checkpoints").iterdir()),
        "trackers": len(list(folder.rglob("events.out*"))),
        "scalars": sum(p.stat().st_size for p in folder.rglob("events.out*")),
        "folder": str(folder),
        "evaluation": [evaluation["settings"], evaluation["dataset"]["rows"],
                       [(m["metrics"], m["generated_tokens"]) for m in evaluation["models"]]],
    }  # fmt: skip


# A value that must be felt; a dict changes more than the field, where the field needs company.
MUTATIONS: dict[str, Any] = {
    "dtype": "bfloat16", "attn_implementation": "eager", "chat_template": "plain",
    "added_tokens": ["<|new|>"], "val_size": 0.4, "max_length": 60,
    "truncation_strategy": "drop", "assistant_only_loss": False, "completion_only_loss": False,
    "max_train_samples": 20, "max_eval_samples": 2, "num_train_epochs": 2.0, "max_steps": 3,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "group_by_length": False,
    "learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_ratio": 0.5,
    "warmup_steps": 3, "weight_decay": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.9,
    "adam_epsilon": 1e-2, "max_grad_norm": 0.1, "gradient_checkpointing": True, "seed": 7,
    "eval_steps": 1, "save_steps": 1, "save_every": "0.001s",
    "save_total_limit": 1, "lora_r": 2, "lora_alpha": 1.0,
    "lora_dropout": 0.5, "lora_target_modules": ["q_proj"], "use_rslora": True,
    "use_dora": True, "init_lora_weights": "gaussian", "modules_to_save": ["norm"],
    "rank_pattern": {"q_proj": 1},
    "alpha_pattern": {"q_proj": 1.0}, "adapters": [{"name": "a"}, {"name": "b", "lora_r": 1}],
    "adapter_name_or_path": "start",
    "optim": "adamw_8bit", "loraplus_lr_ratio": 8.0,
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine",
                            "lr_scheduler_kwargs": {"num_cycles": 1.5}},
    "gradient_checkpointing_layers": {"gradient_checkpointing": True,
                                      "gradient_checkpointing_layers": 2},
    "gradient_checkpointing_part": {"gradient_checkpointing": True,
                                    "gradient_checkpointing_part": "mlp"},
    "activation_offload": True,
    "peft": {"peft": {"peft_type": "IA3"}, "lora_r": 8, "lora_dropout": 0.0},
    # What the training teaches makes the held-out answers less likely from the first step on.
    "early_stopping_patience": {"early_stopping_patience": 1, "eval_steps": 1, "val_size": 0.05,
                                "eval_dataset": "foreign.jsonl"},
    "early_stopping_threshold": {"early_stopping_patience": 1, "early_stopping_threshold": 100.0,
                                 "eval_steps": 1},
    "load_best_model_at_end": {"load_best_model_at_end": True, "eval_steps": 1, "val_size": 0.05,
                               "eval_dataset": "foreign.jsonl"},
    "report_to": ["tensorboard"],
    "load_in_4bit": True, "load_in_8bit": True,
    "bnb_4bit_quant_type": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "bnb_4bit_use_double_quant": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "bnb_4bit_compute_dtype": {"load_in_4bit": True, "dtype": "auto",
                               "bnb_4bit_compute_dtype": "float32"},
    "evaluate.max_examples": 2, "evaluate.max_new_tokens": 1, "evaluate.bootstrap_samples": 200,
    "evaluate.seed": 5,
}  # fmt: skip
# Felt by other means than the result, each with the test that shows it.
ELSEWHERE = {
    "max_time": "test_train_time_budget",
    "method": "test_train_whole", "trainable_layers": "test_train_whole",
    "model_name_or_path": "every test", "dataset": "every test", "evaluate": "its own fields",
    "output_dir": "every test", "revision": "test_models, hub",
    "trust_remote_code": "test_models, code", "skip_bad_rows": "below",
    "dataset_columns": "test_cases_reader",
    "system_role": "test_cases_templates", "thinking": "test_cases_templates",
    "eval_dataset": "below", "logging_steps": "below",
    "tokens_per_microbatch": "below: the layout changes, the result must not",
    "per_device_eval_batch_size": "below: the layout changes, the result must not",
    "gradient_checkpointing_kwargs": "test_train_memory: handed on, or refused",
    "packing": "below: the layout changes, the result must not",
    "workers": "below: the layout changes, the result must not",
    "sweep": "test_sweep_arms, test_sweep", "quantize": "test_quantize",
    "qat": "test_qat", "qat_group_size": "test_qat",
    "strategy": "test_strategies: where the state lies changes, the result must not",
    "offload_base": "test_streamed_base: memory changes, the result must not",
    "offload_optimizer": "test_offloaded: memory changes, the result must not",
    "offload_params": "test_strategies: where weights lie, the result must not change",
    "nvme_path": "test_offloaded: where the state lies",
    "torch_compile": "test_train_compiled: code changes, the result must not",
    "evaluate.extra_metrics": "test_evaluate_metrics",
    "evaluate.forgetting": "test_evaluate_general",
    "evaluate.judge": "test_evaluate_judge", "evaluate.judge_model": "test_evaluate_judge",
    "evaluate.judge_max_tokens": "test_evaluate_judge",
    "evaluate.tasks": "test_evaluate_tasks", "evaluate.include_path": "test_evaluate_tasks",
    "evaluate.tasks_limit": "test_evaluate_tasks",
    "evaluate.tasks_chat_template": "test_evaluate_tasks",
    "evaluate.batch_size": "test_evaluate, trap 17: the result must not change",
}  # fmt: skip


def test_trap52_the_table_below_names_every_setting() -> None:
    named = {name for name in MUTATIONS | ELSEWHERE if "." not in name}
    assert named == set(RecipeFields.model_fields)
    nested = {name.partition(".")[2] for name in MUTATIONS | ELSEWHERE if "." in name}
    assert nested == set(EvaluateOptions.model_fields)


@pytest.fixture(scope="module")
def before(world: dict[str, Any]) -> dict[str, Any]:
    return fingerprint(world["settings"], world["folder"] / "same")


@pytest.fixture(scope="module")
def fingerprints(world: dict[str, Any], before: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Fingerprints by their settings: several fields need the same company."""
    return {json.dumps(world["settings"], sort_keys=True): before}


@pytest.mark.parametrize("field", sorted(MUTATIONS))
def test_trap52_every_setting_is_felt(
    field: str, world: dict[str, Any], fingerprints: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    def of(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
        key = json.dumps(settings, sort_keys=True)
        if key not in fingerprints:
            fingerprints[key] = fingerprint(settings, folder)
        return fingerprints[key]

    change = MUTATIONS[field]
    alone = not (isinstance(change, dict) and field in change)
    changes = {field: change} if alone else change
    settings = {**world["settings"], **changes}
    if field == "num_train_epochs":
        del settings["max_steps"]
    if field == "adapter_name_or_path":
        settings[field] = str(world["folder"] / "start")
    if "eval_dataset" in settings:
        settings["eval_dataset"] = str(world["folder"] / settings["eval_dataset"])
    if field == "truncation_strategy":
        settings["max_length"] = 60
    reference_settings = world["settings"]
    if not alone or field == "truncation_strategy":
        reference_settings = {key: value for key, value in settings.items() if key != field}
    reference, changed = (
        of(reference_settings, tmp_path / "others"),
        of(settings, tmp_path / "changed"),
    )
    parts = [key for key in changed if key != "folder" and changed[key] != reference[key]]
    assert parts, f"{field} changed nothing"


def test_the_same_recipe_leaves_the_same(
    world: dict[str, Any], before: dict[str, Any], tmp_path: Path
) -> None:
    repeated = fingerprint(world["settings"], tmp_path / "again")
    assert {**repeated, "folder": ""} == {**before, "folder": ""}


def test_layout_settings_change_batches_but_no_result(
    world: dict[str, Any], before: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lighten.engine import validation
    from lighten.training import step_batches

    sizes: list[tuple[int, bool]] = []
    for module in (step_batches, validation):
        plain = module.collate

        def note_batch(items: Any, *args: Any, _plain: Any = plain, **options: Any) -> Any:
            batch = _plain(items, *args, **options)
            sizes.append((len(items), batch.starts is None))
            return batch

        monkeypatch.setattr(module, "collate", note_batch)
    batches = {}
    for name, change in (
        ("plain", {}), ("tokens_per_microbatch", {"tokens_per_microbatch": 130}),
        ("per_device_eval_batch_size", {"per_device_eval_batch_size": 2}),
        ("packing", {"packing": False}), ("workers", {"workers": 3}),
    ):  # fmt: skip
        sizes.clear()
        changed = fingerprint({**world["settings"], **change}, tmp_path / name)
        batches[name] = list(sizes)
        for record, reference in zip(changed["metrics"], before["metrics"], strict=True):
            assert record["loss"] == pytest.approx(reference["loss"], rel=1e-4)
    unfelt = [name for name in batches if name != "plain" and batches[name] == batches["plain"]]
    assert not unfelt, "these settings changed no batch"


def test_other_files_of_data_are_felt(world: dict[str, Any], tmp_path: Path) -> None:
    folder, settings = world["folder"], dict(world["settings"])
    del settings["val_size"]
    evaluated = fingerprint(
        {**settings, "eval_dataset": str(folder / "eval.jsonl")}, tmp_path / "e"
    )
    assert evaluated["data"]["eval_rows"] == 1
    broken = {**settings, "dataset": str(folder / "broken.jsonl")}
    with pytest.raises(lighten.UserError, match="not valid JSON"):
        lighten.train(**broken, output_dir=str(tmp_path / "x"), progress=False)
    run = lighten.train(
        **broken, skip_bad_rows=True, output_dir=str(tmp_path / "b"), progress=False
    )
    assert run.info()["data"]["bad_rows"] == 1
    jinja = fingerprint({**settings, "chat_template": str(folder / "plain.jinja")}, tmp_path / "j")
    assert jinja["data"]["template"]["name"] == "plain.jinja"
    other_base = fingerprint(
        {**settings, "model_name_or_path": str(folder / "other")}, tmp_path / "o"
    )
    assert other_base["base"]["checksum"] != evaluated["base"]["checksum"]


def test_trackers_hear_every_so_many_steps(world: dict[str, Any], tmp_path: Path) -> None:
    settings = {**world["settings"], "report_to": ["tensorboard"]}
    often = fingerprint(settings, tmp_path / "often")
    seldom = fingerprint({**settings, "logging_steps": 4}, tmp_path / "seldom")
    assert seldom["scalars"] < often["scalars"]
    assert seldom["metrics"] == often["metrics"]
