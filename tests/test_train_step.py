"""One optimiser step against plain autograd: normalisation, masks, heads, scalers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import PreTrainedModel

from lighten.adapters import AdapterSpec, Cohort, attach, ops
from lighten.data.batches import Item, MicroBatch, collate, layout
from lighten.engine.adapter_optimizer import AdapterOptimizer, AdapterOptimizerSettings
from lighten.engine.checkpointing import checkpoint_layers
from lighten.engine.forward_backward import shares_of
from lighten.engine.loss import Objective
from lighten.engine.scaling import LossScaler
from lighten.engine.step import AdapterStep, TrainingDiverged, train_step
from lighten.engine.validation import held_out
from lighten.errors import UserError
from lighten.models import attention
from tests.tiny import ARCHITECTURES, VOCAB, tiny_model


@dataclass
class Row:
    input_ids: list[int]
    supervised: list[bool]


def row(length: int, supervised: int, seed: int = 0) -> Row:
    generator = torch.Generator().manual_seed(seed * 1000 + length)
    ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
    return Row(ids, [place >= length - supervised for place in range(length)])


UNEVEN = [row(8, 3), row(40, 30), row(15, 7), row(22, 1), row(9, 8), row(31, 12)]


def settings(seed: int = 0, **changes: object) -> AdapterOptimizerSettings:
    values: dict[str, object] = {
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup": 0, "total_steps": 10,
        "weight_decay": 0.0, "betas": (0.9, 0.999), "epsilon": 1e-8, "max_grad_norm": None,
        "seed": seed,
    }  # fmt: skip
    return AdapterOptimizerSettings(**{**values, **changes})  # type: ignore[arg-type]


def cohort_of(*specs: AdapterSpec, arch: str = "llama", **changes: object) -> Cohort:
    return attach(tiny_model(arch, **changes), list(specs))  # type: ignore[arg-type]


def random_spec(name: str = "a", r: int = 4, **options: object) -> AdapterSpec:
    return AdapterSpec(name, r=r, init_lora_weights=False, **options)  # type: ignore[arg-type]


def micro_batches(
    rows: list[Row], members: list[str], max_rows: int, *, packed: bool = False
) -> list[MicroBatch]:
    lengths = [len(r.input_ids) for r in rows]
    items = [Item(member, i, i) for member in members for i in range(len(rows))]
    return [
        collate(part, rows, members, packed=packed)
        for part in layout(items, lengths, max_rows=max_rows, packed=packed)
    ]


def one_step(
    cohort: Cohort,
    rows: list[Row],
    max_rows: int,
    *,
    scaler: LossScaler | None = None,
    objective: Objective | None = None,
    packed: bool = False,
    **changes: object,
) -> tuple[dict[str, AdapterStep], dict[str, AdapterOptimizer]]:
    members = [
        AdapterOptimizer(name, cohort.parameters(name), settings(**changes))
        for name in cohort.names
    ]
    report = train_step(
        micro_batches(rows, list(cohort.names), max_rows, packed=packed),
        members,
        objective or Objective(cohort.model, cohort),
        Accelerator(cpu=True),
        scaler or LossScaler(enabled=False),
    )
    return report, {member.name: member for member in members}


def gradients(member: AdapterOptimizer) -> dict[str, torch.Tensor]:
    """AdamW's first moment after one step is a tenth of the gradient it saw."""
    return {key: member.optimizer.state[p]["exp_avg"] / 0.1 for key, p in member.parameters.items()}


