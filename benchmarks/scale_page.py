"""The tables of docs/scale.md, from the functions that `lighten plan` uses.

python -m benchmarks.scale_page            # prints them
python -m benchmarks.scale_page --write    # puts them into the page
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lighten.machine.devices import DEVICES
from lighten.planning.distributed import TRAINED, states_per_rank, volume_per_rank
from lighten.planning.result import States

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- made by benchmarks/scale_page.py -->", "<!-- end -->"
GPUS = (1, 8, 64, 512, 4096)
RANK = 16
DEVICE = "h100"
# Of a datasheet's arithmetic, what the steps of large models reach: a round figure.
REACHED = 0.4
GB, GIB = 1e9, 2**30


@dataclass(frozen=True)
class Shape:
    """A published Llama: hidden size, width of the MLP, layers, width of keys, vocabulary."""

    name: str
    hidden: int
    mlp: int
    layers: int
    keys: int
    vocabulary: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's linear layers."""
        h, m, k = self.hidden, self.mlp, self.keys
        return [(h, h), (h, k), (h, k), (h, h), (h, m), (h, m), (m, h)]

    @property
    def parameters(self) -> int:
        """All weights; embedding and head are two."""
        return self.in_layers + 2 * self.vocabulary * self.hidden + self.hidden

    @property
    def in_layers(self) -> int:
        """Weights of the decoder layers."""
        return self.layers * (sum(a * b for a, b in self.linears) + 2 * self.hidden)

    @property
    def adapter(self) -> int:
        """Numbers of an adapter of rank 16 on every linear layer."""
        return self.layers * RANK * sum(a + b for a, b in self.linears)


SHAPES = (
    Shape("7B", 4096, 11008, 32, 4096, 32000),
    Shape("70B", 8192, 28672, 80, 1024, 128256),
    Shape("405B", 16384, 53248, 126, 1024, 128256),
)


def states_of(shape: Shape, method: str) -> States:
    """What a training holds: float32 of what learns, with AdamW, over a base in bfloat16."""
    if method == "full":
        size = 4.0 * shape.parameters
        return States(0.0, size, size, 2 * size, layers=4.0 * shape.in_layers)
    size = 4.0 * shape.adapter
    return States(
        2.0 * shape.parameters, size, size, 2 * size, adapters=size, layers=2.0 * shape.in_layers
    )


def memory_table() -> str:
    """Model states per rank and what it sends per optimiser step of one micro-batch."""
    head = ["model", "method", "GPUs", *(f"{name}, GiB" for name in TRAINED),
            *(f"{name} sends, GB" for name in TRAINED)]  # fmt: skip
    rows = []
    for shape in SHAPES:
        for method in ("full", "LoRA"):
            states = states_of(shape, method)
            for gpus in GPUS:
                states_gib = [
                    states_per_rank(states, strategy, gpus).total / GIB for strategy in TRAINED
                ]
                sent = [
                    volume_per_rank(states, strategy, gpus, layers=shape.layers).network / GB
                    for strategy in TRAINED
                ]
                rows.append([shape.name, method, f"{gpus:,}",
                             *(f"{value:,.2f}" for value in states_gib),
                             *(f"{value:,.2f}" for value in sent)])  # fmt: skip
    return _table(head, rows)


def hidden_table() -> str:
    """Tokens of a rank's micro-batch from which sending takes no longer than computing."""
    device = DEVICES[DEVICE]
    assert device.peer_link is not None
    assert device.node_link is not None
    flops = REACHED * device.flops["bfloat16"]
    rows = []
    for shape in SHAPES:
        for method in ("full", "LoRA"):
            states = states_of(shape, method)
            # Forward and backward by the inputs, and by the weights where they learn.
            per_token = (6.0 if method == "full" else 4.0) * shape.parameters
            for strategy in ("zero2", "zero3"):
                sent = volume_per_rank(states, strategy, 4096, layers=shape.layers).network
                tokens = [sent / link * flops / per_token
                          for link in (device.peer_link, device.node_link)]  # fmt: skip
                rows.append([shape.name, method, strategy, *(f"{count:,.0f}" for count in tokens)])
    return _table(["model", "method", "strategy", "inside a node", "between nodes"], rows)


def text() -> str:
    """Both tables as they stand in the page."""
    return f"{memory_table()}\n\n{hidden_table()}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(text())
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{text()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
