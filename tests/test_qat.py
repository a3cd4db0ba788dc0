"""Quantisation-aware training: what is trained is what torchao's conversion computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import lighten
from lighten.adapters import AdapterSpec, Share, WholeBase, attach, load
from lighten.adapters.fake_quant import (
    FakeQuantLinear,
    fake_layers,
    fake_quantise,
    make_plain,
    really_quantised,
)
from lighten.artifacts import open_source
from lighten.errors import MissingExtra, UserError
from lighten.quantization.model_source import ModelSource
from lighten.quantization.receipts import _source_of, round_as_learnt
from lighten.quantization.weights import make
from lighten.recipe import Recipe, RecipeError
from lighten.runs import Run
from lighten.training import quantization_aware
from lighten.training import run as training
from tests.tiny import save_tiny, tiny_model

pytest.importorskip("torchao.quantization")
QAT = "int8-dynamic-act-int4-weight"
SHAPE = {"intermediate_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", **SHAPE)


@pytest.fixture
def settings(folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(folder), "dataset": str(chat_file), "dtype": "float32",
        "output_dir": str(tmp_path / "run"), "qat": QAT, "lora_r": 4, "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, "max_steps": 4, "val_size": 4, "planned": False,
    }  # fmt: skip


def adapter(name: str = "a", **changes: Any) -> AdapterSpec:
    return AdapterSpec(name=name, r=4, alpha=8, init_lora_weights=False, **changes)


def by_hand(weight: torch.Tensor, x: torch.Tensor, group: int) -> torch.Tensor:
    """8da4w from its definition, without torchao."""
    groups = weight.view(len(weight), -1, group)
    scale = (groups.abs().amax(-1) / 7.5).clamp(min=torch.finfo().eps)
    # The largest is a tie, 7.5: times the reciprocal it is rounded as torchao rounds it.
    codes = (groups * (1 / scale[..., None])).round().clamp(-8, 7)
    dense = (codes * scale[..., None]).view_as(weight)
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    step = ((high - low) / 255).clamp(min=torch.finfo().eps)[:, None]
    zero = (-128 - (low[:, None] / step).round()).clamp(-128, 127)
    rounded = (((x / step).round() + zero).clamp(-128, 127) - zero) * step
    return rounded @ dense.T


def test_a_layer_computes_what_the_format_says_and_what_torchao_makes_of_it() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        model: Any = nn.Module()
        model.layer = nn.Linear(64, 48, bias=True).to(dtype)
        model.get_output_embeddings = lambda: None
        fake_quantise(model, 32)
        x = torch.randn(7, 64).to(dtype)
        out = model.layer(x)
        assert torch.equal(out, really_quantised(model.layer)(x))
        if dtype == torch.float32:
            expected = by_hand(model.layer.weight, x, 32) + model.layer.bias
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        make_plain(model)
        assert type(model.layer) is nn.Linear
        assert "group_size" not in vars(model.layer)


def test_base_and_update_are_rounded_together_and_convert_exactly() -> None:
    """Where PEFT's A and B are rounded apart, merged and converted is a fifth off (FACTS)."""
    model = tiny_model("llama", **SHAPE)
    cohort = attach(model, [adapter()], qat_group_size=32)
    agreement = quantization_aware.agreement(cohort, "a", [list(range(5, 40)), [7, 8, 9]])
    assert agreement["layers"] == 14
    assert agreement["tokens"] == 38
    assert agreement["largest_difference"] == 0
    ids = torch.arange(5, 40)[None]
    with torch.no_grad(), cohort.using("a") as fake:
        trained = fake(ids).logits
    merged = cohort.fuse("a")
    assert not fake_layers(merged)
    from torchao.quantization import quantize_

    from lighten.adapters.fake_quant import scheme

    head = merged.get_output_embeddings()
    quantize_(merged, scheme(32), filter_fn=lambda m, _: isinstance(m, nn.Linear) and m is not head)
    with torch.no_grad():
        assert torch.equal(merged(ids).logits, trained)


def test_gradients_go_straight_through_to_both_factors_and_the_input() -> None:
    """Against the chain rule by hand."""
    model = tiny_model("llama", **SHAPE)
    cohort = attach(model, [adapter()], qat_group_size=32)
    layer = cohort.linears["model.layers.0.mlp.down_proj"]
    assert isinstance(layer.base, FakeQuantLinear)
    x = torch.randn(6, 64, requires_grad=True)
    out = layer.base.with_updates(x, [(0, 6, layer.lora_A["a"], layer.lora_B["a"], 2.0)])
    gradient = torch.randn_like(out)
    out.backward(gradient)
    A, B = layer.lora_A["a"], layer.lora_B["a"]
    with torch.no_grad():
        merged_weight = layer.base.weight + 2 * B @ A
        from lighten.adapters.fake_quant import fake_activations, fake_weight

        of_weight = gradient.T @ fake_activations(x)
        torch.testing.assert_close(B.grad, 2 * of_weight @ A.T)
        torch.testing.assert_close(A.grad, 2 * B.T @ of_weight)
        torch.testing.assert_close(x.grad, gradient @ fake_weight(merged_weight, 32))