def full_batch(cohort: Cohort, name: str, rows: list[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by the model's own forward, row by row, token-mean over all rows."""
    total = torch.zeros(())
    count = 0
    parameters = cohort.parameters(name)
    with cohort.using(name):
        for r in rows:
            ids = torch.tensor([r.input_ids])
            labels = torch.where(torch.tensor([r.supervised]), ids, -100)
            logits = cohort.model(input_ids=ids).logits[0, :-1].float()
            total = total + F.cross_entropy(logits, labels[0, 1:], reduction="sum")
            count += int((labels[0, 1:] != -100).sum())
        loss = total / count
        grads = torch.autograd.grad(loss, list(parameters.values()))
    return float(loss.detach()), dict(zip(parameters, grads, strict=True))


def assert_close(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    assert set(actual) == set(expected)
    for key, value in expected.items():
        error = float((actual[key] - value).abs().max() / value.abs().max().clamp_min(1e-9))
        assert error < tolerance, (key, error)


@pytest.mark.parametrize("max_rows", [1, 2, 6])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_trap1_splitting_a_step_changes_neither_loss_nor_gradients(
    arch: str, max_rows: int
) -> None:
    cohort = cohort_of(random_spec(), arch=arch)
    expected_loss, expected = full_batch(cohort, "a", UNEVEN)
    report, members = one_step(cohort, UNEVEN, max_rows)
    assert report["a"].loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close(gradients(members["a"]), expected)


def in_blocks(cohort: Cohort) -> Cohort:
    """The attention that keeps packed rows apart, where the architecture can have it."""
    if cohort.model.config.model_type == "gemma2":
        pytest.skip("its soft cap has no place in sdpa")
    attention.register()
    cohort.model.set_attn_implementation(attention.NAME)
    return cohort


@pytest.mark.parametrize("max_rows", [1, 4, 6])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_trap21_a_packed_row_learns_as_it_does_alone(arch: str, max_rows: int) -> None:
    # Longer than the sliding windows and, together, than a block of attention.
    cohort = in_blocks(cohort_of(random_spec(), random_spec("b", 3, seed=1), arch=arch))
    rows = [*UNEVEN, row(70, 20), row(33, 9)]
    report, members = one_step(cohort, rows, max_rows, packed=True)
    for name in cohort.names:
        expected_loss, expected = full_batch(cohort_at_start(cohort, arch), name, rows)
        assert report[name].loss == pytest.approx(expected_loss, rel=1e-5)
        assert_close(gradients(members[name]), expected, 3e-5)


def cohort_at_start(cohort: Cohort, arch: str) -> Cohort:
    """The same adapters before their first step, on the plain attention."""
    return cohort_of(*cohort.specs.values(), arch=arch)


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "deepseek_v3", "gemma3n_text", "glm4_moe"])
def test_trap21_logits_of_a_packed_row_are_its_own(arch: str) -> None:
    cohort = in_blocks(cohort_of(random_spec(), arch=arch))
    plain = cohort_of(random_spec(), arch=arch)
    (batch,) = micro_batches(UNEVEN, ["a"], 9, packed=True)
    objective = Objective(cohort.model, cohort, fast=False, packs=True)
    assert batch.starts is not None
    with torch.no_grad(), objective.at(batch, shares_of(batch)):
        logits = cohort.model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits[0]
    for item, start, length in zip(batch.items, batch.starts, batch.lengths, strict=False):
        ids = torch.tensor([UNEVEN[item.row].input_ids])
        with torch.no_grad(), plain.using("a"):
            alone = plain.model(input_ids=ids).logits[0]
        assert float((logits[start : start + length] - alone).abs().max()) < 2e-5


def test_trap22_and_trap23_no_label_crosses_a_boundary_and_none_is_lost() -> None:
    rows = [Row(r.input_ids, [True] * len(r.input_ids)) for r in UNEVEN]
    (batch,) = micro_batches(rows, ["a"], 9, packed=True)
    single_rows = micro_batches(rows, ["a"], 1)
    assert batch.starts is not None
    # The token that predicts stands in the row of the one predicted.
    row_of = torch.bucketize(batch.positions, torch.tensor(batch.starts), right=True)
    label_row = torch.bucketize(batch.positions + 1, torch.tensor(batch.starts), right=True)
    assert torch.equal(row_of, label_row)
    assert len(batch.labels) == sum(len(row_batch.labels) for row_batch in single_rows)
    assert batch.tokens == sum(row_batch.tokens for row_batch in single_rows)


def test_packing_is_left_where_attention_looks_across_rows_and_that_is_said() -> None:
    cohort = cohort_of(random_spec())  # PyTorch's own attention knows nothing of packed rows
    objective = Objective(cohort.model, cohort, packs=True)
    (batch,) = micro_batches(UNEVEN, ["a"], 9, packed=True)
    with_none = batch.position_ids
    assert with_none is not None
    # From 0 to N, as if the rows were one: transformers would tell rows apart by their positions.
    batch = replace(batch, position_ids=torch.arange(with_none.shape[1])[None])
    assert objective.verify(batch, shares_of(batch))
    assert not objective.packs
    assert "looks across rows" in objective.packing_reason
    assert objective.fast, objective.reason


def test_trap2_a_last_partial_window_is_divided_by_its_own_count() -> None:
    cohort = cohort_of(random_spec())
    expected_loss, expected = full_batch(cohort, "a", UNEVEN[4:])
    report, members = one_step(cohort, UNEVEN[4:], 4)
    assert report["a"].loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close(gradients(members["a"]), expected)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_trap4_every_kind_of_loss_is_normalised_alike(arch: str, fast: bool) -> None:
    cohort = cohort_of(random_spec(), arch=arch)
    _, expected = full_batch(cohort, "a", UNEVEN)
    objective = Objective(cohort.model, cohort, fast=fast)
    _, members = one_step(cohort, UNEVEN, 2, objective=objective)
    assert_close(gradients(members["a"]), expected)


@pytest.mark.parametrize("max_rows", [6, 3, 2])
def test_trap5_the_logged_loss_is_the_token_mean(max_rows: int) -> None:
    cohort = cohort_of(random_spec())
    expected_loss, _ = full_batch(cohort, "a", UNEVEN)
    report, _ = one_step(cohort, UNEVEN, max_rows)
    assert report["a"].loss == pytest.approx(expected_loss, rel=1e-5)
    assert report["a"].supervised_tokens == sum(sum(r.supervised[1:]) for r in UNEVEN)
    assert report["a"].tokens == sum(len(r.input_ids) for r in UNEVEN)


def test_trap6_a_step_without_supervised_tokens_stops_with_the_reason() -> None:
    cohort = cohort_of(random_spec())
    before = {k: v.clone() for k, v in cohort.parameters("a").items()}
    with pytest.raises(UserError, match="without one supervised token"):
        one_step(cohort, [Row([5, 6, 7], [False] * 3)], 1)
    assert all(torch.equal(before[k], v) for k, v in cohort.parameters("a").items())


def test_trap7_labels_are_shifted_once() -> None:
    """A model that always says the next token is its input plus one has no loss on such rows."""
    cohort = cohort_of(random_spec(), tie_word_embeddings=False, num_hidden_layers=1)
    model: PreTrainedModel = cohort.model
    with torch.no_grad():
        model.base_model.norm.weight.fill_(1.0)
        eye = torch.nn.functional.one_hot(torch.arange(VOCAB) % 32, 32).float()
        model.get_input_embeddings().weight.copy_(eye * 100)  # drowns what the layer adds
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().weight[1:32] = eye[:31] * 10
    ids = list(range(4, 30))
    evaluation = held_out(Objective(model, cohort), [Row(ids, [True] * len(ids))], None, max_rows=1)
    assert evaluation.loss < 1e-3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["lora", "copy"])
