"""A fast tokenizer's files as the tokenizer of a GGUF file.

llama.cpp has two kinds for the models here: byte-level BPE, whose splitting of text before the
merges is chosen by a name, and SentencePiece, whose merges are ordered by scores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten.errors import UserError
from lighten.gguf_names import PATTERNS, WHOLE_WORDS
from lighten.quantization.gguf_source import declared_ends, read_json
from lighten.wording import with_article

# llama.cpp's kinds of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"  # SentencePiece's mark of a space
_NAMES = {patterns: name for name, patterns in PATTERNS.items()}
# The same splitting without taking words of the vocabulary whole.
_WITHOUT_WHOLE_WORDS = {"llama-bpe": "dbrx"}
# A file does not say which special tokens swallow the white space behind them. llama.cpp goes by
# the model's name (`src/llama-vocab.cpp`): of one with `phi-3` in it all do but these, and a
# vocabulary without these and `</s>` is not loaded.
_PHI3 = "phi-3"
_KEEPS_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_TELLING_NAME = re.compile(r"(phi)-?(3)|(modern)-(bert)", re.IGNORECASE)
# How `PreTrainedTokenizer` calls what llama.cpp calls so.
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


@dataclass
class Vocabulary:
    """A tokenizer as a GGUF file says it.

    Attributes:
        model: `gpt2` for byte-level BPE, `llama` for SentencePiece.
        pre: llama.cpp's name of the splitting.
        tokens: Every token's text.
        kinds: Every token's kind.
        scores: Of SentencePiece, the order of merges.
        merges: Of byte-level BPE.
        special: Token id by role.
        adds: Whether start or end tokens are added, by role.
        space_prefix: Whether a space is put before a text; None says nothing.
        template: The chat template.
        ends: Ids that end an answer.
        by_name: Whether the model's name has to tell llama.cpp which special tokens swallow the
            white space behind them.
        otherwise: Special tokens that treat it otherwise in llama.cpp all the same.
        without_row: Added tokens that the model has no row for: they are left out.
        composes: Whether the model's tokenizer composes letters (NFC) first, as llama.cpp does not.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    space_prefix: bool | None = None
    template: str | None = None
    ends: tuple[int, ...] = ()
    by_name: bool = False
    otherwise: tuple[str, ...] = ()
    without_row: tuple[str, ...] = ()
    composes: bool = False

    def name_for(self, name: str) -> str:
        """What a file has to call a model of this tokenizer, for llama.cpp to read its texts right.

        Args:
            name: As it is called otherwise.
        """
        if self.by_name:
            return name if re.search("phi-?3", name, re.IGNORECASE) else f"{name} ({_PHI3})"
        return _TELLING_NAME.sub(lambda match: " ".join(filter(None, match.groups())), name)

    def write(self, writer: Any) -> None:
        """Write it into the header of a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.kinds)
        if self.merges:
            writer.add_token_merges(self.merges)
        for role, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token)
        for role, adds in self.adds.items():
            writer.add_bool(f"tokenizer.ggml.add_{role}_token", adds)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        if self.template is not None:
            writer.add_chat_template(self.template)


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer of a model folder.

    Args:
        folder: With tokenizer.json and the files beside it.
        rows: Of the model's word embeddings; tokens are made up to that number.

    Raises:
        UserError: There is none, or llama.cpp has no such tokenizer.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{folder} holds no tokenizer.json; load its tokenizer with transformers and "
            "save_pretrained(...) it into the folder"
        )
    tokenizer = read_json(file)
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise UserError(
            f"{file} is {with_article(str(model.get('type')))} tokenizer; llama.cpp has byte-level "
            "BPE and SentencePiece BPE for the models that are written here"
        )
    config_file = folder / "tokenizer_config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    ids: dict[str, int] = dict(model["vocab"])
    added = {int(entry["id"]): entry for entry in tokenizer.get("added_tokens") or []}
    # As Gemma 3's for pictures, which its models without a picture tower have no row for.
    without_row = {
        token: entry["content"] for token, entry in added.items()
        if token >= rows and entry["content"] not in ids
    }  # fmt: skip
    added = {token: entry for token, entry in added.items() if token not in without_row}
    ids |= {entry["content"]: token for token, entry in added.items()}
    if ids and max(ids.values()) >= rows:
        raise UserError(
            f"{file} has token {max(ids.values())} and the model {rows} rows of embeddings; it "
            "belongs to another model, or the embeddings have to be resized"
        )
    tokens = [f"[PAD{token}]" for token in range(rows)]
    kinds = [_UNUSED] * rows
    for text, token in ids.items():
        tokens[token], kinds[token] = text, _NORMAL
    pieces = _is_sentencepiece(tokenizer)
    for token, entry in added.items():
        kinds[token] = (
            _CONTROL if entry.get("special") or _looks_special(entry["content"]) else _USER
        )
        if pieces and kinds[token] == _USER:
            tokens[token] = entry["content"].replace(_SPACE, " ")
    vocabulary = (
        _sentencepiece(file, tokenizer, tokens, kinds, ids)
        if pieces
        else _byte_level(file, tokenizer, tokens, kinds)
    )
    _special(folder, config, tokenizer, ids, vocabulary)
    vocabulary.template = _template(folder, config)
    vocabulary.without_row = tuple(without_row.values())
    vocabulary.composes = _composes(file, tokenizer, pieces)
    _look_at_space(vocabulary, added, ids)
    return vocabulary


def _look_at_space(
    vocabulary: Vocabulary, added: Mapping[int, Mapping[str, Any]], ids: Mapping[str, int]
) -> None:
    """Which special tokens swallow the white space behind them, and whether a name can say so."""
    swallow = {str(entry["content"]) for entry in added.values() if entry.get("rstrip")}
    of_phi3 = {
        text
        for text, token in ids.items()
        if vocabulary.kinds[token] in (_CONTROL, _USER, _UNKNOWN) or text == "</s>"
    } - _KEEPS_SPACE
    loaded = ids.keys() >= {*_KEEPS_SPACE, "</s>"}
    vocabulary.by_name = loaded and len(swallow ^ of_phi3) < len(swallow)
    vocabulary.otherwise = tuple(sorted(swallow ^ of_phi3 if vocabulary.by_name else swallow))


def _looks_special(text: str) -> bool:
    """Control tokens that some models did not mark as such; llama.cpp knows them by their look."""
    return (text.startswith("<|") and text.endswith("|>")) or (
        text.startswith("<unused") and text.endswith(">")
    )


def _steps(tokenizer: Mapping[str, Any], key: str, inner: str) -> list[dict[str, Any]]:
    """A tokenizer's normalisers or pre-tokenisers, a sequence of them or one."""
    value = tokenizer.get(key)
    if not value:
        return []
    return list(value[inner]) if value.get("type") == "Sequence" else [value]


