"""Tensor names of BERT, RoBERTa and DistilBERT in safetensors files; see `lora_jax.io.names`.

    HUGGING_FACE["bert"]["bert.pooler.dense.weight"]       # "pooler/kernel"

The dense layer on a text's first token is called the pooler here. In files BERT's is a part of the
body, and RoBERTa's and DistilBERT's are parts of the classification head.
"""

from lora_jax.io.names import Table


def _layers(prefix: str, own: dict[str, str]) -> dict[str, str]:
  """The table rows of a layer's dense layers and norms, by their names after the prefix."""
  leaves = {"attn_norm": "scale", "mlp_norm": "scale"}
  rows = {}
  for name, path in own.items():
    rows[f"{prefix}.{{i}}.{name}.weight"] = f"block_{{i}}/{path}/{leaves.get(path, 'kernel')}"
    rows[f"{prefix}.{{i}}.{name}.bias"] = f"block_{{i}}/{path}/bias"
  return rows


def _embeddings(prefix: str, types: bool) -> dict[str, str | None]:
  """The table rows of the embeddings and their norm."""
  of_types = {f"{prefix}.token_type_embeddings.weight": "types/embedding"} if types else {}
  return {
    f"{prefix}.word_embeddings.weight": "embed/embedding",
    f"{prefix}.position_embeddings.weight": "positions/embedding",
    **of_types,
    f"{prefix}.LayerNorm.weight": "embed_norm/scale",
    f"{prefix}.LayerNorm.bias": "embed_norm/bias",
    f"{prefix}.position_ids": None,  # 0, 1, 2, …
    f"{prefix}.token_type_ids": None,
  }


def _dense(name: str, path: str) -> dict[str, str]:
  return {f"{name}.weight": f"{path}/kernel", f"{name}.bias": f"{path}/bias"}


def _unread(*names: str) -> dict[str, None]:
  """Heads of pretraining, which no task here uses."""
  return {f"{name}.{part}": None for name in names for part in ("weight", "bias")}


_LAYER = {
  "attention.self.query": "attn/query",
  "attention.self.key": "attn/key",
  "attention.self.value": "attn/value",
  "attention.output.dense": "attn/out",
  "attention.output.LayerNorm": "attn_norm",
  "intermediate.dense": "mlp/up",
  "output.dense": "mlp/down",
  "output.LayerNorm": "mlp_norm",
}
_DISTILBERT_LAYER = {
  "attention.q_lin": "attn/query",
  "attention.k_lin": "attn/key",
  "attention.v_lin": "attn/value",
  "attention.out_lin": "attn/out",
  "sa_layer_norm": "attn_norm",
  "ffn.lin1": "mlp/up",
  "ffn.lin2": "mlp/down",
  "output_layer_norm": "mlp_norm",
}


def _with_names_of_tensorflow(table: dict[str, str | None]) -> dict[str, str | None]:
  """Adds gamma and beta for a norm's weight and bias, as in files converted from TensorFlow."""
  spelled = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
  also = {
    name.replace(theirs, converted): path
    for theirs, converted in spelled.items()
    for name, path in table.items()
    if name.endswith(theirs)
  }
  return table | also


HUGGING_FACE: dict[str, Table] = {
  "bert": _with_names_of_tensorflow(
    {
      **_embeddings("bert.embeddings", types=True),
      **_layers("bert.encoder.layer", _LAYER),
      **_dense("bert.pooler.dense", "pooler"),
      **_dense("classifier", "head"),
    }
  )
  | _unread(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder",
    "cls.seq_relationship",
  )
  | {
    "cls.predictions.bias": None,
    "cls.predictions.transform.LayerNorm.gamma": None,
    "cls.predictions.transform.LayerNorm.beta": None,
  },
  "roberta": {
    **_embeddings("roberta.embeddings", types=True),
    **_layers("roberta.encoder.layer", _LAYER),
    **_dense("classifier.dense", "pooler"),
    **_dense("classifier.out_proj", "head"),
    **_unread("roberta.pooler.dense", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
    "lm_head.bias": None,
  },
  "distilbert": {
    **_embeddings("distilbert.embeddings", types=False),
    **_layers("distilbert.transformer.layer", _DISTILBERT_LAYER),
    **_dense("pre_classifier", "pooler"),
    **_dense("classifier", "head"),
    **_unread("vocab_transform", "vocab_layer_norm", "vocab_projector"),
  },
}
"""By `BertConfig.family`: of safetensors and of PEFT's adapters."""
