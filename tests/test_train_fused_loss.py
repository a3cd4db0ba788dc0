"""One operation for losses and gradients: on CUDA devices and in a processor's kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lighten.adapters import Cohort
from lighten.engine import fused_loss
from lighten.engine.forward_backward import shares_of
from lighten.engine.fused_loss import cross_entropy_, plain
from lighten.engine.loss import Objective
from tests.kernels import each_kernel
from tests.test_train_step import (
    UNEVEN,
    assert_close,
    cohort_of,
    full_batch,
    gradients,
    micro_batches,
    one_step,
)
from tests.test_train_step import random_spec as spec
from tests.tiny import VOCAB, tiny_config, tiny_model

RULES = [(1.0, 0.0), (0.25, 0.0), (1.0, 30.0), (2.0, 5.0)]


def autograd(logits: Tensor, labels: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Losses and gradients as autograd finds them in float64."""
    raw = logits.double().requires_grad_(True)
    final = raw * scale
    final = torch.tanh(final / softcap) * softcap if softcap else final
    nll = torch.nn.functional.cross_entropy(final, labels, reduction="none")
    (gradients,) = torch.autograd.grad(nll.sum(), raw)
    return nll.detach(), gradients


def problem(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3.0 * torch.randn(37, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(0, vocabulary, (37,), generator=generator)
    labels[0], labels[1] = 0, vocabulary - 1
    return logits, labels


@pytest.mark.parametrize(("scale", "softcap"), RULES)
def test_gradients_are_those_of_autograd(scale: float, softcap: float) -> None:
    logits, labels = problem(300, torch.float32)
    nll, gradients = autograd(logits, labels, scale, softcap)
    plain_nll = plain(logits, labels, scale, softcap)
    torch.testing.assert_close(plain_nll.double(), nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradients, rtol=1e-4, atol=1e-6)


@each_kernel
@pytest.mark.parametrize("vocabulary", [300, 4099])
@pytest.mark.parametrize(("scale", "softcap"), RULES)
def test_the_processors_kernel_rounds_once(
    scale: float, softcap: float, vocabulary: int, dtype: torch.dtype
) -> None:
    rounding = {torch.bfloat16: 2**-8, torch.float32: 1e-5}[dtype]
    logits, labels = problem(vocabulary, dtype)
    nll, gradients = autograd(logits, labels, scale, softcap)
    kernel_nll = cross_entropy_(logits, labels, scale, softcap)
    torch.testing.assert_close(kernel_nll.double(), nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradients, rtol=rounding, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [300, 4096, 128_256])
@pytest.mark.parametrize(("scale", "softcap"), RULES)
def test_the_kernel_computes_what_the_plain_operations_do(
    scale: float, softcap: float, vocabulary: int, dtype: torch.dtype
) -> None:
    logits, labels = (tensor.cuda() for tensor in problem(vocabulary, dtype))
    if (why := fused_loss.obstacle(dtype, logits.device)) is not None:
        assert dtype == torch.bfloat16, why  # which a T4 does not have
        pytest.skip(why)
    plain_logits = logits.clone()
    nll = plain(plain_logits, labels, scale, softcap)
    kernel_nll = cross_entropy_(logits, labels, scale, softcap)
    torch.testing.assert_close(kernel_nll, nll, rtol=1e-4, atol=1e-4)
    rounding = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(logits, plain_logits, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_a_run_for_a_gpu_learns_what_one_for_a_processor_learns(arch: str) -> None:
    plain_report, plain_members = one_step(cohort_of(spec(), arch=arch), UNEVEN, 3)
    cohort = cohort_of(spec(), arch=arch)
    objective = Objective(cohort.model, cohort, device="cuda")
    report, members = one_step(cohort, UNEVEN, 3, objective=objective)
    assert objective.fast, objective.reason
    assert report["a"].loss == pytest.approx(plain_report["a"].loss, rel=1e-5)
    assert_close(gradients(members["a"]), gradients(plain_members["a"]))


def beside_a_tower() -> PreTrainedModel:
    """Gemma 3n and 4 as they are published: the cap is among the decoder's settings."""
    text = tiny_config(
        "gemma4_text", head_dim=8, global_head_dim=16, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=0, final_logit_softcapping=3.0,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma4", text_config=text.to_dict())
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("arch", "changes"),
    [("gemma4", {}), ("hyperclovax", {"logits_scaling": 0.25}),
     ("recurrent_gemma", {"logits_soft_cap": 3.0, "attention_window_size": 64, "lru_width": 32,
                          "num_hidden_layers": 3})],  # the third attends
)  # fmt: skip
def test_what_a_model_does_to_its_logits_is_known(arch: str, changes: dict[str, Any]) -> None:
    """Else whole rows of logits are formed, or a cap that changes the loss little is left out."""
    model = beside_a_tower() if arch == "gemma4" else tiny_model(arch, **changes)
    model.requires_grad_(False)
    with torch.no_grad():  # logits that a cap changes
        model.get_output_embeddings().weight.mul_(8.0)
    cohort = Cohort(model)
    cohort.add(spec())
    objective = Objective(model, cohort)
    (batch,) = micro_batches(UNEVEN, ["a"], 9)
    objective.verify(batch, shares_of(batch))
    assert objective.fast, objective.reason
    expected_loss, expected = full_batch(cohort, "a", UNEVEN)
    report, members = one_step(cohort, UNEVEN, 9, objective=objective)
    assert report["a"].loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close(gradients(members["a"]), expected, 5e-5)
