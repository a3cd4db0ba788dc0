"""What the recipe's method trains on a base: adapters, or the base's own weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from lighten import models
from lighten.adapters import AdapterSpec, Trained, WholeBase, attach
from lighten.adapters.files import adapter_tensors, check_fit, read_weights, word_rows
from lighten.errors import UserError
from lighten.machine.hardware import Choice
from lighten.models.load import tokenizer_in
from lighten.models.same import names_another
from lighten.peft_config import CONFIG, WEIGHTS, read_config, tensor_shapes
from lighten.recipe import AdapterOptions, Recipe

FROM_ADAPTER = "adapter_name_or_path"  # where nothing more is to be said of it
TEMPLATE = "chat_template.jinja"


def what_learns(recipe: Recipe, base: models.Base, *, layers_later: bool = False) -> Trained:
    """What the recipe's method trains on this base (layers_later: see `WholeBase`).

    Raises:
        UserError: The recipe does not fit the model.
    """
    if recipe.method == "full":
        return WholeBase(
            base.model, dtype=getattr(torch, base.dtype.value), last=recipe.last_layers,
            qat_group_size=recipe.qat_groups, layers_later=layers_later,
        )  # fmt: skip
    start = recipe.adapter_name_or_path
    try:
        trained = attach(base.model, adapter_specs(recipe), qat_group_size=recipe.qat_groups)
    except UserError as error:
        if start is None:
            raise
        raise UserError(
            f"adapter_name_or_path: {start} does not fit {base.name}: {error}"
        ) from error
    # A run that is resumed needs it no more.
    if start is not None and (weights := Path(start) / WEIGHTS).is_file():
        shapes = {
            key: shape for key, shape in tensor_shapes(weights).items()
            if not key.endswith(".base_layer.weight")  # the base's, as PEFT saves a head's
        }  # fmt: skip
        for name in trained.names:
            expected = trained.shapes(name)
            _require_words(Path(start), base, {k: s for k, s in shapes.items() if k in expected})
            check_fit(shapes, expected, f"adapter_name_or_path: {start}")
    return trained


def _require_words(adapter: Path, base: models.Base, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """An adapter that trained the embedding has no more rows of it than there are.

    Raises:
        UserError: It has more: for tokens that the recipe does not give the base.
    """
    rows, own = word_rows(base.model, shapes), base.model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    if rows > own:
        tokens = _lacking_tokens(adapter, base)
        named = f": {json.dumps(tokens, ensure_ascii=False)}" if tokens else ""
        raise UserError(
            f"adapter_name_or_path: {adapter} has an embedding of {rows} tokens and {base.name} "
            f"{own}; name those that it learnt with in added_tokens{named}"
        )


def _lacking_tokens(adapter: Path, base: models.Base) -> list[str]:
    """Tokens that an adapter's tokenizer has and the base's has not, by their ids."""
    if base.tokenizer is None or not (adapter / "tokenizer.json").is_file():
        return []  # a plan's base has none
    ids = tokenizer_in(adapter, str(adapter)).get_vocab()
    return sorted(ids.keys() - base.tokenizer.get_vocab().keys(), key=lambda token: int(ids[token]))


def go_on_from_adapter(recipe: Recipe, trained: Trained) -> None:
    """Put the weights of `adapter_name_or_path` into every adapter, if it names some.

    Raises:
        UserError: They are not whole, or belong to another base.
    """
    if recipe.adapter_name_or_path is None:
        return
    folder = Path(recipe.adapter_name_or_path)
    weights = adapter_tensors(trained.model, read_weights(folder), read_config(folder), alone=False)
    for name in trained.names:
        trained.restore(name, weights)


def adapter_specs(recipe: Recipe) -> list[AdapterSpec]:
    """The adapters of the recipe, as `attach` takes them."""
    return [_spec(options) for options in recipe.cohort()]


def _spec(options: AdapterOptions) -> AdapterSpec:
    targets = options.lora_target_modules
    return AdapterSpec(
        name=options.name,
        r=options.lora_r,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=options.use_rslora,
        init_lora_weights=options.init_lora_weights,
        modules_to_save=tuple(options.modules_to_save or ()),
        rank_pattern=dict(options.rank_pattern),
        alpha_pattern=dict(options.alpha_pattern),
        seed=options.seed,
        use_dora=options.use_dora,
        peft=options.peft,
    )


def choices_of(
    recipe: Recipe, base: models.Base, template: Choice, trained: Trained
) -> dict[str, Choice]:
    """What is trained on what, and in which format, with the reasons."""
    choices = {
        "method": Choice(recipe.method, "; ".join(map(trained.describe, trained.names))),
        "dtype": base.dtype,
        "attention": base.attention,
        "template": template,
    }
    if (start := recipe.adapter_name_or_path) is not None:
        differences = _differences(Path(start), base)
        choices["start"] = Choice(start, "; ".join([FROM_ADAPTER, *differences]))
    if isinstance(trained, WholeBase):
        choices["precision"] = _precision(trained)
    if untrained := _untrained_tokens(recipe):
        choices["added_tokens"] = Choice("untrained", untrained)
    if base.quantization is not None:
        choices["quantization"] = base.quantization
    if recipe.qat is not None:
        choices["qat"] = Choice(
            f"{recipe.qat}, groups of {recipe.qat_group_size}",
            "qat of the recipe; every linear layer but the head, held-out losses too",
        )
    return choices


def _differences(adapter: Path, base: models.Base) -> list[str]:
    """What has to be said where an adapter learnt with another base, other tokens or a template.

    Args:
        adapter: Its folder.
        base: What it goes on over, with the tokens and the template of the recipe.
    """
    if not (adapter / CONFIG).is_file():  # a run that is resumed needs it no more
        return []
    differences = []
    recorded = read_config(adapter).get("base_model_name_or_path")
    if names_another(recorded, base.name, base.path):
        differences.append(
            f"its {CONFIG} names {recorded} as its base, not {base.name}: it learnt on other "
            "weights"
        )
    if tokens := _lacking_tokens(adapter, base):
        differences.append(
            "it learnt with tokens that are cut into others here; to go on with them: "
            f"added_tokens: {json.dumps(tokens, ensure_ascii=False)}"
        )
    template = _template_beside(adapter)
    known = base.tokenizer is not None and template is not None
    if known and template != base.tokenizer.chat_template:
        differences.append(
            "it learnt with another chat template than the one used here; to go on with it: "
            f"chat_template: {adapter / TEMPLATE}"
        )
    return differences


def _template_beside(adapter: Path) -> str | None:
    """The text of the chat template that was saved in a file of its own beside an adapter."""
    try:
        return (adapter / TEMPLATE).read_text(encoding="utf-8")
    except OSError:
        return None


def _precision(trained: WholeBase) -> Choice:
    if trained.dtype == torch.float32:
        return Choice("float32", "weights, optimiser and products alike")
    products = str(trained.dtype).removeprefix("torch.")
    scaled = ", its gradients scaled" if trained.dtype == torch.float16 else ""
    return Choice(
        f"mixed: float32 and {products}",
        f"weights that learn and AdamW's state in float32, products in {products} "
        f"(autocast{scaled})",
    )


def _untrained_tokens(recipe: Recipe) -> str | None:
    """Why new tokens stay as they began, if they do."""
    if not recipe.added_tokens:
        return None
    if recipe.method == "full":
        frozen = recipe.last_layers is not None
        return "the embedding is below the layers that learn" if frozen else None
    if all(map(_may_train_embedding, recipe.cohort())):
        return None
    return "modules_to_save does not name the embedding, so they stay as they began"


def _may_train_embedding(options: AdapterOptions) -> bool:
    """Whether the adapter trains anything that might be the embedding."""
    peft = options.peft or {}
    return bool(
        options.modules_to_save
        or peft.get("modules_to_save")
        or peft.get("peft_type") == "TRAINABLE_TOKENS"
        or peft.get("trainable_token_indices")
    )
