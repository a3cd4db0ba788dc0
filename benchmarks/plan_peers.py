"""What other estimators say of the configurations of `plan_accuracy.py`.

They estimate a GPU's memory, most of them with an allowance for CUDA's context; here it is taken
off, so that what is compared is weights, adapters, optimiser, gradients and activations alone.
"""

from __future__ import annotations
