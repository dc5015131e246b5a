"""Every error Perdure raises on purpose, in one place for users."""

from perdure.failures import StepOutcomeUnknown as StepOutcomeUnknown
from perdure.schemas.errors import *  # noqa: F403
from perdure.tasks import InputMismatch as InputMismatch
