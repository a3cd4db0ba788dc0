"""ExecuTorch's Python runtime in a process of its own: a program can end it.

`python -m lighten.quantization.executorch_runtime FILE` reads a JSON request per line and answers
each with a JSON line; scores go through a file of NumPy's. The parent's end is
`executorch.Program`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np


class Stepper:
    """A loaded program.

    Args:
        path: The `.pte` file.
    """

    def __init__(self, path: Path) -> None:
        import torch
        from executorch.kernels import quantized  # noqa: F401  # its operations, for embeddings
        from executorch.runtime import Runtime

        self._tensor = torch.tensor
        # By its path: a program given as bytes does not keep them alive (1.5.1).
        self._program = Runtime.get().load_program(path)
        self._forward = self._program.load_method("forward")
        self.most = self._fact("get_max_seq_len")
        self.positions = self._fact("get_max_context_len")

    def _fact(self, name: str) -> int:
        method = self._program.load_method(name)
        assert method is not None
        return int(method.execute([])[0])

    def step(self, ids: list[int], start: int) -> Any:
        """Scores [V] of the token after the last of some, the first of which is at a position."""
        assert self._forward is not None
        (scores,) = self._forward.execute([self._tensor([ids]), self._tensor([start])])
        return scores[0]

    def scores_of_all(self, ids: list[int]) -> Any:
        """Scores after every token [T, V], one at a time, as in an answer."""
        return np.stack([self.step([token], at).numpy().copy() for at, token in enumerate(ids)])

    def greedy(self, ids: list[int], most: int, stops: list[int]) -> dict[str, Any]:
        """The likeliest tokens after a prompt, which is read in pieces, and the time that takes."""
        began = time.perf_counter()
        for start in range(0, len(ids), self.most):
            scores = self.step(ids[start : start + self.most], start)
        prefill_end = time.perf_counter()
        answer: list[int] = []
        while len(answer) < most:
            token = int(scores.argmax())
            answer.append(token)
            if token in stops or len(answer) == most:
                break
            scores = self.step([token], len(ids) + len(answer) - 1)
        decode_end = time.perf_counter()
        return {
            "answer": answer,
            "prefill_seconds": prefill_end - began,
            "decode_seconds": decode_end - prefill_end,
        }


def main(path: str) -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the library prints is no answer
    try:
        stepper = Stepper(Path(path))
    except RuntimeError as error:
        _answer(answers, {"error": str(error)})
        return
    _answer(answers, {"most": stepper.most, "positions": stepper.positions})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "every":
                np.save(request["file"], stepper.scores_of_all(request["ids"]))
                response: dict[str, Any] = {}
            else:
                response = stepper.greedy(request["ids"], request["most"], request["stops"])
        except RuntimeError as error:
            response = {"error": str(error)}
        _answer(answers, {**response, "peak_bytes": _peak()})


def _answer(to: TextIO, value: dict[str, Any]) -> None:
    to.write(json.dumps(value) + "\n")
    to.flush()


def _peak() -> int:
    from lighten.machine.hardware import high_water

    return high_water()


if __name__ == "__main__":
    main(sys.argv[1])
