"""Memory, communication and its time per rank for DDP, ZeRO 1, 2, 3 and FSDP, from formulas.

Sources: ZeRO (Rajbhandari et al., arXiv 1910.02054): model states per rank in section 3 and figure
1, communication volume in section 7; where `parallel/` sends something else, that is counted. Ring
collectives (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009): of n ranks each sends
(n-1)/n of the data in a reduce-scatter or an all-gather, and twice that in an all-reduce, which is
both. FSDP with full sharding is ZeRO 3, with sharding inside a node (`HYBRID_SHARD`) ZeRO 3 there
and an all-reduce between nodes (Zhao et al., arXiv 2304.11277, section 3.2). Offload: ZeRO-Offload
(Ren et al., arXiv 2101.06840, section 4).

Left out: the latency of each hop (which counts for thousands of ranks and small messages),
trees in place of rings, links that ranks share, overlap with computing (both ends of it are given),
fragmentation of the gathered layers, padding of shards to equal size, and that of pinned memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lighten.machine.devices import Device
from lighten.planning.result import Moment, Plan, States

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp_hybrid"]
# Those that lighten trains with, each needing less memory than the one before.
TRAINED: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3")
# Full layers that stand gathered at once under ZeRO 3 and FSDP: the one that computes and the one
# that is fetched ahead (FSDP's `backward_prefetch`, DeepSpeed's prefetch bucket).
GATHERED_LAYERS = 2
# Of a rank's peak: what is not there on it is no matter of doubt either.
MOST_DOUBT = 0.25
_SHARDED = {  # which model states are split over the ranks, arXiv 1910.02054, figure 1
    "ddp": (),
    "zero1": ("optimiser",),
    "zero2": ("optimiser", "gradients"),
    "zero3": ("optimiser", "gradients", "weights"),
    "fsdp": ("optimiser", "gradients", "weights"),
    "fsdp_hybrid": ("optimiser", "gradients", "weights"),
}


@dataclass(frozen=True)
class Volume:
    """Bytes that each rank sends per optimiser step, by what for.

    Attributes:
        gather: All-gathers of weights.
        reduce: Reduce-scatters and all-reduces of gradients inside the sharding group.
        across: Between nodes alone (hybrid sharding).
        host: To main memory and back (offload).
    """

    gather: float
    reduce: float
    across: float = 0.0
    host: float = 0.0

    @property
    def network(self) -> float:
        """What passes between ranks."""
        return self.gather + self.reduce + self.across


@dataclass(frozen=True)
class Distributed:
    """What one of the ranks needs.

    Attributes:
        strategy: How states are spread.
        ranks: GPUs or processes in all.
        nodes: Machines.
        offload: What waits elsewhere: in main memory, and where ranks are processes on a disk.
        device_bytes: Expected peak of each rank's GPU, or process.
        low: It surely reaches.
        high: It surely stays below.
        host_bytes: Per rank for what is offloaded or paged.
        volume: What it sends per optimiser step.
        communication_s: Time of that, were nothing hidden behind computing.
        step_s: Seconds per step with all of it hidden as far as it can be, and with none.
        capacity: What the GPU offers, or a process's part of this machine's memory.
        states: What is spread, on one device that holds all of it.
        kind: Of the device: `cuda`, or `cpu`.
        on_disk: What is offloaded waits in files, some of it or all.
    """

    strategy: str
    ranks: int
    nodes: int
    offload: tuple[str, ...]
    device_bytes: float
    low: float
    high: float
    host_bytes: float
    volume: Volume
    communication_s: float | None
    step_s: tuple[float, float] | None
    capacity: int | None
    states: States
    kind: str = "cuda"
    on_disk: bool = False

    def fits(self) -> bool | None:
        """Whether what a rank has is large enough; None where the prediction cannot tell."""
        if self.capacity is None or self.low <= self.capacity < self.high:
            return None
        return self.high <= self.capacity

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "fits": self.fits()}


def reduce_scatter(size: float, ranks: int) -> float:
    """Bytes that each rank of a ring sends to reduce-scatter so many bytes."""
    return size * (ranks - 1) / ranks


def all_gather(size: float, ranks: int) -> float:
    """Bytes that each rank of a ring sends until all of them hold the whole of so many bytes."""
    return size * (ranks - 1) / ranks


def all_reduce(size: float, ranks: int) -> float:
    """Bytes that each rank of a ring sends: a reduce-scatter and an all-gather."""
    return reduce_scatter(size, ranks) + all_gather(size, ranks)


def states_per_rank(
    states: States, strategy: Strategy, ranks: int, *, ranks_per_node: int | None = None
) -> States:
    """The states that stay on one rank (arXiv 1910.02054, figure 1).

    A frozen weight has neither gradient nor moments, so only ZeRO 3 and FSDP make it smaller. They
    leave adapters whole, and what is frozen outside of decoder layers; of a base in few bits its
    packed layers alone are spread.

    Args:
        states: On one device alone.
        strategy: How they are spread.
        ranks: In all.
        ranks_per_node: Needed for hybrid sharding, which shards inside a node.
    """
    group = ranks_per_node if strategy == "fsdp_hybrid" and ranks_per_node else ranks
    sharded = _SHARDED[strategy]
    if "weights" in sharded:
        frozen, trained = states.spread
        away = 1.0 - 1.0 / group  # of what is spread
        learns = away if trained else 0.0
        return States(
            states.frozen - away * frozen, states.trained - away * trained,
            states.gradients * (1.0 - learns), states.optimiser * (1.0 - learns),
            states.packed / group,
        )  # fmt: skip
    return States(
        states.frozen,
        states.trained,
        states.gradients / (ranks if "gradients" in sharded else 1),
        states.optimiser / (ranks if "optimiser" in sharded else 1),
    )


def volume_per_rank(
    states: States,
    strategy: Strategy,
    ranks: int,
    *,
    ranks_per_node: int | None = None,
    micro_batches: int = 1,
    layers: int | None = None,
    gloo: bool = False,
) -> Volume:
    """Bytes that each rank sends per optimiser step, as `parallel/` sends them.

    Gradients of adapters, and those of DDP and ZeRO 1, are summed once per step. ZeRO 1 sums them
    whole and hands its rows out after that: half as much again as in arXiv 1910.02054, section 7.
    Of weights of the base ZeRO 2 gathers the layers and scatters the gradients of each micro-batch.
    ZeRO 3 gathers layers for the forward pass and again for the backward pass; one that is
    recomputed there stays gathered until its backward is done, so that costs no third time. What
    learns outside of the layers is gathered once for both passes. Below the first layer that learns
    there is no backward pass, and one layer is gathered for it all the same.

    Args:
        states: On one device alone.
        strategy: How they are spread.
        ranks: In all.
        ranks_per_node: For hybrid sharding.
        micro_batches: Per optimiser step.
        layers: Decoder layers; None: so many that two more or fewer do not count.
        gloo: On processors, where a reduce-scatter sends as much as an all-reduce.
    """
    if ranks == 1:
        return Volume(0.0, 0.0)
    scatter = all_reduce if gloo else reduce_scatter
    whole = all_reduce(states.gradients, ranks)
    learns_base = states.trained > states.adapters
    if strategy == "ddp":
        return Volume(0.0, whole)
    if strategy == "zero1":
        return Volume(all_gather(states.trained, ranks), whole)
    if strategy == "zero2":
        times = micro_batches if learns_base else 1
        return Volume(
            times * all_gather(states.trained, ranks), times * scatter(states.gradients, ranks)
        )
    group = ranks_per_node if strategy == "fsdp_hybrid" and ranks_per_node else ranks
    frozen, trained = states.spread
    if not learns_base:
        # Two packed layers are still there at each turn, up and down.
        kept = min(1.0, GATHERED_LAYERS / layers) if states.packed and layers else 0.0
        return Volume(2 * micro_batches * all_gather(frozen, group) * (1.0 - kept), whole)
    ahead = (frozen + trained) / layers if frozen and layers else 0.0
    once = states.outside + frozen + ahead
    across = 0.0
    if group < ranks:
        # Each rank's shard is summed with the same shard of the other nodes.
        across = micro_batches * all_reduce(states.gradients / group, ranks // group)
    return Volume(
        micro_batches * all_gather(2 * (trained - states.outside) + once, group),
        micro_batches * scatter(states.gradients, group),
        across,
    )


def offloaded(
    states: States, offload: tuple[str, ...], *, micro_batches: int = 1
) -> tuple[States, float, float]:
    """States left on the GPU, bytes moved to main memory, and bytes over its link per step.

    With the optimiser in main memory, gradients go there and updated weights come back, once per
    step each (arXiv 2101.06840, section 4.1: 4 bytes per parameter in 16 bits). Weights in main
    memory come over twice per micro-batch and, where they learn, their gradients go there once; the
    optimiser moves them where they are. Adapters stay on the device.

    Args:
        states: Of one rank, already split.
        offload: `optimizer`, `param`, or both.
        micro_batches: Per optimiser step.
    """
    if "param" in offload and states.trained > states.adapters:
        link = micro_batches * (2 * (states.frozen + states.trained) + states.gradients)
        return States(0.0, 0.0, 0.0, 0.0), states.total, link
    left, host, link = states, 0.0, 0.0
    if "param" in offload:
        host, link = states.frozen, 2 * micro_batches * states.frozen
        left = replace(left, frozen=0.0)
    if "optimizer" in offload:
        host += states.optimiser + states.gradients
        link += states.gradients + states.trained
        left = replace(left, optimiser=0.0)
    return left, host, link


def gathered_bytes(states: States, layers: int, offload: tuple[str, ...], kind: str) -> float:
    """Bytes of weights that are gathered at once on a rank that holds its part, or none of them.

    What learns outside of the layers is gathered for the whole pass. Where weights wait elsewhere,
    what is frozen there stays, and on a GPU as many gradients are on their way to main memory.

    Args:
        states: On one device alone.
        layers: Decoder layers.
        offload: `optimizer`, `param`, or both.
        kind: `cpu` or `cuda`.
    """
    in_layers = sum(states.spread) - states.outside
    gathered = min(1.0, GATHERED_LAYERS / max(1, layers)) * in_layers + states.outside
    if "param" not in offload:
        return gathered
    learns = kind != "cpu" and states.trained > states.adapters
    return gathered * (2 if learns else 1) + states.frozen - states.spread[0]


def link_seconds(
    volume: Volume, device: Device, nodes: int, *, hybrid: bool = False
) -> float | None:
    """Seconds that each rank's links are busy per step; None where they are not known.

    A ring that crosses nodes runs at the slower of the two links. To and from main memory one rank
    has its own PCIe link.

    Args:
        volume: What it sends.
        device: Whose links.
        nodes: Machines.
        hybrid: Weights are gathered inside of a node. Gradients are summed there, and then
            `across`; of adapters, which no rank shards, over all ranks at once.
    """
    if device.peer_link is None or device.node_link is None or device.host_link is None:
        return None
    ring = device.peer_link if nodes == 1 else min(device.peer_link, device.node_link)
    return (
        volume.gather / (device.peer_link if hybrid else ring)
        + volume.reduce / (device.peer_link if hybrid and volume.across else ring)
        + volume.across / device.node_link
        + volume.host / device.host_link
    )


def spread(
    plan: Plan,
    device: Device,
    strategy: Strategy,
    *,
    gpus: int,
    nodes: int = 1,
    layers: int,
    offload: tuple[str, ...] = (),
    on_disk: bool = False,
) -> Distributed:
    """A plan of one GPU spread over many, each with the plan's own micro-batch.

    Args:
        plan: Of one GPU.
        device: The GPU, for its links.
        strategy: How states are spread.
        gpus: Per node.
        nodes: Machines.
        layers: Decoder layers: under ZeRO 3 and FSDP so many of them stand gathered at once.
        offload: `optimizer`, `param`, or both, to main memory.
        on_disk: To files instead, some of it or all: how long that takes is not known.
    """
    ranks = gpus * nodes
    parts = {part.name: float(part.bytes) for part in plan.memory.parts}
    states = plan.states if plan.states is not None else _of_parts(plan, parts)
    of_rank = states_per_rank(states, strategy, ranks, ranks_per_node=gpus)
    micro = plan.shape.micro_batches
    volume = volume_per_rank(
        states, strategy, ranks, ranks_per_node=gpus, micro_batches=micro, layers=layers,
        gloo=device.kind == "cpu",
    )  # fmt: skip
    device_states, host, link = offloaded(of_rank, offload, micro_batches=micro)
    if device.kind == "cpu" and offload:
        # A process computes in main memory: what is in a file is read and written back. Weights
        # are read for both passes of a micro-batch too.
        device_states = replace(device_states, gradients=of_rank.gradients)
        host, link = of_rank.optimiser, 2 * of_rank.optimiser
        if "param" in offload:
            weights = of_rank.frozen + of_rank.trained
            host, link = host + weights, link + 2 * (micro + 1) * weights
    volume = Volume(volume.gather, volume.reduce, volume.across, link)
    gathered, learns_base = 0.0, states.trained > states.adapters
    if ("weights" in _SHARDED[strategy] and ranks > 1) or "param" in offload:
        gathered = gathered_bytes(states, layers, offload, device.kind)
    if ranks > 1 and (strategy in ("ddp", "zero1") or not learns_base):
        gathered += states.gradients  # the flat copy that is summed
        device_states = replace(device_states, gradients=states.gradients)
    if strategy == "zero2" and ranks > 1 and learns_base:
        gathered = states.trained / ranks  # the rows that whole layers are gathered from
        if micro == 1:
            # A layer's gradients come as its whole weights go, and are as many or fewer: the most
            # is there before the first of them.
            device_states = replace(device_states, gradients=0.0)
    peak = _peak(plan, parts, states, device_states) + gathered
    if device.kind == "cpu" and not (states.packed and "weights" in _SHARDED[strategy]):
        peak = max(peak, _read_whole(plan, states, strategy) + _always(parts))
    below, above = (
        min(abs(plan.memory.expected - bound), MOST_DOUBT * peak)
        for bound in (plan.memory.low, plan.memory.high)
    )
    busy = link_seconds(volume, device, nodes, hybrid=strategy == "fsdp_hybrid")
    step = None
    if busy is not None and plan.time is not None and not on_disk:
        step = (max(plan.time.seconds, busy), plan.time.seconds + busy)
    return Distributed(
        strategy, ranks, nodes, offload, peak, max(peak - below, min(peak, device_states.total)),
        peak + above, host + states.paged, volume, busy, step, plan.capacity, states, device.kind,
        on_disk,
    )  # fmt: skip


def _read_whole(plan: Plan, states: States, strategy: Strategy) -> float:
    """Bytes that each rank holds of a model before it is spread.

    What is spread is read and spread layer by layer, unless it is rounded as it is read.
    """
    if plan.method == "full" and strategy in ("zero2", "zero3", "fsdp"):
        return states.frozen
    in_float32 = plan.choices.get("dtype", "float32").startswith("float32")
    if strategy in ("zero3", "fsdp") and (in_float32 or "loading" not in plan.choices):
        return states.trained
    return states.frozen + states.trained


def of_recipe(strategy: str) -> Strategy:
    """The formula's name for a recipe's `strategy` on several ranks."""
    for name in (*TRAINED, "fsdp"):
        if name == strategy:
            return name
    return "ddp"


def on_ranks(
    plan: Plan, device: Device, strategy: Strategy, *, ranks: int, local: int, layers: int,
    offload: tuple[str, ...] = (), on_disk: bool = False,
) -> Distributed:  # fmt: skip
    """What each rank of a launch needs, of a plan of one process.

    On a processor the ranks of a machine share its memory: each may have its part, and what they
    map together, a frozen base that is whole on each, counts once.

    Args:
        plan: Of one process.
        device: Of each rank.
        strategy: How states are spread.
        ranks: In all.
        local: On this machine.
        layers: Decoder layers of the base.
        offload: `optimizer`, `param`, or both: what waits elsewhere.
        on_disk: Some of it in files.
    """
    spread_states = spread(
        plan, device, strategy, gpus=local, nodes=max(1, ranks // local), layers=layers,
        offload=offload, on_disk=on_disk,
    )  # fmt: skip
    if device.kind != "cpu" or spread_states.capacity is None:
        return spread_states
    states = spread_states.states
    mapped = states.frozen
    if "weights" in _SHARDED[strategy]:  # what stands outside of the layers
        mapped = 0.0 if states.packed else states.frozen - states.spread[0]
    return replace(
        spread_states, capacity=int((spread_states.capacity + (local - 1) * mapped) / local)
    )


def cheapest(candidates: Iterable[Distributed]) -> Distributed | None:
    """The one that surely fits and sends least over the network; None: none of them fits."""
    fitting = [candidate for candidate in candidates if candidate.fits()]
    return min(fitting, key=lambda candidate: candidate.volume.network, default=None)


def _peak(plan: Plan, parts: Mapping[str, float], states: States, device_states: States) -> float:
    """The peak of a rank that keeps so much of the states, what it gathers left out.

    With fewer states on the device another moment can be the fullest: the one that was on a single
    GPU, the one with the most activations, and the optimiser's step, where all states are there.
    """
    always = _always(parts)
    gradients, optimiser = parts.get("gradients", 0.0), parts.get("optimiser", 0.0)
    weights = states.frozen + states.trained
    beside = plan.memory.expected - weights - gradients - optimiser - always
    moments = [Moment(int(gradients), int(optimiser), int(max(0.0, beside)))]
    if plan.fullest is not None:
        # It may be one of the first step, before there is optimiser state; later steps have all.
        moments.append(replace(plan.fullest, optimiser=int(states.optimiser)))
    weights_on_device = device_states.frozen + device_states.trained
    alive = [
        weights_on_device
        + moment.beside
        + device_states.gradients * _share(moment.gradients, states.gradients)
        + device_states.optimiser * _share(moment.optimiser, states.optimiser)
        for moment in moments
    ]
    return always + max(*alive, device_states.total)


def _always(parts: Mapping[str, float]) -> float:
    """What is there at every moment beside tensors."""
    return sum(parts.get(name, 0.0) for name in ("allocator overhead", "device context"))


def _share(alive: float, total: float) -> float:
    return min(1.0, alive / total) if total else 0.0


def _of_parts(plan: Plan, parts: Mapping[str, float]) -> States:
    """The states of a plan that was made by hand: all of them are alive at its peak."""
    adapters, gradients = parts.get("adapters", 0.0), parts.get("gradients", 0.0)
    base = parts.get("base weights", 0.0) + parts.get("quantisation constants", 0.0)
    # Weights of the base that learn are float32, as their gradients are.
    learning = min(base, gradients) if plan.method in ("full", "last_layers") else 0.0
    optimiser = parts.get("optimiser", 0.0)
    return States(base - learning, learning + adapters, gradients, optimiser, adapters=adapters)