def test_trap8_an_adapted_head_learns_through_the_chunked_loss(tied: bool, how: str) -> None:
    spec = (
        random_spec(target_modules=("q_proj", "lm_head"))
        if how == "lora"
        else random_spec(modules_to_save=("lm_head",))
    )
    cohort = cohort_of(spec, tie_word_embeddings=tied)
    _, expected = full_batch(cohort, "a", UNEVEN)
    _, members = one_step(cohort, UNEVEN, 2)
    actual = gradients(members["a"])
    assert any("lm_head" in key and bool(value.any()) for key, value in actual.items())
    assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_adapter_in_a_cohort_learns_as_it_does_alone(arch: str) -> None:
    specs = [random_spec("a", 4, seed=1), random_spec("b", 8, seed=2)]
    together = cohort_of(*specs, arch=arch)
    report, _ = one_step(together, UNEVEN, 4)
    for spec in specs:
        alone = cohort_of(spec, arch=arch)
        single, _ = one_step(alone, UNEVEN, 4)
        assert report[spec.name].loss == pytest.approx(single[spec.name].loss, rel=1e-5)
        assert report[spec.name].grad_norm == pytest.approx(single[spec.name].grad_norm, rel=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ("v_proj", "up_proj", "down_proj")])
def test_dropout_in_a_cohort_is_the_dropout_alone(targets: str | tuple[str, ...]) -> None:
    """Layers that read one tensor share a mask, whichever of them an adapter changes."""
    specs = [random_spec("a", 4, seed=1, dropout=0.3),
             random_spec("b", 8, seed=2, dropout=0.1, target_modules=targets)]  # fmt: skip
    report, _ = one_step(cohort_of(*specs), UNEVEN, 5)
    for spec in specs:
        single, _ = one_step(cohort_of(spec), UNEVEN, 2)
        assert report[spec.name].loss == pytest.approx(single[spec.name].loss, rel=1e-5)
    without, _ = one_step(cohort_of(random_spec("a", 4, seed=1)), UNEVEN, 2)
    assert abs(without["a"].loss - report["a"].loss) > 1e-3


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_trap35_recomputed_layers_give_the_same_gradients_and_none_is_zero(arch: str) -> None:
    specs = [random_spec("a", 4, seed=1, dropout=0.2), random_spec("b", 8, seed=2)]
    plain, plain_members = one_step(cohort_of(*specs, arch=arch), UNEVEN, 3)
    cohort = cohort_of(*specs, arch=arch)
    assert checkpoint_layers(cohort.model) == 2
    saved, members = one_step(cohort, UNEVEN, 3)
    for name in ("a", "b"):
        assert saved[name].loss == plain[name].loss
        assert saved[name].grad_norm > 0
        actual, expected = gradients(members[name]), gradients(plain_members[name])
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_trap35_an_adapter_without_a_gradient_stops_the_run() -> None:
    cohort = cohort_of(AdapterSpec("a", init_lora_weights=True))
    with torch.no_grad():
        for layer in cohort.linears.values():
            layer.lora_A["a"].zero_()
    with pytest.raises(UserError, match="has no gradient at its first step"):
        one_step(cohort, UNEVEN, 2)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_no_number_stops_before_the_optimiser_moves(where: str) -> None:
    cohort = cohort_of(random_spec())
    with torch.no_grad():
        if where == "loss":
            next(iter(cohort.parameters("a").values()))[0, 0] = float("nan")
    if where == "gradient":
        parameter = next(iter(cohort.parameters("a").values()))
        parameter.register_hook(lambda grad: grad * float("inf"))
    before = {k: v.clone() for k, v in cohort.parameters("a").items()}
    with pytest.raises(TrainingDiverged, match="the weights were not changed"):
        one_step(cohort, UNEVEN, 2)
    after = cohort.parameters("a")
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)


