"""Optimisers against their formulas, their resume, LoRA+, and what gets a state at all."""

from __future__ import annotations

import importlib.util
import math
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load, load_file, save
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import lighten
from lighten.adapters import Cohort, WholeBase, attach
from lighten.adapters.peft_backed import PeftBacked
from lighten.engine import optimizers
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.engine.loss import Objective
from lighten.engine.scaling import LossScaler
from lighten.engine.step import train_step
from lighten.errors import MissingExtra
from lighten.recipe import Recipe, RecipeError
from lighten.recipe.fields import Optimizer
from lighten.training import checkpoints
from tests.test_adapters_peft import METHODS, lora_spec, peft_spec
from tests.test_train_step import UNEVEN, cohort_of, micro_batches, random_spec, settings
from tests.tiny import ARCHITECTURES, tiny_model

NAMES = get_args(Optimizer)
CPU = sorted({optimizers.choose(name, "cpu").value for name in NAMES})
A, B = "m.q.lora_A.weight", "m.q.lora_B.weight"


def member_of(
    optim: str, start: dict[str, nn.Parameter] | None = None, **changes: Any
) -> AdapterOptimizer:
    """Large enough for 8-bit states in A and too small for them in B; not whole blocks of 256."""
    generator = torch.Generator().manual_seed(0)
    shapes = {A: (8, 650), B: (40, 8)}
    values = {k: torch.randn(shape, generator=generator) * 0.1 for k, shape in shapes.items()}
    parameters = start or {key: nn.Parameter(value) for key, value in values.items()}
    return AdapterOptimizer("a", parameters, settings(optim=optim, weight_decay=0.01, **changes))


def move(
    member: AdapterOptimizer, steps: range, device: str = "cpu"
) -> list[dict[str, torch.Tensor]]:
    """Steps under gradients of fixed seeds, and those gradients."""
    grads = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in member.parameters.values():
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        grads.append(
            {k: p.grad.clone() for k, p in member.parameters.items() if p.grad is not None}
        )
        member.optimizer.step()
    return grads


@pytest.mark.parametrize("optim", CPU)
def test_trap38_every_optimiser_resumes_bitwise(optim: str) -> None:
    uninterrupted = member_of(optim)
    move(uninterrupted, range(3))
    parameters = {k: nn.Parameter(v.detach().clone()) for k, v in uninterrupted.parameters.items()}
    saved = save({k: v.contiguous() for k, v in uninterrupted.optimizer_tensors().items()})
    move(uninterrupted, range(3, 6))

    resumed = member_of(optim, parameters)
    resumed.restore_optimizer(load(saved))
    move(resumed, range(3, 6))
    for key, value in uninterrupted.parameters.items():
        assert torch.equal(resumed.parameters[key], value)

    if optim != "sgd":  # it remembers nothing
        forgetful = member_of(optim, {k: nn.Parameter(load(save({"p": v.detach()}))["p"])
                                      for k, v in parameters.items()})  # fmt: skip
        move(forgetful, range(3, 6))
        move(resumed, range(6, 7))
        assert not torch.equal(forgetful.parameters[A], uninterrupted.parameters[A])


