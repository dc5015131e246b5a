"""Every error Perdure raises (defined in `perdure.schemas.errors`, named here for users)."""

from perdure.schemas.errors import *  # noqa: F403
