"""Preference losses as plain objects: `from losses import DPO`. Depends on torch only."""

from losses.anchored import *  # noqa: F403
from losses.base import *  # noqa: F403
from losses.batch import *  # noqa: F403
from losses.compose import *  # noqa: F403
from losses.divergence import *  # noqa: F403
from losses.functional import *
from losses.margin import *  # noqa: F403
from losses.normalised import *  # noqa: F403
from losses.pointwise import *  # noqa: F403
from losses.tokens import *  # noqa: F403
