"""Many adapters over one frozen base: what they are, how they attach, and their files."""

from lighten.adapters.attach import attach, load
from lighten.adapters.cohort import Cohort
from lighten.adapters.layers import Share
from lighten.adapters.spec import AdapterSpec
from lighten.adapters.trained import Trained
from lighten.adapters.whole import WholeBase

__all__ = ["AdapterSpec", "Cohort", "Share", "Trained", "WholeBase", "attach", "load"]
