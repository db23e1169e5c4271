"""Adapters made by `peft` give the same results here."""

import json

import numpy as np
import pytest
from peers import peft
from torch_models import gpt2_twins, image_twins, in_peft, llama_twins, made_by_peft, of_models

from lora_jax.weights import (
  AdaLoRA,
  DoRA,
  Full,
  LoHa,
  LoKr,
  LowRank,
  TokenRows,
  VeRA,
)

TWINS = {
  "llama": llama_twins(),
  "scanned": llama_twins(scan=True),
  "tied": llama_twins(tie=True),
  "scanned and tied": llama_twins(tie=True, scan=True),
  "gpt2": gpt2_twins(),
  "images": image_twins(),
}
LLAMAS = ("llama", "scanned")


def lora(targets=("q_proj", "down_proj"), **options):
  options = {"r": 4, "lora_alpha": 6} | options
  return lambda: peft.LoraConfig(
    target_modules=list(targets) if isinstance(targets, tuple) else targets, **options
  )


GPT2_LAYERS = ("c_attn", "c_proj", "c_fc")
IMAGE_LAYERS = ("first", "second", "series", "to_heads", "from_heads")

# name: (models, config, how many leaves it changes in each, and of which kinds these are)
CASES = {
  "all linear layers": (LLAMAS, lora("all-linear"), (21, 7), {LowRank}),
  "rslora": (LLAMAS, lora(use_rslora=True), (6, 2), {LowRank}),
  "gaussian start": (("scanned",), lora(init_lora_weights="gaussian"), (2,), {LowRank}),
  "orthogonal start": (("scanned",), lora(init_lora_weights="orthogonal"), (2,), {LowRank}),
  "frozen B": (("scanned",), lora(init_lora_weights="mica"), (2,), {LowRank}),
  "patterns": (
    LLAMAS,
    lora(
      rank_pattern={"layers.1.self_attn.q_proj": 2, r"^model\.layers\.\d+\.mlp\.(down|up)_proj": 3},
      alpha_pattern={"q_proj": 3, r"layers.[02].*.down_proj": 5},
    ),
    (6, 2),
    {LowRank},
  ),
  "some layers": (LLAMAS, lora(layers_to_transform=[0, 2]), (4, 2), {LowRank}),
  "modules to save": (
    LLAMAS, lora(modules_to_save=["lm_head", "model.norm"]), (6 + 2, 2 + 2), {LowRank, Full},
  ),
  "norms to save": (
    LLAMAS, lora(modules_to_save=["input_layernorm"]), (6 + 3, 2 + 1), {LowRank, Full},
  ),
  "dora": (LLAMAS, lora("all-linear", use_dora=True), (21, 7), {DoRA}),
  "dora of some layers": (
    LLAMAS, lora(use_dora=True, layers_to_transform=[1]), (2, 2), {DoRA},
  ),
  "embedding": (LLAMAS, lora(("embed_tokens", "q_proj")), (4, 2), {LowRank}),
  "dora of an embedding": (
    LLAMAS, lora(("embed_tokens", "q_proj"), use_dora=True), (4, 2), {DoRA},
  ),
  "tied embedding": (
    ("tied", "scanned and tied"),
    lora(("embed_tokens", "q_proj"), ensure_weight_tying=True),
    (4, 2),
    {LowRank},
  ),
  "tied embedding to save": (
    ("tied", "scanned and tied"),
    lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    (7, 3),
    {LowRank, Full},
  ),
  "tokens": (
    ("llama", "scanned", "tied", "scanned and tied"),
    lora(trainable_token_indices=[5, 9]),
    (7, 3, 7, 3),
    {LowRank, TokenRows},
  ),
  "tokens of the head": (
    LLAMAS,
    lora(trainable_token_indices={"embed_tokens": [9, 5], "lm_head": [1]}),
    (8, 4),
    {LowRank, TokenRows},
  ),
  "tokens alone": (
    ("llama", "tied"),
    lambda: peft.TrainableTokensConfig(token_indices=[7, 5]),
    (1, 1),
    {TokenRows},
  ),
  "whole modules": (
    LLAMAS,
    lambda: peft.LNTuningConfig(target_modules=["norm", "q_proj", "embed_tokens"]),
    (5, 3),
    {Full},
  ),
  "adalora": (
    LLAMAS,
    lambda: peft.AdaLoraConfig(
      total_step=9, init_r=6, lora_alpha=5, target_modules=["q_proj", "down_proj"]
    ),
    (6, 2),
    {AdaLoRA},
  ),
  "fan in, fan out": (("gpt2",), lora(GPT2_LAYERS, fan_in_fan_out=True), (8,), {LowRank}),
  "dora of fan in, fan out": (
    ("gpt2",), lora(GPT2_LAYERS, fan_in_fan_out=True, use_dora=True), (8,), {DoRA},
  ),
  "adalora of fan in, fan out": (
    ("gpt2",),
    lambda: peft.AdaLoraConfig(
      total_step=9, init_r=3, target_modules=["c_attn"], fan_in_fan_out=True
    ),
    (2,),
    {AdaLoRA},
  ),
  "conv1d to save": (
    ("gpt2",),
    lora(("c_attn",), fan_in_fan_out=True, modules_to_save=["c_fc", "lm_head"]),
    (2 + 4 + 1,),
    {LowRank, Full},
  ),
  "all biases": (
    ("gpt2", "images"), lora(("c_attn", "first", "to_heads"), bias="all"), (15, 7), {LowRank, Full},
  ),
  "biases of the adapted": (
    ("gpt2", "images"),
    lora(("c_attn", "first", "to_heads"), bias="lora_only"),
    (4, 4),
    {LowRank, Full},
  ),
  "convolutions": (("images",), lora(IMAGE_LAYERS), (5,), {LowRank}),
  "dora of convolutions": (("images",), lora(IMAGE_LAYERS, use_dora=True), (5,), {DoRA}),
  "adalora of a convolution": (
    ("images",),
    lambda: peft.AdaLoraConfig(total_step=9, init_r=3, target_modules=["first", "to_heads"]),
    (2,),
    {AdaLoRA},
  ),
  "convolutions to save": (
    ("images",),
    lora(("to_heads",), modules_to_save=["first", "second", "from_heads"]),
    (1 + 6,),
    {LowRank, Full},
  ),
  "vera": (
    LLAMAS,
    lambda: peft.VeraConfig(r=5, target_modules=["q_proj", "k_proj", "down_proj"]),
    (9, 3),
    {VeRA},
  ),
  "vera of some layers": (
    LLAMAS,
    lambda: peft.VeraConfig(
      r=5, target_modules=["v_proj", "down_proj"], layers_to_transform=[1]
    ),
    (2, 2),
    {VeRA},
  ),
  "vera of fan in, fan out, with biases": (
    ("gpt2",),
    lambda: peft.VeraConfig(
      r=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, bias="vera_only"
    ),
    (8,),
    {VeRA, Full},
  ),
  "loha": (
    LLAMAS,
    lambda: peft.LoHaConfig(
      r=4, alpha=6, target_modules=["q_proj", "k_proj", "down_proj"],
      rank_pattern={"k_proj": 2, "layers.1.self_attn.q_proj": 3},
      alpha_pattern={"layers.0.self_attn.q_proj": 9}, modules_to_save=["model.norm"],
    ),
    (10, 4),
    {LoHa, Full},
  ),
  "loha of convolutions": (
    ("images",),
    lambda: peft.LoHaConfig(r=2, target_modules=list(IMAGE_LAYERS)),
    (5,),
    {LoHa},
  ),
  "loha of convolutions by three modes": (
    ("images",),
    lambda: peft.LoHaConfig(r=2, target_modules=list(IMAGE_LAYERS), use_effective_conv2d=True),
    (5,),
    {LoHa},
  ),
  "lokr": (
    LLAMAS,
    lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=["q_proj", "k_proj", "down_proj"]),
    (9, 3),
    {LoKr},
  ),
  "lokr by a factor": (
    LLAMAS,
    lambda: peft.LoKrConfig(
      r=1, alpha=2, target_modules=["q_proj", "k_proj", "down_proj"], decompose_both=True,
      decompose_factor=2, layers_to_transform=[0, 2],
    ),
    (6, 3),
    {LoKr},
  ),
  "lokr of two products": (
    LLAMAS,
    lambda: peft.LoKrConfig(
      r=1, alpha=2, target_modules=["q_proj", "k_proj", "down_proj"], decompose_both=True,
      init_weights="lycoris",
    ),
    (9, 3),
    {LoKr},
  ),
  "lokr of convolutions": (
    ("images",),
    lambda: peft.LoKrConfig(r=1, target_modules=list(IMAGE_LAYERS), decompose_both=True),
    (5,),
    {LoKr},
  ),
  "lokr of convolutions by three modes": (
    ("images",),
    lambda: peft.LoKrConfig(
      r=1, target_modules=["first", "second", "to_heads"], use_effective_conv2d=True
    ),
    (3,),
    {LoKr},
  ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "model", "n"), of_models(CASES))
