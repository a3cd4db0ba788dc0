"""Cohorts on NF4, FP4 and INT8 bases against PEFT, and what merging into them gives (trap 30)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lighten.adapters import AdapterSpec, Cohort, Share, attach, files
from lighten.adapters.frozen import dense_copy, is_quantized, out_in_features, product, weight_of
from lighten.engine.checkpointing import checkpoint_layers
from lighten.models.quantized import Storage, finish
from tests.test_adapters import CLOSE, IDS, loss_of, relative_difference, spec
from tests.test_train_step import UNEVEN, one_step
from tests.tiny import ARCHITECTURES, save_tiny, tiny_model

STORAGES = [Storage("nf4"), Storage("nf4", double=True), Storage("fp4"), Storage("int8")]


def by_hand(weight: Any) -> torch.Tensor:
    """What a bitsandbytes weight stands for, looked up number by number."""
    if weight.dtype == torch.int8:
        return weight.data.float() * weight.SCB[:, None] / 127
    state = weight.quant_state
    places = torch.stack([weight.data.reshape(-1) >> 4, weight.data.reshape(-1) & 15], 1).flatten()
    scales = state.absmax
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: scales.numel()]
        scales = state.state2.code[scales.int()] * outer + state.offset
    values = state.code[places.int()][: state.shape.numel()]
    return (values * scales.repeat_interleave(64)[: values.numel()]).view(state.shape)


def quantised(arch: str, storage: Storage, **changes: Any) -> PreTrainedModel:
    model = tiny_model(arch, **changes)
    finish(model, storage, torch.float32, "cpu")
    return model


def dense_twin(model: PreTrainedModel, arch: str) -> PreTrainedModel:
    """A plain model with the weights that the quantised one stands for, dequantised by hand."""
    twin = tiny_model(arch)
    for path, layer in model.named_modules():
        if is_quantized(layer):
            plain: Any = twin.get_submodule(path)
            weight = by_hand(layer.weight)
            plain.weight.data = weight.T if isinstance(plain, Conv1D) else weight
    return twin


def in_peft(model: PreTrainedModel, cohort: Cohort, name: str) -> nn.Module:
    config = files.peft_config(cohort, name)
    keys = ("r", "lora_alpha", "target_modules", "fan_in_fan_out", "task_type")
    peft_model = get_peft_model(model, LoraConfig(**{key: config[key] for key in keys}))
    peft_parameters = dict(peft_model.named_parameters())
    with torch.no_grad():
        for key, value in cohort.parameters(name).items():
            peft_parameters[key.replace(".weight", ".default.weight")].copy_(value)
    return peft_model.eval()


def assert_like_peft(cohort: Cohort, theirs: dict[str, nn.Module]) -> None:
    """Loss and gradients of each member on its own rows, in one pass against PEFT's."""
    shares = [Share("a", 0, 1), Share("b", 1, 4)]
    with cohort.sharing(shares):
        logits = cohort.model(input_ids=IDS, use_cache=False).logits[:, :-1]
        losses = [
            nn.functional.cross_entropy(logits[s.start : s.stop].flatten(0, 1),
                                        IDS[s.start : s.stop, 1:].flatten())
            for s in shares
        ]  # fmt: skip
        torch.stack(losses).sum().backward()
    for share, ours in zip(shares, losses, strict=True):
        model = theirs[str(share.adapter)]
        peft_loss = loss_of(model, IDS[share.start : share.stop])
        peft_loss.backward()
        assert relative_difference(ours, peft_loss) < CLOSE
        expected_gradients = {k.replace(".default", ""): p.grad for k, p in model.named_parameters()
                  if "lora_" in k}  # fmt: skip
        parameters = cohort.parameters(str(share.adapter))
        assert set(parameters) == set(expected_gradients)
        for key, parameter in parameters.items():
            assert parameter.grad is not None
            assert relative_difference(parameter.grad, expected_gradients[key]) < CLOSE, key


