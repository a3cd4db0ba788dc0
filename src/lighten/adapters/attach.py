"""Adapters on a base: new ones from their specs, or saved ones from their folders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from transformers import PreTrainedModel

from lighten.adapters import files
from lighten.adapters.cohort import Cohort
from lighten.adapters.spec import AdapterSpec
from lighten.errors import UserError
from lighten.peft_config import needs_peft, read_config


def attach(
    model: PreTrainedModel, specs: Sequence[AdapterSpec], *, qat_group_size: int | None = None
) -> Cohort:
    """Freeze the base and attach a cohort of adapters to it.

    Args:
        model: The base.
        specs: The adapters.
        qat_group_size: Compute as once quantised to int8 activations and int4 weights in groups of
            so many; None: as the weights are.

    Raises:
        UserError: Two adapters share a name, an adapter's targets match nothing, one of several
            needs PEFT's own modules, or one cannot be rounded together with the base.
    """
    model.requires_grad_(False)
    if needy := [spec for spec in specs if spec.needs_peft]:
        if qat_group_size is not None:
            raise UserError(
                f"adapter {needy[0].name!r} is trained by PEFT's own modules, which round nothing: "
                "it cannot be trained with qat"
            )
        if len(specs) > 1:
            raise UserError(
                f"adapter {needy[0].name!r} is trained by PEFT's own modules, which cannot tell "
                f"the rows of {len(specs)} adapters in one batch apart; train it alone"
            )
        return _peft_backed().PeftBacked(model, needy[0])
    cohort = Cohort(model)
    if qat_group_size is not None:
        cohort.fake_quantise(qat_group_size)
    for spec in specs:
        cohort.add(spec)
    return cohort


def load(
    model: PreTrainedModel,
    folders: Mapping[str, str | os.PathLike[str]],
    *,
    qat_group_size: int | None = None,
) -> Cohort:
    """Attach saved adapters (ours or PEFT's) to a base, frozen.

    Args:
        model: The base.
        folders: Adapter folder by the name it shall have.
        qat_group_size: As for `attach`.

    Raises:
        UserError: A folder is not an adapter, or does not fit the base or the others.
    """
    cohort = attach(model, [], qat_group_size=qat_group_size)
    for name, folder in folders.items():
        config = read_config(folder)
        weights = files.read_weights(Path(folder))
        vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
        # An adapter that brought its own tokens has a taller embedding than the base.
        rows = files.word_rows(model, {key: tuple(w.shape) for key, w in weights.items()})
        if rows > vocabulary:
            model.resize_token_embeddings(rows, mean_resizing=False)
            model.requires_grad_(False)
        weights = files.adapter_tensors(model, weights, config, alone=len(folders) == 1)
        if needs_peft(config) or any(".lora_embedding_" in key for key in weights):
            if len(folders) > 1:
                raise UserError(
                    f"{folder} is run by PEFT's own modules, which cannot tell the rows of "
                    f"{len(folders)} adapters in one batch apart; load it alone"
                )
            return _peft_backed().load(model, name, folder, weights)
        cohort.add(files.spec_from_peft(name, config, folder, weights))
        files.restore(cohort, name, weights, where=str(folder))
        for parameter in cohort.parameters(name).values():
            parameter.requires_grad_(False)
    return cohort


def _peft_backed() -> ModuleType:
    """What runs PEFT's own modules: it takes a second and more to import, and most do without."""
    from lighten.adapters import peft_backed

    return peft_backed
