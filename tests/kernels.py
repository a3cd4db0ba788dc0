"""The formats that a processor may have kernels of, each skipped where it has none."""

from __future__ import annotations

import pytest
import torch

from lighten.cpu.kernels import formats

each_kernel = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=pytest.mark.skipif(why is not None, reason=str(why)))
        for dtype in (torch.bfloat16, torch.float32)
        for why in [formats.obstacle(dtype)]
    ],
)
