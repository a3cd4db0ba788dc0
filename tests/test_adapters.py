"""The cohort against PEFT: losses, gradients, files, merging, over every architecture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lighten.adapters import AdapterSpec, Cohort, Share, attach, files, layers, load, ops
from lighten.adapters.ops import Dropout, Part, low_rank_linears, reference, row_hashes
from lighten.cpu import dropout as cpu_dropout
from lighten.errors import UserError
from tests.tiny import ARCHITECTURES, NEWER, VOCAB, save_tiny, tiny_model

IDS = torch.randint(3, VOCAB, (4, 11), generator=torch.Generator().manual_seed(0))
# Relative, in float32: the bar that the project sets itself.
CLOSE = 1e-5


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


def spec(name: str = "default", r: int = 4, **options: object) -> AdapterSpec:
    """An adapter whose update is not zero."""
    return AdapterSpec(name, r=r, alpha=2 * r, init_lora_weights=False, **options)  # type: ignore[arg-type]


def in_peft(arch: str, cohort: Cohort, name: str) -> PreTrainedModel:
    """PEFT's own model of the same base with the same adapter weights."""
    config = files.peft_config(cohort, name)
    peft_model = get_peft_model(
        tiny_model(arch),
        LoraConfig(
            **{
                key: config[key]
                for key in ("r", "lora_alpha", "target_modules", "use_rslora", "fan_in_fan_out",
                            "rank_pattern", "alpha_pattern", "task_type")
            }
        ),
    )  # fmt: skip
    peft_parameters = dict(peft_model.named_parameters())
    with torch.no_grad():
        for key, value in cohort.parameters(name).items():
            peft_parameters[key.replace(".weight", ".default.weight")].copy_(value)
    peft_model.eval()
    return peft_model  # type: ignore[return-value]


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *NEWER])
def test_loss_and_gradients_equal_peft_alone_and_in_a_cohort(arch: str) -> None:
    cohort = attach(tiny_model(arch), [spec("a", 4, seed=1), spec("b", 8, seed=2)])
    shares = [Share("a", 0, 1), Share("b", 1, 4)]
    with cohort.sharing(shares):
        logits = cohort.model(input_ids=IDS).logits[:, :-1]
    for share in shares:
        rows = slice(share.start, share.stop)
        ours = F.cross_entropy(logits[rows].flatten(0, 1), IDS[rows, 1:].flatten())
        theirs_model = in_peft(arch, cohort, str(share.adapter))
        theirs = loss_of(theirs_model, IDS[rows])
        assert relative_difference(ours, theirs) < CLOSE
        ours.backward(retain_graph=True)
        theirs.backward()
        expected_gradients = {
            key.replace(".default", ""): p.grad
            for key, p in theirs_model.named_parameters()
            if p.grad is not None
        }
        parameters = cohort.parameters(str(share.adapter))
        assert set(parameters) == set(expected_gradients)
        for key, parameter in parameters.items():
            assert parameter.grad is not None
            assert relative_difference(parameter.grad, expected_gradients[key]) < CLOSE, key


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *NEWER])
def test_a_saved_adapter_gives_the_same_logits_in_plain_peft(arch: str, tmp_path: Path) -> None:
    cohort = attach(tiny_model(arch), [spec(use_rslora=True)])
    for name, data in files.contents(cohort, "default", base_model="x").items():
        (tmp_path / name).write_bytes(data)
    files.verify(tmp_path, cohort.shapes("default"))
    theirs = PeftModel.from_pretrained(tiny_model(arch), str(tmp_path)).eval()
    again = load(tiny_model(arch), {"default": tmp_path})
    with torch.no_grad(), cohort.using("default"), again.using("default"):
        ours = cohort.model(input_ids=IDS).logits
        assert relative_difference(ours, theirs(input_ids=IDS).logits) < CLOSE
        assert torch.equal(ours, again.model(input_ids=IDS).logits)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fused_at_the_start_is_the_base_and_later_equals_the_adapter(arch: str) -> None:
    base = tiny_model(arch)(input_ids=IDS).logits
    fresh = attach(tiny_model(arch), [AdapterSpec("fresh")]).fuse("fresh")
    assert torch.equal(fresh(input_ids=IDS).logits, base)
    cohort = attach(tiny_model(arch), [spec()])
    with torch.no_grad(), cohort.using("default"):
        tuned = cohort.model(input_ids=IDS).logits
    assert relative_difference(tuned, base) > 1e-2
    assert relative_difference(cohort.fuse("default")(input_ids=IDS).logits, tuned) < 1e-4


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_trap33_a_mixed_batch_leaks_nothing(arch: str) -> None:
    cohort = attach(tiny_model(arch), [spec("a", 4, seed=1), spec("b", 8, seed=2)])
    members = ["a", "b", "b", None]
    shares = [Share("a", 0, 1), Share("b", 1, 3), Share(None, 3, 4)]
    with torch.no_grad(), cohort.sharing(shares):
        mixed = cohort.model(input_ids=IDS).logits
    for row, member in enumerate(members):
        with torch.no_grad(), cohort.using(member):
            alone = cohort.model(input_ids=IDS[row : row + 1]).logits
        assert relative_difference(mixed[row : row + 1], alone) < CLOSE