@pytest.mark.parametrize("storage", [Storage("nf4", double=True), Storage("int8")], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_learns_on_quantised_layers_as_on_their_dense_twin(
    arch: str, storage: Storage
) -> None:
    model = quantised(arch, storage)
    cohort = attach(model, [spec("a", 4, seed=1), spec("b", 8, seed=2)])
    with cohort._detached():
        twins = {name: dense_twin(model, arch) for name in ("a", "b")}
    checkpoint_layers(model)
    assert_like_peft(cohort, {name: in_peft(twins[name], cohort, name) for name in twins})
    packed = {p: layer.weight.clone() for p, layer in cohort.linears.items()}
    factors = {k: v.detach().clone() for k, v in cohort.parameters("a").items()}
    for parameter in cohort.parameters("a").values():
        parameter.grad = None
    for parameter in cohort.parameters("b").values():
        parameter.grad = None
    report, _ = one_step(cohort, UNEVEN, 3)
    assert report["a"].grad_norm > 0
    assert not any(torch.equal(v, factors[k]) for k, v in cohort.parameters("a").items())
    assert all(torch.equal(cohort.linears[p].weight, packed[p]) for p in packed)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bits_equal_peft_on_the_same_bitsandbytes_layers(
    quant_type: str, tmp_path: Path
) -> None:
    # Rows of whole blocks: elsewhere bitsandbytes itself is wrong on a processor.
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    tiny_model("llama", **sizes).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_compute_dtype=torch.float32
    )

    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, dtype=torch.float32
        )

    model = load()
    finish(model, None, torch.float32, "cpu")
    cohort = attach(model, [spec("a", 4, seed=1), spec("b", 8, seed=2)])
    theirs = {}
    for name in ("a", "b"):
        theirs[name] = in_peft(load(), cohort, name)
        layers = [m for m in theirs[name].modules() if isinstance(m, bnb.nn.Linear4bit)]
        assert len(layers) == 14
        for layer in layers:  # else it rounds scales to bfloat16 on some processors
            layer.support_avx512bf16_for_cpu = False
    assert_like_peft(cohort, theirs)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("shape", [(31, 65), (48, 32), (7, 3), (32, 48), (64, 128), (1, 1)])
def test_odd_sizes_are_dequantised_right(shape: tuple[int, int], storage: Storage) -> None:
    torch.manual_seed(sum(shape))
    outputs, inputs = shape
    holder = nn.Sequential(nn.Linear(inputs, outputs))
    plain = copy.deepcopy(holder[0])
    model = tiny_model("llama")
    model.set_submodule("model.odd", holder[0])
    finish(model, storage, torch.float32, "cpu")
    layer = model.get_submodule("model.odd")
    assert out_in_features(layer) == out_in_features(plain) == shape
    weight = weight_of(layer)
    assert relative_difference(weight, by_hand(layer.weight)) < 1e-6
    # Half a step of the widest gap between two values, times the largest value of a block.
    widest = {"nf4": 0.16, "fp4": 0.18, "int8": 0.5 / 127 + 1e-3}[storage.kind]
    allowed = widest + (0.02 if storage.double else 0.0)
    assert float((weight - plain.weight).detach().abs().max()) < allowed * float(
        plain.weight.detach().abs().max()
    )
    x = torch.randn(5, inputs, requires_grad=True)
    ours, theirs = layer(x), nn.functional.linear(x, by_hand(layer.weight), plain.bias)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(product(layer, x), theirs, atol=1e-5)
    gradient = torch.randn_like(ours)
    (mine,) = torch.autograd.grad(ours, x, gradient)
    assert torch.allclose(mine, gradient @ by_hand(layer.weight), atol=1e-5)


@pytest.mark.parametrize("storage", [Storage("nf4"), Storage("int8")], ids=str)
def test_no_dense_weight_waits_for_the_backward_pass(storage: Storage) -> None:
    model = quantised("llama", storage)
    cohort = attach(model, [spec(target_modules=("q_proj",))])
    head = model.get_output_embeddings().weight.untyped_storage().data_ptr()
    saved_shapes: list[torch.Size] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() != head:
            saved_shapes.append(tensor.shape)
        return tensor

    with cohort.using("default"), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss_of(model, IDS)
    shapes = {torch.Size(out_in_features(m)) for m in model.modules() if is_quantized(m)}
    assert not {s for shape in shapes for s in (shape, shape[::-1])} & set(saved_shapes)


