"""wav2vec2 against transformers and peft, on tiny random models with both kinds of norm."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speech_models
from peers import peft, torch, transformers

import lora_jax
from lora_jax import exchange, families
from lora_jax.data import standardized
from lora_jax.io import export, pretrained, safetensors

ATOL = 2e-3
LORA = lora_jax.LoRA(rank=3, alpha=2.0)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """(folder, the model of transformers, what `pretrained.load` makes of it), by the name."""

  @functools.cache
  def load(name):
    folder = tmp_path_factory.mktemp("family")
    return folder, speech_models.write(folder, name), pretrained.load(folder)

  return load


def ours(found, samples, params=None):
  apply = jax.jit(lora_jax.adapt(found.family.make_model(found.config).apply))
  return np.asarray(apply({"params": params or found.params}, samples))


def theirs(model, samples):
  with torch.no_grad():
    return model(torch.tensor(samples)).logits.numpy()


@pytest.mark.parametrize("name", speech_models.WAV2VEC2S)
def test_logits_are_those_of_transformers(loaded, name):
  _, model, found = loaded(name)
  samples = speech_models.samples()
  expected = theirs(model, samples)
  np.testing.assert_allclose(ours(found, samples), expected, atol=ATOL, rtol=0)
  assert expected.shape[1] == found.config.frames_of(samples.shape[1])
  least = found.config.samples_of(2)
  assert [found.config.frames_of(least + n) for n in (-1, 0)] == [1, 2]
  assert np.ptp(expected, axis=0).max() > 0.05 and found.tokenizer is None
  assert found.config.classes[0] == "<pad>" and len(found.config.classes) == 9


@pytest.mark.parametrize("name", speech_models.WAV2VEC2S)
def test_a_written_model_is_read_back_by_transformers_and_here(loaded, tmp_path, name):
  _, model, found = loaded(name)
  export.save(tmp_path / "copy", found.params, found.config, None)
  again = pretrained.load(tmp_path / "copy")
  assert again.config == found.config
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), again.params, found.params)
  copy = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "copy").eval()
  samples = speech_models.samples()
  np.testing.assert_allclose(theirs(copy, samples), theirs(model, samples), atol=1e-4)


def test_both_names_of_weight_normed_parts_are_read(loaded, tmp_path):
  folder, _, found = loaded(speech_models.WAV2VEC2S[0])
  tensors = safetensors.load_file(folder / "model.safetensors")
  start = "wav2vec2.encoder.pos_conv_embed.conv"
  new = [f"{start}.parametrizations.weight.original{n}" for n in (0, 1)]
  old = [f"{start}.weight_g", f"{start}.weight_v"]
  here, other = (new, old) if new[0] in tensors else (old, new)
  renamed = dict(zip(here, other, strict=True))
  safetensors.save_file(
    {renamed.get(name, name): x for name, x in tensors.items()}, tmp_path / "model.safetensors"
  )
  (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
  again = pretrained.load(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
  del tensors[here[1]]
  safetensors.save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"is weight-normed, and one of its parts .* is missing"):
    pretrained.load(tmp_path)


@pytest.mark.parametrize("name", speech_models.WAV2VEC2S)
def test_every_kernel_adapts_and_stays_factored(loaded, name):
  """The weight-normed convolution too: its kernel is joined when it is read."""
  _, _, found = loaded(name)
  model = found.family.make_model(found.config)
  samples = jnp.asarray(speech_models.samples())
  axes = lora_jax.trace_axes(lambda p, x: model.apply({"params": p}, x), found.params, samples)
  linear = lora_jax.match(found.params, [("all-linear", LORA)], axes)
  convolved = lora_jax.match(found.params, [("convolutions", LORA)], axes)
  kernels = {path for path in axes if path.endswith("/kernel")}
  assert {*linear} | {*convolved} == kernels - {"head/kernel"} and "positions/kernel" in convolved
  specs = lora_jax.match(found.params, [("all-linear", LORA), ("convolutions", LORA)], axes)
  adapters = lora_jax.init(jax.random.key(0), found.params, specs, axes)
  adapters = jax.tree.map(lambda x: x + 0.05, adapters)
  strict = lora_jax.adapt(model.apply, strict=True)
  weights = lora_jax.attach(found.params, adapters)
  out = jax.jit(strict)({"params": weights}, samples)
  merged = model.apply({"params": lora_jax.merge(found.params, adapters)}, samples)
  np.testing.assert_allclose(out, merged, atol=1e-3)


@pytest.mark.parametrize("name", speech_models.WAV2VEC2S)
def test_adapters_from_and_to_peft_give_the_same_logits(loaded, tmp_path, name):
  folder, _, found = loaded(name)
  model = found.family.make_model(found.config)
  samples = speech_models.samples()
  axes = lora_jax.trace_axes(
    lambda p, x: model.apply({"params": p}, x), found.params, jnp.asarray(samples)
  )
  base = transformers.Wav2Vec2ForCTC.from_pretrained(folder)
  torch.manual_seed(1)
  config = peft.LoraConfig(
    r=3,
    target_modules=["q_proj", "out_proj", "output_dense"],
    init_lora_weights=False,
    modules_to_save=["lm_head"],
  )
  made = peft.get_peft_model(base, config).eval()
  made.save_pretrained(tmp_path / "theirs")
  adapters = exchange.load(tmp_path / "theirs", found.params, axes, table=found.table)
  assert len(adapters) == 2 * 3 + 2
  weights = lora_jax.attach(found.params, adapters)
  np.testing.assert_allclose(ours(found, samples, weights), theirs(made, samples), atol=1e-4)
  exchange.save(
    tmp_path / "ours",
    adapters,
    found.params,
    axes,
    base_model="tiny",
    table=found.table,
    task_type=None,
  )
  again = transformers.Wav2Vec2ForCTC.from_pretrained(folder)
  again = peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval()
  np.testing.assert_allclose(theirs(again, samples), ours(found, samples, weights), atol=1e-4)


def test_samples_are_standardized_as_transformers_does():
  samples = 3 + speech_models.samples()[0]
  extract = transformers.Wav2Vec2FeatureExtractor()
  expected = extract(samples, sampling_rate=16_000, return_tensors="np").input_values[0]
  found = standardized.features(samples, 5000)
  np.testing.assert_allclose(found[:4000], expected, atol=1e-5)
  assert not found[4000:].any()
  with pytest.raises(ValueError, match=r"a clip of 4,000 samples does not fit a window of 3,000"):
    standardized.features(samples, 3000)


def test_what_is_not_computed_is_refused_by_name(loaded):
  fields = json.loads(loaded(speech_models.WAV2VEC2S[0])[1].config.to_json_string(use_diff=False))
  cases = [
    ({"hidden_act": "relu"}, "hidden_act='relu' is not supported, only gelu"),
    ({"add_adapter": True}, "add_adapter=True is not supported, only False"),
    ({"feat_extract_norm": "none"}, "feat_extract_norm='none' is not supported"),
    ({"conv_dim": [16]}, "1 channels, 3 windows and 3 strides"),
    ({"conv_stride": [1, "2", 3]}, "conv_strides must be a positive integer"),
    ({"num_conv_pos_embedding_groups": 5}, "width 32 is no multiple of position_groups 5"),
    ({"conv_stride": [1000, 1000, 1000]}, "over the limit of 1,048,576"),
    ({"num_hidden_layers": 200}, "num_layers 200 is over the limit of 128 for layers that are not"),
    ({"rotary": True}, "'rotary'=True is not known"),
  ]
  for changes, words in cases:
    with pytest.raises(ValueError, match=words):
      families.parse_config(fields | changes)
  found = loaded(speech_models.WAV2VEC2S[0])[2]
  with pytest.raises(ValueError, match="5 samples are too few for a frame"):
    ours(found, np.zeros((1, 5), np.float32))