def test_trap28_without_an_adapter_the_base_answers_bitwise() -> None:
    plain = tiny_model("llama")(input_ids=IDS).logits
    cohort = attach(tiny_model("llama"), [spec()])
    with torch.no_grad(), cohort.using(None):
        assert torch.equal(cohort.model(input_ids=IDS).logits, plain)
    assert torch.equal(cohort.detach()(input_ids=IDS).logits, plain)


@pytest.mark.parametrize("rslora", [False, True])
def test_trap24_the_merged_delta_is_scale_times_B_A(rslora: bool) -> None:
    cohort = attach(tiny_model("llama"), [spec(r=4, use_rslora=rslora)])
    path, layer = next(iter(cohort.linears.items()))
    scale = 8 / 4**0.5 if rslora else 8 / 4
    expected = scale * layer.lora_B["default"] @ layer.lora_A["default"]
    before = layer.base.weight.clone()  # type: ignore[operator]
    merged = cohort.fuse("default").get_submodule(path).weight
    assert relative_difference(merged - before, expected) < 1e-5


def test_rank_and_alpha_patterns_reach_their_modules_and_peft_agrees() -> None:
    adapter_spec = spec(
        rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 6}, alpha_pattern={"q_proj": 3}
    )
    cohort = attach(tiny_model("llama"), [adapter_spec])
    sizes = {path: layer.lora_A["default"].shape[0] for path, layer in cohort.linears.items()}
    assert sizes["model.layers.0.self_attn.q_proj"] == 2
    assert sizes["model.layers.1.mlp.down_proj"] == 6
    assert sizes["model.layers.0.mlp.down_proj"] == 4
    with torch.no_grad(), cohort.using("default"):
        ours = cohort.model(input_ids=IDS).logits
    assert (
        relative_difference(ours, in_peft("llama", cohort, "default")(input_ids=IDS).logits) < CLOSE
    )


def test_trap27_targets_that_match_nothing_are_an_error_that_names_the_layers() -> None:
    with pytest.raises(UserError, match=r"matches no module.*q_proj"):
        attach(tiny_model("llama"), [spec(target_modules=("query",))])


def test_trap27_a_reloaded_adapter_is_not_inert(tmp_path: Path) -> None:
    cohort = attach(tiny_model("llama"), [spec()])
    for name, data in files.contents(cohort, "default").items():
        (tmp_path / name).write_bytes(data)
    again = load(tiny_model("llama"), {"mine": tmp_path})
    with torch.no_grad(), again.using("mine"):
        tuned = again.model(input_ids=IDS).logits
    with torch.no_grad(), again.using(None):
        base = again.model(input_ids=IDS).logits
    assert relative_difference(tuned, base) > 1e-2


def test_targets_by_name_by_regex_and_by_default_are_what_peft_takes() -> None:
    for targets in (("q_proj", "v_proj"), r".*layers\.1\..*_proj", "all-linear"):
        cohort = attach(tiny_model("llama"), [spec(target_modules=targets)])
        peft_model = get_peft_model(
            tiny_model("llama"),
            LoraConfig(
                target_modules=targets if isinstance(targets, str) else list(targets),
                task_type="CAUSAL_LM",
            ),
        )
        paths = {
            key.removeprefix("base_model.model.").partition(".lora_A")[0]
            for key, _ in peft_model.named_parameters()
            if ".lora_A." in key
        }
        assert set(cohort.linears) == paths


