"""DoRA, PiSSA, OLoRA and orthogonal factors against PEFT on the untouched base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F
from transformers import PreTrainedModel

from lighten.adapters import AdapterSpec, attach, files, load
from lighten.adapters.peft_backed import PeftBacked
from lighten.adapters.peft_methods import configured
from lighten.engine.checkpointing import checkpoint_layers
from lighten.engine.loss import Objective
from lighten.errors import UserError
from lighten.models import attention
from lighten.recipe import Recipe, RecipeError
from tests.test_adapters_peft import (
    CLOSE,
    IDS,
    in_peft,
    logits_of,
    lora_spec,
    relative_difference,
    save,
    stir,
)
from tests.test_train_step import UNEVEN, assert_close, full_batch, gradients, one_step
from tests.tiny import ARCHITECTURES, VOCAB, tiny_model

STARTS: list[dict[str, Any]] = [
    {"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"},
]  # fmt: skip


@pytest.mark.parametrize("start", STARTS, ids=["dora", "pissa", "olora"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_dora_pissa_and_olora_on_every_architecture(
    arch: str, start: dict[str, Any], tmp_path: Path
) -> None:
    plain = tiny_model(arch)(input_ids=IDS).logits
    cohort = attach(tiny_model(arch), [lora_spec(**start)])
    assert relative_difference(logits_of(cohort, "a"), plain) < CLOSE
    assert torch.equal(logits_of(cohort, None), plain)
    stir(cohort)
    tuned = logits_of(cohort, "a")
    assert relative_difference(tuned, plain) > 1e-3

    # On the untouched base, in PEFT and here.
    folder = save(cohort, tmp_path / "a")
    assert (
        relative_difference(in_peft(folder, tiny_model(arch))(input_ids=IDS).logits, tuned) < CLOSE
    )
    again = load(tiny_model(arch), {"a": folder})
    assert isinstance(again, PeftBacked) == ("use_dora" in start)
    assert relative_difference(logits_of(again, "a"), tuned) < CLOSE

    # A live adapter takes the saved state back whole.
    fresh = attach(tiny_model(arch), [lora_spec(**start, seed=9)])
    fresh.restore("a", folder)
    assert torch.equal(logits_of(fresh, "a"), tuned)
    for key, parameter in cohort.parameters("a").items():
        assert torch.equal(parameter, fresh.parameters("a")[key]), key

    # Trap 31: merged equals unmerged.
    assert relative_difference(cohort.fuse("a")(input_ids=IDS).logits, tuned) < 1e-4
    assert set(cohort.model.state_dict()) == set(tiny_model(arch).state_dict())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("start", STARTS, ids=["dora", "pissa", "olora"])
def test_loss_and_gradients_equal_plain_peft(arch: str, start: dict[str, Any]) -> None:
    if start.get("init_lora_weights") == "olora" and arch == "gpt2":
        pytest.skip("PEFT's own OLoRA does not know how GPT-2's Conv1D lies")
    cohort = attach(tiny_model(arch), [lora_spec(**start)])
    with torch.random.fork_rng():
        torch.manual_seed(42)
        config = configured(lora_spec(**start), tiny_model(arch))
        if "use_dora" not in start:
            config.init_lora_weights = start["init_lora_weights"]  # type: ignore[attr-defined]
        theirs = get_peft_model(tiny_model(arch), config).eval()
    peft_parameters = {k: p for k, p in theirs.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in cohort.parameters("a").items():
            place = key.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")
            if place == key:
                place = key.replace(".weight", ".default.weight")
            if "use_dora" not in start:
                assert relative_difference(parameter, peft_parameters[place]) < CLOSE
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
            peft_parameters[place].copy_(parameter)
    with cohort.using("a"):
        ours_logits = cohort.model(input_ids=IDS).logits
    losses = [
        F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        for logits in (ours_logits, theirs(input_ids=IDS).logits)
    ]
    assert relative_difference(*losses) < CLOSE
    for loss in losses:
        loss.backward()
    our_gradients = {key: p.grad for key, p in cohort.parameters("a").items()}
    for (key, ours), theirs_p in zip(our_gradients.items(), peft_parameters.values(), strict=True):
        assert ours is not None
        assert theirs_p.grad is not None
        assert relative_difference(ours, theirs_p.grad) < 2 * CLOSE, key


@pytest.mark.parametrize(("rslora", "scale"), [(False, 1.5), (True, 3.0)])
def test_trap24_a_converted_start_keeps_its_scale_and_patterns(
    rslora: bool, scale: float, tmp_path: Path
) -> None:
    adapter_spec = lora_spec(
        init_lora_weights="pissa", use_rslora=rslora,
        rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3.0},
    )  # fmt: skip
    cohort = attach(tiny_model("llama"), [adapter_spec])
    stir(cohort)
    saved = json.loads((save(cohort, tmp_path / "a") / "adapter_config.json").read_text())
    assert (saved["r"], saved["rank_pattern"]) == (8, {"q_proj": 4})
    layer = in_peft(tmp_path / "a", tiny_model("llama")).get_submodule(
        "base_model.model.model.layers.0.mlp.up_proj"
    )
    assert layer.scaling["default"] == pytest.approx(scale)  # type: ignore[index]
    again = load(tiny_model("llama"), {"a": tmp_path / "a"})
    assert relative_difference(logits_of(again, "a"), logits_of(cohort, "a")) < CLOSE


def test_trap27_a_converted_adapter_does_not_fit_another_model(tmp_path: Path) -> None:
    cohort = attach(tiny_model("llama"), [lora_spec(use_dora=True)])
    folder = save(cohort, tmp_path / "a")
    with pytest.raises(UserError, match="was trained on another model"):
        load(tiny_model("llama", hidden_size=64), {"a": folder})
    with pytest.raises(UserError, match="lacks base_model"):
        load(tiny_model("llama", num_hidden_layers=3), {"a": folder})
    with pytest.raises(UserError, match="no adapter is called 'b'"), cohort.using("b"):
        pass


def test_an_adapter_that_needs_its_changed_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / files.CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "init_lora_weights": "pissa"})
    )
    with pytest.raises(UserError, match="belongs to a base that it changed"):
        load(tiny_model("llama"), {"a": tmp_path})


def test_a_rank_above_the_layers_size_is_refused_where_it_comes_from_the_weight() -> None:
    with pytest.raises(UserError, match=r"k_proj has only 16 features"):
        attach(tiny_model("llama"), [AdapterSpec("a", r=20, init_lora_weights="pissa")])


@pytest.mark.parametrize("start", [*STARTS, {"peft": {"peft_type": "IA3"}}])
def test_packed_rows_and_recomputed_layers_learn_as_padded_ones(start: dict[str, Any]) -> None:
    def step(packed: bool, recompute: bool) -> dict[str, torch.Tensor]:
        model = tiny_model("llama")
        model.config._attn_implementation = attention.NAME
        cohort = attach(model, [lora_spec(**start)])
        stir(cohort)
        if recompute:
            checkpoint_layers(model)
        return gradients(one_step(cohort, UNEVEN, 3, packed=packed)[1]["a"])

    attention.register()
    plain = step(False, False)
    assert all(float(value.abs().max()) > 0 for value in plain.values())
    assert_close(step(True, False), plain)
    assert_close(step(True, True), plain)


def test_dropout_is_drawn_from_the_rows_and_off_when_measured() -> None:
    adapter_spec = lora_spec(use_dora=True, dropout=0.5)
    first, second = (
        one_step(attach(tiny_model("llama"), [adapter_spec]), UNEVEN, 3)[1] for _ in range(2)
    )
    assert_close(gradients(first["a"]), gradients(second["a"]), 1e-9)
    without = one_step(attach(tiny_model("llama"), [lora_spec(use_dora=True)]), UNEVEN, 3)[1]
    key = next(key for key in gradients(without["a"]) if "lora_B" in key)
    assert relative_difference(gradients(first["a"])[key], gradients(without["a"])[key]) > 0.01
    cohort = attach(tiny_model("llama"), [adapter_spec])
    stir(cohort)
    before = torch.random.get_rng_state()
    assert torch.equal(logits_of(cohort, "a"), logits_of(cohort, "a"))
    one_step(cohort, UNEVEN, 3)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("saved_whole", [True, False])
def test_trap8_and_trap29_a_head_inside_peft_learns_and_merges(
    tied: bool, saved_whole: bool
) -> None:
    adapter_spec = (
        lora_spec(use_dora=True, modules_to_save=("lm_head",))
        if saved_whole
        else lora_spec(use_dora=True, target_modules=("q_proj", "lm_head"))
    )
    cohort = attach(tiny_model("llama", tie_word_embeddings=tied), [adapter_spec])
    stir(cohort)
    assert not cohort.supports_fast_loss
    _, expected = full_batch(cohort, "a", UNEVEN)
    objective = Objective(cohort.model, cohort, fast=cohort.supports_fast_loss)
    members = one_step(cohort, UNEVEN, 2, objective=objective)[1]
    assert any("lm_head" in key for key in expected)
    assert_close(gradients(members["a"]), expected, 2 * CLOSE)
    tuned = logits_of(cohort, "a")
    assert relative_difference(cohort.fuse("a")(input_ids=IDS).logits, tuned) < 1e-4
    assert cohort.model.config.tie_word_embeddings is False or not tied


def test_two_saved_adapters_of_which_one_is_pefts_are_refused(tmp_path: Path) -> None:
    dora = save(attach(tiny_model("llama"), [lora_spec(use_dora=True)]), tmp_path / "dora")
    with pytest.raises(UserError, match="load it alone"):
        load(tiny_model("llama"), {"a": dora, "b": dora})


def test_the_recipe_takes_the_inits_that_it_names() -> None:
    for start in ("pissa_niter_16", "olora", "orthogonal", False):
        specs = Recipe.from_values(
            {"model": "x", "dataset": __file__, "init_lora_weights": start}
        ).cohort()
        assert specs[0].init_lora_weights == start
    with pytest.raises(RecipeError, match="pissa_niter_0"):
        Recipe.from_values(
            {"model": "x", "dataset": __file__, "init_lora_weights": "pissa_niter_0"}
        )


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_orthogonal_factors_start_at_nothing_and_are_not_nothing(arch: str) -> None:
    spec = AdapterSpec("a", r=4, init_lora_weights="orthogonal")
    cohort = attach(tiny_model(arch), [spec])
    assert not isinstance(cohort, PeftBacked)
    assert (
        relative_difference(logits_of(cohort, "a"), tiny_model(arch)(input_ids=IDS).logits) < CLOSE
    )
    for layer in cohort.linears.values():
        A, B = layer.lora_A["a"], layer.lora_B["a"]
        assert float((B @ A).abs().max()) < 1e-7 < float(A.abs().max())
        assert 0.03 < float(A.std()) < 0.15  # PEFT's scale: a tenth, over half of the rank
        assert torch.linalg.matrix_rank(A.double(), atol=1e-6) == 2
    with pytest.raises(UserError, match="orthogonal halves the rank, but 3 is odd"):
        attach(tiny_model(arch), [AdapterSpec("a", r=3, init_lora_weights="orthogonal")])


def test_saving_keeps_whole_modules_and_new_tokens(tmp_path: Path) -> None:
    def grown() -> PreTrainedModel:
        model = tiny_model("llama")
        model.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
        return model

    adapter_spec = lora_spec(use_dora=True, modules_to_save=("embed_tokens", "lm_head"))
    cohort = attach(grown(), [adapter_spec])
    stir(cohort)
    folder = save(cohort, tmp_path / "a")
    again = load(tiny_model("llama"), {"a": folder})
    assert torch.equal(logits_of(again, "a"), logits_of(cohort, "a"))
