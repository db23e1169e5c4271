"""The process of a `TorchRow`: loads a model with `transformers`, and takes steps on request.

It is started with one JSON object, the fields of `TorchSpec` in benchmarks/torch_peer.py. It
answers with a line of JSON when it is ready, and then with one for each line that it reads, a
number of steps. With `new_tokens`, it decodes instead of training. It imports nothing of this
library, and does not run JAX.
"""

import ctypes
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main(spec: dict) -> None:
  # Output of libraries goes to standard error, not among the answers.
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  torch.set_num_threads(os.cpu_count())
  torch.set_float32_matmul_precision("high")  # TF32 on a GPU, which is JAX's default too

  logging.disable_progress_bar()
  model = AutoModelForCausalLM.from_pretrained(spec["base"], dtype=getattr(torch, spec["dtype"]))
  if spec["adapter"]:
    from peft import PeftModel  # not needed for full fine-tuning

    model = PeftModel.from_pretrained(model, spec["adapter"], is_trainable=True)
  model = model.to(spec["device"]).train()
  batch = {name: x.to(spec["device"]).long() for name, x in load_file(spec["batch"]).items()}
  if spec["new_tokens"]:
    generate(model.eval(), batch["inputs"], spec["new_tokens"], answers)
    return
  trainable = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(
    trainable, lr=spec["learning_rate"], weight_decay=spec["weight_decay"], fused=True
  )

  def step() -> torch.Tensor:
    optimizer.zero_grad()
    logits = model(input_ids=batch["inputs"], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
      logits.float().flatten(end_dim=1), batch["targets"].flatten()
    )
    loss.backward()
    optimizer.step()
    return loss.detach()

  def run(steps: int) -> dict:
    _synchronize()
    started = time.perf_counter()
    for _ in range(steps):
      loss = step()
    _synchronize()
    return {"seconds": time.perf_counter() - started, "loss": loss.item()}

  ready = {"trainable": sum(p.numel() for p in trainable), "losses": [run(1)["loss"]]}
  optimizer.zero_grad()  # gradients count as temporary memory
  ready["temporary"], answer = _peak_growth(lambda: run(1))
  ready["losses"].append(answer["loss"])
  print(json.dumps(ready), file=answers)
  for line in sys.stdin:
    print(json.dumps(run(int(line))), file=answers)


def generate(model, prompts: torch.Tensor, count: int, answers) -> None:
  """Decodes greedily with the model's cache, once for each line that it reads, `count` tokens."""

  def run() -> dict:
    _synchronize()
    started = time.perf_counter()
    with torch.inference_mode():
      tokens = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        use_cache=True,
        max_new_tokens=count,
        min_new_tokens=count,
        pad_token_id=0,
      )
    _synchronize()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": tokens[:, prompts.shape[1] :].tolist()}

  print(json.dumps(run()), file=answers)
  for _ in sys.stdin:
    print(json.dumps(run()), file=answers)


def _synchronize() -> None:
  if torch.cuda.is_available():
    torch.cuda.synchronize()


def _peak_growth(function: Callable) -> tuple[int | None, dict]:
  """Peak memory of a call beyond the memory in use before it, in bytes, and the call's result.

  On a GPU it is measured by PyTorch's allocator. On Linux it is the resident memory of the process:
  its high-water mark is reset first, and memory that malloc still holds is released, since the peak
  of an earlier call would otherwise hide this one's. None on other systems.
  """
  gc.collect()
  if torch.cuda.is_available():
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    return torch.cuda.max_memory_allocated() - before, result
  if sys.platform != "linux":
    return None, function()
  ctypes.CDLL(None).malloc_trim(0)
  Path("/proc/self/clear_refs").write_text("5")
  before = _resident("VmRSS")
  result = function()
  return _resident("VmHWM") - before, result


def _resident(field: str) -> int:
  status = Path("/proc/self/status").read_text()
  return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1])


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