def test_a_target_that_is_no_linear_layer_is_refused() -> None:
    with pytest.raises(UserError, match="low-rank updates go on linear layers"):
        attach(tiny_model("llama"), [spec(target_modules=("embed_tokens",))])


def test_two_adapters_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="two adapters are called 'a'"):
        attach(tiny_model("llama"), [spec("a"), spec("a")])


def test_trap26_adapter_weights_are_float32_on_every_base() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cohort = attach(tiny_model("llama", dtype=dtype), [spec(modules_to_save=("norm",))])
        assert {p.dtype for p in cohort.parameters("default").values()} == {torch.float32}
        assert {p.dtype for p in cohort.model.parameters()} == {dtype}
        assert not any(p.requires_grad for p in cohort.detach().parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_trap29_a_trained_head_or_embedding_survives_merging_and_reloading(
    tied: bool, module: str, tmp_path: Path
) -> None:
    cohort = attach(
        tiny_model("llama", tie_word_embeddings=tied), [spec(modules_to_save=(module,))]
    )
    with torch.no_grad():
        for key, value in cohort.parameters("default").items():
            if module in key:
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(5)))
    with torch.no_grad(), cohort.using("default"):
        tuned = cohort.model(input_ids=IDS).logits
    for name, data in files.contents(cohort, "default").items():
        (tmp_path / name).write_bytes(data)
    again = load(tiny_model("llama", tie_word_embeddings=tied), {"a": tmp_path})
    with torch.no_grad(), again.using("a"):
        assert torch.equal(again.model(input_ids=IDS).logits, tuned)
    cohort.fuse("default").save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is False
    assert relative_difference(merged(input_ids=IDS).logits, tuned) < 1e-4


def test_saved_modules_load_in_plain_peft(tmp_path: Path) -> None:
    cohort = attach(tiny_model("llama"), [spec(modules_to_save=("lm_head", "norm"))])
    with torch.no_grad():
        for key, value in cohort.parameters("default").items():
            if "lora" not in key:
                value.mul_(1.5)
    for name, data in files.contents(cohort, "default").items():
        (tmp_path / name).write_bytes(data)
    theirs = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path)).eval()
    with torch.no_grad(), cohort.using("default"):
        ours = cohort.model(input_ids=IDS).logits
    assert relative_difference(ours, theirs(input_ids=IDS).logits) < CLOSE


def test_verify_notices_every_kind_of_damage(tmp_path: Path) -> None:
    cohort = attach(tiny_model("llama"), [spec()])
    expected = cohort.shapes("default")
    data = files.contents(cohort, "default")[files.WEIGHTS]
    path = tmp_path / files.WEIGHTS
    with pytest.raises(UserError, match="does not exist"):
        files.verify(tmp_path, expected)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        files.verify(tmp_path, expected)
    path.write_bytes(data)
    with pytest.raises(UserError, match="is missing"):
        files.verify(tmp_path, {**expected, "another": (1,)})
    with torch.no_grad():
        for layer in cohort.linears.values():
            layer.lora_A["default"].zero_()
    path.write_bytes(files.contents(cohort, "default")[files.WEIGHTS])
    with pytest.raises(UserError, match="every lora_A is zero"):
        files.verify(tmp_path, expected)


