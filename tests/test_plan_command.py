"""`lighten plan` as a user meets it: tables, JSON, exit codes, errors in a sentence."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lighten
from lighten import api, models
from lighten.api.recipes import plannable
from lighten.errors import UserError
from lighten.machine.hardware import Choice
from lighten.models import gguf
from lighten.parallel.streamed.build import build
from lighten.planning import PARTS, memory
from lighten.planning.build import config_of
from lighten.planning.probe import random_base
from lighten.planning.result import Plan
from lighten.planning.steps import follow_recipe
from lighten.quantization.weights import make
from tests.gguf_files import write_gguf
from tests.processes import call
from tests.tiny import save_few_bits, save_tiny, tiny_config, tiny_model

GIB = 2**30


def configured(folder: Path, layers: int) -> Path:
    """A model that consists of its configuration alone: of 70 billion parameters with 80 layers."""
    tiny_config("llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=layers,
                num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
                max_position_embeddings=8192,
                architectures=["LlamaForCausalLM"]).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("flags", [[], ["--limits"], ["--search"], ["--largest"]], ids=str)
def test_a_gguf_file_whose_text_would_be_split_otherwise_is_refused_without_data(
    flags: list[str], tmp_path: Path
) -> None:
    """As training refuses it."""
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), pre="viking")
    completed = call("plan", str(path), "--device", "t4", *flags)
    said = " ".join((completed.stdout + completed.stderr).split())
    assert completed.returncode == (1 if flags == ["--largest"] else 3), said
    assert "splits text as 'viking'" in said
    assert "Traceback" not in said


def test_a_gguf_file_that_was_converted_is_planned_as_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    before = memory.loading_of("gguf", path, 1000, 0)
    copy = gguf.converted(path)
    after = memory.loading_of("gguf", path, 1000, 0)
    assert before.copies > after.copies == 0
    assert after == memory.loading_of("folder", copy, 1000, 0)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("nf4", {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}),
        ("int8:bitsandbytes", {"load_in_8bit": True}),
    ],
)
def test_a_folder_in_few_bits_is_planned_as_what_it_holds(
    kind: str, settings: dict[str, bool], tmp_path: Path
) -> None:
    """As many on the hub are, which no setting of the recipe says."""
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 256, "intermediate_size": 512}
    make(kind, save_tiny(tmp_path / "dense", **wide), tmp_path / "stored", [])
    how = {"device": "t4", "max_length": 64, "changes": False}
    stored = lighten.plan(model_name_or_path=str(tmp_path / "stored"), **how)
    asked = lighten.plan(model_name_or_path=str(tmp_path / "dense"), **how, **settings)
    assert (stored.method, stored.memory.parts) == ("qlora", asked.memory.parts)
    assert not any("as if they were dense" in reason for reason in stored.outside)


STORED: dict[str, tuple[dict[str, bool], list[str]]] = {
    "one layer's MLP and the head": ({"load_in_4bit": True}, ["model.layers.0.mlp", "lm_head"]),
    "not the head": ({"load_in_4bit": True}, ["down_proj"]),
    "of 8 bits": ({"load_in_8bit": True}, [r"model.layers.*.self_attn", "lm_head"]),
}


@pytest.mark.parametrize("case", STORED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_layers_that_a_folder_in_few_bits_holds_dense_are_planned_dense(
    case: str, dtype: str, tmp_path: Path
) -> None:
    """In the format that they are loaded in; a head that is not named among them is packed."""
    pytest.importorskip("bitsandbytes")
    bits, dense = STORED[case]
    folder = str(save_few_bits(tmp_path, dense, **bits))
    loaded = models.census(models.load(folder, dtype=dtype).model)
    recipe = {"model_name_or_path": folder, "dtype": dtype, "max_length": 64}
    plan = lighten.plan(**recipe, device="h100", changes=False)
    assert plan.states is not None
    # A layer's table of 16 values is shared in a plan.
    assert plan.states.frozen == pytest.approx(loaded.weight_bytes, abs=15 * 64)
    probed = models.census(random_base(plannable(**recipe), "cpu").model)
    assert (probed.quantized, probed.weight_bytes) == (loaded.quantized, loaded.weight_bytes)


@pytest.mark.parametrize("case", ["one layer's MLP and the head", "of 8 bits"])
def test_layers_of_a_folder_in_few_bits_are_planned_as_they_are_streamed(
    case: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    bits, dense = STORED[case]
    folder = save_few_bits(tmp_path, dense, **bits)
    recipe = plannable(
        model_name_or_path=str(folder), dtype="bfloat16", offload_base="disk", max_length=64
    )
    traced = follow_recipe(
        recipe, config_of(recipe)[0], Choice("bfloat16", "of the test"), "cpu", rows_tokens=(1, 64)
    )
    feed = build("stored", folder, torch.bfloat16, device="cpu").feed
    assert traced.setup.base.feed is not None
    assert traced.setup.base.feed.base_bytes == feed.base_bytes


def test_packed_layers_that_are_streamed_are_in_their_slots_alone(tmp_path: Path) -> None:
    """A plan counts neither the layers that they were made of nor scales beside a slot's."""
    pytest.importorskip("bitsandbytes")
    folder = save_tiny(tmp_path)
    recipe = plannable(
        model_name_or_path=str(folder), dtype="bfloat16", load_in_4bit=True, offload_base="disk",
        max_length=64,
    )  # fmt: skip
    gc.disable()
    try:
        traced = follow_recipe(
            recipe, config_of(recipe)[0], Choice("bfloat16", "of the test"), "cpu",
            rows_tokens=(1, 64),
        )  # fmt: skip
    finally:
        gc.enable()
    feed = traced.setup.base.feed
    assert feed is not None
    assert feed.base_bytes > 8192
    alive = traced.timeline.alive_at(len(traced.timeline.events) - 1)
    assert alive["temporary buffers"] < 512


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"load_in_4bit": True}, "is quantised already"),
        ({"method": "full"}, "method: full cannot train"),
    ],
    ids=str,
)
def test_what_training_refuses_of_a_folder_in_few_bits_is_not_planned(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = str(save_few_bits(tmp_path, None, load_in_8bit=True))
    with pytest.raises(UserError, match=said):
        lighten.plan(model_name_or_path=folder, device="t4", max_length=64, **settings)


def test_the_largest_model_may_be_a_folder_in_8_bits(tmp_path: Path) -> None:
    """Which has no 4 bits to need least in."""
    pytest.importorskip("bitsandbytes")
    folder = str(save_few_bits(tmp_path, None, load_in_8bit=True))
    (sized,) = api.plan_largest([folder], device="t4", max_length=64)
    assert sized.why == "the largest that fits"
    assert sized.best is not None
    assert sized.best.plan is not None
    assert sized.best.plan.method == "qlora"


def test_a_model_that_fits(tiny_folder: Path) -> None:
    completed = call("plan", str(tiny_folder), "--device", "t4", "--max_length", "256")
    assert completed.returncode == 0, completed.stderr
    for phrase in ("on t4", "which fits", "base weights", "peak (", "low ", "high ", "micro-batch",
                   "time of the largest step", "download", "no data set is given"):  # fmt: skip
        assert phrase in completed.stdout, phrase
    assert "what would need less" not in completed.stdout


def test_a_model_that_does_not_fit_says_what_would(tmp_path: Path) -> None:
    """8 billion numbers in 16 bits on a device of 16 GB, in two layers: a plan follows each."""
    folder = str(tmp_path / "model")
    tiny_config("llama", hidden_size=16384, intermediate_size=65536, num_hidden_layers=2,
                num_attention_heads=128, num_key_value_heads=16, vocab_size=16032,
                architectures=["LlamaForCausalLM"]).save_pretrained(folder)  # fmt: skip
    assert models.describe(folder).total_parameters == pytest.approx(8.2e9, rel=0.02)
    # One short row: what could be changed beside the format is little, and each change is a plan.
    completed = call("plan", folder, "--device", "t4", "--max_length", "128", "--json",
                     "per_device_train_batch_size=1")  # fmt: skip
    assert completed.returncode == 1
    report = json.loads(completed.stdout)
    assert report["fits"] is False
    assert report["memory"]["low"] > report["capacity"]
    assert report["changes"]
    assert all(change["saves_bytes"] > 0 for change in report["changes"])
    best = report["changes"][0]
    assert best["fits"] is True
    assert best["settings"]["load_in_4bit"] is True


def test_qlora_of_a_large_model_fits_where_its_paper_says(tmp_path: Path) -> None:
    """70 billion parameters on one device of 80 GB (arXiv 2305.14314)."""
    completed = call(
        "plan", str(configured(tmp_path / "model", layers=80)), "--device", "a100-80", "--json",
        "--max_length", "2048", "per_device_train_batch_size=1", "gradient_checkpointing=true",
        "load_in_4bit=true",
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    parts = {
        part["name"]: part["bytes"] for part in json.loads(completed.stdout)["memory"]["parts"]
    }
    weights = parts["base weights"] + parts["quantisation constants"]
    assert 35e9 < weights < 50e9, "four bits of a number, its scale, and the vocabulary in 16"


def test_json_holds_every_part_and_they_sum_up(tiny_folder: Path) -> None:
    completed = call("plan", str(tiny_folder), "--device", "l4", "--json", "lora_r=16")
    report = json.loads(completed.stdout)
    assert [part["name"] for part in report["memory"]["parts"]] == [
        name for name in PARTS if name in {part["name"] for part in report["memory"]["parts"]}
    ]
    assert sum(part["bytes"] for part in report["memory"]["parts"]) == report["memory"]["expected"]
    assert report["memory"]["low"] <= report["memory"]["expected"] <= report["memory"]["high"]
    assert report["device"] == "l4"


def test_a_recipe_is_planned_with_its_data(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"base_model: {tiny_folder}\ndataset: {chat_file}\nnum_train_epochs: 2\n"
                      "val_size: 0\nbatch_size: 4\n")  # fmt: skip
    completed = call("plan", str(recipe), "--json")
    assert completed.returncode == 0, completed.stderr
    report = json.loads(completed.stdout)
    assert report["steps"] == 20  # 40 rows by 4, twice
    assert report["shape"]["tokens_per_row"] < 1024  # the data's rows, not max_length
    assert report["device"] == "cpu"
    from_python = lighten.plan(str(recipe))
    assert isinstance(from_python, Plan)
    assert from_python.memory.parts == lighten.plan(recipe).memory.parts


def test_mistakes_are_one_sentence_and_exit_with_3(tiny_folder: Path) -> None:
    for arguments, message in (
        (["plan"], "give a recipe"),
        (["plan", "no-such-model-anywhere.gguf"], "does not exist"),
        (["plan", str(tiny_folder), "--device", "t5"], "did you mean t4"),
        (["plan", str(tiny_folder), "--lora_rankk", "3"], "is not a setting"),
        (["plan", str(tiny_folder), "--device", "t4", "--probe"], "is elsewhere"),
        (["plan", str(tiny_folder), "--zero", "4", "--gpus", "2"], "no stage"),
        (["plan", str(tiny_folder), "--gpus", "2", "--offload", "disk"], "--offload"),
        (["plan", str(tiny_folder), "--processes", "0"], "--processes is 0; give 1 or more"),
        (["plan", str(tiny_folder), "--processes", "2", "--gpus", "2"], "not both"),
        (["plan", str(tiny_folder), "--processes", "2", "--device", "t4"], "leave --device t4 out"),
        (["plan", str(tiny_folder), "--processes", "2", "--fsdp", "hybrid"], "use full"),
        (["plan", str(tiny_folder), "--processes", "2", "--offload", "param"], "is of GPUs"),
        (["plan", str(tiny_folder), "--gpus", "0"], "--gpus is 0; give 1 or more"),
        (["plan", str(tiny_folder), "--nodes", "0"], "--nodes is 0; give 1 or more"),
        (["plan", str(tiny_folder), "--search", "--gpus", "2"], "--search and --gpus are differ"),
        (["plan", str(tiny_folder), "--probe", "--limits"], "--probe and --limits are different"),
        (["plan", "serve", str(tiny_folder), "--gpus", "2"], "of one device: it has no --gpus"),
        (["plan", "serve"], "give one base"),
        (["plan", "serve", str(tiny_folder), "--ranks", "3"], "no --ranks"),
        (["plan", "serve", str(tiny_folder), "--context", "4k"], "--context 4k: give a whole"),
        (
            ["plan", "serve", str(tiny_folder), "--adapters", "2", "--rank", "0"],
            "--rank 0: give a whole number from 1",
        ),
        (["plan", "serve", str(tiny_folder), "--cache_bytes", "0"], "--cache_bytes 0: give a num"),
        (["plan", "serve", str(tiny_folder), "--storage", "q8"], "--storage q8: it is not known"),
        (["plan", "quantize", str(tiny_folder), "--storage", "q8"], "it is not known; use nf4"),
    ):
        completed = call(*arguments)
        assert completed.returncode == 3, arguments
        assert message in completed.stderr, (arguments, completed.stderr)
        assert "Traceback" not in completed.stderr


def test_many_gpus(tmp_path: Path) -> None:
    tiny_config("llama", hidden_size=4096, intermediate_size=16384, num_hidden_layers=2,
                num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
                architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)  # fmt: skip
    numbers = models.describe(str(tmp_path)).total_parameters
    arguments = ["plan", str(tmp_path), "--device", "h100", "--method", "full", "--gpus", "8",
                 "--nodes", "4", "--max_length", "1024", "--gradient_checkpointing",
                 "per_device_train_batch_size=1", "--json"]  # fmt: skip
    zero3 = json.loads(call(*arguments, "--zero", "3").stdout)
    ddp = json.loads(call(*arguments).stdout)
    assert (zero3["strategy"], zero3["ranks"]) == ("zero3", 32)
    # All but a 32nd of weights, gradients and moments is elsewhere; at most the two largest
    # weights, embedding and head, are gathered at the peak.
    states, largest = numbers * 16, 128256 * 4096 * 4
    saved_bytes = ddp["device_bytes"] - zero3["device_bytes"]
    assert states * 31 / 32 - 2 * largest <= saved_bytes <= states * 31 / 32 * 1.001
    # Each rank is as surely told as one that holds all: what is elsewhere is in no doubt here.
    assert zero3["fits"] is True
    assert states / 32 <= zero3["low"] <= zero3["device_bytes"] <= zero3["high"]
    assert zero3["high"] <= 1.25 * zero3["device_bytes"]
    assert zero3["communication_s"] > 0
    offloaded = json.loads(call(*arguments, "--zero", "3", "--offload", "optimizer:cpu").stdout)
    # AdamW's two float32 moments of every weight, over 32 ranks, and the gradients.
    assert offloaded["host_bytes"] == pytest.approx(numbers * 12 / 32, rel=0.02)
    assert zero3["device_bytes"] - offloaded["device_bytes"] == pytest.approx(
        numbers * 8 / 32, rel=0.02
    )
    alone = json.loads(call(*arguments[:6], *arguments[10:], "--offload", "optimizer:cpu").stdout)
    assert (alone["ranks"], alone["offload"]) == (1, ["optimizer"])
    table = call(*arguments[:-1], "--fsdp", "full")
    assert "links busy per step" in table.stdout


def test_weights_that_wait_on_a_disk_are_planned(tiny_folder: Path) -> None:
    arguments = ["plan", str(tiny_folder), "--method", "full", "--processes", "2",
                 "--strategy", "zero3", "--offload_optimizer", "nvme"]  # fmt: skip
    moved = call(*arguments, "--offload_params", "nvme")
    assert moved.returncode == 0, moved.stderr
    assert "weights and state on a disk" in moved.stdout
    assert "optimiser's state on a disk" in call(*arguments).stdout


def test_processes_of_this_machine(tiny_folder: Path) -> None:
    arguments = ["plan", str(tiny_folder), "--method", "full", "--processes", "2",
                 "--gradient_accumulation_steps", "1",
                 "--per_device_train_batch_size", "1"]  # fmt: skip
    # The strategies that send least are as good as each other: the plainest is said.
    plain = json.loads(call(*arguments, "--json").stdout)
    assert (plain["strategy"], plain["ranks"], plain["nodes"]) == ("ddp", 2, 1)
    assert plain["fits"] is True
    sharded = json.loads(call(*arguments, "--zero", "3", "--json").stdout)
    states = sharded["states"]
    # Half of the layers twice, and of all else once; gloo scatters by reducing all.
    gathered = (states["layers"] + states["trained"]) / 2
    assert sharded["volume"]["gather"] == gathered > states["layers"] > 0
    assert sharded["volume"]["reduce"] == states["gradients"]
    assert sharded["communication_s"] is None
    completed = call(*arguments, "--strategy", "zero2", "--offload_optimizer", "nvme")
    assert completed.returncode == 0, completed.stderr
    assert "zero2 over 2 ranks: " in completed.stdout
    assert "to train so" not in completed.stdout  # it is the recipe's
    assert "to train so: --strategy zero3" in call(*arguments, "--zero", "3").stdout
    assert "node" not in completed.stdout
    assert "GPU" not in completed.stdout
    offloaded = api.plan_spread(
        model=str(tiny_folder), method="full", processes=2, strategy="zero2",
        offload_optimizer="nvme", gradient_accumulation_steps=1, per_device_train_batch_size=1,
    )  # fmt: skip
    assert offloaded.host_bytes == states["optimiser"] / 2
    assert "optimiser's state on a disk" in completed.stdout


def test_serving_and_quantising(tiny_folder: Path, tmp_path: Path) -> None:
    large = str(configured(tmp_path / "model", layers=80))
    completed = call("plan", "serve", large, "--adapters", "8", "--rank", "16", "--context",
                     "4096", "--concurrency", "32", "--device", "h200", "--json")  # fmt: skip
    report = json.loads(completed.stdout)
    assert completed.returncode == 1  # 141 GB of weights alone
    # 80 layers, 8 heads of 128, keys and values in 16 bits, 32 sequences of 4096 tokens.
    assert report["parts"]["KV cache"] == 80 * 2 * 8 * 128 * 2 * 4096 * 32
    in_nf4 = call("plan", "serve", large, "--storage", "nf4", "--context", "4096",
                  "--concurrency", "32", "--device", "h200")  # fmt: skip
    assert in_nf4.returncode == 0, in_nf4.stdout
    assert "KV cache" in in_nf4.stdout
    pytest.importorskip("bitsandbytes")
    completed = call("plan", "quantize", str(tiny_folder))
    assert completed.returncode == 0, completed.stderr
    assert "main memory at the peak" in completed.stdout


def test_search_writes_a_recipe(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> None:
    completed = call("plan", str(tiny_folder), str(chat_file), "--device", "t4", "--search",
                     "--write", "found.yaml", "--max_length", "128", cwd=tmp_path)  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    assert "the fastest that fits" in completed.stdout
    trained = call("train", "found.yaml", "--max_steps", "1", "output_dir=out", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr


def test_a_plan_draws_itself_in_a_notebook(tiny_folder: Path) -> None:
    plan = lighten.plan(model_name_or_path=str(tiny_folder), device="t4", max_length=64)
    html = plan._repr_html_()
    assert html.count("<svg") >= 2  # the bar, and the legend's squares
    assert "base weights" in html
    assert "which fits" in html
    assert "var(--series-1,#0b6e5f)" in html  # a colour where no page defines one


def test_probe_compares_a_true_step_with_the_plan(tiny_folder: Path) -> None:
    completed = call("plan", str(tiny_folder), "--max_length", "64", "--probe", "--json",
                     "per_device_train_batch_size=2")  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    probe = json.loads(completed.stdout)["probe"]
    assert probe["error"] is None
    assert probe["peak_bytes"] > 0
    assert probe["step_seconds"] > 0
    assert probe["predicted_bytes"] == json.loads(completed.stdout)["memory"]["expected"]


def test_a_probe_has_the_rows_of_its_plan_and_all_weights(tmp_path: Path) -> None:
    """Of a model whose positions end before max_length does, and not of one that is streamed."""
    tiny_config("gpt2", n_positions=24).save_pretrained(tmp_path)
    settings: dict[str, Any] = {"model": str(tmp_path), "device": "cpu", "max_length": 64}
    plan, probed = api.plan_probe(**settings)
    assert plan.shape.tokens_per_row == 24
    assert probed.error is None
    assert probed.peak_bytes
    with pytest.raises(UserError, match="offload_base: disk keeps them elsewhere"):
        api.plan_probe(**settings, offload_base="disk")
