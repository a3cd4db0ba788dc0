"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass, field

# Below it the likeliest token is taken: logits over much less are no float32 any more.
LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are OpenAI's, for every engine.

    Attributes:
        temperature: 0 takes the most likely token, and so does less than `LEAST_TEMPERATURE`.
        top_p: Nucleus.
        top_k: 0 for no limit.
        min_p: 0 for no limit.
        presence_penalty: Subtracted once from the logits of what was generated.
        frequency_penalty: Subtracted as often as it was generated.
        repetition_penalty: 1 for none.
        seed: None for a different one each time.
        logit_bias: Added to the logits, by token id.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < LEAST_TEMPERATURE