def test_each_adapter_of_a_cohort_trains_as_it_would_alone() -> None:
    ids = torch.arange(5, 45).view(2, 20)
    alone = []
    for seed in (1, 2):
        cohort = attach(tiny_model("llama", **SHAPE), [adapter(seed=seed)], qat_group_size=32)
        with cohort.using("a") as model:
            loss = model(ids[seed - 1 : seed]).logits.pow(2).sum()
        loss.backward()
        alone.append((loss.detach(), cohort.parameters("a")))
    together = attach(tiny_model("llama", **SHAPE), [adapter("x", seed=1), adapter("y", seed=2)],
                      qat_group_size=32)  # fmt: skip
    with together.sharing([Share("x", 0, 1), Share("y", 1, 2)]) as model:
        logits = model(ids).logits
        logits.pow(2).sum().backward()
    for place, name in enumerate(("x", "y")):
        loss, parameters = alone[place]
        torch.testing.assert_close(logits[place].pow(2).sum(), loss, rtol=1e-5, atol=0)
        for key, value in together.parameters(name).items():
            assert value.grad is not None
            assert value.grad.abs().sum() > 0
            torch.testing.assert_close(value.grad, parameters[key].grad, rtol=2e-3, atol=2e-3)


def test_the_untouched_base_stays_as_it_was() -> None:
    model = tiny_model("llama", **SHAPE)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        expected = model(ids).logits
        cohort = attach(model, [adapter()], qat_group_size=32)
        with cohort.using(None) as unchanged:
            assert torch.equal(unchanged(ids).logits, expected)
        with cohort.sharing([Share(None, 0, 1)]) as unchanged:
            assert torch.equal(unchanged(ids).logits, expected)
        assert torch.equal(cohort.detach()(ids).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_learns_whole_agrees_with_its_conversion(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype, **SHAPE)
    base = WholeBase(model, dtype=dtype, qat_group_size=32)
    (name,) = base.names
    assert {p.dtype for p in base.parameters(name).values()} == {torch.float32}
    with base.using(name) as learning:
        learning(torch.arange(5, 40)[None]).logits.float().pow(2).mean().backward()
    assert all(p.grad is not None for p in base.parameters(name).values())
    agreement = quantization_aware.agreement(base, name, [list(range(5, 40))])
    # Linear layers agree bit for bit; in bfloat16 nothing else is in between.
    assert agreement["largest_difference"] == 0
    assert agreement["layers"] == 14
    plain = base.fuse(name)
    assert not fake_layers(plain)
    assert plain.dtype == dtype


def facts(run: Run) -> dict[str, Any]:
    qat_info: dict[str, Any] = run.info()["qat"]
    assert qat_info["scheme"] == QAT
    assert qat_info["group_size"] == 32
    assert qat_info["tried_difference"] == 0
    for conversion in qat_info["converted"].values():
        assert conversion["largest_difference"] == 0
        assert conversion["layers"] == 14
    return qat_info


def test_a_cohort_trains_resumes_bitwise_and_is_evaluated_rounded(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    options = {**settings, "lora_r": [2, 4], "save_steps": 2}
    run = lighten.train(**options, progress=False)
    assert set(facts(run)["converted"]) == {"r2", "r4"}
    (choice,) = (choice for choice in run.info()["choices"] if choice["what"] == "qat")
    assert "groups of 32" in choice["value"]
    card = (run.adapters()["r4"] / "README.md").read_text(encoding="utf-8")
    assert "quantisation-aware" in card

    folder = tmp_path / "cut"
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    shutil.rmtree(folder / "adapters")
    resumed = lighten.train(**{**options, "output_dir": str(folder)}, resume=True, progress=False)
    for name, adapter_folder in run.adapters().items():
        ours = load_file(resumed.adapters()[name] / "adapter_model.safetensors")
        for key, value in load_file(adapter_folder / "adapter_model.safetensors").items():
            assert torch.equal(ours[key], value), key

    evaluation = lighten.evaluate(run, max_examples=4, max_new_tokens=2)
    assert any("as it will be once quantised" in note for note in evaluation.dataset["notes"])
    loss = [m["loss"] for m in run.metrics() if m["kind"] == "eval" and m["adapter"] == "r4"][-1]
    # The model that training saw: unrounded it has another loss.
    assert evaluation.metric("r4", "loss")["value"] == pytest.approx(loss, rel=1e-5)


def test_a_full_run_ships_a_plain_model_and_is_evaluated_rounded(settings: dict[str, Any]) -> None:
    del settings["lora_r"]
    run = lighten.train(**settings, method="full", progress=False)
    facts(run)
    model = run.model()
    assert model is not None
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert "quantisation-aware" in (model / "README.md").read_text(encoding="utf-8")
    evaluation = lighten.evaluate(run, max_examples=4, max_new_tokens=2)
    loss = [m["loss"] for m in run.metrics() if m["kind"] == "eval"][-1]
    # An activation between two integers goes to either by its last bit.
    assert evaluation.metric("default", "loss")["value"] == pytest.approx(loss, rel=1e-4)


def test_what_does_not_combine_is_refused_together(settings: dict[str, Any]) -> None:
    wrong = {"load_in_4bit": True, "torch_compile": True, "workers": 2, "lora_dropout": 0.1,
             "use_dora": True, "offload_base": "disk", "strategy": "zero1"}  # fmt: skip
    with pytest.raises(RecipeError) as error:
        lighten.train(**settings, **wrong, progress=False)
    for key in wrong:
        assert key in str(error.value)
    with pytest.raises(RecipeError, match="qat_group_size has no effect without qat"):
        lighten.train(**{**settings, "qat": None}, qat_group_size=64, progress=False)


def test_what_does_not_suit_is_refused_before_anything_is_read(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("read too early")

    monkeypatch.setattr(training, "load_rows", too_late)
    with pytest.raises(UserError, match=r"qat_group_size: 128 does not divide the rows of model"):
        lighten.train(**settings, qat_group_size=128, progress=False)
    gpt2 = save_tiny(tmp_path / "gpt2", "gpt2")
    with pytest.raises(UserError, match=r"no linear layer beside its head"):
        lighten.train(**{**settings, "model_name_or_path": str(gpt2)}, progress=False)
    config = Path(settings["model_name_or_path"]) / "config.json"
    rounded = tmp_path / "rounded"
    rounded.mkdir()
    config_values = json.loads(config.read_text(encoding="utf-8"))
    config_values["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (rounded / "config.json").write_text(json.dumps(config_values), encoding="utf-8")
    with pytest.raises(UserError, match=r"quantised already \(gptq\)"):
        lighten.train(**{**settings, "model_name_or_path": str(rounded)}, progress=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"lighten\[quantize\]"):
        lighten.train(**settings, progress=False)


def test_a_conversion_that_fails_is_told_before_training(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ImportError("wants mslk")

    monkeypatch.setattr(quantization_aware, "really_quantised", broken)
    with pytest.raises(UserError, match=r"cannot convert .*wants mslk"):
        lighten.train(**settings, progress=False)


def test_modules_saved_whole_and_dropout_are_refused_by_the_cohort() -> None:
    with pytest.raises(UserError, match="modules_to_save names"):
        attach(tiny_model("llama", **SHAPE), [adapter(modules_to_save=("up_proj",),
               target_modules=("q_proj",))], qat_group_size=32)  # fmt: skip
    with pytest.raises(UserError, match="lora_dropout"):
        attach(tiny_model("llama", **SHAPE), [adapter(dropout=0.1)], qat_group_size=32)


def test_a_plan_traces_it(settings: dict[str, Any]) -> None:
    del settings["planned"]
    plan = lighten.plan(**settings, device="t4", changes=False)
    assert "groups of 32" in plan.choices["qat"]
    assert plan.memory.expected > 0


def test_what_is_written_for_it_answers_as_it_was_trained(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", dtype=torch.bfloat16, hidden_size=64,
                       intermediate_size=128)  # fmt: skip
    quantized_folder = tmp_path / "made"
    quantized_folder.mkdir()
    make(QAT, folder, quantized_folder, [], group_size=64)
    plain, loaded = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        for path in (folder, quantized_folder)
    )
    fake_quantise(plain, 64)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, loaded(ids).logits)
    with pytest.raises(UserError, match="groups of 96"):
        make(QAT, folder, quantized_folder, [], group_size=96)


def test_a_receipt_compares_with_what_was_trained_rounded(settings: dict[str, Any]) -> None:
    """Unrounded the run never answered: its program would have to answer as nothing did."""
    run = lighten.train(**settings, progress=False)
    source = _source_of(open_source(run), False)[0]
    ids = list(range(5, 40))
    unrounded = source.log_probabilities(ids)
    base = tiny_model("llama", **SHAPE)
    trained = load(base, run.adapters(), qat_group_size=32)
    with trained.using(next(iter(run.adapters()))) as model, torch.no_grad():
        learnt = model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    round_as_learnt(source, 32, "float32")
    assert np.abs(source.log_probabilities(ids) - learnt).mean() < 1e-4
    assert np.abs(unrounded - learnt).mean() > 0.01
    assert len(source.greedy(ids, 3)) == 3
    source.release()
    assert np.array_equal(source.log_probabilities(ids), unrounded)
    # In 16 bits weights are rounded otherwise, and products are in float32 all the same.
    round_as_learnt(source, 32, "bfloat16")
    assert 0 < np.abs(source.log_probabilities(ids) - learnt).mean() < 0.1


def test_a_run_is_quantised_in_the_groups_it_was_trained_for(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    recipe = Recipe.from_values({**{k: v for k, v in settings.items() if k != "planned"},
                                 "qat_group_size": 64}, {})  # fmt: skip
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    for run, group_size in ((Run(folder), 64), (None, 32)):
        assert ModelSource("m", tmp_path, None, run, "m", None, tmp_path).group_size == group_size