def adamw(p: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    exp_avg, exp_avg_sq = torch.zeros_like(p), torch.zeros_like(p)
    for step, grad in enumerate(grads, 1):
        exp_avg, exp_avg_sq = 0.9 * exp_avg + 0.1 * grad, 0.999 * exp_avg_sq + 0.001 * grad**2
        unbiased = exp_avg / (1 - 0.9**step), exp_avg_sq / (1 - 0.999**step)
        p = p * (1 - 1e-2 * 0.01) - 1e-2 * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    return p


def lion(p: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    exp_avg = torch.zeros_like(p)
    for grad in grads:
        p = p * (1 - 1e-2 * 0.01) - 1e-2 * (0.9 * exp_avg + 0.1 * grad).sign()
        exp_avg = 0.999 * exp_avg + 0.001 * grad
    return p


def sgd(p: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    for grad in grads:
        p = p - 1e-2 * (grad + 0.01 * p)
    return p


def adafactor(p: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    rows, columns = torch.zeros(p.shape[0]), torch.zeros(p.shape[1])
    for step, grad in enumerate(grads, 1):
        keep = 1 - step**-0.8
        square = grad**2 + 1e-30
        rows = keep * rows + (1 - keep) * square.mean(1)
        columns = keep * columns + (1 - keep) * square.mean(0)
        update = grad / (rows[:, None] * columns[None] / rows.mean()).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        p = p * (1 - 1e-2 * 0.01) - 1e-2 * update
    return p


@pytest.mark.parametrize(
    ("optim", "formula", "tolerance"),
    [("adamw_torch", adamw, 1e-6), ("lion_32bit", lion, 1e-6), ("sgd", sgd, 1e-6),
     ("adafactor", adafactor, 1e-6),
     # Moments of 256 levels per block move each number a little differently, by far less than
     # the three steps of 0.01 themselves. Lion's sign may turn where the sum is nearly zero.
     ("adamw_8bit", adamw, 2e-3), ("lion_8bit", lion, 2.1e-2)],
)  # fmt: skip
def test_every_optimiser_is_its_formula(optim: str, formula: Any, tolerance: float) -> None:
    member = member_of(optim)
    starts = {key: value.detach().clone() for key, value in member.parameters.items()}
    grads = move(member, range(3))
    for key, start in starts.items():
        expected = formula(start, [step_grads[key] for step_grads in grads])
        difference = (member.parameters[key].detach() - expected).abs()
        assert float((expected - start).abs().max()) > 1e-2
        assert float(difference.max()) < tolerance
        assert float(difference.mean()) < 5e-4


def test_an_8bit_state_is_a_quarter_of_the_32bit_one() -> None:
    def state_bytes(optim: str) -> int:
        member = member_of(optim)
        move(member, range(1))
        state = optimizers.state_tensors(member.optimizer, member.parameters[A])
        return sum(v.nbytes for v in state.values() if v.dim() > 0)

    assert state_bytes("adamw_8bit") < 0.27 * state_bytes("adamw_torch")
    assert state_bytes("lion_8bit") < 0.14 * state_bytes("adamw_torch")
    assert state_bytes("adafactor") < 0.08 * state_bytes("adamw_torch")


def test_names_that_mean_the_same_and_paging_without_a_gpu_are_said() -> None:
    assert optimizers.choose("adamw_bnb_8bit", "cpu").value == "adamw_8bit"
    assert optimizers.choose("adamw_torch_fused", "cpu").value == "adamw_torch"
    for name in (n for n in NAMES if n.startswith("paged_")):
        choice = optimizers.choose(name, "cpu")
        assert "paged" not in choice.value
        assert "there is no GPU" in choice.reason
        assert optimizers.choose(name, "cuda").value == name


def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, chat_file: Path, tmp_path: Path
) -> None:
    plain = importlib.util.find_spec

    def without(name: str, *args: Any) -> Any:
        return None if name == "bitsandbytes" else plain(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(MissingExtra, match=r"bitsandbytes.*lighten\[quant\]"):
        lighten.train(  # told before the model is looked for
            model="nowhere", dataset=str(chat_file), optim="adamw_8bit", progress=False,
            output_dir=str(tmp_path / "run"),
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
    assert optimizers.choose("paged_adamw_32bit", "cpu").value == "adamw_torch"


@pytest.mark.parametrize(
    ("optim", "unread"),
    [("sgd", "adam_beta1"), ("adafactor", "adam_epsilon"), ("lion_8bit", "adam_epsilon")],
)
def test_settings_that_an_optimiser_does_not_read_are_refused(
    optim: str, unread: str, chat_file: Path
) -> None:
    values = {"model": "m", "dataset": str(chat_file), "optim": optim}
    with pytest.raises(RecipeError, match=f"{unread} has no effect with optim: {optim}"):
        Recipe.from_values({**values, unread: 0.5})
    Recipe.from_values({**values, "weight_decay": 0.1})


def test_a_whole_run_with_8bit_states_resumes_bitwise(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    def train(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
        run = lighten.train(
            model=str(tiny_folder), dataset=str(chat_file), output_dir=str(folder), max_steps=4,
            save_steps=2, lora_r=[2, 96], optim="adamw_8bit", loraplus_lr_ratio=4.0, val_size=0,
            progress=False, **changes,
        )  # fmt: skip
        choices = {choice["what"]: choice["value"] for choice in run.info()["choices"]}
        assert choices["optimizer"] == "adamw_8bit"
        return load_file(run.adapters()["r96"] / "adapter_model.safetensors")

    uninterrupted = train(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (newest := checkpoints.listing(tmp_path / "cut" / "checkpoints")[-1]).rename(tmp_path / "off")
    assert newest.name == "checkpoint-4"
    shutil.rmtree(tmp_path / "cut" / "adapters")
    resumed = train(tmp_path / "cut", resume=True)
    assert all(torch.equal(resumed[key], uninterrupted[key]) for key in uninterrupted)


def steps_of(cohort: Cohort, count: int, **changes: Any) -> AdapterOptimizer:
    member = AdapterOptimizer("a", cohort.parameters("a"), settings(**changes))
    for _ in range(count):
        train_step(
            micro_batches(UNEVEN, ["a"], 6), [member], Objective(cohort.model, cohort),
            Accelerator(cpu=True), LossScaler(enabled=False),
        )  # fmt: skip
    return member


def test_loraplus_is_plain_adamw_over_two_groups_with_the_schedule_on_both() -> None:
    course: dict[str, Any] = {"lr_scheduler_type": "linear", "warmup": 1, "total_steps": 4}
    course["learning_rate"] = 1e-3
    member = steps_of(cohort_of(random_spec()), 3, loraplus_lr_ratio=16.0, **course)

    cohort = cohort_of(random_spec())
    parameters = cohort.parameters("a")
    plain = torch.optim.AdamW(
        [{"params": [p for k, p in parameters.items() if "lora_A" in k], "lr": 1e-3},
         {"params": [p for k, p in parameters.items() if "lora_B" in k], "lr": 16e-3}],
        weight_decay=0.0,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(plain, lambda s: min(1.0, (4 - s) / 3))
    for _ in range(3):
        (batch,) = micro_batches(UNEVEN, ["a"], 6)
        with cohort.using("a"):
            logits = cohort.model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions]
        nn.functional.cross_entropy(logits, batch.labels).backward()
        plain.step()
        plain.zero_grad()
        schedule.step()
    for key, value in member.parameters.items():
        assert torch.allclose(value, parameters[key], atol=5e-5), key


def test_loraplus_groups_are_pefts() -> None:
    config = LoraConfig(r=4, target_modules="all-linear")
    peft = get_peft_model(tiny_model("llama"), config)
    optimizer = create_loraplus_optimizer(peft, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)  # type: ignore[arg-type]
    names = {id(p): n.replace(".default", "") for n, p in peft.named_parameters()}
    expected = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}

    member = AdapterOptimizer(
        "a", cohort_of(random_spec()).parameters("a"),
        settings(learning_rate=1e-3, loraplus_lr_ratio=8.0),
    )  # fmt: skip
    keys = {id(p): key for key, p in member.parameters.items()}
    rates = {keys[id(p)]: g["lr"] for g in member.optimizer.param_groups for p in g["params"]}
    assert rates == pytest.approx(expected)
    assert set(rates.values()) == {1e-3, 8e-3}


def test_loraplus_differs_per_adapter_and_has_its_other_name(chat_file: Path) -> None:
    recipe = Recipe.from_values(
        {"model": "m", "dataset": str(chat_file), "lorap_lr_ratio": 4.0,
         "adapters": [{"name": "a"}, {"name": "b", "loraplus_lr_ratio": 16.0}]}
    )  # fmt: skip
    assert [adapter.loraplus_lr_ratio for adapter in recipe.cohort()] == [4.0, 16.0]


def decayed_by_trainer(model: nn.Module) -> set[int]:
    """Which parameters transformers' Trainer lets decay, by id: it may name a tied one twice."""
    names = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    return {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in names}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_norms_and_biases_of_the_whole_base_do_not_decay_as_transformers_has_it(arch: str) -> None:
    base = WholeBase(tiny_model(arch), dtype=torch.float32)
    decay = decayed_by_trainer(base.model)
    parameters = base.parameters("default")
    undecayed = base.undecayed("default")
    assert undecayed == {key for key, p in parameters.items() if id(p) not in decay}
    assert 0 < len(undecayed) < len(parameters)


@pytest.mark.parametrize(
    ("arch", "saved_modules", "undecayed"),
    [("llama", ("model.norm", "lm_head"), 1), ("gpt2", ("ln_f", "c_proj"), 6),
     ("opt", ("final_layer_norm", "embed_tokens"), 6), ("qwen3", ("q_norm",), 2)],
)  # fmt: skip
def test_weight_decay_of_an_adapter_falls_where_trainer_lets_it_fall_in_peft(
    arch: str, saved_modules: tuple[str, ...], undecayed: int
) -> None:
    targets = ("c_attn",) if arch == "gpt2" else ("q_proj", "v_proj")
    peft_model = get_peft_model(
        tiny_model(arch),
        LoraConfig(target_modules=list(targets), modules_to_save=list(saved_modules), r=4),
    )
    decay = decayed_by_trainer(peft_model)
    expected = {
        name.replace(".modules_to_save", "").replace(".default", "")
        for name, p in peft_model.named_parameters()
        if p.requires_grad and id(p) not in decay
    }
    cohort = cohort_of(
        random_spec(target_modules=targets, modules_to_save=saved_modules), arch=arch
    )
    assert cohort.undecayed("a") == expected
    assert len(expected) == undecayed
    assert not any("lora_" in key for key in expected)


@pytest.mark.parametrize("method", [*sorted(METHODS), None])
def test_weight_decay_of_pefts_methods_falls_where_trainer_lets_it_fall(method: str | None) -> None:
    dora = lora_spec(use_dora=True, modules_to_save=("norm",))
    cohort = attach(tiny_model("llama"), [dora if method is None else peft_spec(method)])
    assert isinstance(cohort, PeftBacked)
    decay = decayed_by_trainer(cohort._peft)
    parameters = cohort.parameters("a")
    expected = {key for key, p in parameters.items() if id(p) not in decay}
    assert cohort.undecayed("a") == expected
    if method in (None, "LN_TUNING", "P_TUNING"):
        assert expected


@pytest.mark.parametrize("optim", CPU)
def test_what_does_not_decay_stays_where_there_is_no_gradient(optim: str) -> None:
    member = member_of(optim, loraplus_lr_ratio=2.0)
    before = {key: p.detach().clone() for key, p in member.parameters.items()}
    member.undecayed = frozenset({B})
    member.__post_init__()
    for p in member.parameters.values():
        p.grad = torch.zeros_like(p)
    member.optimizer.step()
    after = member.parameters
    assert torch.equal(after[B], before[B])
    assert torch.allclose(after[A], before[A] * (1 - 1e-2 * 0.01), rtol=1e-6)
    assert not torch.equal(after[A], before[A])


def test_a_run_of_the_whole_base_decays_its_matrices_alone(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    def train(weight_decay: float) -> dict[str, torch.Tensor]:
        run = lighten.train(
            model=str(tiny_folder), dataset=str(chat_file), max_steps=1, val_size=0, method="full",
            weight_decay=weight_decay, output_dir=str(tmp_path / str(weight_decay)),
            dtype="float32", progress=False,
        )  # fmt: skip
        return load_file(run.folder / "model" / "model.safetensors")

    without, decayed = train(0.0), train(10.0)
    for key, value in without.items():
        assert torch.equal(value, decayed[key]) == ("norm" in key), key


def test_only_adapters_have_gradients_and_optimiser_state() -> None:
    cohort = cohort_of(random_spec("a"), random_spec("b", modules_to_save=("lm_head",)))
    members = [AdapterOptimizer(name, cohort.parameters(name), settings()) for name in cohort.names]
    adapter_ids = {id(p) for member in members for p in member.parameters.values()}
    at_step: set[int] = set()

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert not [n for n, p in cohort.model.named_parameters() if p.grad is not None]
        at_step.update(id(p) for g in optimizer.param_groups for p in g["params"]
                       if p.grad is not None)  # fmt: skip

    for member in members:
        member.optimizer.register_step_pre_hook(note)
    train_step(
        micro_batches(UNEVEN, list(cohort.names), 3), members, Objective(cohort.model, cohort),
        Accelerator(cpu=True), LossScaler(enabled=False),
    )  # fmt: skip
    assert at_step == adapter_ids
    assert {id(p) for member in members for p in member.optimizer.state} == adapter_ids
    frozen = list(cohort.model.named_parameters())
    assert len(frozen) > 10
    assert not any(p.requires_grad or id(p) in adapter_ids for _, p in frozen)
    assert all(p.grad is None for member in members for p in member.parameters.values())


@pytest.mark.gpu
@pytest.mark.parametrize("optim", NAMES)
def test_gpu_every_optimiser_resumes_bitwise(optim: str) -> None:
    def on_gpu(values: dict[str, Any]) -> dict[str, nn.Parameter]:
        # Large enough to be paged.
        return {k: nn.Parameter(v.detach().clone().cuda()) for k, v in values.items()}

    start = {A: torch.randn(64, 4000), B: torch.randn(40, 8)}
    name = optimizers.choose(optim, "cuda").value
    uninterrupted = member_of(name, on_gpu(start))
    move(uninterrupted, range(3), "cuda")
    resumed = member_of(name, on_gpu(uninterrupted.parameters))
    saved = save({k: v.cpu().contiguous() for k, v in uninterrupted.optimizer_tensors().items()})
    resumed.restore_optimizer({k: v.cuda() for k, v in load(saved).items()})
    for member in (uninterrupted, resumed):
        move(member, range(3, 6), "cuda")
    for key, value in uninterrupted.parameters.items():
        assert torch.equal(resumed.parameters[key], value)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@example(losses=[1.0, 1.0, 0.8, 0.5], patience=3)  # 0.8 - 0.5 is more than 0.3, as it is rounded
@given(losses=st.lists(st.floats(0.1, 3.0), min_size=1, max_size=12), patience=st.integers(1, 3))
def test_patience_and_the_best_are_transformers_own(
    threshold: float, losses: list[float], patience: int
) -> None:
    member = member_of("sgd", early_stopping_patience=patience, early_stopping_threshold=threshold)
    callback = EarlyStoppingCallback(patience, threshold)
    arguments = TrainingArguments(metric_for_best_model="loss", greater_is_better=False)
    state, control = TrainerState(), TrainerControl()
    for step, loss in enumerate(losses, 1):
        callback.on_evaluate(arguments, state, control, {"eval_loss": loss})
        member.note_evaluation(loss, step)
        state.best_metric = min(losses[:step])  # which its Trainer notes after the callback
        assert member.progress.stopped == control.should_training_stop
        assert member.progress.best_loss == state.best_metric
        assert member.progress.best_step == losses.index(state.best_metric) + 1
        if member.progress.stopped:
            break


def test_what_is_no_number_is_never_the_best() -> None:
    member = member_of("sgd", early_stopping_patience=2)
    for step, loss in enumerate([math.nan, math.inf, 2.0, math.nan, 1.0], 1):
        member.note_evaluation(loss, step)
    assert (member.progress.best_loss, member.progress.best_step) == (1.0, 5)
