"""One adapter at its start, and PEFT's of the same layer."""

import jax
import numpy as np
from peers import peft, torch

from lora_jax import Axes, init


def start(w, spec, roles="io"):
  """The adapter of a leaf with these roles."""
  axes = {"w": Axes(roles, ("dot_general",))}
  return init(jax.random.key(0), {"w": w}, {"w": spec}, axes)["w"]


def peft_start(w, how, rank, alpha, rslora=False):
  """(residual, a, b, scale) of PEFT on a layer with the kernel w, (in, out)."""
  torch.manual_seed(0)
  model = torch.nn.Sequential(torch.nn.Linear(*w.shape, bias=False))
  model[0].weight.data = torch.tensor(np.asarray(w)).T.contiguous()
  config = peft.LoraConfig(
    r=rank, lora_alpha=alpha, use_rslora=rslora, init_lora_weights=how, target_modules=["0"]
  )
  layer = peft.get_peft_model(model, config).base_model.model[0]
  arrays = (layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
  return *(x.detach().numpy().T for x in arrays), layer.scaling["default"]
