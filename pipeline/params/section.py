"""What every section of params.yaml shares: the numbers it is made of, and how strict it is."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

EXPONENT_FORM = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", re.ASCII)


def _exponent_form(value: Any) -> Any:
    """YAML's reading of `1e-4` (text: YAML 1.1 wants a dot) as the number that the user meant."""
    return float(value) if isinstance(value, str) and EXPONENT_FORM.fullmatch(value) else value


Number = Annotated[float, BeforeValidator(_exponent_form)]
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of every section: unknown keys refused, values frozen, no silent conversion of text to numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
