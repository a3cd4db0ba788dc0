"""The models of a run in memory: the base, and what was trained, on it or as a model of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lighten import adapters, data, models
from lighten.adapters import Trained
from lighten.adapters.fake_quant import fake_quantise
from lighten.artifacts.source import Artefact
from lighten.errors import UserError
from lighten.evaluation.engine import open_engine
from lighten.evaluation.model_alone import settings_of
from lighten.paths import name_of
from lighten.recipe import Recipe
from lighten.runs import Run
from lighten.training.base import load_base

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lighten.generation.engine import Engine


@dataclass
class Opened:
    """A base with adapters on it, perhaps none.

    Attributes:
        base: The base.
        trained: The adapters.
        template: Name of its chat template.
        adapter: Which adapter answers; None: the base alone.
        engine: That answers in transformers' place, with the adapters that `trained` lacks.
        why_no_engine: Why there is none, where one was to be.
    """

    base: models.Base
    trained: Trained
    template: str
    adapter: str | None = None
    engine: Engine | None = None
    why_no_engine: str | None = None

    def close(self) -> None:
        """End the engine, if there is one."""
        if self.engine is not None:
            self.engine.close()


def open_model(
    base: models.Base,
    folders: Mapping[str, Path],
    template: str,
    *,
    qat_group_size: int | None = None,
) -> Opened:
    """A base that answers token by token, in our engine where that takes it and its adapters.

    Args:
        base: Without adapters.
        folders: Of adapters, by name.
        template: Name of its chat template.
        qat_group_size: As `adapters.load` takes it.

    Raises:
        UserError: An adapter does not fit the base.
    """
    try:
        if qat_group_size is not None:
            raise UserError("weights and activations are rounded as they were in its training")
        engine = open_engine(base, folders, prefix_caching=True)
    except UserError as error:
        trained = adapters.load(base.model, folders, qat_group_size=qat_group_size)
        return Opened(base, trained, template, why_no_engine=str(error))
    return Opened(base, adapters.attach(base.model, []), template, engine=engine)


def open_adapter(adapter: Artefact, device: str) -> Opened:
    """An adapter's folder, over its base, that answers token by token.

    Args:
        adapter: With its folder.
        device: Where they go.

    Raises:
        UserError: Its base cannot be had, or it does not fit it.
    """
    assert adapter.adapter is not None
    # No data are read of it.
    recipe = Recipe.from_values({**settings_of(adapter), "dataset": ""})
    base = load_base(recipe, device)
    template = data.choose_template(base.tokenizer, recipe.chat_template).name
    # As in a run, `base` is the base.
    name = name_of(adapter.adapter)
    name = "adapter" if name == "base" else name
    opened = open_model(base, {name: adapter.adapter}, template, qat_group_size=recipe.qat_groups)
    return replace(opened, adapter=name)


class Models:
    """What a run can answer with: `None` is the base, names are what it trained.

    What was trained quantisation-aware answers as it was trained, its weights and activations
    rounded; the base answers as it is. Adapters share the base. A base that was trained whole is a
    second model: it is opened when it is asked for, and `keep` says whether the other one may stay
    in memory meanwhile.

    Args:
        run: The run.
        device: Where the models go.
        keep: Hold every model that was opened.
        talks: Answers are wanted, one at a time, and nothing else: in our engine where it can.

    Attributes:
        names: What the run trained; empty before that.
        learnt: What the answers that it was trained on end with and hold.
        handling: What it does with system messages and thoughts.
    """

    def __init__(self, run: Run, device: str, *, keep: bool, talks: bool = False) -> None:
        self._recipe, self._device, self._keep = run.recipe(), device, keep
        self._talks = talks
        self._adapters, self._model_folder = run.adapters(), run.model()
        if self._model_folder is None:
            self.names = tuple(self._adapters)
        else:
            self.names = tuple(adapter.name for adapter in self._recipe.cohort())
        self.learnt = data.LearntAnswers.of(run.info())
        self.handling = data.Handling(self._recipe.system_role, self._recipe.thinking)
        self._opened: dict[Path | None, Opened] = {}

    def open(self, name: str | None) -> Opened:
        """The model that answers under this name."""
        if self._model_folder is None:
            return replace(self._get(None), adapter=name)
        return self._get(None if name is None else self._model_folder)

    def close(self) -> None:
        """End what answers."""
        for opened in self._opened.values():
            opened.close()

    def _get(self, folder: Path | None) -> Opened:
        """The base, or the model of a folder."""
        if folder not in self._opened:
            if not self._keep:
                self._opened.clear()
            recipe, device = self._recipe, self._device
            base = load_base(recipe, device) if folder is None else _load(recipe, folder, device)
            template = data.choose_template(base.tokenizer, recipe.chat_template).name
            rounded = folder is not None and recipe.qat is not None
            if rounded:
                fake_quantise(base.model, recipe.qat_group_size)
            groups = recipe.qat_groups if self._adapters else None
            if self._talks and not rounded:
                opened = open_model(base, self._adapters, template, qat_group_size=groups)
            else:
                trained = adapters.load(base.model, self._adapters, qat_group_size=groups)
                opened = Opened(base, trained, template)
            self._opened[folder] = opened
        return self._opened[folder]


def _load(recipe: Recipe, folder: Path, device: str) -> models.Base:
    return models.load(
        str(folder),
        dtype=recipe.dtype,
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
        device=device,
    )
