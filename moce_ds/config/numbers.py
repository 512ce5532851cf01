"""Types of settings that are numbers within limits."""

from typing import Annotated

from pydantic import Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
CropShare = Annotated[float, Field(gt=0, le=1)]
Deviation = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
