"""Which format each tensor gets in a GGUF file of a type: llama.cpp's own mixtures.

The rules are those of `llama_tensor_get_type_impl` in llama.cpp's `src/llama-quant.cpp` for dense
models without an importance matrix; formats that need one (IQ1 to IQ3) are not offered.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lighten.errors import UserError

# ggml's numbers of formats.
F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = 0, 1, 2, 3, 6, 7, 8
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, BF16 = 10, 11, 12, 13, 14, 20, 23, 30
FORMAT_NAMES = {
    F32: "F32", F16: "F16", Q4_0: "Q4_0", Q4_1: "Q4_1", Q5_0: "Q5_0", Q5_1: "Q5_1", Q8_0: "Q8_0",
    Q2_K: "Q2_K", Q3_K: "Q3_K", Q4_K: "Q4_K", Q5_K: "Q5_K", Q6_K: "Q6_K", IQ4_NL: "IQ4_NL",
    IQ4_XS: "IQ4_XS", BF16: "BF16",
}  # fmt: skip
# Numbers in a block; rows have to be a multiple of it.
_BLOCK = {F32: 1, F16: 1, BF16: 1, Q4_0: 32, Q4_1: 32, Q5_0: 32, Q5_1: 32, Q8_0: 32, IQ4_NL: 32,
          Q2_K: 256, Q3_K: 256, Q4_K: 256, Q5_K: 256, Q6_K: 256, IQ4_XS: 256}  # fmt: skip
_FALLBACK = {Q2_K: Q4_0, Q3_K: Q4_0, Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0, IQ4_XS: IQ4_NL}
BLOCK_OF_NAME = {FORMAT_NAMES[kind]: block for kind, block in _BLOCK.items()}
PLAIN = (F32, F16, BF16)
K_QUANTS = (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS)
_GROUPED = 4  # query heads per key head from which llama.cpp gives values more bits
_LAYERS_OF_70B = 80


@dataclass(frozen=True)
class FileType:
    """A type of GGUF file.

    Attributes:
        name: As users write it.
        number: llama.cpp's `general.file_type`.
        kind: ggml's number of the format that most tensors get.
    """

    name: str
    number: int
    kind: int


FILE_TYPES = {
    entry.name: entry
    for entry in (
        FileType("f32", 0, F32), FileType("f16", 1, F16), FileType("bf16", 32, BF16),
        FileType("q8_0", 7, Q8_0), FileType("q6_k", 18, Q6_K), FileType("q5_k_m", 17, Q5_K),
        FileType("q5_k_s", 16, Q5_K), FileType("q5_1", 9, Q5_1), FileType("q5_0", 8, Q5_0),
        FileType("q4_k_m", 15, Q4_K), FileType("q4_k_s", 14, Q4_K), FileType("q4_1", 3, Q4_1),
        FileType("q4_0", 2, Q4_0), FileType("iq4_nl", 25, IQ4_NL), FileType("iq4_xs", 30, IQ4_XS),
        FileType("q3_k_l", 13, Q3_K), FileType("q3_k_m", 12, Q3_K), FileType("q3_k_s", 11, Q3_K),
        FileType("q2_k", 10, Q2_K),
    )
}  # fmt: skip


def file_type(name: str) -> FileType:
    """The type of a name such as `q4_k_m`, in any case.

    Raises:
        UserError: There is no such type.
    """
    entry = FILE_TYPES.get(name.lower())
    if entry is None:
        raise UserError(
            f"{name!r} is not a type of GGUF file that can be written; those are "
            f"{', '.join(FILE_TYPES)}"
        )
    return entry


@dataclass(frozen=True)
class TensorFormat:
    """The format of a tensor.

    Attributes:
        kind: ggml's number of it.
        preferred: The one that the type would give rows of any length.
    """

    kind: int
    preferred: int


@dataclass(frozen=True)
class Shape:
    """What of a model decides about formats.

    Attributes:
        layers: Transformer layers.
        grouped: Query heads per key head.
        tied: Whether the word embeddings are the head too.
        architecture: llama.cpp's.
    """

    layers: int
    grouped: int
    tied: bool
    architecture: str


def choose(kind: FileType, name: str, shape: tuple[int, ...], model: Shape) -> TensorFormat:
    """The format of one tensor.

    Args:
        kind: Type of the file.
        name: Of the tensor, in the file.
        shape: Its, as PyTorch orders it.
        model: Whose it is.
    """
    if len(shape) < 2 or name == "position_embd.weight" or not name.endswith("weight"):
        return TensorFormat(F32, F32)
    if kind.kind in PLAIN:
        return TensorFormat(kind.kind, kind.kind)
    preferred = _mixture(kind, name, shape, model)
    columns = shape[-1]
    ggml_type = preferred
    if columns % _BLOCK[ggml_type]:
        ggml_type = _FALLBACK.get(ggml_type, F16)
    if columns % _BLOCK[ggml_type]:
        ggml_type = F16
    return TensorFormat(ggml_type, preferred)


def _mixture(kind: FileType, name: str, shape: tuple[int, ...], model: Shape) -> int:
    block, type_name = kind.kind, kind.name
    if name == "output.weight" or (model.tied and name == "token_embd.weight"):
        if shape[-1] % _BLOCK[block]:
            return Q8_0
        return Q8_0 if block == Q8_0 else Q6_K
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None:
        return block
    layer, part = int(match[1]), match[2]
    if part in ("attn_v", "attn_qkv"):
        return _values(type_name, block, layer, model)
    if part == "ffn_down":
        return _down(type_name, block, layer, model)
    if part == "attn_output":
        return {"q2_k": Q3_K, "q3_k_m": Q4_K, "q3_k_l": Q5_K}.get(type_name, block)
    return block


def _values(type_name: str, block: int, layer: int, model: Shape) -> int:
    """Of the projections to values, which suffer most."""
    heavily_grouped = model.grouped >= _GROUPED
    ggml_type = block
    if type_name == "q2_k":
        ggml_type = Q4_K if heavily_grouped else Q3_K
    elif type_name == "q3_k_m":
        ggml_type = Q5_K if layer < 2 else Q4_K
    elif type_name == "q3_k_l" or (type_name.startswith("iq4") and heavily_grouped):
        ggml_type = Q5_K
    elif type_name in ("q4_k_m", "q5_k_m") and _more_bits(layer, model.layers):
        ggml_type = Q6_K
    elif type_name == "q4_k_s" and layer < 4:
        ggml_type = Q5_K
    large = model.architecture in ("llama", "qwen2") and model.layers == _LAYERS_OF_70B
    return Q5_K if large and model.grouped > 1 and ggml_type in (Q3_K, Q4_K) else ggml_type


def _down(type_name: str, block: int, layer: int, model: Shape) -> int:
    """Of the projections out of the MLP."""
    early = layer < model.layers // 8
    if type_name == "q2_k":
        return Q3_K
    if type_name == "q3_k_m":
        return Q5_K if layer < model.layers // 16 else Q4_K
    if type_name == "q3_k_l" or (early and (type_name.startswith("iq4") or type_name == "q4_k_s")):
        return Q5_K
    if type_name in ("q4_k_m", "q5_k_m") and _more_bits(layer, model.layers):
        return Q6_K
    return block


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def gguf_merge_dtype(kind: str) -> str:
    """The format of the merged model that a GGUF file is made from.

    bfloat16 has 8 significant bits, of which small updates are rounded away, and float16 has 11:
    what is stored in it is merged in float32. What a quantised type keeps is coarser than either.

    Args:
        kind: The file's type.
    """
    return "float32" if kind in ("f32", "f16") else "auto"
