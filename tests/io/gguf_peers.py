"""transformers and llama.cpp as readers of GGUF files."""

import pytest
from peers import torch, transformers

LLAMA_CPP = "llama.cpp is not installed; `pip install xllamacpp` has it built"


def server(path):
  """llama.cpp's server of a model, on the CPU with one thread."""
  xllamacpp = pytest.importorskip("xllamacpp", reason=LLAMA_CPP)
  settings = xllamacpp.CommonParams()
  settings.model.path = str(path)
  settings.n_ctx, settings.n_parallel, settings.warmup = 64, 1, False
  settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
  settings.n_gpu_layers, settings.verbosity = 0, -1
  return xllamacpp.Server(settings)


def llama_cpp(path, prompt):
  """What llama.cpp finds likeliest after a text: {token id: logarithm of its probability}."""
  asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "n_probs": 20}
  (choice,) = server(path).handle_completions(asked)["choices"]
  return {x["id"]: x["logprob"] for x in choice["logprobs"]["content"][0]["top_logprobs"]}


def by_transformers(path, **changes):
  """The tokenizer that transformers makes of a file, and its logits of some ids.

  changes: of the configuration that it makes, where it does not read what the file says.
  """
  words = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
  config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
  for name, value in changes.items():
    setattr(config, name, value)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, config=config, dtype=torch.float32
  )

  def apply(ids):
    with torch.no_grad():
      return model.eval()(torch.tensor([ids])).logits.numpy()[0]

  return words, apply
