"""Which strategies run with what is installed here, each with a word on why."""

from __future__ import annotations


def strategies() -> dict[str, str]:
    """For each strategy `yes`, or what is missing."""
    import torch
    from torch import distributed

    if not distributed.is_available():
        none = "no: this PyTorch was built without torch.distributed"
        return dict.fromkeys(("ddp", "zero1", "zero2", "zero3", "fsdp"), none)
    from torch.distributed.fsdp import FSDPModule

    gpu = torch.cuda.is_available()
    engine = "NCCL" if gpu and distributed.is_nccl_available() else "gloo"
    sharded = (
        f"yes, PyTorch's fully_shard over {engine}"
        if hasattr(FSDPModule, "reset_iter_state")
        else f"no: it needs PyTorch 2.13 or later, and this is {torch.__version__}"
    )
    return {
        "ddp": f"yes, over {engine}", "zero1": f"yes, over {engine}",
        "zero2": f"of adapters yes; of the base's weights: {sharded}",
        "zero3": sharded, "fsdp": sharded,
    }  # fmt: skip
