"""What a finished run ships: an adapter in PEFT's format, or the base that learnt as a model."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lighten import data, runs
from lighten.adapters import WholeBase, dtensors
from lighten.errors import DiskFull
from lighten.machine import hardware
from lighten.models import Base
from lighten.models.names import card_line, card_name, public_name
from lighten.models.stored import stored_as
from lighten.parallel import ranks
from lighten.parallel.offloaded import stores
from lighten.paths import data_names
from lighten.training.setup import Setup
from lighten.training.spread_model import SpreadModel
from lighten.wording import diverged

# What other tools and the hub's web pages can fetch without trouble.
SHARD_SIZE = "5GB"
# What prepares pictures and sound for a model, which learnt from text alone here.
PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


def export(setup: Setup, name: str, run: runs.Run) -> int:
    """Write what was trained under a name into the run; the last thing that happens to a setup.

    Returns:
        Bytes of its weight files.

    Raises:
        UserError: The disk is full; an older result stays.
    """
    if isinstance(setup.trained, WholeBase):
        folder = run.folder / runs.MODEL
        export_model(setup, setup.trained, folder)
    else:
        folder = run.folder / "adapters" / name
        export_adapter(setup, name, folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def take_part(setup: Setup) -> None:
    """What every other rank does while the main one exports: hand over the rows that it holds.

    Raises:
        PeerLost: A rank has ended.
    """
    trained = setup.trained
    if isinstance(trained, WholeBase) and _is_spread(trained):
        with _ranks_of(setup):
            _spread_model(trained).take_part()


def export_adapter(setup: Setup, name: str, folder: Path) -> None:
    """Write an adapter with all it needs to be used: tokenizer, chat template, card.

    The files are verified after they are written.
    """
    parts = dict(
        setup.trained.contents(
            name, base_model=public_name(setup.base.name), revision=setup.base.revision
        )
    )
    with TemporaryDirectory() as scratch:
        tokenizer, generation = with_learnt_ends(setup)
        tokenizer.save_pretrained(scratch)
        generation.save_pretrained(scratch)
        for path in sorted(Path(scratch).iterdir()):
            parts[path.name] = path.read_bytes()
    parts["README.md"] = _adapter_card(setup, name).encode()
    for file_name, contents in parts.items():
        runs.write_bytes(folder / file_name, contents)
    setup.trained.verify(name, folder)


def export_model(setup: Setup, trained: WholeBase, folder: Path) -> None:
    """Write the base that learnt as transformers writes a model, in the base's format."""
    learnt = trained.describe(trained.names[0])
    tokenizer, generation = with_learnt_ends(setup)
    model, is_spread = trained.model, _is_spread(trained)
    if not is_spread:
        trained.fuse(trained.names[0])
    model.generation_config = generation
    if setup.rows.train.findings.ends:
        model.config.eos_token_id = data.learnt_answers(setup.rows.train.findings).ends[0]
    with runs.whole_folder(folder) as partial:
        try:
            if is_spread:
                with _ranks_of(setup):
                    _spread_model(trained).write(partial)
            else:
                model.save_pretrained(partial, max_shard_size=SHARD_SIZE)
        except SafetensorError as error:  # how its files tell of a full disk
            raise DiskFull(
                f"{folder} could not be written ({error}); the checkpoints are intact, free some "
                "space"
            ) from error
        tokenizer.save_pretrained(partial)
        _copy_processor(setup.base, partial)
        (partial / "README.md").write_text(_model_card(setup, learnt), encoding="utf-8")


def _copy_processor(base: Base, folder: Path) -> None:
    """Put the base's processor beside the model, if the model is all of the base.

    Of some bases transformers takes the language model alone, which sees no pictures.
    """
    files = [base.path / name for name in PROCESSOR_FILES if (base.path / name).is_file()]
    types = {
        json.loads((place / "config.json").read_text(encoding="utf-8")).get("model_type")
        for place in (base.path, folder)
        if files
    }
    for file in files if len(types) == 1 else ():
        shutil.copyfile(file, folder / file.name)


def _is_spread(trained: WholeBase) -> bool:
    return dtensors.any_spread(trained.model.parameters())


def _spread_model(trained: WholeBase) -> SpreadModel:
    return SpreadModel(trained.model, trained.format_of, SHARD_SIZE, stores.release_all)


def _ranks_of(setup: Setup) -> AbstractContextManager[None]:
    """Weights are gathered within."""
    accelerator = setup.accelerator
    return ranks.lost_within(accelerator.process_index, accelerator.num_processes)


