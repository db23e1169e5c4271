"""Adapters made here load in `peft`, without a key too many or too few, and give the same results.

And they are read back as they were.
"""

import jax
import numpy as np
import pytest
from torch_models import gpt2_twins, image_twins, in_peft, llama_twins, of_models, shaken

import lora_jax
from lora_jax import AdaLoRA, DoRA, Full, LoHa, LoKr, LoRA, OLoRA, PiSSA, TokenRows, VeRA, weights

TWINS = {
  "llama": llama_twins(),
  "scanned": llama_twins(scan=True),
  "tied": llama_twins(tie=True),
  "scanned and tied": llama_twins(tie=True, scan=True),
  "gpt2": gpt2_twins(),
  "images": image_twins(),
}
ALL = ("llama", "scanned")
TIED = ("tied", "scanned and tied")
EVERYWHERE = (*ALL, "gpt2", "images")
LINEAR = [("all-linear", LoRA(rank=2, alpha=3.0))]
KERNELS = r"(block|h)[^/]*/.*kernel|(first|second|series|(to|from)_heads)/kernel"

# name: (models, rules of `match`, whether a reader gets what was written to the bit)
CASES = {
  "lora": (EVERYWHERE, [(KERNELS, LoRA(rank=2, alpha=3.0))], True),
  "rslora": (ALL, [("all-linear", LoRA(rank=8, alpha=16.0, rslora=True))], True),
  "lora-fa with dropout": (
    ALL, [("all-linear", LoRA(rank=2, alpha=3.0, train_a=False, dropout=0.1))], True,
  ),
  "several ranks and scales": (
    ALL,
    [
      (r".*/attn/(query|key)/kernel", LoRA(rank=2, alpha=10.0)),
      ("mlp", LoRA(rank=3, alpha=3.0, rslora=True)),
      (r"head/kernel", LoRA(rank=5, alpha=1.0)),
    ],
    True,
  ),
  "embedding and head": (ALL, [("(embed|head)/.*", LoRA(rank=2, alpha=3.0))], True),
  "tied embedding": (TIED, [("embed/.*", LoRA(rank=2, alpha=3.0)), *LINEAR], True),
  "dora": (EVERYWHERE, [(KERNELS, DoRA(rank=2, alpha=3.0))], True),
  "dora of an embedding": (ALL, [("(embed|head)/.*", DoRA(rank=2, alpha=3.0))], True),
  "pissa": (EVERYWHERE, [(KERNELS, PiSSA(rank=2, alpha=3.0))], False),
  "olora and lora": (
    ALL, [("mlp", OLoRA(rank=2, alpha=3.0)), ("attention", LoRA(rank=3, alpha=3.0))], False,
  ),
  "adalora": (
    EVERYWHERE, [(KERNELS.replace("|second|series", ""), AdaLoRA(rank=4, alpha=6.0))], True,
  ),
  "adalora of several ranks": (
    ALL,
    [("mlp", AdaLoRA(rank=4, alpha=4.0)), ("attention", AdaLoRA(rank=2, alpha=5.0))],
    False,
  ),
  "adalora of a negative scale, and of none": (
    ALL,
    [("mlp", AdaLoRA(rank=4, alpha=-4.0)), (".*/query/kernel", AdaLoRA(rank=2, alpha=0))],
    False,
  ),
  "adalora and lora": (
    ALL, [("mlp", AdaLoRA(rank=2, alpha=3.0)), ("attention", LoRA(rank=3, alpha=3.0))], False,
  ),
  "vera": (
    (*ALL, "gpt2"), [(r"(block|h)[^/]*/.*/(query|down|c_fc|c_attn)/kernel", VeRA(rank=5))], True,
  ),
  "loha": ((*ALL, "images"), [(KERNELS, LoHa(rank=2, alpha=3.0))], True),
  "lokr": (ALL, [("all-linear", LoKr(rank=2, alpha=3.0))], True),
  "lokr of two products": (
    ALL, [("all-linear", LoKr(rank=1, alpha=3.0, decompose_both=True))], True,
  ),
  "lokr by a factor": (ALL, [("all-linear", LoKr(rank=1, alpha=3.0, factor=2))], True),
  "lokr of convolutions": (
    ("images",), [("(first|series)/kernel", LoKr(rank=1, alpha=3.0, channels=True))], True,
  ),
  "norms, head and kernels in full": (
    ALL,
    [("norm|head/kernel", Full()), ("attention", LoRA(rank=2, alpha=3.0)),
     (".*/mlp/up/kernel", Full())],
    True,
  ),
  "loha beside norms in full": (
    ALL, [("norm", Full()), ("attention", LoHa(rank=2, alpha=3.0))], True,
  ),
  "biases in full": (
    ("gpt2", "images"),
    [("bias", Full()), (r".*c_(attn|fc)/kernel|(first|to_heads)/kernel", LoRA(rank=2, alpha=3.0))],
    True,
  ),
  "conv1d, convolutions and embeddings in full": (
    ("gpt2", "images"),
    [(r".*c_(attn|fc)/kernel|(first|to_heads)/kernel", LoRA(rank=2, alpha=3.0)),
     (r".*c_proj/kernel|wte/.*|head/.*|(second|from_heads)/kernel", Full())],
    True,
  ),
  "tied embedding in full": (TIED, [("embed/.*", Full()), *LINEAR], True),
  "full training alone": (ALL, [("norm", Full()), (".*/mlp/up/kernel", Full())], True),
  "full training of a tied embedding alone": (TIED, [("norm|embed/.*", Full())], True),
  "rows of tokens": (
    ALL,
    [("embed/.*", TokenRows(ids=(5, 9))), ("head/.*", TokenRows(ids=(1,), axis=1)), *LINEAR],
    False,
  ),
  "rows of tied tokens": (TIED, [("embed/.*", TokenRows(ids=(9, 5))), *LINEAR], False),
  "rows of tokens alone": (
    ALL,
    [("embed/.*", TokenRows(ids=(5, 9))), ("head/.*", TokenRows(ids=(5, 9), axis=1))],
    False,
  ),
  "rows of tied tokens alone": (TIED, [("embed/.*", TokenRows(ids=(9, 5)))], False),
}  # fmt: skip


