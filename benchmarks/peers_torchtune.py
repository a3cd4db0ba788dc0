"""torchtune on given steps: its Llama with LoRA in a plain loop, a column where it installs.

    python peers_torchtune.py JOB.json

Its adapters carry other names and its queries and keys another order of features; the first A is
copied, and B is zero for everybody, so that all start from the same function.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3 import lora_llama3
from torchtune.models.llama3_2 import lora_llama3_2
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from transformers import AutoConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "output_proj")
NAMES = {"o_proj": "output_proj", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3",
         "self_attn": "attn"}  # fmt: skip


def load(job: dict[str, Any]) -> Any:
    """The model with the adapter that all start from."""
    config = AutoConfig.from_pretrained(job["model"])
    dtype = getattr(torch, job["dtype"])
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    tied = bool(config.tie_word_embeddings)
    build = lora_llama3_2 if tied else lora_llama3
    model = build(
        lora_attn_modules=list(ATTENTION), apply_lora_to_mlp=True, apply_lora_to_output=False,
        vocab_size=config.vocab_size, num_layers=config.num_hidden_layers, num_heads=heads,
        num_kv_heads=kv_heads, embed_dim=config.hidden_size,
        max_seq_len=config.max_position_embeddings, intermediate_dim=config.intermediate_size,
        rope_base=int(config.rope_parameters["rope_theta"]), norm_eps=config.rms_norm_eps,
        lora_rank=job["rank"], lora_alpha=2.0 * job["rank"],
    )  # fmt: skip
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(Path(job["model"]).glob("*.safetensors")):
        weights |= load_file(path)
    if tied:
        weights.pop("lm_head.weight", None)
    weights = hf_to_tune(weights, heads, kv_heads, config.hidden_size)
    model.load_state_dict(weights, strict=False)
    model.to(dtype)
    model.to(job["device"])
    trained = get_adapter_params(model)
    set_trainable_params(model, trained)
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    for key, value in load_file(Path(job["adapter"]) / "adapter_model.safetensors").items():
        words = key.removeprefix("base_model.model.model.").split(".")
        parameter_name = ".".join(NAMES.get(word, word) for word in words).replace(
            "lora_A", "lora_a"
        )
        with torch.no_grad():
            trained[parameter_name.replace("lora_B", "lora_b")].copy_(value)
    return model


def main() -> None:
    """Train and print what was measured."""
    from peers_trl import high_water

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    device, settings = job["device"], job["optimiser"]
    on_cpu = device == "cpu"
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        held_bytes = psutil.Process().memory_info().rss
    model = load(job)
    trained = get_adapter_params(model)
    before = {key: value.detach().to("cpu", copy=True) for key, value in trained.items()}
    adamw = torch.optim.AdamW(
        trained.values(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"],
        betas=(settings["adam_beta1"], settings["adam_beta2"]), eps=settings["adam_epsilon"],
        fused=True,
    )  # fmt: skip
    losses, norms, seconds = [], [], []
    first_step_s = 0.0
    for step in job["steps"]:
        began = time.time()
        longest = max(len(ids) for ids, _ in step)
        tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in step], device=device)
        supervised = torch.tensor([mask + [False] * (longest - len(mask)) for _, mask in step])
        labels = tokens.masked_fill(~supervised.to(device), -100)[:, 1:]
        with torch.autocast(device, torch.bfloat16, enabled=job["dtype"] == "bfloat16"):
            logits = model(tokens)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), settings["max_grad_norm"])
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        norms.append(float(norm))
        if not on_cpu:
            torch.cuda.synchronize()
        seconds.append(time.time() - began)
        first_step_s = first_step_s or time.time() - job["began"]
    moved = max(float((trained[k].detach().cpu() - was).abs().max()) for k, was in before.items())
    print(
        json.dumps(
            {
                "losses": losses, "grad_norms": norms, "moved": moved, "step_seconds": seconds,
                "first_step_s": first_step_s, "dtype": job["dtype"],
                "peak_bytes":
                    high_water() - held_bytes if on_cpu else torch.cuda.max_memory_allocated(),
                "versions": {n: importlib.metadata.version(n) for n in ("torch", "torchtune")},
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
