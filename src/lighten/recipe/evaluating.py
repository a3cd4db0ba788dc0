"""What `lighten evaluate` measures and how."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from lighten.recipe.section import Positive, Section, Seed, listed


class EvaluateOptions(Section):
    """What `lighten evaluate` measures."""

    max_examples: Positive | None = Field(
        200, description="held-out examples measured on at most, spread evenly over all"
    )
    max_new_tokens: Positive | None = Field(
        None,
        description="longest answer, in tokens; null: a quarter more than the longest reference "
        "has, 512 at most",
    )
    batch_size: Positive = Field(16, description="examples answered together")
    extra_metrics: list[str] = Field(
        [],
        description="metrics beside loss, chrF, BLEU and exact match: chrf_spaces, rouge1, rouge2, "
        "rougeL, token_f1, json_valid, or module:function of yours (answer, reference)",
    )
    forgetting: str | None = Field(
        None,
        description="general text whose loss tells what training made the model forget: builtin "
        "(English and Korean), a text file (its paragraphs), or a data file",
    )
    judge: str | None = Field(
        None,
        description="address of an OpenAI-compatible API whose model compares the answers with the "
        "base's: http://127.0.0.1:8000/v1 (its key: OPENAI_API_KEY)",
    )
    judge_model: str | None = Field(None, description="the judge's name there")
    judge_max_tokens: Positive = Field(
        4096, description="tokens of a judge's reply at most, with what it thinks before it"
    )
    tasks: list[str] = Field(
        [], description="tasks of lm-eval: names, or those of include_path (extra: lm-eval)"
    )
    include_path: str | None = Field(None, description="folder with lm-eval's task files")
    tasks_limit: Positive | None = Field(None, description="documents of each task at most")
    tasks_chat_template: bool = Field(
        True, description="ask tasks within the model's chat template, where it has one"
    )
    bootstrap_samples: int = Field(1000, ge=100, description="resamples behind each interval")
    seed: Seed = Field(0, description="seed of the resampling")

    @field_validator("extra_metrics", "tasks", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return listed(value)
