"""Base class and number types of the sections of params.yaml."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

EXPONENT_FORM = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", re.ASCII)


def _exponent_form(value: Any) -> Any:
    """Convert `1e-4` to a number; YAML 1.1 reads it as text, because it has no dot."""
    return float(value) if isinstance(value, str) and EXPONENT_FORM.fullmatch(value) else value


Number = Annotated[float, BeforeValidator(_exponent_form)]
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base class of every section: unknown keys are errors, values are frozen, text is not converted to numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