def test_trap42_a_skipped_float16_step_moves_neither_weights_nor_schedule() -> None:
    cohort = cohort_of(random_spec(), dtype=torch.float16)
    scaler = LossScaler(initial=2.0**40)
    before = {k: v.clone() for k, v in cohort.parameters("a").items()}
    report, members = one_step(
        cohort, UNEVEN, 3, scaler=scaler, lr_scheduler_type="linear", total_steps=4
    )
    assert report["a"].skipped
    assert members["a"].progress.steps == 0
    assert members["a"].learning_rate == pytest.approx(1e-2)
    assert all(torch.equal(before[k], v) for k, v in cohort.parameters("a").items())
    assert scaler.factor("a") < 2.0**40


def test_float16_with_a_scaler_learns_what_float32_learns() -> None:
    plain, _ = one_step(cohort_of(random_spec()), UNEVEN, 3)
    scaler = LossScaler(initial=2.0**8)
    half, members = one_step(cohort_of(random_spec(), dtype=torch.float16), UNEVEN, 3,
                             scaler=scaler)  # fmt: skip
    assert not half["a"].skipped
    assert members["a"].progress.steps == 1
    assert half["a"].loss == pytest.approx(plain["a"].loss, rel=5e-3)
    assert half["a"].grad_norm == pytest.approx(plain["a"].grad_norm, rel=2e-2)


def two_in_float16(a: float = 2.0**8, b: float = 2.0**8) -> tuple[Cohort, LossScaler]:
    specs = [random_spec("a", 4, seed=1), random_spec("b", 8, seed=2)]
    scaler = LossScaler()
    scaler.load_state_dict({"a": {"scale": a}, "b": {"scale": b}})
    return cohort_of(*specs, dtype=torch.float16), scaler


