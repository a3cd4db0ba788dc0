"""The processor's attention against PyTorch's own, alone and inside every architecture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lighten.models import attention
from lighten.models.attention_setting import set_attention
from tests.tiny import ARCHITECTURES, VOCAB, tiny_model

# Latent attention to the few keys that an indexer chooses.
INDEXED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "qk_nope_head_dim": 8, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8,
}  # fmt: skip


# The last is no longer the blocks'.
@pytest.mark.parametrize("tokens", [2, 127, 128, 129, 300, attention.LONGEST_IN_BLOCKS + 7])
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


def windowed(
    inputs: list[torch.Tensor], scale: float, window: int, starts: Sequence[int]
) -> torch.Tensor:
    """By PyTorch, under a mask."""
    q, k, v = inputs
    place = torch.arange(q.shape[2])
    row = torch.bucketize(place, torch.tensor(starts[1:-1]), right=True)
    query, key = place[:, None], place[None]
    seen = (key <= query) & (key > query - window) & (row[:, None] == row[None])
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize(
    ("starts", "window"),
    [((0, 300), 1), ((0, 300), 8), ((0, 300), 128), ((0, 300), 129), ((0, 300), 299),
     ((0, 300), 500), ((0, 70, 300, 310), 50),
     ((0, attention.LONGEST_IN_BLOCKS + 200), 50),
     ((0, 30, 60 + attention.LONGEST_IN_BLOCKS), attention.LONGEST_IN_BLOCKS + 10)],
)  # fmt: skip
def test_a_window_hides_what_is_too_long_ago(
    monkeypatch: pytest.MonkeyPatch, starts: tuple[int, ...], window: int, emulated: bool
) -> None:
    monkeypatch.setattr(attention, "_emulated", lambda _: emulated)
    torch.manual_seed(0)
    shapes = [(1, heads, starts[-1], 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(s, dtype=torch.double, requires_grad=True) for s in shapes]
    packed = starts if len(starts) > 2 else None
    ours = attention.block_attention(*inputs, 0.3, packed, window)
    theirs = windowed(inputs, 0.3, window, starts)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    upstream = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, inputs, upstream),
                    torch.autograd.grad(theirs, inputs, upstream), strict=True):  # fmt: skip
        assert torch.allclose(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("arch", sorted(attention.WINDOWED))
def test_models_with_a_window_need_no_mask(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    attention.register()
    several_kinds = arch not in {"mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2"}
    changes: dict[str, Any] = {"sliding_window": 8, "use_sliding_window": True, "pad_token_id": 0}
    if several_kinds:
        changes["layer_types"] = ["sliding_attention", "full_attention"]
    if arch == "ministral":
        changes["head_dim"] = 8
    if arch == "qwen3_moe":
        changes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ids = torch.randint(3, VOCAB, (2, 150), generator=torch.Generator().manual_seed(0))
    plain, ours = tiny_model(arch, **changes), tiny_model(arch, **changes)
    assert plain.config.sliding_window == 8
    plain.set_attn_implementation("eager")
    ours.set_attn_implementation(attention.NAME)
    expected = plain(input_ids=ids, labels=ids, use_cache=False).loss
    monkeypatch.setattr(attention, "sdpa_mask", None)
    loss = ours(input_ids=ids, labels=ids, use_cache=False).loss
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    # It does make a difference.
    longer = tiny_model(arch, **changes | {"sliding_window": 200})
    longer.set_attn_implementation("eager")
    other = longer(input_ids=ids, labels=ids, use_cache=False).loss
    assert float(other.detach()) != pytest.approx(float(expected.detach()), rel=1e-4)
    loss.backward()
    expected.backward()
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        if a.grad is not None and b.grad is not None:
            assert float((a.grad - b.grad).abs().max()) < 2e-5, name


def test_dropout_of_probabilities_keeps_the_window() -> None:
    model = tiny_model("mistral", sliding_window=8)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 40, 8) for heads in (4, 2, 2))
    layer = model.model.layers[0].self_attn.train()
    options = {"scaling": 0.3, "sliding_window": 8}
    torch.manual_seed(1)
    out, _ = attention._forward(layer, q, k, v, None, dropout=1e-7, **options)
    assert torch.allclose(out.transpose(1, 2), windowed([q, k, v], 0.3, 8, (0, 40)), atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("has_kernel", [False, True])
def test_what_a_long_row_keeps_grows_with_its_length_and_not_its_square(
    packed: bool, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernel:
        monkeypatch.setattr(attention.kernel, "takes", lambda *_: False)

    def kept_bytes(tokens: int) -> int:
        q, k, v = (
            torch.randn(1, heads, tokens, 8, requires_grad=True) for heads in (6, 2, 2)
        )  # fmt: skip
        kept: list[int] = []

        def note(x: torch.Tensor) -> torch.Tensor:
            kept.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            attention.block_attention(q, k, v, 0.3, (0, tokens) if packed else None)
        return sum(kept)

    long = 2 * attention.LONGEST_IN_BLOCKS
    assert kept_bytes(2 * long) == 2 * kept_bytes(long)


def test_packed_rows_of_which_one_is_long_are_what_they_are_alone() -> None:
    torch.manual_seed(0)
    lengths = (40, attention.LONGEST_IN_BLOCKS + 5, 300)
    starts = (0, lengths[0], lengths[0] + lengths[1], sum(lengths))
    shapes = [(1, heads, sum(lengths), 8) for heads in (6, 2, 2)]
    q, k, v = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in shapes)
    together = attention.block_attention(q, k, v, 0.3, starts)
    alone = torch.cat([
        F.scaled_dot_product_attention(
            *(x[:, :, a:b] for x in (q, k, v)), is_causal=True, scale=0.3, enable_gqa=True
        )
        for a, b in itertools.pairwise(starts)
    ], 2)  # fmt: skip
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)
    upstream = torch.randn_like(alone)
    for a, b in zip(torch.autograd.grad(together, [q, k, v], upstream),
                    torch.autograd.grad(alone, [q, k, v], upstream), strict=True):  # fmt: skip
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


def test_what_runs_while_another_thread_compiles_is_not_compiled_itself() -> None:
    """`torch.compiler.is_compiling` says yes to all that runs meanwhile, in any thread."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 40, 8), torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8)
    model = tiny_model("llama")

    def attend() -> torch.Tensor:
        out, _ = attention._forward_uncompiled(model, q, k, v, None, scaling=0.3)
        return out

    meanwhile: list[tuple[bool, torch.Tensor]] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        meanwhile.append((torch.compiler.is_compiling(), attend()))
        return graph.forward

    torch.compile(lambda x: x + 1, backend=compiler)(torch.ones(3))
    ((compiling, out),) = meanwhile
    assert compiling
    assert torch.equal(out, attend())


