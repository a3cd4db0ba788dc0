"""The models of a run in memory: the base, and what was trained, on it or as a model of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lighten import adapters, data, models
from lighten.adapters import Trained
from lighten.adapters.fake_quant import fake_quantise
from lighten.recipe import Recipe
from lighten.runs import Run
from lighten.training.base import load_base


@dataclass
class Opened:
    """A base with adapters on it, perhaps none.

    Attributes:
        base: The base.
        trained: The adapters.
        template: Name of its chat template.
        adapter: Which adapter answers; None: the base alone.
    """

    base: models.Base
    trained: Trained
    template: str
    adapter: str | None = None


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

    Attributes:
        names: What the run trained; empty before that.
        learnt: What the answers that it was trained on end with and hold.
        handling: What it does with system messages and thoughts.
    """

    def __init__(self, run: Run, device: str, *, keep: bool) -> None:
        self._recipe, self._device, self._keep = run.recipe(), device, keep
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

    def _get(self, folder: Path | None) -> Opened:
        """The base, or the model of a folder."""
        if folder not in self._opened:
            if not self._keep:
                self._opened.clear()
            recipe, device = self._recipe, self._device
            base = load_base(recipe, device) if folder is None else _load(recipe, folder, device)
            if folder is not None and recipe.qat is not None:
                fake_quantise(base.model, recipe.qat_group_size)
            cohort = adapters.load(
                base.model, self._adapters,
                qat_group_size=recipe.qat_groups if self._adapters else None,
            )  # fmt: skip
            template = data.choose_template(base.tokenizer, recipe.chat_template).name
            self._opened[folder] = Opened(base, cohort, template)
        return self._opened[folder]


def _load(recipe: Recipe, folder: Path, device: str) -> models.Base:
    return models.load(
        str(folder),
        dtype=recipe.dtype,
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
        device=device,
    )
