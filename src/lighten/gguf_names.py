"""Names in GGUF files: of tensors beside those of transformers, and of ways to split a text.

Those of tensors are llama.cpp's (`gguf-py/gguf/tensor_mapping.py`), by its architecture, for the
architectures that are read and written here.
"""

from __future__ import annotations

import re

# Ways to split a text under which llama.cpp looks for a word in the vocabulary before it merges
# (`ignore_merges` in its `src/llama-vocab.cpp`).
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0",
               "lfm2", "jina-v5-nano", "tekken")  # fmt: skip
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_APOSTROPHES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_REST_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_ASCII_SIGN = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
# Chinese characters with kana, and with all that lies between Samaritan letters and Hangul.
_CHINESE_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Letters with a case, as DeepSeek LLM lists them: not the small ones of Armenian and Georgian.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
# Signs (and letters) of ASCII and of full width, quotation marks, and `\u3000` to the full stop.
_SIGNS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
# Ways to split a text by llama.cpp's name, as patterns of `tokenizer.json`, each of which splits
# what the one before it left. GPT-2's is that of the byte level itself, and SmolLM's takes every
# digit by itself before it.
PATTERNS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (f"{_APOSTROPHES}|{_LETTERS}|\\p{{N}}{{1,3}}|{_REST}",),
    "qwen2": (f"{_APOSTROPHES}|{_LETTERS}|\\p{{N}}|{_REST}",),
    "qwen35": (
        f"{_APOSTROPHES}|{_WORD}[\\p{{L}}\\p{{M}}]+|\\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ),
    "gpt-4o": (
        f"{_WORD}{_UPPER}*{_LOWER}+{_APOSTROPHES}?|{_WORD}{_UPPER}+{_LOWER}*{_APOSTROPHES}?"
        f"|\\p{{N}}{{1,3}}|{_REST_WITH_SLASH}",
    ),
    "tekken": (
        f"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\\p{{N}}|{_REST_WITH_SLASH}",
    ),
    "seed-coder": (
        f"{_APOSTROPHES}|{_LETTERS}|\\p{{N}}{{1}}"
        rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}", _CHINESE_AND_KANA,
        rf"{_ASCII_SIGN}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    ),
    "deepseek-llm": (
        r"[\r\n]", rf"\s?[{_CASED}]+", rf"\s?[{_SIGNS}]+", r"\s+$", _ASIAN, r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}"),
}  # fmt: skip
# Other names of each in `src/llama-vocab.cpp`.
_OTHER_NAMES = {
    "gpt-2": ("phi-2", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais", "trillion",
              "granite-docling", "exaone4"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "llama-bpe": (*(name for name in WHOLE_WORDS if name not in PATTERNS), "dbrx", "smaug-bpe",
                  "glm4", "chatglm-bpe"),
    "qwen2": ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan",
              "solar-open", "grok-2"),
    "qwen35": (),
    "gpt-4o": ("llama4", "kanana2", "talkie", "minimax-m2"),
    "tekken": (),
    "seed-coder": (),
    "deepseek-v3": ("hunyuan-dense",),
    "deepseek-llm": (),
    "deepseek-coder": (),
}  # fmt: skip
# The first name of a way to split a text, by each that it has.
SPLITTINGS = {name: first for first, others in _OTHER_NAMES.items() for name in (first, *others)}
STEM, STEM_OF_GPT2 = "model.layers", "transformer.h"
# llama.cpp's architecture by transformers' `model_type`.
ARCHITECTURE_OF = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "gemma3": "gemma3", "phi3": "phi3",
    "gpt2": "gpt2",
}  # fmt: skip
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_SANDWICH = {
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_LINEAR = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
LAYER: dict[str, dict[str, str]] = {
    "llama": {**_NORMS, **_LINEAR},
    "qwen2": {**_NORMS, **_LINEAR},
    "qwen3": {**_NORMS, **_LINEAR, **_HEAD_NORMS},
    "gemma": {**_NORMS, **_LINEAR},
    "gemma2": {**_SANDWICH, **_LINEAR},
    "gemma3": {**_SANDWICH, **_LINEAR, **_HEAD_NORMS},
    "phi3": {
        **_NORMS, "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
        "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj",
    },
    "gpt2": {
        "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
    },
}  # fmt: skip
_OUTER = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}  # fmt: skip
_OUTER_OF_GPT2 = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f", "output": "lm_head",
}  # fmt: skip
# Parts whose biases llama.cpp computes with.
_BIASED = {
    "llama": set(_LINEAR),
    "qwen2": {"attn_q", "attn_k", "attn_v"},
    "gpt2": {*LAYER["gpt2"], "output_norm"},
}
_LAYER_PATH = re.compile(r"^(?:.*\.)?(?:layers|h)\.(?P<layer>\d+)\.(?P<part>.+)$")
_OUTSIDE = re.compile(r"(^|\.)(vision_tower|multi_modal_projector|visual)\.")


def outer_names(architecture: str) -> dict[str, str]:
    """The module in transformers by the name of a tensor that belongs to no layer."""
    return _OUTER_OF_GPT2 if architecture == "gpt2" else _OUTER


def of_pictures(path: str) -> bool:
    """Whether a module belongs to a picture tower, which a file of the text model does without."""
    return _OUTSIDE.search(path) is not None


def stored_name(architecture: str, path: str) -> str | None:
    """A tensor's name in a GGUF file without its suffix; None of a module that has none.

    Args:
        architecture: llama.cpp's.
        path: The module's path in transformers, such as `model.layers.3.self_attn.q_proj`.
    """
    if of_pictures(path):
        return None
    place = _LAYER_PATH.match(path)
    if place is not None:
        for stored, part in LAYER[architecture].items():
            if part == place["part"]:
                return f"blk.{place['layer']}.{stored}"
        return None
    # Bases with a picture tower, and files of GPT-2, put other words in front of the last.
    last = path.rpartition(".")[2]
    for stored, outer in outer_names(architecture).items():
        if last == outer.rpartition(".")[2]:
            return stored
    return None


def has_bias(architecture: str, stored: str) -> bool:
    """Whether llama.cpp adds a bias at this place.

    Args:
        architecture: llama.cpp's.
        stored: The tensor's name without its suffix, such as `blk.3.attn_q`.
    """
    return stored.rpartition(".")[2] in _BIASED.get(architecture, set())
