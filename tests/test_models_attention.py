"""The processor's attention against PyTorch's own, alone and inside every architecture."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lighten.models import attention
from tests.tiny import ARCHITECTURES, VOCAB, tiny_model


@pytest.mark.parametrize("tokens", [2, 127, 128, 129, 300])
@pytest.mark.parametrize("groups", [1, 3])
def test_blocks_give_pytorchs_values_and_gradients(tokens: int, groups: int) -> None:
    torch.manual_seed(0)
    shapes = [(2, 2 * groups, tokens, 8), (2, 2, tokens, 8), (2, 2, tokens, 8)]
    q, k, v = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in shapes)
    ours = attention.block_attention(q, k, v, 0.3)
    theirs = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.3, enable_gqa=groups > 1
    )
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    upstream = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, [q, k, v], upstream),
                    torch.autograd.grad(theirs, [q, k, v], upstream), strict=True):  # fmt: skip
        assert torch.allclose(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_computes_the_same_with_and_without_it(arch: str) -> None:
    attention.register()
    # Longer than the sliding windows of the tiny models, and than one block.
    ids = torch.randint(3, VOCAB, (2, 150), generator=torch.Generator().manual_seed(0))
    plain, blocks = tiny_model(arch), tiny_model(arch)
    plain.set_attn_implementation("eager")
    if plain.config.model_type != "gemma2":  # its soft cap has no place in sdpa
        blocks.set_attn_implementation(attention.NAME)
    losses = []
    for model in (plain, blocks):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, a), b in zip(plain.named_parameters(), blocks.parameters(), strict=True):
        if a.grad is not None and b.grad is not None:
            assert float((a.grad - b.grad).abs().max()) < 2e-5, name


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_repeated_keys_change_nothing(arch: str, capability: tuple[int, int]) -> None:
    attention.register_repeated(capability)
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    plain, repeated = tiny_model(arch), tiny_model(arch)
    if plain.config.model_type != "gemma2":  # its soft cap has no place in sdpa
        repeated.set_attn_implementation(attention.REPEATS)
    losses = [float(model(input_ids=ids, labels=ids).loss) for model in (plain, repeated)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_scores_are_kept_where_grouped_keys_have_no_kernel(dtype: torch.dtype) -> None:
    """As on a T4: PyTorch's own would keep 1 GiB of scores here."""
    attention.register_repeated((7, 5))
    model = tiny_model("llama").to("cuda", dtype)
    ids = torch.randint(3, VOCAB, (4, 8192), device="cuda")
    peak_bytes = []
    for name in ("sdpa", attention.REPEATS):
        model.set_attn_implementation(name)
        torch.cuda.reset_peak_memory_stats()
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            model.model(input_ids=ids, use_cache=False)
        peak_bytes.append(torch.cuda.max_memory_allocated())
    assert peak_bytes[1] < 0.2 * peak_bytes[0]


@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt2"])
def test_left_padding_and_the_cache_of_generation_are_left_to_pytorch(arch: str) -> None:
    attention.register()
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    answers = []
    for name in ("eager", attention.NAME):
        model = tiny_model(arch)
        model.set_attn_implementation(name)
        answers.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False))
    assert torch.equal(*answers)


def test_half_precision_is_as_close_as_pytorchs_own() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 200, 16) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    low = [x.bfloat16() for x in (q, k, v)]
    ours = attention.block_attention(*low, 0.25).float()
    theirs = F.scaled_dot_product_attention(*low, is_causal=True).float()
    assert float((ours - exact).abs().mean()) < 1.5 * float((theirs - exact).abs().mean())
