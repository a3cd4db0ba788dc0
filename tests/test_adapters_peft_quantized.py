"""PEFT's methods on quantised bases against the same on the base's dense twin (traps 30, 31)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lighten
from lighten.adapters import AdapterSpec, Cohort, attach, load
from lighten.adapters.frozen import is_quantized
from lighten.errors import UserError
from lighten.models.quantized import Storage, finish
from tests.test_adapters_peft import (
    IDS,
    METHODS,
    PROMPTS,
    UNMERGED,
    logits_of,
    lora_spec,
    peft_spec,
    relative_difference,
    save,
    stir,
)
from tests.test_adapters_quantized import dense_twin, quantised
from tests.test_adapters_starts import STARTS
from tests.test_train_step import UNEVEN, assert_close, gradients, one_step
from tests.tiny import tiny_model

# The int8 product rounds once where the twin's does not; what follows adds to that.
CLOSE = 3e-5
NF4 = Storage("nf4", double=True)
PLAIN_ONLY = "GLORA"  # it asks for nn.Linear itself and takes nothing that is like it
CASES = [
    *(("llama", NF4, peft_spec(method)) for method in sorted(METHODS) if method != PLAIN_ONLY),
    *((arch, storage, lora_spec(**start)) for arch in ("llama", "gpt2")
      for storage in (NF4, Storage("int8")) for start in STARTS),
    ("gpt2", Storage("int8"), peft_spec("IA3")),
    ("llama", NF4, peft_spec("VERA", target_modules="all-linear")),
]  # fmt: skip


def quantised_modules(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if is_quantized(module)]


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize(("arch", "storage", "spec"), CASES)
def test_trap30_and_trap31_a_method_on_a_quantised_base_is_the_one_on_its_dense_twin(
    arch: str, storage: Storage, spec: AdapterSpec, tmp_path: Path
) -> None:
    base = quantised(arch, storage)
    plain, places = base(input_ids=IDS).logits.detach(), quantised_modules(base)
    twin = attach(dense_twin(base, arch), [spec])
    cohort = attach(base, [spec])
    assert torch.equal(logits_of(cohort, None), plain)
    for side in (cohort, twin):
        stir(side)
    assert relative_difference(logits_of(cohort, "a"), logits_of(twin, "a")) < CLOSE

    (ours, our_members), (theirs, their_members) = (
        one_step(side, UNEVEN, 3) for side in (cohort, twin)
    )
    assert ours["a"].loss == pytest.approx(theirs["a"].loss, rel=1e-5)
    assert ours["a"].grad_norm > 0
    assert_close(gradients(our_members["a"]), gradients(their_members["a"]), 1e-3)

    tuned = logits_of(cohort, "a")
    folder = save(cohort, tmp_path / "a")
    again = load(quantised(arch, storage), {"a": folder})
    assert relative_difference(logits_of(again, "a"), tuned) < CLOSE
    assert torch.equal(logits_of(cohort, None), plain)
    method = spec.peft["peft_type"] if spec.peft else None
    if method in (*PROMPTS, *UNMERGED):
        back = cohort.detach()
        assert quantised_modules(back) == places
        assert torch.equal(back(input_ids=IDS).logits, plain)
        return
    merged_equals(cohort, arch, storage, tuned)
    back = again.detach()
    assert quantised_modules(back) == places
    assert torch.equal(back(input_ids=IDS).logits, plain)


def test_the_method_that_takes_plain_layers_alone_says_so() -> None:
    with pytest.raises(UserError, match=r"GLORA cannot train this base: .*not a plain torch"):
        attach(quantised("llama", NF4), [peft_spec(PLAIN_ONLY)])


def merged_equals(cohort: Cohort, arch: str, storage: Storage, tuned: torch.Tensor) -> None:
    """Merged into the dequantised weights, not one layer left in few bits, and it is said."""
    merged = cohort.fuse("a")
    assert relative_difference(merged(input_ids=IDS).logits, tuned) < 1e-4
    assert not quantised_modules(merged)
    assert merged.config.merged_base == f"{storage} weights dequantised to float32"
    like = tiny_model(arch)
    assert {k: v.shape for k, v in merged.state_dict().items()} == {
        k: v.shape for k, v in like.state_dict().items()
    }
    assert [type(m) for m in merged.modules()] == [type(m) for m in like.modules()]
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


@pytest.mark.parametrize("start", [*STARTS, {"peft": {"peft_type": "IA3"}}])
def test_trap26_a_quantised_base_of_half_precision_gets_float32_weights(
    start: dict[str, Any],
) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    finish(model, Storage("nf4"), torch.bfloat16, "cpu")
    cohort = attach(model, [lora_spec(**start)])
    report, members = one_step(cohort, UNEVEN, 3)
    exact, _ = one_step(attach(quantised("llama", Storage("nf4")), [lora_spec(**start)]), UNEVEN, 3)
    assert report["a"].loss == pytest.approx(exact["a"].loss, rel=0.05)
    assert {p.dtype for p in members["a"].parameters.values()} == {torch.float32}
    tuned = logits_of(cohort, "a")
    assert tuned.dtype == torch.bfloat16
    merged = cohort.fuse("a")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert relative_difference(merged(input_ids=IDS).logits.float(), tuned.float()) < 0.05


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_modules_to_save_beside_dora_are_dense_copies_of_the_quantised(arch: str) -> None:
    saved_module = "c_fc" if arch == "gpt2" else "up_proj"
    spec = lora_spec(
        use_dora=True, modules_to_save=(saved_module,), target_modules=("q_proj", "c_attn")
    )  # fmt: skip
    cohort = attach(quantised(arch, NF4), [spec])
    saved_parameters = {
        k: v for k, v in cohort.parameters("a").items() if saved_module in k and "weight" in k
    }
    like = dict(tiny_model(arch).named_parameters())
    assert len(saved_parameters) == 2
    for key, value in saved_parameters.items():
        assert value.shape == like[key.removeprefix("base_model.model.")].shape
    stir(cohort)
    tuned = logits_of(cohort, "a")
    merged_equals(cohort, arch, NF4, tuned)


def test_a_run_of_dora_in_four_bits_is_evaluated_on_the_base_that_it_saw(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    run = lighten.train(
        model=str(tiny_folder), dataset=str(chat_file), output_dir=str(tmp_path / "run"),
        use_dora=True, load_in_4bit=True, dtype="float32", max_steps=3, learning_rate=1e-2,
        val_size=0.2, progress=False,
    )  # fmt: skip
    last_loss = [m["loss"] for m in run.metrics() if m["kind"] == "eval"][-1]
    evaluation = lighten.evaluate(run, max_new_tokens=2)
    assert evaluation.metric("default", "loss")["value"] == pytest.approx(last_loss, rel=1e-4)
    (adapter,) = run.info()["adapters"]
    assert (adapter["method"], adapter["serving"]) == ("DoRA", "merge it for vLLM")