@pytest.mark.parametrize("merged", [False, True])
def test_one_adapters_overflow_in_float16_leaves_the_other_as_it_learns_alone(
    merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "launches_cost", lambda _: merged)  # as on a GPU
    cohort, scaler = two_in_float16(a=2.0**40)
    before = {k: v.clone() for k, v in cohort.parameters("a").items()}
    report, members = one_step(cohort, UNEVEN, 3, scaler=scaler)
    assert (report["a"].skipped, report["b"].skipped) == (True, False)
    assert [members[name].progress.steps for name in "ab"] == [0, 1]
    assert all(torch.equal(before[k], v) for k, v in cohort.parameters("a").items())
    assert (scaler.factor("a"), scaler.factor("b")) == (2.0**39, 2.0**8)
    alone = cohort_of(random_spec("b", 8, seed=2), dtype=torch.float16)
    expected, expected_members = one_step(alone, UNEVEN, 3, scaler=LossScaler(initial=2.0**8))
    # Batches of twelve rows against six: what half precision rounds differs by some of its 2^-11.
    assert report["b"].loss == pytest.approx(expected["b"].loss, rel=2e-3)
    assert_close(gradients(members["b"]), gradients(expected_members["b"]), 1e-2)


def test_adapters_of_unlike_factors_have_their_true_gradients() -> None:
    cohort, scaler = two_in_float16(a=2.0**4, b=2.0**12)
    report, members = one_step(cohort, UNEVEN, 6, scaler=scaler)
    exact = cohort_of(*cohort.specs.values())
    for name in cohort.names:
        expected_loss, expected = full_batch(exact, name, UNEVEN)
        assert report[name].loss == pytest.approx(expected_loss, rel=5e-3)
        norm = torch.stack([value.norm() for value in expected.values()]).norm()
        assert report[name].grad_norm == pytest.approx(float(norm), rel=2e-2)
    assert {name: members[name].progress.steps for name in "ab"} == {"a": 1, "b": 1}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_diverged_adapter_in_float16_is_named_before_any_has_moved(
    order: str, merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "launches_cost", lambda _: merged)  # as on a GPU
    specs = {"a": random_spec("a", 4, seed=1), "b": random_spec("b", 8, seed=2)}
    cohort = cohort_of(*(specs[name] for name in order), dtype=torch.float16)
    with torch.no_grad():
        next(iter(cohort.parameters("b").values()))[0, 0] = float("nan")
    members = [AdapterOptimizer(name, cohort.parameters(name), settings()) for name in cohort.names]
    scaler, objective = LossScaler(initial=2.0**8), Objective(cohort.model, cohort)
    before = {k: v.clone() for k, v in cohort.parameters("a").items()}
    batches = micro_batches(UNEVEN, list(cohort.names), 3)
    with pytest.raises(TrainingDiverged) as caught:
        train_step(batches, members, objective, Accelerator(cpu=True), scaler)
    assert list(caught.value.sentences) == ["b"]
    assert all(torch.equal(before[k], v) for k, v in cohort.parameters("a").items())
    assert scaler.factor("a") == scaler.factor("b") == 2.0**8
    # The step is made again without it, which a GradScaler that has unscaled once refuses.
    for member in members:
        member.optimizer.zero_grad(set_to_none=True)
    remaining = [member for member in members if member.name == "a"]
    report = train_step(micro_batches(UNEVEN, ["a"], 3), remaining, objective,
                        Accelerator(cpu=True), scaler)  # fmt: skip
    assert not report["a"].skipped
    assert remaining[0].progress.steps == 1


def test_a_gradient_that_no_float16_factor_mends_is_a_divergence() -> None:
    cohort, _ = two_in_float16()
    parameter = next(iter(cohort.parameters("a").values()))
    parameter.register_hook(lambda grad: grad * float("inf"))
    scaler = LossScaler(initial=2.0**-9)
    report, _ = one_step(cohort, UNEVEN, 3, scaler=scaler)
    assert report["a"].skipped
    with pytest.raises(TrainingDiverged, match="adapter 'a'"):
        one_step(cohort, UNEVEN, 3, scaler=scaler)