def _is_sentencepiece(tokenizer: Mapping[str, Any]) -> bool:
    normalizers = _steps(tokenizer, "normalizer", "normalizers")
    splitters = _steps(tokenizer, "pre_tokenizer", "pretokenizers")
    marks = [step for step in normalizers if step.get("type") == "Replace"
             and step.get("content") == _SPACE]  # fmt: skip
    return bool(marks) or any(step.get("type") == "Metaspace" for step in splitters)


def _composes(file: Path, tokenizer: Mapping[str, Any], pieces: bool) -> bool:
    """Whether texts are composed (NFC) before they are split; llama.cpp takes them as they are.

    Raises:
        UserError: They are changed in another way.
    """
    kinds = set()
    for step in _steps(tokenizer, "normalizer", "normalizers"):
        kind = str(step.get("type"))
        marks = kind in ("Prepend", "Replace") and _SPACE in (
            step.get("prepend"), step.get("content")
        )  # fmt: skip
        if not (pieces and marks):
            kinds.add(kind)
    if kinds - {"NFC"}:
        raise UserError(
            f"{file} changes text before it is split ({', '.join(sorted(kinds))}), which llama.cpp "
            "does not, so the file would read other tokens; keep this model in safetensors"
        )
    return bool(kinds)


def _sentencepiece(
    file: Path,
    tokenizer: Mapping[str, Any],
    tokens: list[str],
    kinds: list[int],
    ids: Mapping[str, int],
) -> Vocabulary:
    model = tokenizer["model"]
    if not model.get("byte_fallback"):
        raise UserError(f"{file} has no tokens for bytes; llama.cpp's SentencePiece needs them")
    # A merge's rank is the order in which its word's score sorts it.
    scores = [0.0] * len(tokens)
    for rank, merge in enumerate(model["merges"]):
        token = ids.get("".join(merge) if isinstance(merge, list) else merge.replace(" ", ""))
        if token is not None and scores[token] == 0.0:
            scores[token] = -float(rank + 1)
    unknown = model.get("unk_token")
    for token, text in enumerate(tokens):
        if kinds[token] == _NORMAL and len(text) == 6 and text.startswith("<0x") and text[5] == ">":
            kinds[token] = _BYTE
        elif text == unknown:
            kinds[token] = _UNKNOWN
        elif kinds[token] in (_CONTROL, _USER, _UNUSED):
            scores[token] = -1e6
    normalizers = _steps(tokenizer, "normalizer", "normalizers")
    splitters = _steps(tokenizer, "pre_tokenizer", "pretokenizers")
    prefix = any(step.get("type") == "Prepend" for step in normalizers) or any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in splitters
    )
    return Vocabulary("llama", "default", tokens, kinds, scores=scores, space_prefix=prefix)