def with_learnt_ends(setup: Setup) -> tuple[PreTrainedTokenizerBase, GenerationConfig]:
    """Tokenizer and generation settings that name what ends the answers learnt.

    Other tools stop where these two say. The tokenizer's own end stays where answers end with it,
    and where the chat template would write something else without it.
    """
    base, learnt = setup.base, data.learnt_answers(setup.rows.train.findings)
    tokenizer: PreTrainedTokenizerBase = base.tokenizer
    generation = copy.deepcopy(base.model.generation_config) or GenerationConfig()
    if not learnt.ends:
        return tokenizer, generation
    generation._from_model_config = False  # else transformers may derive it anew from the model's
    generation.eos_token_id = data.stop_tokens(tokenizer, generation.eos_token_id, learnt)
    # Changed settings are not saved where some have no effect, as published ones do (temperature).
    generation._original_object_hash = hash(generation)
    if (token := data.end_token(tokenizer, learnt)) is not None:
        renamed = copy.deepcopy(tokenizer)
        renamed.eos_token = token
        if data.writes_alike(tokenizer, renamed):
            tokenizer = renamed
    return tokenizer, generation


def _adapter_card(setup: Setup, name: str) -> str:
    facts, base = setup.trained.facts(name), setup.base
    method = facts.get("method", "LoRA")
    serving = f"Serving: {facts['serving']}.\n\n" if "serving" in facts else ""
    return (
        f"---\n{card_line(base.name)}library_name: peft\ntags: [lora, lighten]\n---\n\n"
        f"# {name}\n\nA {method} adapter ({setup.trained.describe(name)}) for "
        f"`{card_name(base.name)}`, "
        f"{_training_summary(setup)}.{_learned_on(base)}{_new_tokens(setup)}"
        f"{_diverged(setup, name)}\n\n{serving}"
        f"```python\n{snippet(setup)}```\n"
    )


def snippet(setup: Setup) -> str:
    """Code that opens the adapter in PEFT, with new tokens as its training began with them."""
    base, adds_tokens = setup.base, bool(setup.recipe.added_tokens)
    source = f'"{public_name(base.name)}"'
    if base.source == "gguf":
        file = Path(public_name(base.name))
        source = f'"{file.parent}", gguf_file="{file.name}"'
    elif base.source == "hub" and base.revision:
        source += f', revision="{base.revision}"'
    lines = [
        "from peft import PeftModel",
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if adds_tokens else ''}",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({source})",
    ]
    if adds_tokens:
        lines += [
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
            "rows = base.get_input_embeddings().weight.shape[0]",
            "if len(tokenizer) > rows:",
            "    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)",
            "    for layer in {base.get_input_embeddings(), base.get_output_embeddings()}:",
            "        layer.weight.data[rows:] = layer.weight.data[:rows].mean(0)",
        ]
    lines.append('model = PeftModel.from_pretrained(base, "path/to/this/folder")')
    return "\n".join(lines) + "\n"


def _new_tokens(setup: Setup) -> str:
    """What whoever uses the adapter has to know of tokens that the base does not have."""
    if not setup.recipe.added_tokens:
        return ""
    names = ", ".join(f"`{token}`" for token in setup.recipe.added_tokens)
    untrained = setup.choices.get("added_tokens")
    learnt = f" They were not trained: {untrained.reason}." if untrained else ""
    return (
        f" It uses new tokens: {names}. The base's embedding has to grow by them before the "
        f"adapter is loaded, as below.{learnt}"
    )


def _diverged(setup: Setup, name: str) -> str:
    """That an adapter's training did not come to its end, where it did not."""
    progress = next(a.progress for a in setup.adapters if a.name == name)
    if not progress.diverged:
        return ""
    best = progress.best_step if setup.recipe.load_best_model_at_end else None
    return f" {diverged(progress.steps, best)}"


def _learned_on(base: Base) -> str:
    """The weights that an adapter corrects, where they are not those that its base loads with."""
    if base.quantization is None:
        if base.source != "packaged":
            return ""
        return (
            " It learnt on that model's 4-bit file, dequantised, as lighten's package carries it: "
            "with the original weights its answers differ a little."
        )
    if stored_as(base.path) is not None:
        return (
            f" Its base is stored as {base.quantization.value}: merged, it goes onto what that is "
            "dequantised to."
        )
    return (
        f" It learnt on its base stored as {base.quantization.value}. `lighten export` merges it "
        "onto the original weights, or with `--onto dequantized` onto those that it learnt on, and "
        "tells the held-out loss on each."
    )


def _model_card(setup: Setup, learnt: str) -> str:
    base = setup.base.name
    return (
        f"---\n{card_line(base)}library_name: transformers\ntags: [lighten]\n---\n\n"
        f"# {setup.recipe.name}\n\n`{card_name(base)}` with {learnt} "
        f"{_training_summary(setup)}.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n```\n'
    )


def _training_summary(setup: Setup) -> str:
    return (
        f"trained with lighten {hardware.versions().get('lighten', '')} on "
        f"`{data_names(setup.recipe.dataset)}` with the chat template `{setup.rows.template.name}`"
        f"{_rounded(setup)}"
    )


def _rounded(setup: Setup) -> str:
    if setup.recipe.qat is None:
        return ""
    return (
        f", quantisation-aware: it is meant to be quantised to {setup.recipe.qat} in groups of "
        f"{setup.recipe.qat_group_size}"
    )
