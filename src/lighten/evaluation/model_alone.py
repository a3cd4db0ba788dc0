"""A model that is measured as it is, or an adapter: a run's folder in which nothing is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten import runs
from lighten.errors import UserError
from lighten.machine import hardware
from lighten.paths import data_label, exists, expanded
from lighten.peft_config import CONFIG, WEIGHTS, is_adapter, on_hub, read_config
from lighten.recipe import EvaluateOptions, Recipe, aliases, start
from lighten.runs import Run

if TYPE_CHECKING:
    from lighten.artifacts.source import Artefact

log = logging.getLogger(__name__)
# Of the run that trained an adapter, what decides how its base is loaded and how it is asked.
_OF_RUN = (
    "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype", "dtype", "trust_remote_code", "chat_template", "added_tokens",
    "system_role", "thinking", "qat", "qat_group_size",
)  # fmt: skip
_TEMPLATE = "chat_template.jinja"


def recipe_of(
    model: str, options: Mapping[str, Any]
) -> tuple[Recipe, Artefact | None, dict[str, Any]]:
    """What a model is measured on.

    Args:
        model: As in a recipe, or an adapter's folder.
        options: Settings of a recipe, `dataset` or `eval_dataset` among them, and of its `evaluate`
            section, by name. `model_name_or_path` is another base than the adapter names, and
            `adapter_name_or_path` an adapter over the model.

    Returns:
        The recipe, whose model is the base; the adapter, if there is one; and the settings of its
        `evaluate` section.

    Raises:
        UserError: No data are named, a setting is none, or the adapter's base cannot be had.
    """
    evaluate, others = dict[str, Any](), dict[str, Any]()
    for key, value in options.items():
        name = key.removeprefix("evaluate.")
        (evaluate if name in EvaluateOptions.model_fields else others)[key] = value
    named, _, _ = aliases.translate(others)
    folder, base = _adapter_of(model, named)
    if not {"dataset", "eval_dataset"} & set(named):
        what = "a model" if folder is None else "an adapter"
        raise UserError(
            f"{model} is not a run (see: lighten runs list); to measure it as {what}, name the "
            "data: --dataset FILE_OR_FOLDER (what a training would hold out of it) or "
            "--eval_dataset FILE_OR_FOLDER (all of it)"
        )
    others.setdefault("dataset", named.get("dataset", named.get("eval_dataset")))
    values, adapter = dict[str, Any](model_name_or_path=model), None
    if folder is not None:
        others = {
            key: value for key, value in others.items()
            if not {start.MODEL, start.START} & set(aliases.translate({key: value})[0])
        }  # fmt: skip
        from lighten.artifacts.source import open_source  # a mistyped name is told without PyTorch

        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder} has no {WEIGHTS}; save it again with save_pretrained")
        adapter = open_source(folder, base=base)
        values = settings_of(adapter)
    recipe = Recipe.from_values(values, others)
    if recipe.output_dir is None:
        name = recipe.name
        if adapter is not None:
            name = f"{adapter.name}-{data_label(recipe.dataset)}"
        run_folder = str(Path("runs") / f"{name}-as-it-is")
        recipe = Recipe.from_values(values, {**others, "output_dir": run_folder})
    return recipe, adapter, evaluate


def adapter_folder(name: str) -> Path | None:
    """The folder of an adapter that a name means, perhaps on the hub; None of a model or a run."""
    folder = expanded(name)
    if not exists(folder):
        return on_hub(name)
    return folder.resolve() if is_adapter(folder) else None


def _adapter_of(model: str, named: Mapping[str, Any]) -> tuple[Path | None, str | None]:
    """The adapter that is measured, if one is, and its base, where that is named too.

    Raises:
        UserError: There is no such adapter, or two are named, or two bases.
    """
    folder, other = adapter_folder(model), named.get(start.START)
    if folder is not None and other is not None:
        raise UserError(f"{model} is an adapter, and {start.START} is {other}; name one")
    if folder is not None:
        return folder, named.get(start.MODEL)
    if other is not None and start.MODEL in named:
        raise UserError(f"{model} and {named[start.MODEL]} are both named as the base; name one")
    return (None, None) if other is None else (start.find(str(other)).resolve(), model)


def settings_of(adapter: Artefact) -> dict[str, Any]:
    """How an adapter's base is loaded, and how it is asked: as in the run that trained it.

    Of one without its run that is what lies beside it: its tokens, and its chat template.

    Args:
        adapter: In a folder of its own, or a run's.

    Returns:
        Settings of a recipe.

    Raises:
        UserError: A tokenizer cannot be read.
    """
    from lighten.artifacts.source import new_tokens
    from lighten.models.load import tokenizer_in
    from lighten.models.same import names_another

    values = dict[str, Any](model_name_or_path=adapter.base, revision=adapter.revision)
    if adapter.run is not None:
        completed = adapter.run.recipe().completed()
        return {**values, **{key: completed[key] for key in _OF_RUN}}
    assert adapter.adapter is not None
    recorded = read_config(adapter.adapter).get("base_model_name_or_path")
    if names_another(recorded, adapter.base, adapter.base_folder):
        log.warning(
            "%s: %s names %s as its base, and %s is taken: it learnt on other weights",
            adapter.adapter, CONFIG, recorded, adapter.base,
        )  # fmt: skip
    if adapter.companions == adapter.base_folder:
        return values
    if tokens := new_tokens(adapter):
        values["added_tokens"] = tokens
    template, of_base = (
        tokenizer_in(folder, adapter.name).chat_template
        for folder in (adapter.companions, adapter.base_folder)
    )
    if isinstance(template, dict):
        template = template.get("default")
    if template and template != of_base:
        # Older tokenizers keep it in tokenizer_config.json.
        file = adapter.companions / _TEMPLATE
        values["chat_template"] = str(file) if file.is_file() else template
    return values


@contextmanager
def run_of(recipe: Recipe, adapter: Artefact | None = None) -> Iterator[Run]:
    """The run's folder, while its model is measured; nothing is left of one where that fails.

    Args:
        recipe: Of `recipe_of`.
        adapter: Over its model.

    Raises:
        UserError: The folder is somebody's, or a run that trains is in it.
    """
    commit, clean = hardware.commit()
    with runs.model_alone(recipe, None if adapter is None else adapter.adapter) as run:
        run.update(
            version=1, name=run.name, started=runs.now(), commit=commit, tree_clean=clean,
            machine=hardware.machine().to_dict(), versions=hardware.versions(),
        )  # fmt: skip
        if adapter is not None and adapter.run is not None:
            learnt = (adapter.run.info().get("data") or {}).get("answers")
            run.update(data={"answers": learnt})  # what its answers end with
        yield run
        run.update(ended=runs.now())