def trained(twins, rules):
  specs = lora_jax.match(twins.params, rules, twins.axes)
  adapters = lora_jax.init(jax.random.key(0), twins.params, specs, twins.axes)
  return shaken(twins.params, adapters)


@pytest.mark.parametrize(("case", "model", "_"), of_models(CASES))
def test_an_adapter_made_here_gives_the_same_logits_in_peft(case, model, _, tmp_path):
  twins, (_, rules, exact) = TWINS[model], CASES[case]
  adapters = trained(twins, rules)
  twins.save(tmp_path / "adapter", adapters)
  expected = twins.logits(adapters)
  np.testing.assert_allclose(in_peft(twins, tmp_path / "adapter"), expected, atol=1e-4)
  assert np.abs(expected - twins.logits({})).max() > 1e-3  # the adapter does something

  again = twins.load(tmp_path / "adapter")
  # PEFT keeps a module as a whole: the bias beside a kernel trained in full comes back unchanged.
  beside = again.keys() - adapters.keys()
  assert all(path.endswith("/bias") and not np.any(again[path].dw) for path in beside)
  assert [path for path in again if path not in beside] == list(adapters)
  np.testing.assert_allclose(twins.logits(again), expected, atol=1e-5)
  if exact:
    for path, adapter in adapters.items():
      assert type(again[path]) is type(adapter)
      assert getattr(again[path], "scale", None) == getattr(adapter, "scale", None)
      assert getattr(again[path], "dropout", None) == getattr(adapter, "dropout", None)
      for name, part in again[path].parts.items():
        # A leaf is stored as it stands, so its change comes back with the rounding of the sum.
        tolerance = 1e-6 if isinstance(adapter, weights.Full) else 0
        np.testing.assert_allclose(part, getattr(adapter, name), rtol=0, atol=tolerance)
