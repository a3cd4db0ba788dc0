"""Strategies on paper and as other tools write them: the page's tables, plans, configurations."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lighten
from benchmarks import largest, scale_page
from lighten.api import training
from lighten.errors import UserError
from lighten.machine.devices import DEVICES
from lighten.models import describe, load
from lighten.parallel import launch
from lighten.planning.distributed import cheapest, on_ranks, spread
from lighten.recipe import Recipe, RecipeError
from tests.test_plan_distributed import a_plan

PAGE = scale_page.PAGE.read_text(encoding="utf-8")
RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "ACCELERATE_MIXED_PRECISION": "no"}


def recipe(data: Path, **settings: Any) -> Recipe:
    return Recipe.from_values({"model_name_or_path": "x", "dataset": str(data), **settings})


def test_the_page_s_tables_are_those_of_plan_s_functions() -> None:
    assert f"{scale_page.BEGIN}\n{scale_page.text()}\n{scale_page.END}" in PAGE
    # Published counts (Llama 2 and 3.1): 6.74, 70.6 and 405.9 thousand million.
    sizes = [round(shape.parameters / 1e9, 1) for shape in scale_page.SHAPES]
    assert sizes == [6.7, 70.6, 405.9]


def sky_file() -> str:
    return PAGE.partition("```yaml\n")[2].partition("```")[0]


def test_the_page_s_sky_file_has_the_shape_of_one() -> None:
    task = yaml.safe_load(sky_file())
    assert set(task) == {"name", "resources", "num_nodes", "workdir", "setup", "run", "file_mounts"}
    assert (task["workdir"], task["setup"]) == (".", "pip install -e .")  # it is not on PyPI
    assert task["resources"]["accelerators"].partition(":")[0].lower() in DEVICES
    # A mounted bucket takes appended lines in this mode alone, and a run's metrics are such lines.
    assert task["file_mounts"]["/checkpoints"]["mode"] == "MOUNT_CACHED"


def test_the_page_s_sky_file_is_taken_by_skypilot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed: pip install skypilot")
    monkeypatch.chdir(tmp_path)  # its `workdir` is the folder that it is started in
    file = tmp_path / "task.yaml"
    file.write_text(sky_file(), encoding="utf-8")
    task = sky.Task.from_yaml(str(file))
    (resources,) = task.resources
    assert (task.num_nodes, resources.use_spot, resources.accelerators) == (2, True, {"H100": 8})
    assert [mount.mode.value for mount in task.storage_mounts.values()] == ["MOUNT_CACHED"]


def test_the_page_s_sky_commands_begin_a_run_and_go_on_with_it(tmp_path: Path) -> None:
    # The words that `torchrun` is given, once without and once with a run in the bucket.
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$@"\n', encoding="ascii")
    (tmp_path / "torchrun").chmod(0o755)
    bucket = tmp_path / "checkpoints"
    commands = yaml.safe_load(sky_file())["run"].replace("/checkpoints/", f"{bucket}/")
    names = {"NODE_IPS": "10.0.0.1\n10.0.0.2", "NUM_NODES": "2", "NODE_RANK": "1",
             "NUM_GPUS_PER_NODE": "8"}  # fmt: skip
    environment = {f"SKYPILOT_{name}": value for name, value in names.items()}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"

    def started() -> str:
        return subprocess.run(
            ["bash", "-euc", commands], env=environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    first = started()
    assert first == (
        "--nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr 10.0.0.1 --master-port 29500 "
        f"-m lighten train recipe.yaml --output_dir {bucket}/run"
    )
    (bucket / "run").mkdir(parents=True)
    (bucket / "run" / "recipe.yaml").touch()
    assert started() == f"{first} --resume"


def test_the_cheapest_strategy_that_fits_sends_least() -> None:
    alone = a_plan()
    device = DEVICES["h100"]
    candidates = [spread(alone, device, strategy, gpus=8, layers=32)
                  for strategy in ("ddp", "zero1", "zero2", "zero3")]  # fmt: skip
    best = cheapest(candidates)
    fitting = [candidate for candidate in candidates if candidate.fits()]
    if not fitting:
        assert best is None
    else:
        assert best is not None
        assert best.volume.network == min(candidate.volume.network for candidate in fitting)
    assert cheapest([replace(candidate, capacity=1) for candidate in candidates]) is None


def test_ranks_of_one_machine_s_processor_share_its_memory() -> None:
    processor = replace(DEVICES["h100"], kind="cpu")
    alone = replace(a_plan(), capacity=100 * 2**30)
    replicated = on_ranks(alone, processor, "ddp", ranks=4, local=4, layers=32)
    assert replicated.capacity == int((100 * 2**30 + 3 * replicated.states.frozen) / 4)
    sharded = on_ranks(alone, processor, "zero3", ranks=4, local=4, layers=32)
    assert sharded.capacity == 25 * 2**30
    on_disk = on_ranks(alone, processor, "zero3", ranks=4, local=4, layers=32,
                       offload=("optimizer", "param"))  # fmt: skip
    states = on_disk.states
    weights = (states.frozen + states.trained) / 4
    assert on_disk.host_bytes == states.optimiser / 4 + weights
    # Moments are read and written once; weights too, and read for both passes of the micro-batch.
    assert on_disk.volume.host == 2 * states.optimiser / 4 + 4 * weights
    state_alone = on_ranks(alone, processor, "zero3", ranks=4, local=4, layers=32,
                           offload=("optimizer",))  # fmt: skip
    assert state_alone.device_bytes - on_disk.device_bytes <= weights


@pytest.mark.parametrize("most", [1, 2, 13, 14, 15, 40, 97])
def test_the_largest_model_is_bracketed_within_a_tenth(most: int) -> None:
    trials = largest.search(lambda layers: largest.Trial(layers, layers <= most, 0, 0.0), 14)
    fitting = max((trial.layers for trial in trials if trial.fits), default=0)
    failing = min(trial.layers for trial in trials if not trial.fits)
    assert fitting <= most < failing <= fitting + max(1, fitting // 10)
    assert len({trial.layers for trial in trials}) == len(trials) < 12
    none = largest.search(lambda layers: largest.Trial(layers, False, 0, 0.0), 3)
    assert [trial.layers for trial in none] == [3, 2, 1]


def test_a_process_over_the_limit_is_ended_with_all_it_started() -> None:
    small = [sys.executable, "-c", "pass"]
    assert largest.watched(small, 1, 2**30).fits
    large = "import time; block = b'1' * 2**29; time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {large!r}])"
    trial = largest.watched([sys.executable, "-c", parent], 1, 2**28)
    assert not trial.fits
    assert trial.peak_bytes > 2**28
    assert trial.error == "over 0.25 GiB"
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        largest.watched([sys.executable, "-c", "1 / 0"], 1, 2**30)


def test_models_of_the_table_share_their_layers_files(tmp_path: Path) -> None:
    models = largest.Models(tmp_path, 128, 512)
    row = largest.ROWS[0]
    with models.of(1):
        pass
    with models.of(2) as folder:
        assert describe(str(folder)).total_parameters == models.shape(2).parameters
        weights = load(str(folder), dtype="float32").model.state_dict()
        first, second = (weights[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1))
        assert torch.equal(first, second)
        assert float(first.std()) == pytest.approx(0.02, rel=0.1)
        assert Recipe.from_values(largest._recipe(models, row, folder)).method == "full"
    assert not folder.exists()


def test_a_whole_model_is_planned_to_be_verified_a_file_at_a_time(tmp_path: Path) -> None:
    """Weights, gradients and moments at the backward pass are more than one of its files more."""
    models = largest.Models(tmp_path, 1024, 512)
    with models.of(12, weights=False) as folder:
        recipe = largest._recipe(models, largest.ROWS[0], folder)
        memory = lighten.plan(device="cpu", changes=False, **recipe).memory
    parts = {part.name: part.bytes for part in memory.parts}
    numbers = models.shape(12).parameters
    assert parts["gradients"] == pytest.approx(4 * numbers, rel=0.01)
    assert parts["optimiser"] == pytest.approx(8 * numbers, rel=0.01)
    assert parts["temporary buffers"] < 4 * numbers


def test_the_table_of_the_largest_models_ends_with_its_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if so many bytes were held for each parameter, beside 2 MiB of a process."""
    bytes_per_parameter = dict(zip([row.name for row in largest.ROWS], (16, 12, 8, 5, 4, 2, 0.1),
                                   strict=True))  # fmt: skip

    def held(models: largest.Models, row: largest.Row, layers: int) -> int:
        return int(bytes_per_parameter[row.name] * models.shape(layers).parameters)

    def trained(
        models: largest.Models, row: largest.Row, limit_bytes: int, layers: int
    ) -> largest.Trial:
        peak = held(models, row, layers) + 2 * 2**20
        return largest.Trial(layers, peak <= limit_bytes, peak, 1.0)

    monkeypatch.setattr(largest, "_planned", held)
    monkeypatch.setattr(largest, "_train", trained)
    table = largest.largest(tmp_path / "models", limit_bytes=50 * 2**20, hidden=128, vocabulary=64)
    assert table["each_as_large_as_before"] is True
    assert table["largest_vs_plain"] > table["largest_vs_plain_lora"] >= largest.AT_LEAST
    assert table["largest_all_weights_vs_plain"] == pytest.approx(16 / 4, rel=0.1)
    assert set(largest.FIGURES) <= set(table)
    for row in table["rows"]:
        assert row["planned_bytes"] == pytest.approx(row["peak_bytes"], rel=0.01)
        assert len(row["trials"]) <= 2  # the plan was right
    assert "| plain, LoRA | 1 | " in capsys.readouterr().out