def test_an_adapter_of_another_model_is_refused_with_the_shape(tmp_path: Path) -> None:
    cohort = attach(tiny_model("llama"), [spec()])
    for name, data in files.contents(cohort, "default").items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match="was trained on another model"):
        load(tiny_model("llama", hidden_size=64), {"a": tmp_path})
    (tmp_path / files.WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="never pickle"):
        load(tiny_model("llama"), {"a": tmp_path})
    (tmp_path / files.CONFIG).write_text(json.dumps({"r": 8}))
    with pytest.raises(UserError, match="names no peft_type"):
        load(tiny_model("llama"), {"a": tmp_path})


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer_type", ["linear", "conv1d"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_fused_form_equals_the_plain_reference(
    layer_type: str, bias: bool, dropout: float, merge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = ops._blocks  # a GPU merges; here both ways are taken
    monkeypatch.setattr(ops, "_blocks", lambda parts, ranks, **_: blocks(parts, ranks, merge=merge))
    torch.manual_seed(0)
    bases: list[nn.Module] = [
        nn.Linear(6, out, bias=bias) if layer_type == "linear" else Conv1D(out, 6)
        for out in (5, 4, 3)
    ]
    bases = [base.double().requires_grad_(False) for base in bases]
    x = torch.randn(7, 6, dtype=torch.double, requires_grad=True)
    hashes = row_hashes((11, 12), (2, 2))
    # The first two layers drop the same features, the third others.
    drops = [Dropout(dropout, hashes, salt) if dropout else None for salt in (7, 7, 8)]
    # Two adapters on three layers: the first changes all, the second two of them; row 6 is bare.
    parts = [Part(0, 4, 0.7, drop, layer) for layer, drop in enumerate(drops)]
    parts += [Part(4, 6, 1.3, None, layer) for layer in (2, 0)]
    shapes = [(2, 6), (5, 2), (1, 6), (4, 1), (2, 6), (3, 2), (3, 6), (3, 3), (2, 6), (5, 2)]
    factors = [torch.randn(s, dtype=torch.double, requires_grad=True) for s in shapes]
    upstream = [torch.randn(7, out, dtype=torch.double) for out in (5, 4, 3)]
    results = []
    for form in (reference, low_rank_linears):
        outs = form(x, bases, parts, factors)
        results.append((*outs, *torch.autograd.grad(outs, [x, *factors], upstream)))
    for ours, plain in zip(results[1], results[0], strict=True):
        assert relative_difference(ours, plain) < 1e-12
    assert torch.autograd.gradcheck(
        lambda x, *f: low_rank_linears(x, bases, parts, f), (x, *factors)
    )


def test_an_output_that_nobody_uses_leaves_its_adapter_without_gradient() -> None:
    bases = [nn.Linear(6, 5).requires_grad_(False), nn.Linear(6, 4).requires_grad_(False)]
    x = torch.randn(3, 6, requires_grad=True)
    parts = [Part(0, 3, 1.0), Part(0, 3, 1.0, None, 1)]
    factors = [torch.randn(s, requires_grad=True) for s in ((2, 6), (5, 2), (2, 6), (4, 2))]
    used = low_rank_linears(x, bases, parts, factors)[1]
    plain = reference(x, bases, parts, factors)[1]
    ours = torch.autograd.grad(used.sum(), [x, *factors[2:]], retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(plain.sum(), [x, *factors[2:]]), strict=True):
        assert relative_difference(a, b) < 1e-6
    assert torch.autograd.grad(used.sum(), factors[0], allow_unused=True) == (None,)


def test_layers_that_read_the_same_tensor_are_computed_together_and_others_are_not() -> None:
    cohort = attach(tiny_model("llama"), [spec()])
    attention = cohort.model.get_submodule("model.layers.0.self_attn")
    calls: list[int] = []
    joint = layers.joint_outputs

    def counting(linears: Any, x: torch.Tensor) -> Any:
        calls.append(len(linears))
        return joint(linears, x)

    x, other_x = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    with pytest.MonkeyPatch.context() as patch, cohort.using("default"), torch.no_grad():
        patch.setattr(layers, "joint_outputs", counting)
        expected = [joint([attention.get_submodule(n)], x)[0] for n in ("q_proj", "k_proj")]
        together = [attention.q_proj(x), attention.k_proj(x)]
        attention.v_proj(x)
        assert calls == [3]
        assert all(torch.equal(a, b) for a, b in zip(together, expected, strict=True))
        # A cross attention reads two tensors: from the second such pass on each goes alone.
        attention.q_proj(x)
        assert torch.equal(attention.k_proj(other_x), joint([attention.k_proj], other_x)[0])
        calls.clear()
        attention.q_proj(x), attention.k_proj(other_x), attention.v_proj(other_x)
        assert calls == [1, 1, 1]


def test_dropout_drops_its_share_keeps_the_mean_and_does_not_depend_on_neighbours() -> None:
    batch_factors = Dropout(0.25, row_hashes((1, 2), (50, 30)), 5).factors(201, torch.ones(1))
    assert batch_factors.shape == (80, 201)
    assert abs(float((batch_factors == 0).float().mean()) - 0.25) < 0.01
    assert abs(float(batch_factors.mean()) - 1.0) < 0.01
    assert batch_factors.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    alone = Dropout(0.25, row_hashes((2,), (30,)), 5).factors(201, torch.ones(1))
    assert torch.equal(alone, batch_factors[50:])
    padded = Dropout(0.25, row_hashes((1, 2), (50, 60)), 5).factors(201, torch.ones(1))
    assert torch.equal(padded[50:80], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [1, 2, 31, 64, 201])
