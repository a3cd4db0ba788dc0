"""What every section of a recipe shares: its base class and bounded numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
# What every generator here takes (PyTorch: below 2^64, as a signed number below 2^63).
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, numbers written as text are numbers."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _valued(cls, value: Any, info: ValidationInfo) -> Any:
        """A flag without its value reads as true, which would count as the number 1."""
        declared = str(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and "bool" not in declared:
            raise ValueError("it needs a value, not true or false")
        return value
