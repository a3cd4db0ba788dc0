"""llama.cpp without its server: what a GGUF file answers, token by token, and its quantisers.

`xllamacpp` is a prebuilt wheel with all of llama.cpp in one shared library, whose C interface
(`llama.h`, `ggml.h`) is called here through `ctypes`. Structures that the interface takes by value
change from release to release: their defaults are compared with what is written below, and a
release that lays them out in another way is refused before anything is loaded.

Dimensions: T tokens, V words of the vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import os
import re
import struct
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import UserError, require_package
from lighten.machine import containers

Floats = np.ndarray[Any, np.dtype[np.float32]]

# `llama_context_params` of llama.cpp b11549: what lies where, and what its defaults are there.
_N_CTX, _N_BATCH, _N_UBATCH, _THREADS, _FLASH, _TYPE_K = 0, 4, 8, 28, 52, 104
_DEFAULTS = {
    0: 512, 4: 2048, 8: 512, 12: 1, 36: 0, 40: -1, 44: -1, 48: -1, 52: -1, 56: 0, 60: 0,
    80: 0, 104: 1, 108: 1,
}  # fmt: skip
_FLASH_OFF = 0
_FORMATS_OF_CACHE = {"f32": 0, "f16": 1}
_ERROR = 4  # a log line's level
_KEPT_LINES = 20  # of the log, for the reason of an error


class _Opaque(ctypes.Structure):
    """A structure passed by value of which only the beginning is known.

    It is longer than any release's: who is called reads as many bytes as it knows.
    """

    _fields_ = [("raw", ctypes.c_uint8 * 1024)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_VOID, _INT, _TEXT, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_float
_CALLS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_Opaque, []),
    "llama_context_default_params": (_Opaque, []),
    "llama_model_load_from_file": (_VOID, [_TEXT, _Opaque]),
    "llama_model_free": (None, [_VOID]),
    "llama_init_from_model": (_VOID, [_VOID, _Opaque]),
    "llama_free": (None, [_VOID]),
    "llama_model_get_vocab": (_VOID, [_VOID]),
    "llama_model_chat_template": (_TEXT, [_VOID, _TEXT]),
    "llama_vocab_n_tokens": (_INT, [_VOID]),
    "llama_vocab_bos": (_INT, [_VOID]),
    "llama_vocab_eos": (_INT, [_VOID]),
    "llama_vocab_get_add_bos": (ctypes.c_bool, [_VOID]),
    "llama_vocab_is_eog": (ctypes.c_bool, [_VOID, _INT]),
    "llama_tokenize": (
        _INT, [_VOID, _TEXT, _INT, ctypes.POINTER(_INT), _INT, ctypes.c_bool, ctypes.c_bool]
    ),
    "llama_detokenize": (
        _INT, [_VOID, ctypes.POINTER(_INT), _INT, _TEXT, _INT, ctypes.c_bool, ctypes.c_bool]
    ),
    "llama_batch_init": (_Batch, [_INT, _INT, _INT]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (_INT, [_VOID, _Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(_FLOAT), [_VOID, _INT]),
    "llama_get_memory": (_VOID, [_VOID]),
    "llama_memory_clear": (None, [_VOID, ctypes.c_bool]),
    "llama_adapter_lora_init": (_VOID, [_VOID, _TEXT]),
    "llama_adapter_lora_free": (None, [_VOID]),
    "llama_set_adapters_lora": (
        _INT, [_VOID, ctypes.POINTER(_VOID), ctypes.c_size_t, ctypes.POINTER(_FLOAT)]
    ),
    "llama_log_set": (None, [_VOID, _VOID]),
    "ggml_quantize_init": (None, [_INT]),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [_INT, _VOID, _VOID, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _VOID],
    ),
}  # fmt: skip

_LOG_CALL = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_log: list[str] = []


def _collect_log(level: int, text: bytes | None, _: Any) -> None:
    """llama.cpp writes pages of log to the terminal; the last errors are kept instead."""
    if level == _ERROR and text:
        _log.append(text.decode(errors="replace").strip())
        del _log[:-_KEPT_LINES]


_log_callback = _LOG_CALL(_collect_log)  # has to live as long as the library


@functools.cache
def library() -> ctypes.CDLL:
    """llama.cpp's shared library.

    Raises:
        UserError: `xllamacpp` is missing, or one whose structures are not known.
    """
    require_package("xllamacpp", "gguf")
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    try:
        lib = ctypes.CDLL(str(spec.origin if spec else None))
        for name, (result, arguments) in _CALLS.items():
            call = getattr(lib, name)
            call.restype, call.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise UserError(_other_release(str(error))) from error
    lib.llama_log_set(ctypes.cast(_log_callback, _VOID), None)
    defaults = bytes(lib.llama_context_default_params().raw)
    if any(struct.unpack_from("<i", defaults, at)[0] != value for at, value in _DEFAULTS.items()):
        raise UserError(_other_release("its settings lie elsewhere"))
    lib.llama_backend_init()
    batch = lib.llama_batch_init(1, 0, 1)
    fields = (batch.token, batch.pos, batch.n_seq_id, batch.seq_id, batch.logits)
    if batch.embd or not all(fields):
        raise UserError(_other_release("its batches lie elsewhere"))
    lib.llama_batch_free(batch)
    return lib


def _other_release(why: str) -> str:
    return (
        f"the installed xllamacpp is of a release that is not known here ({why}); install the "
        "tested one with: pip install 'xllamacpp==2026.10.11549'"
    )


def quantize_rows(rows: Floats, kind: int, threads: int = 1) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Rows of numbers in one of llama.cpp's block formats, by its own code.

    Args:
        rows: In float32, shape (rows, columns), finite; columns a multiple of the format's block.
        kind: ggml's number of the format.
        threads: How many threads share the rows.

    Returns:
        Bytes, shape (rows, bytes of a row).

    Raises:
        UserError: `xllamacpp` is missing.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    lib = library()
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    count, columns = rows.shape
    assert columns % block == 0, (columns, block)
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    packed = np.empty((count, columns // block * size), dtype=np.uint8)
    lib.ggml_quantize_init(kind)

    def quantize_chunk(start: int, stop: int) -> None:
        # ctypes lets other threads run while it waits.
        lib.ggml_quantize_chunk(
            kind, rows.ctypes.data, packed.ctypes.data, start * columns, stop - start, columns, None
        )

    edges = np.linspace(0, count, min(threads, count) + 1).astype(int).tolist()
    workers = [
        threading.Thread(target=quantize_chunk, args=edge) for edge in itertools.pairwise(edges)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return packed


def _require_whole(path: Path) -> None:
    """What is wrong with a torn file is told in a sentence.

    Raises:
        UserError: It is no GGUF file, or ends early.
    """
    from lighten.models.gguf_header import read_header  # quantising does without torch

    read_header(path)


def available_threads() -> int:
    """Threads that this process may use at once."""
    return containers.cores()


class Runtime:
    """A GGUF model in llama.cpp, for comparing what it answers: one sequence at a time.

    Args:
        model: The GGUF file.
        adapters: Scale by GGUF adapter file (1.0 is the adapter as trained).
        context_tokens: Longest sequence.
        threads: Of the computation; all that this process may use when None. On a machine that is
            busy with other work 1 is far quicker: llama.cpp's threads wait for each other at every
            operation.
        cache: `f32` or `f16`, the format of keys and values; float32 is what a comparison with
            float32 transformers wants.

    Raises:
        UserError: `xllamacpp` is missing, or a file cannot be loaded.
    """

    def __init__(
        self,
        model: Path,
        adapters: Mapping[Path, float] | None = None,
        *,
        context_tokens: int = 1024,
        threads: int | None = None,
        cache: str = "f32",
    ) -> None:
        self._lib = library()
        self._model: Any = None
        self._context: Any = None
        self._adapters: list[Any] = []
        _require_whole(model)
        self.path, self.context_tokens = model, context_tokens
        self._model = self._lib.llama_model_load_from_file(
            os.fsencode(model), self._lib.llama_model_default_params()
        )
        if not self._model:
            raise self._refused(model)
        self._vocabulary = self._lib.llama_model_get_vocab(self._model)
        try:
            self._open_context(threads or available_threads(), cache)
            self.set_adapters(adapters or {})
        except BaseException:
            self.close()
            raise

    def _open_context(self, threads: int, cache: str) -> None:
        settings = self._lib.llama_context_default_params()
        for at, value in {
            _N_CTX: self.context_tokens, _N_BATCH: self.context_tokens,
            _N_UBATCH: min(self.context_tokens, 512), _THREADS: threads, _THREADS + 4: threads,
            _FLASH: _FLASH_OFF, _TYPE_K: _FORMATS_OF_CACHE[cache],
            _TYPE_K + 4: _FORMATS_OF_CACHE[cache],
        }.items():  # fmt: skip
            settings.raw[at : at + 4] = struct.pack("<i", value)
        self._context = self._lib.llama_init_from_model(self._model, settings)
        if not self._context:
            raise self._refused(self.path)

    def _refused(self, path: Path) -> UserError:
        # The last lines say that it failed, one before them why.
        reasons = [line for line in _log if re.search(r"(error|failed)[^:]*: .+: ", line)]
        why = (reasons or _log or ["it does not say why"])[-1]
        _log.clear()
        return UserError(f"{path} cannot be loaded by llama.cpp: {why}")

    def set_adapters(self, adapters: Mapping[Path, float]) -> None:
        """Answer with these adapters from now on, and with no others.

        Args:
            adapters: Scale by GGUF adapter file.

        Raises:
            UserError: One cannot be loaded over this model.
        """
        opened = []
        for path in adapters:
            _require_whole(path)
            adapter = self._lib.llama_adapter_lora_init(self._model, os.fsencode(path))
            if not adapter:
                raise self._refused(path)
            opened.append(adapter)
        handles = (_VOID * len(opened))(*opened)
        scales = (_FLOAT * len(opened))(*adapters.values())
        # All in one call: each call replaces what was set before.
        if self._lib.llama_set_adapters_lora(self._context, handles, len(opened), scales):
            raise self._refused(next(iter(adapters), self.path))
        self._adapters = opened

    @property
    def vocabulary_size(self) -> int:
        """Words of the vocabulary, V."""
        return int(self._lib.llama_vocab_n_tokens(self._vocabulary))

    @property
    def chat_template(self) -> str | None:
        """The template that the file holds."""
        text = self._lib.llama_model_chat_template(self._model, None)
        return text.decode() if text else None

    @property
    def adds_bos(self) -> bool:
        """Whether the file says that a text begins with the start token."""
        return bool(self._lib.llama_vocab_get_add_bos(self._vocabulary))

    def ends(self, token: int) -> bool:
        """Whether an answer ends with this token."""
        return bool(self._lib.llama_vocab_is_eog(self._vocabulary, token))

    def tokenise(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of a text; names of special tokens in it are those tokens.

        Args:
            text: Of any language.
            bos: Whether start and end tokens are added as the file says.
        """
        data = text.encode()
        room = len(data) + 16
        ids = (_INT * room)()
        count = self._lib.llama_tokenize(self._vocabulary, data, len(data), ids, room, bos, True)
        if count < 0:
            ids = (_INT * -count)()
            count = self._lib.llama_tokenize(
                self._vocabulary, data, len(data), ids, -count, bos, True
            )
        return list(ids[:count])

    def text(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids; special tokens are left out unless asked for."""
        ids = (_INT * len(tokens))(*tokens)
        room = 64 + 16 * len(tokens)
        buffer = ctypes.create_string_buffer(room)
        count = self._lib.llama_detokenize(
            self._vocabulary, ids, len(tokens), buffer, room, False, special
        )
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = self._lib.llama_detokenize(
                self._vocabulary, ids, len(tokens), buffer, -count, False, special
            )
        return buffer.raw[:count].decode(errors="replace")

    def logits(self, tokens: Sequence[int]) -> Floats:
        """Scores of the next token after every token of a sequence, shape (T, V).

        Raises:
            UserError: The sequence is longer than the context, or could not be computed.
        """
        self._clear()
        return self._decode(tokens, 0, all_positions=True)

    def log_probabilities(self, tokens: Sequence[int]) -> Floats:
        """Natural logarithm of the next token's probabilities after every token, shape (T, V).

        Raises:
            UserError: As of `logits`.
        """
        scores = self.logits(tokens)
        scores -= scores.max(axis=-1, keepdims=True)
        scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        return scores

    def greedy(self, tokens: Sequence[int], most: int, *, stop: bool = True) -> list[int]:
        """What follows a prompt when the likeliest token is taken each time.

        Args:
            tokens: The prompt.
            most: At most so many tokens.
            stop: Whether an end token (which is returned too) ends it earlier.

        Raises:
            UserError: As of `logits`.
        """
        self._clear()
        answer: list[int] = []
        scores = self._decode(tokens, 0, all_positions=False)
        while len(answer) < most:
            answer.append(int(scores[-1].argmax()))
            if len(answer) == most or (stop and self.ends(answer[-1])):
                break
            scores = self._decode(answer[-1:], len(tokens) + len(answer) - 1, all_positions=False)
        return answer

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, tokens: Sequence[int], start: int, *, all_positions: bool) -> Floats:
        count = len(tokens)
        if not count or start + count > self.context_tokens:
            raise UserError(
                f"{self.path}: a sequence of {start + count} tokens does not fit a context of "
                f"{self.context_tokens}"
            )
        size = self.vocabulary_size
        if not all(0 <= token < size for token in tokens):
            raise UserError(f"{self.path} has {size} tokens; {max(tokens)} is not one of them")
        batch = self._lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for place, token in enumerate(tokens):
                batch.token[place] = token
                batch.pos[place] = start + place
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = 0
                batch.logits[place] = all_positions or place == count - 1
            if self._lib.llama_decode(self._context, batch):
                raise self._refused(self.path)
        finally:
            self._lib.llama_batch_free(batch)
        places = range(count) if all_positions else [count - 1]
        rows = [self._lib.llama_get_logits_ith(self._context, place) for place in places]
        return np.stack([np.ctypeslib.as_array(row, shape=(size,)) for row in rows])

    def close(self) -> None:
        """Give the memory back; the model frees its adapters."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None
        self._adapters = []

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
