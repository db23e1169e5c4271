"""Tiny random models of each family of decoders and encoders, as transformers writes them."""

import dataclasses
from typing import Any

import tiny_encoder
from peers import torch, transformers

_SIZES = {
  "vocab_size": 403, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
  "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
  "bos_token_id": 340, "eos_token_id": 341, "pad_token_id": None,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1_000_000.0}
_GEMMA = {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 24}
_FACTORS = {  # of heads of 8 features of which 6 are rotated
  "short_factor": [1.0, 1.1, 1.3],
  "long_factor": [1.0, 2.5, 4.0],
}
_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75} | _FACTORS
_YARN = {
  "rope_type": "yarn",
  "rope_theta": 10000.0,
  "factor": 4.0,
  "original_max_position_embeddings": 32,
}

_EXPERTS = {"head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT_OSS = {
  "head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 24,
  "sliding_window": 6,
  "rope_parameters": {
    "rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "beta_fast": 32.0,
    "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 8,
  },
}  # fmt: skip

_GEMMA4 = {
  "head_dim": 8, "global_head_dim": 16, "sliding_window": 6, "pad_token_id": 0,
  "num_hidden_layers": 5, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 403,
  "layer_types": [
    "sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
    "full_attention",
  ],
}  # fmt: skip

_GPT2 = {
  "vocab_size": 403, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
  "bos_token_id": 340, "eos_token_id": 341, "pad_token_id": None,
}  # fmt: skip

_BERT = {
  "vocab_size": 403, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
  "num_attention_heads": 4, "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
_ROBERTA = _BERT | {"pad_token_id": 1, "max_position_embeddings": 66, "type_vocab_size": 1}
_DISTILBERT = {
  "vocab_size": 403, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
  "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip

# So low that a small model's scores and logits reach them.
_CAPS = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 4.0}


@dataclasses.dataclass(frozen=True)
class Kind:
  """A published shape of config: the family, its class in transformers, what its config says."""

  family: str
  name: str
  fields: dict[str, Any]
  sizes: dict[str, Any] = dataclasses.field(default_factory=lambda: _SIZES)


KINDS = {
  "Qwen 2": Kind("qwen2", "Qwen2", {}),
  "Qwen 2.5, tied": Kind("qwen2", "Qwen2", {"tie_word_embeddings": True}),
  "Qwen 2, upper layers with a window": Kind(
    "qwen2",
    "Qwen2",
    {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
  ),
  "Qwen 3": Kind("qwen3", "Qwen3", {"head_dim": 16}),
  "Qwen 3, tied": Kind("qwen3", "Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
  "Qwen 3, heads of 128": Kind("qwen3", "Qwen3", {"head_dim": 128}),
  "Qwen 3, experts": Kind("qwen3_moe", "Qwen3Moe", _EXPERTS | {"norm_topk_prob": True}),
  "Qwen 3, experts whose shares are as they are, tied": Kind(
    "qwen3_moe", "Qwen3Moe", _EXPERTS | {"tie_word_embeddings": True},
  ),
  "Qwen 3, experts, all layers with a window": Kind(
    "qwen3_moe", "Qwen3Moe", _EXPERTS | {"use_sliding_window": True, "sliding_window": 6},
  ),
  "gpt-oss": Kind("gpt_oss", "GptOss", _GPT_OSS),
  "gpt-oss, tied, no windows, unscaled": Kind(
    "gpt_oss", "GptOss",
    _GPT_OSS
    | {
      "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True,
      "rope_parameters": {"rope_type": "default", "rope_theta": 150_000.0},
    },
  ),
  "Mistral": Kind("mistral", "Mistral", {"sliding_window": 6}),
  "Mistral, tied": Kind("mistral", "Mistral", {"sliding_window": 6, "tie_word_embeddings": True}),
  "Mistral without a window": Kind("mistral", "Mistral", {"sliding_window": None, "head_dim": 16}),
  "Gemma 2": Kind("gemma2", "Gemma2", _GEMMA | _CAPS),
  "Gemma 2, untied": Kind("gemma2", "Gemma2", _GEMMA | {"tie_word_embeddings": False}),
  "Gemma 3": Kind(
    "gemma3_text",
    "Gemma3Text",
    _GEMMA
    | {
      "num_hidden_layers": 3,
      "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
      "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": _LINEAR,
      },
    },
  ),
  "Gemma 3, untied": Kind("gemma3_text", "Gemma3Text", _GEMMA | {"tie_word_embeddings": False}),
  "Gemma 4": Kind(
    "gemma4_text", "Gemma4Text",
    _GEMMA4
    | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "final_logit_softcapping": 4.0},
  ),
  "Gemma 4, keys are values, no embeddings of layers": Kind(
    "gemma4_text", "Gemma4Text",
    _GEMMA4
    | {
      "attention_k_eq_v": True, "num_global_key_value_heads": 1,
      "hidden_size_per_layer_input": 0, "tie_word_embeddings": False,
    },
  ),
  "Phi 4 mini": Kind(
    "phi3",
    "Phi3",
    {"tie_word_embeddings": True, "rope_parameters": _LONG, "original_max_position_embeddings": 64},
  ),
  "Phi 4 mini, longer than its first context": Kind(
    "phi3", "Phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 16}
  ),
  "Phi 3 with a window": Kind("phi3", "Phi3", {"sliding_window": 6}),
  "OLMo 2": Kind("olmo2", "Olmo2", {}),
  "OLMo 3": Kind(
    "olmo3",
    "Olmo3",
    {
      "num_hidden_layers": 4,
      "sliding_window": 6,
      "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        "full_attention": _YARN,
      },
    },
  ),
  "SmolLM 3": Kind("smollm3", "SmolLM3", {"no_rope_layers": [1, 0]}),
  "SmolLM 3 with a window": Kind(
    "smollm3",
    "SmolLM3",
    {
      "num_hidden_layers": 4,
      "no_rope_layer_interval": 2,
      "use_sliding_window": True,
      "sliding_window": 6,
    },
  ),
  "Granite": Kind(
    "granite",
    "Granite",
    {
      "embedding_multiplier": 3.0,
      "attention_multiplier": 0.5,
      "residual_multiplier": 0.7,
      "logits_scaling": 0.5,
    },
  ),
  "Ministral": Kind(
    "ministral",
    "Ministral",
    {"head_dim": 16, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]},
  ),
  "Ministral 3": Kind(
    "ministral3",
    "Ministral3",
    {
      "head_dim": 16,
      "rope_parameters": _YARN
      | {
        "original_max_position_embeddings": 8,
        "llama_4_scaling_beta": 0.3,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
      },
    },
  ),
  "GPT-2": Kind("gpt2", "GPT2", {}, _GPT2),
  "GPT-2, untied": Kind("gpt2", "GPT2", {"tie_word_embeddings": False}, _GPT2),
  "GPT-2 of Stanford": Kind(
    "gpt2",
    "GPT2",
    {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    _GPT2,
  ),
  "Cerebras-GPT": Kind("gpt2", "GPT2", {"activation_function": "gelu", "n_inner": 48}, _GPT2),
  "GPT-2, scores as they are": Kind("gpt2", "GPT2", {"scale_attn_weights": False}, _GPT2),
}  # fmt: skip
"""What the tests claim of each; the first of a family stands for it where one is enough."""

