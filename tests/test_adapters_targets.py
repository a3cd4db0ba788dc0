"""Which layers a base has, and which of them a group of targets means."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from lighten.adapters import AdapterSpec, WholeBase, attach, files
from lighten.adapters.decoder import decoder_layers
from lighten.engine.checkpointing import checkpoint_layers
from lighten.errors import UserError
from tests.test_adapters_peft import CLOSE, IDS, in_peft, logits_of, relative_difference, save
from tests.tiny import ARCHITECTURES, tiny_model

ATTENTION = {
    "gpt2": {"attn.c_attn", "attn.c_proj"}, "phi3": {"self_attn.qkv_proj", "self_attn.o_proj"},
    "opt": {f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")},
}  # fmt: skip
MLP = {
    "gpt2": {"mlp.c_fc", "mlp.c_proj"}, "phi3": {"mlp.gate_up_proj", "mlp.down_proj"},
    "opt": {"fc1", "fc2"},
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_decoder_layers_are_those_that_transformers_marks(arch: str) -> None:
    model = tiny_model(arch)
    marked = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert decoder_layers(model) == marked
    assert len(marked) == 2


def test_a_tower_of_as_many_layers_beside_the_decoder_is_passed_over() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
             "num_hidden_layers": 2}  # fmt: skip
    seeing = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    speaking = LlamaConfig(**sizes, vocab_size=32)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=seeing, text_config=speaking))
    towers = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2]
    assert len(towers) == 2
    assert decoder_layers(model) == list(model.model.language_model.layers)


def test_layers_that_nobody_can_name_are_told() -> None:
    model = tiny_model("llama")
    model.model.layers = nn.Sequential(*model.model.layers)
    assert decoder_layers(model) == []
    with pytest.raises(UserError, match="trainable_layers: LlamaForCausalLM does not say which"):
        WholeBase(model, dtype=torch.float32, last=1)
    with pytest.raises(UserError, match="gradient_checkpointing: LlamaForCausalLM does not say"):
        checkpoint_layers(model)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_groups_of_targets_are_the_linear_layers_of_their_blocks(arch: str, tmp_path: Path) -> None:
    usual = {f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
    gated = {f"mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")}
    for group, expected in (
        ("attention", ATTENTION.get(arch, usual)), ("mlp", MLP.get(arch, gated)),
    ):  # fmt: skip
        if (arch, group) == ("mixtral", "mlp"):
            with pytest.raises(UserError, match="fused experts are reached through peft"):
                attach(tiny_model(arch), [AdapterSpec("a", target_modules="mlp")])
            continue
        for targets in (group, (group,), (group, "lm_head")):
            spec = AdapterSpec("a", target_modules=targets, init_lora_weights=False)
            cohort = attach(tiny_model(arch), [spec])
            ends = {
                next((w for w in sorted(expected) if path.endswith(f".{w}")), path)
                for path in cohort.linears
            }
            assert ends == expected | ({"lm_head"} if "lm_head" in targets else set())
            assert len([p for p in cohort.linears if p != "lm_head"]) == 2 * len(expected)
        folder = save(cohort, tmp_path / group)
        saved = json.loads((folder / files.CONFIG).read_text())["target_modules"]
        assert not {"attention", "mlp"} & set(saved)
        assert relative_difference(in_peft(folder, tiny_model(arch))(input_ids=IDS).logits,
                     logits_of(cohort, "a")) < CLOSE  # fmt: skip


def test_a_linear_layer_that_is_called_like_a_group_is_meant_before_it() -> None:
    class Named(nn.Module):
        """A linear layer under the name of a group."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.attention = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.attention(x)
            return out

    model = tiny_model("llama")
    path = "model.layers.0.mlp.up_proj"
    model.set_submodule(path, Named(model.get_submodule(path)))
    cohort = attach(model, [AdapterSpec("a", target_modules=("attention",))])
    assert set(cohort.linears) == {f"{path}.attention"}


def test_groups_of_targets_work_for_pefts_methods_too() -> None:
    cohort = attach(tiny_model("gpt2"), [AdapterSpec("a", peft={
        "peft_type": "LORA", "target_modules": ["attention"], "lora_bias": True})])  # fmt: skip
    places = {key.partition(".lora_")[0].rpartition("h.")[2] for key in cohort.parameters("a")}
    assert {place.partition(".")[2] for place in places} == {"attn.c_attn", "attn.c_proj"}


@pytest.mark.parametrize(
    ("arch", "named", "why"),
    [("glm4_moe", ("q_proj", "up_proj"), "reaches up_proj of Glm4MoeForCausalLM, where PEFT takes "
      "these names for those of the stacked experts"),
     ("falcon_h1", r".*mamba\.(in|out)_proj", "reaches out_proj of FalconH1ForCausalLM, where PEFT "
      "takes no low-rank update")],
)  # fmt: skip
def test_layers_that_peft_would_lose_are_refused_by_name_and_left_out_of_all_linear(
    arch: str, named: str | tuple[str, ...], why: str
) -> None:
    with pytest.raises(UserError, match=re.escape(why)):
        attach(tiny_model(arch), [AdapterSpec(target_modules=named)])
    cohort = attach(tiny_model(arch), [AdapterSpec()])
    names = {path.rpartition(".")[2] for path in cohort.linears}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= names
    assert "out_proj" not in names
    assert arch != "glm4_moe" or names.isdisjoint({"gate_proj", "up_proj", "down_proj"})


@pytest.mark.parametrize(
    ("arch", "names"),
    [("mixtral", ("w1", "w2", "w3")), ("qwen3_moe", ("down_proj", "gate_proj", "up_proj"))],
)
def test_names_of_experts_that_are_stacked_are_not_passed_over(
    arch: str, names: tuple[str, ...]
) -> None:
    """PEFT trains the experts then; the rest of the list alone would learn without a word."""
    with pytest.raises(UserError, match=f"names {', '.join(names)}, but the experts of "):
        attach(tiny_model(arch), [AdapterSpec(target_modules=("q_proj", *names))])
    attach(tiny_model(arch), [AdapterSpec(target_modules=("q_proj", "attention"))])


def test_all_linear_in_a_list_is_not_passed_over() -> None:
    with pytest.raises(UserError, match="all-linear stands by itself, not in a list"):
        attach(tiny_model("llama"), [AdapterSpec(target_modules=("attention", "all-linear"))])