@pytest.mark.parametrize(("config", "settings"), [
    ("zero2", {"strategy": "zero2"}),
    ({"zero_optimization": {"stage": 3, "overlap_comm": True}, "bf16": {"enabled": "auto"},
      "gradient_clipping": "auto", "train_batch_size": "auto"}, {"strategy": "zero3"}),
    ({"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5,
      "train_micro_batch_size_per_gpu": 3, "bf16": {"enabled": True},
      "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.8, 0.9]}}},
     {"strategy": "zero1", "max_grad_norm": 0.5, "per_device_train_batch_size": 3,
      "dtype": "bfloat16", "learning_rate": 1e-3, "adam_beta1": 0.8, "adam_beta2": 0.9}),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {
        "device": "nvme", "nvme_path": "/data", "pin_memory": True, "buffer_count": 4}}},
     {"strategy": "zero2", "offload_optimizer": "nvme", "nvme_path": "/data"}),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/data"},
                            "offload_optimizer": {"device": "nvme", "nvme_path": "/data"}}},
     {"strategy": "zero3", "offload_params": "nvme", "offload_optimizer": "nvme",
      "nvme_path": "/data"}),
    ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2,
      "gradient_accumulation_steps": 4}, {"strategy": "ddp", "per_device_train_batch_size": 2}),
    # As it was called until DeepSpeed 0.5, and is taken still.
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}},
     {"strategy": "zero2", "offload_optimizer": "cpu"}),
    ({"zero_optimization": {"stage": 2, "cpu_offload": False, "round_robin_gradients": True}},
     {"strategy": "zero2", "offload_optimizer": "none"}),
    ("zero2_offload", {"strategy": "zero2", "offload_optimizer": "cpu"}),
    ({"gradient_clipping": 0.0}, {"max_grad_norm": None}),
    # How a disk is read changes no result, and what is off asks for nothing.
    ({"zero_optimization": {"stage": 3}, "aio": {"block_size": 262144, "queue_depth": 32},
      "flops_profiler": {"enabled": True}, "tensorboard": {"enabled": False}, "amp": None},
     {"strategy": "zero3"}),
    ({"optimizer": {"type": "Adam", "params": {"lr": "auto", "torch_adam": True,
                                               "adam_w_mode": True}}}, {"learning_rate": 2e-4}),
])  # fmt: skip
def test_a_deepspeed_configuration_is_read(
    config: Any, settings: dict[str, Any], chat_file: Path, tmp_path: Path
) -> None:
    if isinstance(config, dict):
        (tmp_path / "ds.json").write_text(json.dumps(config))
        config = str(tmp_path / "ds.json")
    moved = "offload_params" in settings
    parsed = recipe(chat_file, deepspeed=config, **({"method": "full"} if moved else {}))
    assert {name: getattr(parsed, name) for name in settings} == settings
    assert any("deepspeed is called strategy here" in notice for notice in parsed.notices)