def test_an_adapter_made_by_peft_gives_the_same_logits(case, model, n, tmp_path):
  twins, (_, config, counts, kinds) = TWINS[model], CASES[case]
  expected = made_by_peft(twins, config(), tmp_path)
  adapters = twins.load(tmp_path)
  np.testing.assert_allclose(twins.logits(adapters), expected, atol=1e-4)
  assert np.abs(expected - twins.logits({})).max() > 1e-3  # the adapter does something
  assert len(adapters) == counts[n]
  assert {type(adapter) for adapter in adapters.values()} == kinds


@pytest.mark.parametrize("model", ["tied", "scanned and tied"])
def test_an_embedding_and_the_head_tied_to_it_may_both_be_saved_if_they_are_equal(model, tmp_path):
  twins, options = TWINS[model], {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
  tied = peft.LoraConfig(
    **options, modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True
  )
  expected = made_by_peft(twins, tied, tmp_path)
  config = tmp_path / "adapter_config.json"
  fields = json.loads(config.read_text())
  # As without ensure_weight_tying, where the two stay equal if both were trained alike.
  fields |= {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": False}
  config.write_text(json.dumps(fields))
  np.testing.assert_allclose(twins.logits(twins.load(tmp_path)), expected, atol=1e-4)


ZERO_ALPHAS = {
  "lora": lora(lora_alpha=0),
  "one layer's lora": lora(alpha_pattern={"layers.0.self_attn.q_proj": 0}),
  "all but one layer's lora": lora(lora_alpha=0, alpha_pattern={"layers.1.self_attn.q_proj": 6}),
  "adalora": lambda: peft.AdaLoraConfig(
    total_step=9, init_r=6, lora_alpha=0, target_modules=["q_proj", "down_proj"]
  ),
  "loha": lambda: peft.LoHaConfig(r=2, alpha=0, target_modules=["q_proj"]),
  "lokr": lambda: peft.LoKrConfig(r=2, alpha=0, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("model", LLAMAS)
@pytest.mark.parametrize("case", ZERO_ALPHAS)
def test_an_alpha_of_zero_is_read_written_and_read_again(case, model, tmp_path):
  twins = TWINS[model]
  expected = made_by_peft(twins, ZERO_ALPHAS[case](), tmp_path / "theirs")
  adapters = twins.load(tmp_path / "theirs")
  np.testing.assert_allclose(twins.logits(adapters), expected, atol=1e-4)
  twins.save(tmp_path / "ours", adapters)
  np.testing.assert_allclose(in_peft(twins, tmp_path / "ours"), expected, atol=1e-4)
  again = twins.load(tmp_path / "ours")
  np.testing.assert_allclose(twins.logits(again), expected, atol=1e-4)
  assert again.keys() == adapters.keys()