def base_only_is_the_base(cohort: Cohort) -> torch.Tensor:
    with torch.no_grad(), cohort.using(None):
        return cohort.model(input_ids=IDS).logits


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_the_base_alone_and_its_rows_in_a_cohort_see_the_same_numbers(storage: Storage) -> None:
    model = quantised("llama", storage)
    plain = model(input_ids=IDS).logits
    cohort = attach(model, [spec("a")])
    assert torch.equal(base_only_is_the_base(cohort), plain)
    with torch.no_grad(), cohort.sharing([Share("a", 0, 2), Share(None, 2, 4)]):
        mixed = cohort.model(input_ids=IDS).logits
    assert relative_difference(mixed[2:], plain[2:]) < CLOSE
    assert torch.equal(cohort.detach()(input_ids=IDS).logits, plain)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_trap30_merging_gives_a_dense_model_of_the_dequantised_weights(
    arch: str, storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny(tmp_path / "model", arch)
    config = storage.config(torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    finish(model, storage, torch.float32, "cpu")
    cohort = attach(model, [spec(target_modules=("c_attn",) if arch == "gpt2" else ("q_proj",))])
    with cohort._detached():
        twin = dense_twin(model, arch)
    theirs = in_peft(twin, cohort, "default")
    with torch.no_grad(), cohort.using("default"):
        tuned = cohort.model(input_ids=IDS).logits
        on_the_twin = theirs(input_ids=IDS).logits
    assert relative_difference(tuned, on_the_twin) < CLOSE
    merged = cohort.fuse("default")
    # Not one layer stays in 4 bits unsaid, adapted or not, and what was done is written down.
    assert not any(is_quantized(module) for module in merged.modules())
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    merged_base = f"{storage} weights dequantised to float32"
    assert merged.config.merged_base == merged_base
    assert merged_base in caplog.text
    with torch.no_grad():
        assert relative_difference(merged(input_ids=IDS).logits, tuned) < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert not hasattr(again.config, "quantization_config")
    assert again.config.merged_base == merged_base
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, merged(input_ids=IDS).logits)
        # The dense original is not what the adapter learned on: the difference is seen.
        difference_from_original = relative_difference(
            tiny_model(arch)(input_ids=IDS).logits, tuned
        )
    assert difference_from_original > 1e-2


def test_merging_in_bfloat16_rounds_once_to_the_format_of_the_products() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    finish(model, Storage("nf4"), torch.bfloat16, "cpu")
    cohort = attach(model, [spec()])
    path = "model.layers.0.mlp.up_proj"
    delta, weight = cohort.linears[path].delta("default"), weight_of(cohort.linears[path].base)
    assert weight.dtype == torch.bfloat16
    merged: Any = cohort.fuse("default").get_submodule(path)
    assert torch.equal(merged.weight, (weight.float() + delta).bfloat16())


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("storage", [Storage("nf4"), Storage("int8")], ids=str)
def test_modules_to_save_in_a_quantised_base_are_trained_dense(arch: str, storage: Storage) -> None:
    model = quantised(arch, storage)
    before = model(input_ids=IDS).logits.detach()
    saved_module = "c_fc" if arch == "gpt2" else "up_proj"
    cohort = attach(
        model, [spec(modules_to_save=(saved_module,), target_modules=("c_attn", "q_proj"))]
    )
    saved_parameters = {k: v for k, v in cohort.parameters("default").items() if saved_module in k}
    assert {v.dtype for v in saved_parameters.values()} == {torch.float32}
    like = dict(tiny_model(arch).named_parameters())
    for key, value in saved_parameters.items():  # the shape that the dense architecture has
        assert value.shape == like[key.removeprefix("base_model.model.")].shape
    with cohort.using("default"):
        loss_of(model, IDS).backward()
        tuned = model(input_ids=IDS).logits.detach()
    assert all(
        v.grad is not None and float(v.grad.abs().sum()) > 0 for v in saved_parameters.values()
    )
    assert relative_difference(base_only_is_the_base(cohort), before) == 0
    with torch.no_grad():
        assert relative_difference(cohort.fuse("default")(input_ids=IDS).logits, tuned) < 1e-4


def test_a_dense_copy_leaves_the_quantised_layer_alone() -> None:
    model = quantised("llama", Storage("nf4"))
    block: Any = model.get_submodule("model.layers.0.mlp")
    dense: Any = dense_copy(block)
    assert type(dense.up_proj) is nn.Linear
    assert is_quantized(block.up_proj)
    assert torch.equal(dense.up_proj.weight, weight_of(block.up_proj))
    x = torch.randn(3, 32)
    assert torch.allclose(dense(x), block(x), atol=1e-6)


def test_a_saved_adapter_of_a_quantised_gpt2_names_its_orientation() -> None:
    cohort = attach(quantised("gpt2", Storage("nf4")), [AdapterSpec("a")])
    assert files.peft_config(cohort, "a")["fan_in_fan_out"] is True