@pytest.mark.parametrize(("settings", "message"), [
    ({"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}},
     "offload_params: cpu moves weights that learn, and method: lora"),
    ({"deepspeed": {"zero_optimization": {
        "stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/a"},
        "offload_optimizer": {"device": "nvme", "nvme_path": "/b"}}}}, "is another folder"),
    ({"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "tape"}}}},
     "device 'tape' is none of none, cpu, nvme"),
    ({"deepspeed": {"train_batch_size": 8, "gradient_accumulation_steps": 4,
                    "gradient_clipping": 1.0}}, "train_batch_size depends"),
    ({"deepspeed": {"zero_optimization": {"stage": 4}}}, "stage 4 is none of 0, 1, 2, 3"),
    ({"deepspeed": {"curriculum_learning": {}}}, "curriculum_learning has no equal here"),
    ({"deepspeed": {"optimizer": {"type": "Lamb"}}}, "optimizer Lamb has no equal"),
    ({"deepspeed": {"train_batch_size": 64}}, "depends on the number of ranks"),
    ({"deepspeed": {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}},
     "zero_quantized_weights has no equal here, and changes the result"),
    ({"deepspeed": {"zero_optimization": {"stge": 3}}}, "zero_optimization has no stge; correct"),
    ({"deepspeed": {"zero_optimization": {"stage": 3, "stage3_max_live_params": 1}}},
     "no stage3_max_live_params"),
    ({"deepspeed": {"bf16": {"enabled": True}, "fp16": {"enabled": True}}}, "both enabled"),
    ({"deepspeed": {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}},
     "adam_w_mode: False has no equal here: what moves is AdamW"),
    ({"deepspeed": {"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}},
     "give two numbers"),
    ({"deepspeed": "zero3_offload"}, "offload_params: cpu moves weights that learn"),
    ({"deepspeed": {"bf16": True}}, "bf16 is True, where DeepSpeed has settings in braces"),
    ({"deepspeed": {"zero_optimization": {"offload_optimizer": "cpu"}}}, "offload_optimizer is"),
    ({"deepspeed": {"optimizer": "AdamW"}}, "optimizer is 'AdamW', where"),
    ({"deepspeed": "nowhere.json"}, "nowhere.json cannot be read"),
    ({"deepspeed": {"gradient_clipping": 0.5}, "max_grad_norm": 2.0}, "both set the same thing"),
    ({"fsdp": "full_shard offload"}, "offload_params: cpu moves weights that learn"),
    ({"fsdp": "shard_grad_op offload", "method": "full"}, "strategy: zero2 leaves them whole"),
    ({"fsdp": "hybrid_shard"}, "'hybrid_shard' is not built"),
    ({"fsdp": ["full_shard", 3]}, "fsdp: full_shard and 3 contradict each other; keep one"),
])  # fmt: skip
def test_what_has_no_equal_here_is_told(
    settings: dict[str, Any], message: str, chat_file: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(chat_file, **settings)


def test_transformers_words_for_fsdp_are_read(chat_file: Path) -> None:
    assert recipe(chat_file, fsdp="full_shard auto_wrap").strategy == "fsdp"
    assert recipe(chat_file, fsdp=["shard_grad_op"]).strategy == "zero2"
    assert recipe(chat_file, fsdp=["full_shard", 1]).strategy == "fsdp"  # said twice
    assert recipe(chat_file, fsdp=True).strategy == "fsdp"  # transformers 5
    assert recipe(chat_file, fsdp=False).strategy == "auto"
    whole = functools.partial(recipe, chat_file, method="full")
    for moved in (
        whole(fsdp="full_shard offload auto_wrap"),
        whole(fsdp=True, fsdp_config={"cpu_offload": True}),
        whole(fsdp=True, fsdp_config={"fsdp_offload_params": "true"}),
        whole(deepspeed="zero3_offload"),
        whole(deepspeed={"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}),
    ):
        assert moved.strategy in ("fsdp", "zero3")
        assert moved.offload_params == "cpu"
    assert whole(fsdp=True, fsdp_config={"offload_params": False}).offload_params == "none"


def test_a_recipe_may_say_again_what_its_deepspeed_configuration_says(chat_file: Path) -> None:
    config = {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 2, "optimizer": "auto"}
    for settings in ({"bf16": True, "micro_batch_size": 2}, {"dtype": "bfloat16"}):
        for keys in ({"deepspeed": config, **settings}, {**settings, "deepspeed": config}):
            parsed = recipe(chat_file, **keys)
            assert (parsed.dtype, parsed.per_device_train_batch_size) == ("bfloat16", 2)
    with pytest.raises(RecipeError, match="fp16 and deepspeed both set the same thing"):
        recipe(chat_file, deepspeed=config, fp16=True)


FSDP = {"ACCELERATE_USE_FSDP": "true"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(("variables", "settings"), [
    ({}, {"strategy": "auto"}),
    (FSDP, {"strategy": "fsdp", "gradient_checkpointing": False}),
    ({**FSDP, "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, {"strategy": "zero2"}),
    # As `accelerate config` has it now; under the older name is what nobody said.
    ({**FSDP, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
      "FSDP_RESHARD_AFTER_FORWARD": "shard_grad_op"}, {"strategy": "zero2"}),
    ({**FSDP, "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}, {"strategy": "zero2"}),
    ({**FSDP, "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
      "FSDP_ACTIVATION_CHECKPOINTING": "true"},
     {"strategy": "fsdp", "gradient_checkpointing": True}),
    ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
      "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"}, {"strategy": "zero3"}),
    ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme",
      "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": "/data"},
     {"strategy": "zero2", "offload_optimizer": "nvme", "nvme_path": "/data"}),
    ({**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "0.0"}, {"max_grad_norm": None}),
])  # fmt: skip
def test_what_accelerate_was_configured_for_is_in_the_recipe(
    variables: dict[str, str], settings: dict[str, Any], chat_file: Path
) -> None:
    place = launch.recognise({**RANK, **variables})
    configured = training._as_configured(recipe(chat_file), place)
    assert {name: getattr(configured, name) for name in settings} == settings


def test_a_deepspeed_file_that_accelerate_names_is_read(chat_file: Path, tmp_path: Path) -> None:
    params = {"total_num_steps": 40, "warmup_num_steps": 5, "warmup_max_lr": 1e-3,
              "warmup_type": "linear"}  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps({
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "scheduler": {"type": "WarmupDecayLR", "params": params},
        "train_micro_batch_size_per_gpu": 3, "bf16": {"enabled": True},
    }))  # fmt: skip
    named = {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}
    place = launch.recognise({**RANK, **named})
    configured = training._as_configured(recipe(chat_file, max_steps=40), place)
    expected = {"strategy": "zero2", "offload_optimizer": "cpu", "learning_rate": 1e-3,
                "per_device_train_batch_size": 3, "dtype": "bfloat16"}  # fmt: skip
    assert {name: getattr(configured, name) for name in expected} == expected
    with pytest.raises(UserError, match=r"total_num_steps is 40.*or choose plain multi-GPU"):
        training._as_configured(recipe(chat_file), place)


def test_a_step_is_what_accelerate_was_configured_for(chat_file: Path) -> None:
    deepspeed = {**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
                 "ACCELERATE_GRADIENT_CLIPPING": "0.5"}  # fmt: skip
    place = launch.recognise({**RANK, **deepspeed})
    asked = {"gradient_accumulation_steps": 4, "max_grad_norm": 0.5}
    configured = training._as_configured(recipe(chat_file), place)
    assert {name: getattr(configured, name) for name in asked} == asked
    assert any("configured for gradient_accumulation_steps 4" in n for n in configured.notices)
    for name, value in asked.items():
        said = recipe(chat_file, **{name: 3 * value})
        with pytest.raises(UserError, match=f"configured for {name} {value}, and the recipe says"):
            training._as_configured(said, place)
    # What it writes where nobody said it, and where its DeepSpeed part is not used.
    unsaid = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_GRADIENT_CLIPPING": "auto"}
    for variables in ({**deepspeed, **unsaid}, {**deepspeed, "ACCELERATE_USE_DEEPSPEED": "false"}):
        configured = training._as_configured(
            recipe(chat_file), launch.recognise({**RANK, **variables})
        )
        assert {name: getattr(configured, name) for name in asked} == {
            "gradient_accumulation_steps": 1, "max_grad_norm": 1.0
        }  # fmt: skip


@pytest.mark.parametrize(("variables", "message"), [
    ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"},
     "offload_params: cpu moves weights that learn.*configured so"),
    ({**FSDP, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "'hybrid_shard' is not built"),
    ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}, "activations in main memory"),
    ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"}, "nowhere.json cannot be"),
    ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "4"}, "stage 4 is none of"),
    ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"},
     "offload_params: nvme moves weights that learn.*configured so; choose plain multi-GPU"),
])  # fmt: skip
def test_what_accelerate_asks_for_and_is_not_the_same_is_refused(
    variables: dict[str, str], message: str, chat_file: Path
) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        training._as_configured(recipe(chat_file), launch.recognise({**RANK, **variables}))
