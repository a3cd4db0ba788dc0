"""Training the base's own weights, all or the last layers, against plain autograd."""

from __future__ import annotations

import errno
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaProcessor,
)
from transformers.pytorch_utils import Conv1D

import lighten
from lighten import models, runs
from lighten.adapters import WholeBase, shards
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.engine.checkpointing import checkpoint_layers
from lighten.engine.forward_backward import shares_of
from lighten.engine.loss import Objective
from lighten.engine.scaling import LossScaler
from lighten.engine.step import AdapterStep
from lighten.errors import UserError
from lighten.evaluation.chat import chat
from lighten.models import attention
from lighten.recipe import Recipe
from lighten.runs import Run
from lighten.training import checkpoints
from tests.processes import call, python
from tests.test_merge import beside_pictures
from tests.test_train_step import (
    UNEVEN,
    Row,
    gradients,
    micro_batches,
    one_step,
)
from tests.tiny import ARCHITECTURES, NEWER, save_tiny, tiny_model, tiny_tokenizer
from tests.tiny_runs import train

IDS = torch.tensor([[5, 9, 14, 200, 31, 77, 8]])


def whole_base(
    arch: str, *, last: int | None = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> WholeBase:
    """As a run makes it: frozen weights in the base's format, those that learn in float32."""
    loaded = torch.float32 if last is None else dtype
    return WholeBase(tiny_model(arch, dtype=loaded, **changes), dtype=dtype, last=last)


def of_the_last_layer(arch: str) -> set[str]:
    """Names of the weights of the second of two layers."""
    return {key for key, _ in tiny_model(arch).named_parameters() if "s.1." in key or "h.1." in key}


def plain(arch: str, rows: list[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of every weight by the model's own forward, row by row."""
    model = tiny_model(arch).requires_grad_(True)
    total, count = torch.zeros(()), 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        labels = torch.where(torch.tensor([row.supervised]), ids, -100)
        logits = model(input_ids=ids).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, labels[0, 1:], reduction="sum")
        count += int((labels[0, 1:] != -100).sum())
    (total / count).backward()  # type: ignore[no-untyped-call]
    return float(total.detach()) / count, {
        key: p.grad for key, p in model.named_parameters() if p.grad is not None
    }


def close(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    """Each gradient by its own size; one that is zero but for rounding by the largest's."""
    assert set(actual) == set(expected)
    largest = max(float(value.abs().max()) for value in expected.values())
    for key, value in expected.items():
        error = float((actual[key] - value).abs().max())
        assert error < tolerance * max(float(value.abs().max()), 1e-2 * largest), (key, error)


def step(trained: WholeBase, **options: Any) -> tuple[AdapterStep, AdapterOptimizer]:
    report, members = one_step(trained, UNEVEN, 2, **options)  # type: ignore[arg-type]
    return report["default"], members["default"]


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *NEWER])
def test_a_step_of_the_whole_base_is_that_of_plain_autograd(arch: str) -> None:
    expected_loss, expected = plain(arch, UNEVEN)
    report, member = step(whole_base(arch))
    assert report.loss == pytest.approx(expected_loss, rel=1e-5)
    close(gradients(member), expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_last_layers_learn_as_in_plain_autograd_and_nothing_else_moves(arch: str) -> None:
    before = {k: v.clone() for k, v in tiny_model(arch).named_parameters()}
    last_layer_keys = of_the_last_layer(arch)
    assert 0 < len(last_layer_keys) < len(before)
    trained = whole_base(arch, last=1)
    _, expected = plain(arch, UNEVEN)
    _, member = step(trained)
    close(gradients(member), {key: expected[key] for key in last_layer_keys})
    for key, value in trained.model.named_parameters():
        assert torch.equal(value, before[key]) == (key not in last_layer_keys), key
        assert key in last_layer_keys or value.grad is None


def test_nothing_is_kept_for_the_backward_pass_below_the_first_layer_that_learns() -> None:
    trained = whole_base("llama", last=1)
    (batch,) = micro_batches(UNEVEN, ["default"], 6)
    saved: list[int] = []
    below: list[int] = []
    layers = trained.model.base_model.layers
    layers[0].register_forward_hook(lambda *call: below.append(len(saved)))
    objective = Objective(trained.model, trained)
    weights = torch.ones(len(batch.labels))
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda value: saved.append(1) or value, lambda value: value
        ),
        objective.at(batch, shares_of(batch)),
    ):
        objective(batch, shares_of(batch), weights)
    assert below == [0]
    assert saved


