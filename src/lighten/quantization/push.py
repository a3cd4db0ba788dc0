"""An artefact on a model hub: looked at first, then uploaded in one commit."""

from __future__ import annotations

import json
import os
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is public

from lighten.errors import UserError
from lighten.models.gguf_header import read_header
from lighten.quantization.gguf_source import read_weights
from lighten.quantization.verify import RECEIPT

# Formats that run code when they are read, or that only a trainer can use.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy")
WEIGHTS = (".safetensors", ".gguf", ".pte")
CARD = "README.md"


def check(folder: Path, repo_id: str, *, force: bool = False) -> list[Path]:
    """Look at an artefact before anything leaves the machine.

    Args:
        folder: The artefact's.
        repo_id: `owner/name` on the hub.
        force: Take one whose receipt did not pass, too.

    Returns:
        The files that will be uploaded; hidden ones are left out.

    Raises:
        UserError: It has no weights, no card, a torn or pickled file, a receipt that did not pass,
            or the repository's name is none.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"{repo_id!r} is no repository's name (owner/name): {_line(error)}"
        ) from error
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name what lighten export wrote")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    if pickled := [path for path in files if path.suffix in PICKLES]:
        raise UserError(
            f"{pickled[0]} is a pickle or may be one, which can run code when it is read; it is "
            "not uploaded: remove it, or save it as safetensors"
        )
    if not any(path.suffix in WEIGHTS for path in files):
        raise UserError(f"{folder} holds no weights ({', '.join(WEIGHTS)})")
    if not (folder / CARD).is_file():
        raise UserError(f"{folder} has no model card ({CARD}); export it with lighten export")
    for path in files:
        if path.suffix == ".gguf":
            read_header(path)
    if any(path.suffix == ".safetensors" for path in files):
        read_weights(folder)
    receipt = folder / RECEIPT
    if receipt.is_file() and not force:
        try:
            passed = json.loads(receipt.read_text(encoding="utf-8")).get("passed")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{receipt} is torn; run lighten verify again") from error
        if passed is False:
            raise UserError(
                f"{receipt} says that it does not answer as what it was made of; mend it, or "
                "upload it with --force"
            )
    return files


def push(folder: Path, repo_id: str, *, private: bool = True, force: bool = False) -> str:
    """Upload an artefact to a repository of the hub, which is made if it is not there.

    The hub is `HF_ENDPOINT`'s, or Hugging Face's; the token is `HF_TOKEN`'s or that of
    `hf auth login`.

    Args:
        folder: The artefact's.
        repo_id: `owner/name` on the hub.
        private: A new repository is seen by its owner alone.
        force: As of `check`.

    Returns:
        Address of the commit.

    Raises:
        UserError: As of `check`; there is no token, or the hub refuses or cannot be reached.
    """
    files = check(folder, repo_id, force=force)
    token = get_token()
    if token is None:
        raise UserError("the hub wants a token to upload with; set HF_TOKEN, or: hf auth login")
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        hub.create_repo(repo_id, private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            # Patterns: of a name with brackets nothing would be uploaded.
            allow_patterns=[escape(path.relative_to(folder).as_posix()) for path in files],
            commit_message="Upload by lighten",
        )
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set; unset it to upload") from error
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{hub.endpoint} did not take {repo_id}: {_line(error)}") from error
    return str(commit.commit_url)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first_line = lines[0] if lines else type(error).__name__
    # Of a large file it says which, and why is in the cause.
    return (
        first_line
        if error.__cause__ is None
        else f"{first_line.rstrip('.')}: {_line(error.__cause__)}"
    )
