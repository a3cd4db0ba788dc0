"""Many GPUs: what is spread is what learns, whatever is alive at one GPU's peak.

Sizes come from PEFT and from transformers' own models, the formulas from arXiv 1910.02054.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lighten import api
from lighten.adapters.decoder import decoder_layers
from lighten.adapters.whole import WholeBase
from lighten.errors import UserError
from lighten.machine.devices import DEVICES
from lighten.planning import distributed, predict
from lighten.planning.distributed import Distributed, Strategy
from lighten.planning.result import Plan
from tests.processes import call
from tests.tiny import tiny_config, tiny_model

LAYERS, GPUS, NODES = 6, 4, 2
RANKS = GPUS * NODES
MODELS = {"untied head": "llama", "tied head": "qwen2", "tied, two kinds of layers": "gemma3_text"}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "LoRA": {"lora_r": 4},
    "QLoRA": {"lora_r": 4, "load_in_4bit": True},
    "last layers": {"trainable_layers": "last_2"},
}
STAGES: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp_hybrid")


def alone(folder: Path, arch: str, **settings: Any) -> Plan:
    """The plan of one GPU."""
    width = {name: settings.pop(name) for name in ("hidden_size",) if name in settings}
    tiny_config(arch, num_hidden_layers=LAYERS, **width).save_pretrained(folder)
    recipe = api.plannable(
        None, model_name_or_path=str(folder), **{"max_length": 32, **settings}
    )  # fmt: skip
    return predict.plan(recipe, DEVICES["a100-80"], changes=False)


def spread(plan: Plan, strategy: Strategy, offload: tuple[str, ...] = ()) -> Distributed:
    return distributed.spread(
        plan, DEVICES["a100-80"], strategy, gpus=GPUS, nodes=NODES, layers=LAYERS, offload=offload
    )


def numbers(arch: str, method: str) -> tuple[int, int]:
    """How many numbers learn, and how many weights there are, tied ones once."""
    model = tiny_model(arch, num_hidden_layers=LAYERS)
    total = sum(p.numel() for p in model.parameters())
    if method == "full":
        return total, total
    if method == "last layers":
        last_layers = decoder_layers(model)[-2:]
        return sum(p.numel() for layer in last_layers for p in layer.parameters()), total
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad), total


def in_layers(arch: str) -> int:
    """Weights of the decoder layers."""
    layers = decoder_layers(tiny_model(arch, num_hidden_layers=LAYERS))
    return sum(p.numel() for layer in layers for p in layer.parameters())


def linears(arch: str) -> int:
    """Weights that QLoRA packs: of every linear layer but the head."""
    model = tiny_model(arch, num_hidden_layers=LAYERS)
    head = model.get_output_embeddings()
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) if m != head)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", MODELS.values(), ids=MODELS.keys())
def test_what_is_sent_is_by_the_sizes_of_the_models(tmp_path: Path, arch: str, method: str) -> None:
    learning, total = numbers(arch, method)
    gradients = 4 * learning
    plan = alone(tmp_path, arch, **METHODS[method])
    states = spread(plan, "ddp").states
    assert states.gradients == states.trained == gradients
    assert states.optimiser == pytest.approx(2 * gradients, rel=0.02)  # and a counter of steps each
    if method == "QLoRA":
        packed = linears(arch)
        scaled = 4 * packed / 64
        assert states.frozen == pytest.approx(2 * (total - packed) + packed / 2 + scaled, rel=0.01)
    else:
        frozen = {"full": 0, "LoRA": total, "last layers": total - learning}[method]
        assert states.frozen == 2 * frozen  # bfloat16
    share, inside, whole = (RANKS - 1) / RANKS, (GPUS - 1) / GPUS, 2 * gradients
    layers = in_layers(arch) * (4 if method == "full" else 2)  # bytes
    if method == "full":  # what is outside of the layers comes once for both passes
        gathered = 2 * layers + (gradients - layers)
    elif method == "last layers":  # below them there is no way back, but for one that comes ahead
        frozen_layers = layers * (LAYERS - 2) / LAYERS
        gathered = 2 * gradients + frozen_layers + (frozen_layers + gradients) / LAYERS
    elif method == "LoRA":
        gathered = 2 * layers
    else:  # two packed layers are still there at each turn
        assert states.packed == pytest.approx(packed / 2 + scaled, rel=0.01)
        gathered = 2 * states.packed * (LAYERS - 2) / LAYERS
    spreads = method in ("full", "last layers")
    sent = {  # weights gathered, gradients reduced, of them between nodes alone
        "ddp": (0, whole * share, 0),
        "zero1": (gradients * share, whole * share, 0),
        "zero2": (gradients * share, gradients * share, 0),
        "zero3": (gathered * share, (gradients if spreads else whole) * share, 0),
        "fsdp_hybrid": (gathered * inside, gradients * inside if spreads else whole * share,
                        whole / GPUS * (NODES - 1) / NODES if spreads else 0),
    }  # fmt: skip
    sent["fsdp"] = sent["zero3"]
    for stage in STAGES:
        volume = spread(plan, stage).volume
        figures = (volume.gather, volume.reduce, volume.across)
        assert figures == pytest.approx(sent[stage], rel=0.01), stage


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}])
@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_a_rank_holds_its_part_of_packed_layers_and_all_else_whole(
    tmp_path: Path, strategy: Strategy, settings: dict[str, Any]
) -> None:
    plan = alone(tmp_path, "llama", lora_r=4, **settings)
    whole, sharded = spread(plan, "ddp"), spread(plan, strategy)
    packed = whole.states.packed
    scales = {"load_in_4bit": 4 * linears("llama") / 64, "load_in_8bit": 0}
    (setting,) = settings
    numbers_bytes = linears("llama") * {"load_in_4bit": 0.5, "load_in_8bit": 1}[setting]
    assert packed == pytest.approx(numbers_bytes + scales[setting], rel=0.15)
    expected = whole.device_bytes - packed * (RANKS - 1) / RANKS + 2 * packed / LAYERS
    assert sharded.device_bytes == pytest.approx(expected)
    assert packed < whole.states.frozen, "embedding, head and norms are no part of it"


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_links_and_offload_follow(tmp_path: Path, method: str) -> None:
    gradients = 4 * numbers("llama", method)[0]
    plan = alone(tmp_path, "llama", gradient_accumulation_steps=3, **METHODS[method])
    sharded = spread(plan, "zero2", ("optimizer",))
    share = (RANKS - 1) / RANKS
    times = 3 if method in ("full", "last layers") else 1  # adapters' are whole until a step's end
    assert sharded.volume.reduce == pytest.approx(times * gradients * share)
    assert sharded.volume.gather == pytest.approx(times * gradients * share)
    assert sharded.volume.host == pytest.approx(gradients / RANKS + gradients)
    assert sharded.host_bytes == pytest.approx((sharded.states.optimiser + gradients) / RANKS)
    node_link, host_link = 200e9 / 8, 32e9
    assert sharded.communication_s == pytest.approx(
        2 * times * gradients * share / node_link + sharded.volume.host / host_link
    )


def test_a_cohort_reduces_the_gradients_of_all_its_adapters(tmp_path: Path) -> None:
    one_adapter = spread(alone(tmp_path, "llama", lora_r=4), "ddp").states
    two_adapters = spread(alone(tmp_path, "llama", lora_r=[4, 8]), "ddp").states
    assert two_adapters.gradients == 3 * one_adapter.gradients
    assert two_adapters.frozen == one_adapter.frozen


def test_no_rank_is_planned_below_its_share_of_all_states(tmp_path: Path) -> None:
    """With few tokens the peak of one GPU is the optimiser's step, with many the loss."""
    spreads: dict[Strategy, tuple[int, int, int]] = {
        "ddp": (1, 1, 1), "zero1": (1, 1, RANKS), "zero2": (1, RANKS, RANKS),
        "zero3": (RANKS, RANKS, RANKS),
    }  # fmt: skip
    for length in (8, 256):
        before = None
        plan = alone(tmp_path, "llama", method="full", per_device_train_batch_size=8,
                     max_length=length)  # fmt: skip
        for stage, shares in spreads.items():
            sharded = spread(plan, stage)
            states = sharded.states
            least = sum(
                size / share
                for size, share in zip((states.trained, states.gradients, states.optimiser), shares,
                                       strict=True)
            )  # fmt: skip
            assert sharded.device_bytes > least
            assert before is None or sharded.device_bytes <= before, stage
            before = sharded.device_bytes