@pytest.mark.parametrize(("device", "capability"), [("cpu", None), ("cuda", (7, 5))])
@pytest.mark.parametrize("arch", ["deepseek_v32", "glm_moe_dsa"])
def test_a_model_that_chooses_its_keys_keeps_to_them(
    arch: str, device: str, capability: tuple[int, int] | None
) -> None:
    """It hides the others from PyTorch's attention alone, by that one's name."""
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    plain, model = tiny_model(arch, **INDEXED), tiny_model(arch, **INDEXED)
    plain.set_attn_implementation("eager")
    choice = set_attention(model, "sdpa", device, capability)
    assert choice.value == "sdpa"
    assert choice.reason.startswith(f"PyTorch's own: {type(model).__name__} computes another")
    all_keys = tiny_model(arch, **INDEXED | {"index_topk": 40})
    with torch.no_grad():
        expected, loss, other = (
            float(m(input_ids=ids, labels=ids, use_cache=False).loss)
            for m in (plain, model, all_keys)
        )
    assert loss == pytest.approx(expected, rel=1e-5)
    assert other != pytest.approx(expected, rel=1e-3), "it does make a difference"


def test_a_model_that_takes_no_attention_is_said_to_keep_pytorchs() -> None:
    model = tiny_model("falcon", ffn_hidden_size=48)
    choice = set_attention(model, "sdpa", "cpu")
    assert (choice.value, model.config._attn_implementation) == ("sdpa", "sdpa")
    assert choice.reason == "PyTorch's own: FalconForCausalLM takes none from outside"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_others_take_ours(arch: str) -> None:
    expected = "eager" if arch == "gemma2" else attention.NAME
    model = tiny_model(arch)
    set_attention(model, "sdpa", "cpu")
    assert model.config._attn_implementation == expected
