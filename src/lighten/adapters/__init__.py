"""Many adapters over one frozen base: what they are, how they attach, and their files."""

from lighten.adapters.cohort import Cohort, attach
from lighten.adapters.files import load
from lighten.adapters.layers import Share
from lighten.adapters.spec import AdapterSpec
from lighten.adapters.trained import Trained

__all__ = ["AdapterSpec", "Cohort", "Share", "Trained", "attach", "load"]