def _byte_level(
    file: Path, tokenizer: Mapping[str, Any], tokens: list[str], kinds: list[int]
) -> Vocabulary:
    merges = [
        # A space inside a part would be read as the border between parts.
        " ".join(part.replace(" ", "\u0120") for part in merge)
        if isinstance(merge, list)
        else merge
        for merge in tokenizer["model"]["merges"]
    ]
    return Vocabulary("gpt2", _splitting(file, tokenizer), tokens, kinds, merges=merges)


def _splitting(file: Path, tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is split before merging.

    Raises:
        UserError: It has none for this one.
    """
    splitters = _steps(tokenizer, "pre_tokenizer", "pretokenizers")
    whole_words = bool(tokenizer["model"].get("ignore_merges"))
    kinds = [step.get("type") for step in splitters]
    name = None
    if kinds == ["ByteLevel"] and not splitters[0].get("add_prefix_space"):
        name = "gpt-2" if splitters[0].get("use_regex", True) else None
    elif kinds == ["Digits", "ByteLevel"] and splitters[0].get("individual_digits"):
        plain = splitters[1].get("use_regex", True) and not splitters[1].get("add_prefix_space")
        name = "smollm" if plain else None
    elif (
        kinds[-1:] == ["ByteLevel"]
        and not splitters[-1].get("use_regex", True)
        and not splitters[-1].get("add_prefix_space")
    ):
        patterns = [str((step.get("pattern") or {}).get("Regex")) for step in splitters[:-1]]
        name = _NAMES.get(tuple(patterns)) if set(kinds[:-1]) == {"Split"} else None
    if name is not None and whole_words != (name in WHOLE_WORDS):
        name = None if whole_words else _WITHOUT_WHOLE_WORDS.get(name)
    if name is None:
        raise UserError(
            f"{file} splits text in a way for which llama.cpp has no known name "
            f"({', '.join(map(str, kinds)) or 'none'}), so the file would read other tokens; keep "
            "this model in safetensors"
        )
    return name


def _special(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    ids: Mapping[str, int],
    vocabulary: Vocabulary,
) -> None:
    """Start, end and padding tokens, and all that end an answer."""
    for role, key in _SPECIAL.items():
        text = config.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        if isinstance(text, str) and text in ids:
            vocabulary.special[role] = ids[text]
    model_file = folder / "config.json"
    model = read_json(model_file) if model_file.is_file() else {}
    listed = declared_ends(folder)
    if "eos" in vocabulary.special and vocabulary.special["eos"] not in listed:
        listed.insert(0, vocabulary.special["eos"])
    elif "eos" not in vocabulary.special and listed:
        vocabulary.special["eos"] = listed[0]
    if "bos" not in vocabulary.special and isinstance(model.get("bos_token_id"), int):
        vocabulary.special["bos"] = model["bos_token_id"]
    vocabulary.ends = tuple(
        dict.fromkeys(token for token in listed if 0 <= token < len(vocabulary.tokens))
    )
    other_ends = [token for token in vocabulary.ends if token != vocabulary.special.get("eos")]
    # llama.cpp has names for three; it also knows the usual ones by their text.
    vocabulary.special |= dict(zip(("eot", "eom"), other_ends, strict=False))
    vocabulary.adds = _added(tokenizer, vocabulary, ids)


def _added(
    tokenizer: Mapping[str, Any], vocabulary: Vocabulary, ids: Mapping[str, int]
) -> dict[str, bool]:
    """Whether a text gets a start and an end token: what tokenizer.json does decides."""
    single: list[dict[str, Any]] = []
    for processor in _steps(tokenizer, "post_processor", "processors"):
        if processor.get("type") == "TemplateProcessing":
            single = list(processor.get("single") or [])
    names = [str((item.get("SpecialToken") or {}).get("id")) for item in single]
    start, end = (ids.get(names[place]) if names else None for place in (0, -1))
    return {
        "bos": start is not None and start == vocabulary.special.get("bos"),
        "eos": end is not None and end == vocabulary.special.get("eos") and len(names) > 1,
    }


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template, wherever it lies."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    older = folder / "chat_template.json"
    value: Any = config.get("chat_template")
    if value is None and older.is_file():
        value = read_json(older).get("chat_template")
    if isinstance(value, list):
        templates = {template.get("name"): template.get("template") for template in value}
        value = templates.get("default", next(iter(templates.values()), None))
    return value if isinstance(value, str) else None


def stop_texts(folder: Path, rows: int) -> tuple[list[str], bool]:
    """Texts of the tokens that end an answer, and whether texts get a start token in front.

    Args:
        folder: A model folder with its tokenizer.
        rows: Of the model's word embeddings.

    Raises:
        UserError: As of `read_vocabulary`.
    """
    vocabulary = read_vocabulary(folder, rows)
    return [vocabulary.tokens[token] for token in vocabulary.ends], vocabulary.adds["bos"]
