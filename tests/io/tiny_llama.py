"""A small random Llama, written as a folder by transformers."""

from peers import torch, transformers

ROPE = {
  "rope_type": "llama3",
  "rope_theta": 10000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
TOKENS = [[5, 900, 17, 3, 3, 49151, 0, 64, 2, 11, 40_000, 8]]


def write_tiny(folder, tokenizer, max_shard_size="1GB", dtype=torch.float32, **changes):
  """A random Llama written by transformers; returns the model."""
  fields = {
    "vocab_size": 49152,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
  }
  torch.manual_seed(0)
  config = transformers.LlamaConfig(**(fields | changes))
  model = transformers.LlamaForCausalLM(config).to(dtype).eval()
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
  model.save_pretrained(folder, max_shard_size=max_shard_size)
  tokenizer.save(folder)
  return model