def test_the_kernel_of_dropout_draws_the_same_masks(features: int, dtype: torch.dtype) -> None:
    if cpu_dropout.library() is None:
        pytest.skip("no C++ compiler here")
    drop = Dropout(0.1, row_hashes((1, 2**40 + 7), (700, 300)), 0xFFFFFFF0)
    x, total = torch.randn(2, 1000, features).to(dtype)
    x[0, 0], x[1, 0], x[2, 0] = math.nan, math.inf, -0.0
    factors = drop.factors(features, x)
    dropped, added = drop.of(x), total.clone()
    drop.add_to_(added, x)
    assert torch.equal(dropped.nan_to_num(7.0), (x * factors).nan_to_num(7.0))
    expected = total.double().addcmul(x.double(), factors.double())
    torch.testing.assert_close(added.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6,
                               equal_nan=True)  # fmt: skip
    # Rows and columns of a larger tensor, which do not lie one after the other.
    strided = torch.randn(features, 1000).to(dtype).T
    assert torch.equal(drop.of(strided), strided * factors)


@pytest.mark.parametrize("probability", [1e-6, 0.999999])
def test_dropout_of_next_to_nothing_and_next_to_all(probability: float) -> None:
    drop = Dropout(probability, row_hashes((1,), (64,)), 3)
    x = torch.ones(64, 32)
    assert torch.equal(drop.of(x), x * drop.factors(32, x))


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_dropout_masks_are_independent_over_rows_columns_layers_and_examples(
    probability: float,
) -> None:
    seeds = (0, 1, 2**32, 2**62 + 1)  # neighbours, and equal in one half of their bits
    dropped = [
        (Dropout(probability, row_hashes(seeds, (256,) * 4), salt).factors(256, torch.ones(1)) == 0)
        for salt in (0, 1)
    ]
    first_mask, second_mask = (mask.double() - probability for mask in dropped)
    variance = probability * (1 - probability)
    # Counts of n draws stay within five standard deviations of what independent draws give.
    assert float(first_mask.mean(0).abs().max()) < 5 * (variance / 1024) ** 0.5
    assert float(first_mask.mean(1).abs().max()) < 5 * (variance / 256) ** 0.5
    pairs = {
        "layers": (first_mask, second_mask),
        "columns": (first_mask[:, :-1], first_mask[:, 1:]),
        "rows": (first_mask[:-1], first_mask[1:]),
        "examples": (first_mask[:256], first_mask[256:512]),
        "halves of the seed": (first_mask[:256], first_mask[512:768]),
    }
    for name, (left, right) in pairs.items():
        product = left * right
        bound = 5 * variance / product.numel() ** 0.5
        assert abs(float(product.mean())) < bound, name


def test_a_bfloat16_base_computes_its_products_in_bfloat16() -> None:
    cohort = attach(tiny_model("llama", dtype=torch.bfloat16), [spec()])
    with cohort.using("default"):
        out = cohort.model(input_ids=IDS).logits
    assert out.dtype == torch.bfloat16
    exact = attach(tiny_model("llama"), [spec()])
    with torch.no_grad(), exact.using("default"):
        assert relative_difference(out.float(), exact.model(input_ids=IDS).logits) < 0.05


def test_adapters_keep_apart_from_the_base_on_disk(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    names = {name for name, _ in model.named_parameters()}
    cohort = attach(model, [spec("a"), spec("b")])
    cohort.detach()
    assert {name for name, _ in model.named_parameters()} == names


def test_what_a_compiler_is_shown_adds_up() -> None:
    """The low-rank layers' products, as operations that change nothing they are given."""
    x, weight, low = torch.randn(5, 8), torch.randn(6, 8), torch.randn(5, 2)
    bias, B = torch.randn(6), torch.randn(6, 2)
    torch.library.opcheck(torch.ops.lighten.linear_plus, (x, weight, bias, low, B))
    out = torch.ops.lighten.linear_plus(x, weight, bias, low, B)
    torch.testing.assert_close(out, x @ weight.T + bias + low @ B.T)
    pairs = ([out, low], [weight, torch.randn(2, 8)])
    torch.library.opcheck(torch.ops.lighten.sum_of_products, pairs)
    total = torch.ops.lighten.sum_of_products(*pairs)
    torch.testing.assert_close(total, out @ weight + low @ pairs[1][1])
