#!/usr/bin/env bash
# deepspeed 0.19.8, ZeRO 1 and 2 with N accumulation steps: `loss.backward()` of a model that returns
# its logits beside the loss gives 1/N of the gradients.
#
# Expected: the gradients of `engine.backward(loss)`. Since `loss.backward()` is supported, it gives
# these for a model that returns the loss alone.
# Seen: a transformers model given labels returns loss and logits, and its step is 1/N of the right
# one: divided by N twice. Nothing is said. Adam hides most of it; SGD, logged norms and what a bound
# clips show it.
#
# It needs a C++ compiler: DeepSpeed builds an operation of its own at its first start on a processor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 setuptools wheel ninja psutil
"$folder/env/bin/pip" install --quiet --no-build-isolation deepspeed==0.19.8
cd "$folder"
export PATH="$folder/env/bin:$PATH" TORCH_EXTENSIONS_DIR="$folder/extensions" DS_ACCELERATOR=cpu
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - >"$folder/out" 2>"$folder/log" <<'PY' ||
import os
import socket

import torch

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=str(port))
import deepspeed
from transformers import LlamaConfig, LlamaForCausalLM

STEPS = 4
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2)
ids = torch.arange(3, 35).reshape(STEPS, 8)


class LossAlone(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs).loss


def update(stage, alone, by_engine):
    """Change of the head's weights in a step of SGD; stage None: by PyTorch alone."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    head = model.lm_head.weight
    before = head.detach().clone()
    if stage is None:
        for row in ids:
            (model(input_ids=row[None], labels=row[None]).loss / STEPS).backward()
        return -head.grad
    network = LossAlone(model) if alone else model
    engine, *_ = deepspeed.initialize(
        model=network, optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config={"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": STEPS,
                "gradient_clipping": 0.0, "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False})
    for row in ids:
        out = engine(input_ids=row[None], labels=row[None])
        loss = out if alone else out.loss
        engine.backward(loss) if by_engine else loss.backward()
        engine.step()
    return head.detach() - before


print("FOUND deepspeed", deepspeed.__version__)
right, ok = update(None, False, False), True
for stage in (1, 2):
    for alone in (True, False):
        for by_engine in (True, False):
            share = float((update(stage, alone, by_engine) * right).sum() / right.square().sum())
            print(f"FOUND ZeRO-{stage}, returns {'the loss alone' if alone else 'loss and logits'}, "
                  f"{'engine.backward(loss)' if by_engine else 'loss.backward()'}: {share:.3f} of "
                  f"the right update")
            ok &= abs(share - (1 if alone or by_engine else 1 / STEPS)) < 0.01
torch.distributed.destroy_process_group()
raise SystemExit(not ok)
PY
  { sed -n 's/^FOUND //p' "$folder/out"; tail -5 "$folder/log"; exit 1; }
sed -n 's/^FOUND //p' "$folder/out"
