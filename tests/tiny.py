"""Tiny random models of every architecture, and tokenizers built in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 320
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
ARCHITECTURES = tuple(_SETTINGS)
# With parts that those have not: latent attention, stacked experts beside a shared one, a state
# that runs over tokens, four streams of hidden states.
_EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
_NEWER: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **_EXPERTS, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "qk_nope_head_dim": 8,
    },
    "falcon_h1": {
        "head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8,
        "mamba_d_state": 8, "mamba_chunk_size": 8, "lm_head_multiplier": 0.5,
    },
    "gemma3n_text": {
        "head_dim": 8, "sliding_window": 8, "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "laurel_rank": 4,
        "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm4_moe": {**_EXPERTS, "head_dim": 8},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
}  # fmt: skip
NEWER = tuple(_NEWER)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def tiny_config(arch: str, **changes: Any) -> Any:
    """The architecture's config at tiny size."""
    common = (
        _COMMON
        if arch != "gpt2"
        else {k: _COMMON[k] for k in ("vocab_size", "bos_token_id", "eos_token_id")}
    )
    settings = (_SETTINGS | _NEWER).get(arch, {})
    return AutoConfig.for_model(arch, **{**common, **settings, **changes})


def tiny_model(
    arch: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A random model: weights large enough that every part of it matters to the loss."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(arch, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            elif "bias" in name:
                parameter.normal_(std=0.05)
    return model.to(dtype).eval()


def tiny_tokenizer(
    *, template: str | None = CHATML, pad_is_eos: bool = False, add_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a small vocabulary; anything can be encoded with it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the answer is the question", "user assistant system"], trainer)
    if add_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|im_end|>" if template == CHATML else "</s>",
        pad_token=("<|im_end|>" if template == CHATML else "</s>") if pad_is_eos else "<pad>",
    )
    tokenizer.chat_template = template
    return tokenizer


def save_tiny(
    folder: Path, arch: str = "llama", *, seed: int = 0, template: str | None = CHATML,
    **changes: Any,
) -> Path:  # fmt: skip
    """A model folder as a hub would hold it."""
    model = tiny_model(arch, seed=seed, **changes)
    tokenizer = tiny_tokenizer(template=template)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_few_bits(folder: Path, dense: list[str] | None, **bits: bool) -> Path:
    """A model folder as bitsandbytes writes it, the layers that are named left dense."""
    source = save_tiny(folder / "dense", hidden_size=128, intermediate_size=256)
    config = BitsAndBytesConfig(**bits, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=dense)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=config
    )
    model.save_pretrained(folder / "stored")
    tiny_tokenizer().save_pretrained(folder / "stored")
    return folder / "stored"