def test_factors_come_back_from_checkpoints() -> None:
    scaler = LossScaler(initial=4.0)
    scaler.update("a", finite=False)
    scaler.update("b", finite=True)
    restored = LossScaler()
    restored.load_state_dict(scaler.state_dict())
    assert (restored.factor("a"), restored.factor("b")) == (2.0, 4.0)
    assert restored.state_dict() == scaler.state_dict()
    growing = LossScaler(initial=4.0)
    for _ in range(2000):
        growing.update("a", finite=True)
    assert growing.factor("a") == 8.0


def test_clipping_is_per_adapter() -> None:
    specs = [random_spec("a", 4, seed=1), random_spec("b", 8, seed=2)]
    free, members = one_step(cohort_of(*specs), UNEVEN, 6)
    clipped, clipped_members = one_step(cohort_of(*specs), UNEVEN, 6, max_grad_norm=0.5)
    for name in ("a", "b"):
        assert clipped[name].grad_norm == pytest.approx(free[name].grad_norm)
        scale = 0.5 / free[name].grad_norm
        assert scale < 1
        expected = {key: value * scale for key, value in gradients(members[name]).items()}
        assert_close(gradients(clipped_members[name]), expected, 1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_fast_loss_agrees_with_every_architecture(arch: str) -> None:
    cohort = cohort_of(random_spec(), arch=arch)
    objective = Objective(cohort.model, cohort)
    batch = micro_batches(UNEVEN, ["a"], 6)[0]
    objective.verify(batch, shares_of(batch))
    assert objective.fast, objective.reason
    assert "from the model's own loss" in objective.reason


def test_an_unknown_treatment_of_logits_falls_back_to_the_models_own_and_says_so() -> None:
    cohort = cohort_of(random_spec(), arch="gemma2")
    objective = Objective(cohort.model, cohort)
    objective.rule = type(objective.rule)()  # as if the soft cap were not known
    batch = micro_batches(UNEVEN, ["a"], 6)[0]
    objective.verify(batch, shares_of(batch))
    assert not objective.fast
    assert "does something to its logits" in objective.reason
    _, expected = full_batch(cohort, "a", UNEVEN)
    _, members = one_step(cohort, UNEVEN, 6, objective=objective)
    assert_close(gradients(members["a"]), expected)


def test_trap44_held_out_loss_is_total_over_total_with_its_standard_error() -> None:
    cohort = cohort_of(random_spec())
    expected_loss, _ = full_batch(cohort, "a", UNEVEN)
    evaluation = held_out(Objective(cohort.model, cohort), UNEVEN, "a", max_rows=2)
    assert evaluation.loss == pytest.approx(expected_loss, rel=1e-5)
    assert evaluation.tokens == tuple(sum(r.supervised[1:]) for r in UNEVEN)
    # The spread of the ratio over many resamples of whole rows is what the error estimates.
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(0, 6, (20000, 6), generator=generator)
    nll, tokens = torch.tensor(evaluation.nll), torch.tensor(evaluation.tokens)
    spread = float((nll[draws].sum(1) / tokens[draws].sum(1)).std())
    assert evaluation.standard_error == pytest.approx(spread, rel=0.35)


def test_trap28_two_evaluations_are_identical_with_dropout_set() -> None:
    cohort = cohort_of(random_spec(dropout=0.5))
    objective = Objective(cohort.model, cohort)
    evaluation = held_out(objective, UNEVEN, "a", max_rows=2)
    assert evaluation == held_out(objective, UNEVEN, "a", max_rows=2)
    assert evaluation.loss != held_out(objective, UNEVEN, None, max_rows=2).loss


def test_trap37_no_key_value_cache_is_kept_while_training() -> None:
    cohort = cohort_of(random_spec())
    caches = []
    cohort.model.base_model.register_forward_hook(
        lambda module, args, out: caches.append(out.past_key_values)
    )
    used_before = cohort.model.config.use_cache
    one_step(cohort, UNEVEN, 6)
    assert caches == [None]
    assert cohort.model.config.use_cache == used_before
