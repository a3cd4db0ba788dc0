"""What a model is, from its configuration alone: parameters by part, shape, context."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from transformers import PreTrainedModel

from lighten.models import gguf
from lighten.models.configuration import build_empty, read_config
from lighten.models.limits import Limits, limits_of
from lighten.models.load import locate


@dataclass(frozen=True)
class Description:
    """A model without its weights.

    Attributes:
        name: As asked for.
        architecture: The transformers class.
        parameters: Parameters by part: embedding, attention, mlp, norm, head, other.
        layers: Transformer layers.
        hidden_size: Width of the hidden states.
        context_length: Positions it was made for, None if the configuration does not say.
    """

    name: str
    architecture: str
    parameters: dict[str, int]
    layers: int
    hidden_size: int
    context_length: int | None

    @property
    def total_parameters(self) -> int:
        """All parameters, a tied head once."""
        return sum(self.parameters.values())


def describe(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Description:
    """Describe a model; of a hub model only `config.json` is fetched.

    Raises:
        UserError: No such model, or transformers does not know its architecture.
    """
    return of_model(name, skeleton(name, revision=revision, trust_remote_code=trust_remote_code))


def skeleton(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model whose weights are shapes alone (on the meta device).

    Raises:
        UserError: No such model, or transformers does not know its architecture.
    """
    source, path = locate(name, revision=revision, weights=False, code=trust_remote_code)
    if source == "gguf":
        config = gguf.read_config(path)
    else:
        config = read_config(path, trust_remote_code=trust_remote_code)
    return build_empty(name, config, trust_remote_code=trust_remote_code)


def cache_argument(model: PreTrainedModel) -> str:
    """The name that a model's forward takes keys and values of earlier tokens by.

    transformers 5.24 calls it `cache`, and warns of the older name.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def limits(
    name: str, *, tokens: int = 0, revision: str | None = None, trust_remote_code: bool = False
) -> Limits:
    """What a model can take, known before it is loaded.

    Args:
        name: As for `load`.
        tokens: Tokens of its tokenizer, where the embedding will grow to them.
        revision: As for `load`.
        trust_remote_code: As for `load`.

    Raises:
        UserError: No such model, or transformers does not know its architecture.
    """
    model = skeleton(name, revision=revision, trust_remote_code=trust_remote_code)
    return limits_of(model, tokens)


def of_model(name: str, model: PreTrainedModel) -> Description:
    """Describe a built model (its weights may be on the meta device)."""
    config = model.config.get_text_config()
    return Description(
        name=name,
        architecture=type(model).__name__,
        parameters=parameters_by_part(model),
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        context_length=getattr(config, "max_position_embeddings", None),
    )


def parameters_by_part(model: PreTrainedModel) -> dict[str, int]:
    """Parameters by the part of the model they belong to, tied ones once."""
    counts = dict.fromkeys(("embedding", "attention", "mlp", "norm", "head", "other"), 0)
    for name, parameter in model.named_parameters():
        counts[_part(name.lower())] += parameter.numel()
    return counts


def _part(name: str) -> str:
    words = name.split(".")
    if any("norm" in word or word.startswith("ln_") for word in words):
        return "norm"
    if "lm_head" in words:
        return "head"
    if any(
        "embed" in word or word in ("wte", "wpe", "project_in", "project_out") for word in words
    ):
        return "embedding"
    if any("attn" in word or "attention" in word for word in words):
        return "attention"
    if any(word in ("mlp", "feed_forward", "fc1", "fc2", "experts") or "moe" in word
           for word in words):  # fmt: skip
        return "mlp"
    return "other"