def test_paged_state_waits_in_main_memory_on_every_rank(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings: dict[str, Any] = {"method": "full", "hidden_size": 512}
    usual, paged = (
        spread(alone(tmp_path, "llama", optim=optim, **settings), "ddp")
        for optim in ("adamw_8bit", "paged_adamw_8bit")
    )
    moved = usual.states.optimiser - paged.states.optimiser
    assert moved == paged.states.paged > usual.states.optimiser / 2
    assert paged.host_bytes - usual.host_bytes == moved
    assert usual.device_bytes - paged.device_bytes == pytest.approx(moved, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "strategy", "why"),
    [({"offload_base": "cpu"}, None, "offload_base: cpu trains in one process"),
     ({"strategy": "single"}, None, "strategy: single trains in one process"),
     ({"method": "full", "optim": "adamw_8bit"}, "zero2", "optim: adamw_8bit needs whole"),
     ({"use_dora": True}, "zero3", "need whole weights"),
     ({"use_dora": True}, "fsdp_hybrid", "need whole weights")],
)  # fmt: skip
def test_what_ranks_refuse_is_no_plan_that_fits(
    settings: dict[str, Any], strategy: Strategy | None, why: str, tmp_path: Path
) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    recipe = api.plannable(None, model_name_or_path=str(tmp_path), max_length=32, **settings)
    with pytest.raises(UserError, match=why):
        api.plan_spread(recipe, device="a100-80", gpus=2, strategy=strategy)