@pytest.mark.parametrize("last", [None, 1])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_mixed_precision_keeps_float32_weights_and_comes_near_float32(
    arch: str, last: int | None
) -> None:
    exact, exact_member = step(whole_base(arch, last=last))
    trained = whole_base(arch, last=last, dtype=torch.bfloat16)
    if arch != "gemma2":  # attention whose queries, keys and values must be of one format
        attention.register()
        trained.model.set_attn_implementation(attention.NAME)
    output_dtypes: set[torch.dtype] = set()
    for module in trained.model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            module.register_forward_hook(lambda *call: output_dtypes.add(call[-1].dtype))
    objective = Objective(trained.model, trained)
    report, member = step(trained, objective=objective)
    assert output_dtypes == {torch.bfloat16}
    for key, value in trained.model.named_parameters():
        frozen = last is not None and key not in of_the_last_layer(arch)
        assert value.dtype == (torch.bfloat16 if frozen else torch.float32), key
    for value in member.optimizer_tensors().values():
        assert value.dtype == torch.float32
    assert report.loss == pytest.approx(exact.loss, rel=2e-2)
    if arch != "mixtral":  # rounding sends some tokens to another expert
        actual, expected = gradients(member), gradients(exact_member)
        flat = [torch.cat([g[key].flatten() for key in expected]) for g in (actual, expected)]
        assert float(F.cosine_similarity(*flat, dim=0)) > 0.99


def test_float16_products_go_with_a_scaler_that_leaves_true_gradients() -> None:
    exact, exact_member = step(whole_base("llama"))
    scaler = LossScaler(initial=2.0**10)
    report, member = step(whole_base("llama", dtype=torch.float16), scaler=scaler)
    assert report.loss == pytest.approx(exact.loss, rel=1e-2)
    assert report.grad_norm == pytest.approx(exact.grad_norm, rel=2e-2)
    close(gradients(member), gradients(exact_member), 3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [None, 1])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_recomputed_layers_give_the_same_gradients(
    arch: str, last: int | None, dtype: torch.dtype
) -> None:
    report, member = step(whole_base(arch, last=last, dtype=dtype))
    saving = whole_base(arch, last=last, dtype=dtype)
    assert checkpoint_layers(saving.model) == (last or 2)  # a frozen layer has nothing to recompute
    saved, saved_member = step(saving)
    assert saved.loss == report.loss
    actual, expected = gradients(saved_member), gradients(member)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("arch", ["qwen2", "gemma3_text", "gpt2"])
def test_trap29_a_tied_head_stays_tied_while_it_learns(arch: str) -> None:
    trained = whole_base(arch, dtype=torch.bfloat16, tie_word_embeddings=True)
    step(trained)
    model = trained.fuse("default")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


def test_more_layers_than_there_are_is_said() -> None:
    with pytest.raises(UserError, match="last_3 is more than the 2 decoder layers of Llama"):
        whole_base("llama", last=3)


def test_what_a_base_has_in_float32_beside_16_bits_stays_so_when_it_learnt(tmp_path: Path) -> None:
    """transformers loads these routers in float32; the finished model's were rounded."""
    save_tiny(tmp_path / "base", "glm4_moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    router = model.get_parameter(name := "model.layers.1.mlp.gate.weight")
    assert router.dtype == torch.float32
    trained = WholeBase(model, dtype=torch.bfloat16)
    learnt = router.data.add_(1e-5).clone()
    trained.fuse("default").save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert torch.equal(loaded.get_parameter(name), learnt)
    assert loaded.get_input_embeddings().weight.dtype == torch.bfloat16


def test_quantised_weights_are_refused() -> None:
    model = tiny_model("llama")
    layer = model.base_model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match=r"quantised weights \(torch.uint8\)"):
        WholeBase(model, dtype=torch.float32, last=1)


