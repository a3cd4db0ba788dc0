"""PEFT's mixed batch, asked over standard input by `serve_peers.peft`: a round of load a line."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import PeftModel

from benchmarks.serve_load import Shape, planned
from lighten import models


def main() -> None:
    """Answer rounds until standard input ends."""
    base, folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    opened = models.load(base, device="cpu")
    names = sorted(path.parent.name for path in Path(folder).glob("*/adapter_config.json"))
    model = PeftModel.from_pretrained(
        opened.model, str(Path(folder) / names[0]), adapter_name=names[0],
        autocast_adapter_dtype=False,
    )  # fmt: skip
    for name in names[1:]:
        model.load_adapter(str(Path(folder) / name), name, autocast_adapter_dtype=False)
    model.eval()
    tokenizer = opened.tokenizer
    tokenizer.padding_side = "left"
    for line in sys.stdin:
        request = json.loads(line)
        shape = Shape(**request["shape"])
        order = planned(request["models"], shape, request["seed"])
        tokens = prompt_tokens = 0
        began, cpu = time.perf_counter(), time.process_time()
        for start in range(0, len(order), shape.clients):
            batch = order[start : start + shape.clients]
            chats = [[{"role": "user", "content": question}] for _, question in batch]
            ids = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, return_tensors="pt", return_dict=True,
                padding=True,
            )  # fmt: skip
            with torch.inference_mode():
                output = model.generate(
                    **ids, adapter_names=[name or "__base__" for name, _ in batch],
                    max_new_tokens=shape.tokens, min_new_tokens=shape.tokens, do_sample=False,
                )  # fmt: skip
            tokens += (output.shape[1] - ids["input_ids"].shape[1]) * len(batch)
            prompt_tokens += int(ids["attention_mask"].sum())
        took = {
            "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu,
            "tokens": tokens, "prompt_tokens": prompt_tokens,
        }  # fmt: skip
        print(json.dumps(took), flush=True)


if __name__ == "__main__":
    main()