ENCODERS = {
  "BERT": Kind("bert", "Bert", {}, _BERT),
  "BERT with ReLU and one type of token": Kind(
    "bert", "Bert", {"hidden_act": "relu", "type_vocab_size": 1, "layer_norm_eps": 1e-5}, _BERT
  ),
  "RoBERTa": Kind("roberta", "Roberta", {"layer_norm_eps": 1e-5}, _ROBERTA),
  "DistilBERT": Kind("distilbert", "DistilBert", {}, _DISTILBERT),
}
"""The same of encoders, with heads of three classes."""

FIRST = {kind.family: name for name, kind in reversed(KINDS.items())}
"""{family: the name of its first kind}."""

PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")


PER_LAYER = ("per_layer_gate", "per_layer_out")

WITH_EXPERTS = ("qwen3_moe", "gpt_oss")


def projections(family: str) -> tuple[str, ...]:
  """The kernels of a layer, those of attention before those of the MLP."""
  if family == "phi3":
    return ("qkv", "out", "gate_up", "down")
  if family == "gpt2":
    return ("qkv", "out", "up", "down")
  if family in WITH_EXPERTS:
    return (*PROJECTIONS[:4], "gate_up", "down")
  if family == "gemma4_text":
    return (*PROJECTIONS[:4], *PER_LAYER, *PROJECTIONS[4:])
  return PROJECTIONS


def num_kernels(name: str, projections: tuple[str, ...]) -> int:
  """How many of these a model has in all its layers, of which some may share keys and values."""
  shared = KINDS[name].fields.get("num_kv_shared_layers", 0)
  kept = [x for x in projections if x in ("key", "value")]
  return num_layers(name) * len(projections) - shared * len(kept)


def num_layers(name: str) -> int:
  return KINDS[name].fields.get("num_hidden_layers", _SIZES["num_hidden_layers"])


def make(name: str, head: str | None = None) -> "torch.nn.Module":
  """A random model, with the same values each time.

  head: the end of transformers' class, as "Model"; by default that of a language model, or of
    classes.
  """
  kind = (KINDS | ENCODERS)[name]
  torch.manual_seed(0)
  config = getattr(transformers, f"{kind.name}Config")(**kind.sizes | kind.fields)
  if head or name in ENCODERS:
    made = getattr(transformers, f"{kind.name}{head or 'ForSequenceClassification'}")
    model = made._from_config(config, attn_implementation="eager").eval()
  else:
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
  for path, parameter in model.named_parameters():
    # Gemma's norms are 1 + weight.
    norm = "norm" in path.lower() or ("ln_" in path and path.endswith("weight"))
    norm = norm and not (name in ENCODERS and path.endswith("bias"))
    mean = float(norm and kind.family not in ("gemma2", "gemma3_text"))
    torch.nn.init.normal_(parameter, mean=mean, std=0.2)
  for path, buffer in model.named_buffers():
    if path.endswith("layer_scalar"):
      torch.nn.init.normal_(buffer, mean=1.0, std=0.2)
  return model.eval()


def write(folder, name: str, head: str | None = None):
  """Saves the model and a tokenizer to a folder; returns the model."""
  return write_model(folder, make(name, head))


def write_model(folder, model):
  """Saves a model and a tokenizer to a folder; returns the model."""
  model.save_pretrained(folder)
  import tiny_tokenizers  # which needs PyTorch, and the table above does not

  if model.config.model_type in {kind.family for kind in ENCODERS.values()}:
    words = tiny_encoder.wordpiece()
  else:
    words = tiny_tokenizers.byte_level()
    assert [words.token_to_id(x) for x in ("<s>", "</s>")] == [340, 341]
  words.save(str(folder / "tokenizer.json"))
  return model