VERIFY = """
import sys
from pathlib import Path
import torch
from lighten.adapters import files, shards
from lighten.machine.hardware import PeakMemory
shards.SHARD_BYTES = 160 * 2**20
folder, tensors = Path(sys.argv[1]), {f"layer{n}": torch.ones(8 * 2**20) for n in range(10)}
for name, shard in shards.Shards(tensors, shards.STEM).items():
    shard.write(folder / name)
peak = PeakMemory()
files.verify(folder, {name: (8 * 2**20,) for name in tensors})
print(peak.read()["peak_bytes"])
"""


def test_saved_weights_are_verified_a_weight_at_a_time(tmp_path: Path) -> None:
    """Two files of 160 MiB: 32 of them are in memory, and what looking at the numbers takes.

    Libraries' pages are 50 to 110 MiB of it, as their files lie in the kernel's memory.
    """
    completed = python(VERIFY, str(tmp_path))
    assert completed.returncode == 0, completed.stderr
    assert int(completed.stdout) < 192 * 2**20


def test_the_untouched_base_is_not_to_be_had_from_weights_that_learnt() -> None:
    with pytest.raises(UserError, match="has to be loaded anew"), whole_base("llama").using(None):
        pass


@pytest.fixture
def settings(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(tiny_folder), "dataset": str(chat_file), "dtype": "float32",
        "output_dir": str(tmp_path / "run"), "method": "full", "learning_rate": 3e-3,
        "per_device_train_batch_size": 8, "max_steps": 4, "save_steps": 2, "eval_steps": 2,
        "val_size": 0.5, "save_total_limit": 10,
    }  # fmt: skip


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_trains_whole_and_reloads_with_transformers(
    arch: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "base", arch)
    run = train(settings, model_name_or_path=str(folder), max_steps=2)
    assert run.info()["status"] == "finished"
    newest = checkpoints.listing(run.folder / "checkpoints")[-1]
    learnt = load_file(newest / "weights" / "default" / "trained.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(learnt)
    with torch.no_grad():
        for key, value in learnt.items():
            assert not torch.equal(parameters[key], value)
            parameters[key].copy_(value)
        expected = model(input_ids=IDS).logits
    assert torch.equal(logits(run.folder / "model"), expected)
    lighten.report(run)


def test_trap29_the_saved_model_holds_a_tied_head_once_and_reads_as_tied(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "base", "qwen2")
    run = train(settings, model_name_or_path=str(folder), max_steps=2)
    model_folder = run.folder / "model"
    assert "lm_head.weight" not in load_file(model_folder / "model.safetensors")
    assert json.loads((model_folder / "config.json").read_text())["tie_word_embeddings"]
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not torch.equal(logits(model_folder), logits(folder))


def test_a_base_that_sees_pictures_keeps_what_prepares_them(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    base = beside_pictures("gemma3", tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    sizes = {"height": 8, "width": 8}
    pictures = CLIPImageProcessorPil(size=sizes, crop_size=sizes)
    LlavaProcessor(pictures, tiny_tokenizer(), patch_size=4).save_pretrained(tmp_path / "base")
    run = train(settings, model_name_or_path=str(tmp_path / "base"), max_steps=2)
    export = lighten.export(run, "merged", verify=False)
    expected = AutoProcessor.from_pretrained(tmp_path / "base").to_dict()
    for folder in (run.folder / "model", export.folder):
        assert AutoProcessor.from_pretrained(folder).to_dict() == expected


def test_the_model_folder_is_whole_in_the_bases_format(
    settings: dict[str, Any], tiny_folder: Path
) -> None:
    run = train(settings, dtype="bfloat16", trainable_layers="last_1")
    model_folder = run.folder / "model"
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "chat_template.jinja", "README.md"} == {p.name for p in model_folder.iterdir()} - {
                "tokenizer_config.json", "special_tokens_map.json"}  # fmt: skip
    saved, base = (
        load_file(folder / "model.safetensors") for folder in (model_folder, tiny_folder)
    )
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    last_layer_keys = of_the_last_layer("llama")
    for key, value in saved.items():
        assert torch.equal(value, base[key].bfloat16()) == (key not in last_layer_keys), key
    assert json.loads((model_folder / "config.json").read_text())["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_folder).chat_template
    choices = {choice["what"]: choice for choice in run.info()["choices"]}
    assert choices["method"]["reason"] == "the base's last 1 of 2 decoder layers"
    assert choices["precision"]["value"] == "mixed: float32 and bfloat16"
    (entry,) = run.info()["adapters"]
    assert entry["kind"] == "model"
    assert entry["trainable_parameters"] == sum(base[key].numel() for key in last_layer_keys)
    assert entry["file_bytes"] == (model_folder / "model.safetensors").stat().st_size
    assert not run.adapters()


@pytest.mark.parametrize("change", [
    {}, {"trainable_layers": "last_1", "dtype": "bfloat16"}, {"dtype": "float16"},
])  # fmt: skip
def test_trap38_a_resumed_run_ends_bitwise_as_an_uninterrupted_one(
    change: dict[str, Any], settings: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
    run = train(settings, **change)
    folder = tmp_path / "cut"
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    shutil.rmtree(folder / "model")
    weight_files = list((folder / "checkpoints" / "checkpoint-2" / "weights" / "default").iterdir())
    assert len(weight_files) > 1 or "trainable_layers" in change
    resumed = train(settings, resume=True, output_dir=str(folder), **change)
    resumed_weights, expected = (
        load_file(r.folder / "model" / "model.safetensors") for r in (resumed, run)
    )
    assert all(torch.equal(resumed_weights[key], expected[key]) for key in expected)
    assert [m["loss"] for m in resumed.metrics()] == [m["loss"] for m in run.metrics()]


@pytest.mark.slow
def test_trap3_two_ranks_train_the_whole_base_as_one_process(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"max_train_samples": 13, "val_size": 0, "per_device_train_batch_size": 2}
    del settings["eval_steps"]
    one_rank = train(settings, gradient_accumulation_steps=2, output_dir=str(tmp_path / "one"))
    flags = [f"{key}={value}" for key, value in settings.items()]
    child = call("train", *flags, "--processes", "2", environment={"LIGHTEN_DEVICE": "cpu"})
    assert child.returncode == 0, child.stderr[-3000:]
    two_ranks = Run(settings["output_dir"])
    for actual, expected in zip(two_ranks.metrics(), one_rank.metrics(), strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    actual, expected = (
        load_file(r.folder / "model" / "model.safetensors") for r in (two_ranks, one_rank)
    )
    for key, value in expected.items():
        assert float((actual[key] - value).abs().max()) < 2e-5, key


def test_trap40_the_best_state_is_what_is_saved(settings: dict[str, Any]) -> None:
    run = train(settings, load_best_model_at_end=True, learning_rate=0.3, eval_steps=1,
                lr_scheduler_type="constant")  # fmt: skip
    (entry,) = run.info()["adapters"]
    assert entry["best_step"] < 4
    best = run.folder / "checkpoints" / f"checkpoint-{entry['best_step']}"
    learnt = load_file(best / "weights" / "default" / "trained.safetensors")
    saved = load_file(run.folder / "model" / "model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in learnt.items())


@pytest.mark.parametrize("change", [{}, {"trainable_layers": "last_1"}])
def test_evaluate_and_chat_set_the_trained_model_against_the_untouched_base(
    change: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    run = train(settings, **change)
    evaluation = lighten.evaluate(run, max_new_tokens=4)
    assert [model["name"] for model in evaluation.models] == ["base", "default"]
    eval_loss = run.info()["adapters"][0]["eval_loss"]
    assert evaluation.metric("default", "loss")["value"] == pytest.approx(eval_loss, rel=1e-5)
    adapter = train({k: v for k, v in settings.items() if k != "method"}, max_steps=1,
                    output_dir=str(tmp_path / "lora"))  # fmt: skip
    adapter_evaluation = lighten.evaluate(adapter, max_new_tokens=4)
    assert evaluation.metric("base", "loss") == adapter_evaluation.metric("base", "loss")
    assert (
        evaluation.examples[0]["answers"]["base"]
        == adapter_evaluation.examples[0]["answers"]["base"]
    )
    assert eval_loss < evaluation.metric("base", "loss")["value"]

    out = io.StringIO()
    chat(str(run.folder), compare=True, max_new_tokens=5, out=out, lines=io.StringIO("hello\n"))
    alone: dict[str, str] = {}
    for name, folder in (("base", settings["model_name_or_path"]), ("default", run.model())):
        output = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(models, "load", _in_float32(models.load))
            chat(str(folder), max_new_tokens=5, out=output, lines=io.StringIO("hello\n"))
        alone[name] = output.getvalue()
    assert out.getvalue() == f"[base] {alone['base']}[default] {alone['default']}"


def _in_float32(load: Any) -> Any:
    return lambda name, **options: load(name, **{**options, "dtype": "float32"})


def test_nothing_trained_yet_is_one_clear_sentence(settings: dict[str, Any]) -> None:
    run = train(settings, max_steps=1)
    shutil.rmtree(run.folder / "model")
    with pytest.raises(UserError, match="has no trained model yet; train it first"):
        lighten.evaluate(run)


def test_new_tokens_learn_with_the_whole_base_and_not_with_its_last_layers(
    settings: dict[str, Any],
) -> None:
    reasons = []
    for place, change in enumerate(({}, {"trainable_layers": "last_1"})):
        run = train(settings, added_tokens=["<|new|>"], max_steps=1,
                    output_dir=f"{settings['output_dir']}{place}", **change)  # fmt: skip
        reasons.append({c["what"]: c["reason"] for c in run.info()["choices"]}.get("added_tokens"))
    assert reasons == [None, "the embedding is below the layers that learn"]


def test_a_folder_that_cannot_be_written_leaves_the_older_one(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with runs.whole_folder(final) as partial:
        (partial / "a").write_text("old")

    def fail() -> None:
        with runs.whole_folder(final) as partial:
            (partial / "a").write_text("new")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="the disk is full"):
        fail()
    assert (final / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def recipe(chat_file: Path, **values: Any) -> Recipe:
    return Recipe.from_values({"model": "m", "dataset": str(chat_file), **values})


def test_layers_imply_the_method_and_the_method_its_learning_rate(chat_file: Path) -> None:
    assert recipe(chat_file).method == "lora"
    assert recipe(chat_file).learning_rate == 2e-4
    layers = recipe(chat_file, trainable_layers="last_2")
    assert (layers.method, layers.last_layers, layers.learning_rate) == ("full", 2, 2e-5)
    assert recipe(chat_file, method="full", lr=1e-3).learning_rate == 1e-3
    reread = Recipe.from_values(layers.completed())
    assert reread.completed() == layers.completed()
    changed = recipe(chat_file).changed({"trainable_layers": "last_2"})
    assert changed.completed() == layers.completed()  # as beside the settings of a file


@pytest.mark.parametrize(("values", "expected"), [
    ({"finetuning_type": "full"}, ("full", None)),
    ({"fine_tune_type": "full"}, ("full", None)),
    ({"fine_tune_type": "lora"}, ("lora", None)),
    ({"finetuning_type": "freeze"}, ("full", "last_2")),
    ({"finetuning_type": "freeze", "freeze_trainable_layers": 5}, ("full", "last_5")),
])  # fmt: skip
def test_other_tools_names_are_read(
    values: dict[str, Any], expected: tuple[str, str | None], chat_file: Path
) -> None:
    parsed = recipe(chat_file, **values)
    assert (parsed.method, parsed.trainable_layers) == expected
    assert parsed.notices


@pytest.mark.parametrize(("values", "message"), [
    ({"method": "full", "lora_r": 4}, "lora_r has no effect with method: full"),
    ({"method": "full", "modules_to_save": ["norm"]}, "modules_to_save has no effect"),
    ({"method": "full", "adapters": [{"name": "a"}]}, "adapters has no effect"),
    ({"trainable_layers": "last_1", "learning_rate": [1e-5, 1e-4]}, "learning_rate is a list"),
    ({"method": "full", "seed": [1]}, "seed is a list"),
    ({"method": "lora", "trainable_layers": "last_1"}, "which method: lora keeps frozen"),
    ({"trainable_layers": "first_2"}, "trainable_layers: 'first_2' does not do"),
    ({"trainable_layers": "last_0"}, "trainable_layers: 'last_0' does not do"),
    ({"method": "fuller"}, "method: 'fuller' does not do"),
    ({"finetuning_type": "freeze", "freeze_trainable_layers": -2}, "use trainable_layers: last_N"),
])  # fmt: skip
def test_what_contradicts_the_method_is_told(
    values: dict[str, Any], message: str, chat_file: Path
) -> None:
    with pytest.raises(UserError, match=message):
        recipe(chat_file, **values)
