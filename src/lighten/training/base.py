"""The recipe's base and its tokenizer, as training, evaluation and chat all see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lighten import models
from lighten.adapters.whole import make_float32
from lighten.machine.hardware import Choice, choose_dtype
from lighten.models import gguf
from lighten.models.attention_setting import set_attention
from lighten.models.load import locate
from lighten.models.trainable import refuse_rounded_activations, require_gradients
from lighten.models.vocabulary import grow
from lighten.parallel.ranks import gather
from lighten.parallel.streamed.build import without_weights
from lighten.parallel.streamed.shards import Shards
from lighten.recipe import Recipe
from lighten.training import quantization_aware, streaming
from lighten.training.method import adapter_specs


def load_base(
    recipe: Recipe,
    device: str,
    *,
    learns: bool = False,
    layers_later: bool = False,
    ranks: int = 1,
    dtype: Choice | None = None,
) -> models.Base:
    """The recipe's base with its new tokens, as training, evaluation and chat all see it.

    Args:
        recipe: Which.
        device: Where it goes.
        learns: It is about to be trained: a base that learns whole comes in float32 from its
            files, and `dtype` of the result is still the format of the products.
        layers_later: Leave the decoder layers' matrices in their files' format, mapped, in main
            memory: whoever spreads them over ranks makes them float32 (`adapters.whole`) and moves
            them to its device, and the rest too.
        ranks: How many processes train it together.
        dtype: What all of them compute in (`agreed_dtype`); None: what the recipe means here.

    Raises:
        UserError: The base cannot be had.
    """
    full = learns and _learns_whole(recipe)
    if learns:
        require_trainable(recipe)
    chosen = dtype or choose_dtype(recipe.dtype if full else recipe.compute_dtype, device)
    target = "float32" if full else chosen.value
    first = _first_format(recipe, target) if layers_later else target
    base = models.load(
        recipe.model_name_or_path,
        revision=recipe.revision,
        dtype=first,
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
        device=device,
        load_in_4bit=recipe.load_in_4bit,
        load_in_8bit=recipe.load_in_8bit,
        bnb_4bit_quant_type=recipe.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=recipe.bnb_4bit_use_double_quant,
        build=streaming.builder(recipe, device, adapter_specs(recipe), learns, ranks),
        spread_later=layers_later,
    )
    if learns:
        require_gradients(base.name, base.model)
    base = replace(base, dtype=chosen)
    if first != target:
        _make_float32(recipe, base)
        # Which depends on the format: it was chosen for that of the files.
        base.attention = set_attention(base.model, recipe.attn_implementation, device)
    add_tokens(base.model, base.tokenizer, recipe.added_tokens)
    return base


def agreed_dtype(recipe: Recipe, accelerator: Accelerator) -> Choice:
    """The format of the products, one for all ranks, with the reason.

    To `auto` each has an answer of its own hardware, and a sum of gradients in several formats,
    with the factors of float16 losses in some of them, is nobody's. What the oldest of them
    computes in, all can.

    Args:
        recipe: What is trained.
        accelerator: The ranks.

    Raises:
        PeerLost: A rank has ended.
    """
    requested = recipe.dtype if _learns_whole(recipe) else recipe.compute_dtype
    chosen = choose_dtype(requested, str(accelerator.device))
    choices = gather(accelerator, chosen)
    if all(choice.value == chosen.value for choice in choices):
        return chosen
    rank = next(rank for rank, choice in enumerate(choices) if choice.value != "bfloat16")
    return Choice(
        choices[rank].value, f"all ranks compute in one format; rank {rank}: {choices[rank].reason}"
    )


def _learns_whole(recipe: Recipe) -> bool:
    return recipe.method == "full" and recipe.last_layers is None


def _first_format(recipe: Recipe, target: str) -> str:
    """The format in which a base whose layers are spread later comes from its files.

    What is rounded is rounded as it is read: some weights of a model may not be.
    """
    if target != "float32":
        return target
    source, path = locate(
        recipe.model_name_or_path, revision=recipe.revision, code=recipe.trust_remote_code
    )
    if source == "gguf":
        return target
    kinds = {stored.kind for stored in Shards.of(path).values()}
    formats = {"BF16": "bfloat16", "F16": "float16"}
    return formats.get(kinds.pop(), target) if len(kinds) == 1 else target


def _make_float32(recipe: Recipe, base: models.Base) -> None:
    """What a base has outside of its layers' matrices becomes as if all were read in float32."""
    make_float32(base.model, layers_later=True)
    # Constants of the code were rounded to the files' format.
    computed = without_weights(base.name, base.path, torch.float32, recipe.trust_remote_code)
    for path, module in base.model.named_modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            if key in module._non_persistent_buffers_set:
                module._buffers[key] = computed.get_submodule(path).get_buffer(key)
            elif buffer.is_floating_point():
                module._buffers[key] = buffer.float()


def require_trainable(recipe: Recipe) -> None:
    """What a base's configuration alone says against training on it.

    Raises:
        UserError: Its layers pass no gradient on, qat does not suit them, or a GGUF file splits
            text in a way that is not known here.
        MissingExtra: qat is wanted without torchao.
    """
    source, folder = locate(
        recipe.model_name_or_path, revision=recipe.revision, weights=False,
        code=recipe.trust_remote_code,
    )  # fmt: skip
    if source == "gguf":
        gguf.read_config(folder)  # what that refuses comes first
        gguf.require_tokens(folder)
    else:
        refuse_rounded_activations(recipe.model_name_or_path, folder)
    quantization_aware.require(recipe, folder)


def tokenizer_of(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that `load_base` would give, without the base.

    Raises:
        UserError: It cannot be had.
    """
    tokenizer: PreTrainedTokenizerBase = models.load_tokenizer(
        recipe.model_name_or_path,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
    )
    new_tokens(tokenizer, recipe.added_tokens)
    return tokenizer


def add_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]
) -> None:
    """Give the base new special tokens; they start as the mean of the embeddings.

    Without any it stays as it is: a tokenizer that knows more tokens than its model is not asked
    for them (`Limits.check_ids`).
    """
    if not tokens:
        return
    new_tokens(tokenizer, tokens)
    grow(model, len(tokenizer))


def new_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Give the tokenizer alone new special tokens."""
    if tokens:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False
        )