def test_the_strategy_that_is_found_is_one_that_trains_the_recipe(tmp_path: Path) -> None:
    """Over two ranks of zero3 it would fit, and DoRA is refused there."""
    tiny_config(
        "llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=50,
        num_attention_heads=64, num_key_value_heads=8,
    ).save_pretrained(tmp_path)  # fmt: skip
    settings: dict[str, Any] = {
        "model": str(tmp_path), "device": "a100-80", "gpus": 8, "max_length": 32, "lora_r": 2,
        "per_device_train_batch_size": 1,
    }  # fmt: skip
    assert api.plan_spread(**settings).strategy == "zero3"
    with_dora = api.plan_spread(**settings, use_dora=True)
    assert (with_dora.strategy, with_dora.fits()) == ("ddp", False)


def test_ranks_are_advised_of_nothing_that_they_refuse(tmp_path: Path) -> None:
    tiny_config("llama", hidden_size=2048, num_hidden_layers=LAYERS).save_pretrained(tmp_path)
    recipe = api.plannable(None, model_name_or_path=str(tmp_path), max_length=32)
    advised = []
    for ranks in (1, 2):
        planner = predict.planner_for(DEVICES["a100-80"], ranks=ranks)
        changes, _ = predict.changes_of(recipe, planner(recipe), planner)
        advised.append(any("offload_base" in change.settings for change in changes))
    assert advised == [True, False]


def test_the_command_of_the_docs() -> None:
    """134.5 million weights in float32, over 32 ranks: 521.2 MB; LoRA on four T4: 9.77, 14.65."""
    result = call("plan", "smollm2-135m", "--method", "full", "--device", "h100", "--gpus", "8",
                "--nodes", "4", "--zero", "3")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "521.2 MB" in result.stdout
    result = call("plan", "smollm2-135m", "--device", "t4", "--gpus", "4")
    assert "14.7 MB" in result.stdout
    assert "9.8 MB" in result.stdout
    assert "on 1 node:" in result.stdout


def test_gradients_are_float32_in_the_engine_itself() -> None:
    """The 4 bytes of the formulas above are what a true run has."""
    trained = WholeBase(tiny_model("llama", dtype=torch.bfloat16), dtype=torch.bfloat16)
    assert {p.dtype for p in trained.parameters("default").values()} == {torch.float32}
