"""Beam search against all texts there are, against a plain twin, and against transformers."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import torch, transformers

import lora_jax
from lora_jax import tree
from lora_jax.io import assets, names, pretrained
from lora_jax.models import decode, layers, llama

CONFIG = llama.LlamaConfig(
  vocab_size=31,
  width=16,
  mlp_width=24,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  max_length=32,
  scan_layers=True,
)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6]]
EOS = 10  # in this model some texts end with it and others do not


@functools.cache
def make_params(config):
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = jax.jit(llama.Llama(config).init)(jax.random.key(1), tokens)["params"]
  return jax.tree.map(lambda x: 2 * x, params)  # so that logits differ clearly


@pytest.fixture(scope="module")
def params():
  return make_params(CONFIG)


@functools.cache
def jitted(config, penalty, adapted, **options):
  """Beam search compiled once for all strengths of a penalty."""
  apply = llama.Llama(config).apply
  if adapted:
    apply = lora_jax.adapt(apply)

  def f(alpha, params, tokens, lengths, cache):
    return decode.beam_search(
      apply, params, tokens, lengths, penalty=penalty(alpha), cache=cache, **options
    )

  return jax.jit(f)


def search(
  params,
  prompts,
  *,
  config=CONFIG,
  adapted=False,
  steps=8,
  beams=3,
  penalty=decode.power,
  alpha=1.0,
  eos_id=EOS,
  cached=True,
  exact=True,
):
  """Beam search; returns numpy arrays."""
  tokens, lengths = decode.pad_prompts(prompts, pad_id=0)
  cache = None
  if cached:
    cache = llama.init_cache(config, len(prompts), tokens.shape[1] + steps)
  options = {"steps": steps, "beams": beams, "eos_id": eos_id, "exact": exact}
  f = jitted(config, penalty, adapted, **options)
  return jax.tree.map(np.asarray, f(alpha, params, tokens, lengths, cache))


def log_probabilities(forward, text):
  """float64 log-probabilities of the token after a text."""
  logits = np.asarray(forward(text), np.float64)
  logits -= logits.max()
  return logits - np.log(np.exp(logits).sum())


def plain_search(forward, prompt, steps, beams, penalty, eos_id):
  """The slow twin: lists, one text at a time, and no stop before S tokens."""
  running, found = [((), 0.0)], []
  for step in range(steps):
    candidates = [
      ((*new, token), total + log_p)
      for new, total in running
      for token, log_p in enumerate(log_probabilities(forward, [*prompt, *new]))
    ]
    candidates.sort(key=lambda candidate: -candidate[1])
    ends = [new[-1] == eos_id or step + 1 == steps for new, _ in candidates]
    for (new, total), end in list(zip(candidates, ends, strict=True))[:beams]:
      if end:
        found.append((new, float(total / penalty(step + 1))))
    running = [text for text, end in zip(candidates, ends, strict=True) if not end][:beams]
  return sorted(found, key=lambda text: -text[1])[:beams]


def assert_found(result, row, expected, eos_id):
  """The texts of one prompt, filled up with EOS, and their scores."""
  steps = result.tokens_BKS.shape[-1]
  texts = [list(new) + [eos_id] * (steps - len(new)) for new, _ in expected]
  assert result.tokens_BKS[row, : len(texts)].tolist() == texts
  np.testing.assert_allclose(
    result.scores_BK[row], [score for _, score in expected], rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize(
  ("penalty", "alpha"),
  [
    (decode.power, 1.0),
    (decode.gnmt, 0.6),
    pytest.param(decode.power, 0.0, marks=pytest.mark.slow),
    pytest.param(decode.power, -1.0, marks=pytest.mark.slow),
  ],
)
def test_a_beam_as_wide_as_all_texts_finds_them_all_in_the_order_of_their_scores(penalty, alpha):
  vocab_size, steps, eos_id = 3, 3, 2
  config = llama.LlamaConfig(
    vocab_size=vocab_size,
    width=16,
    mlp_width=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_length=8,
  )
  params, prompt = make_params(config), [1, 0]
  complete = [
    new
    for length in range(1, steps + 1)
    for new in itertools.product(range(vocab_size), repeat=length)
    if eos_id not in new[:-1] and (new[-1] == eos_id or length == steps)
  ]
  texts = jnp.array([[*prompt, *new, *[0] * (steps - len(new))] for new in complete])
  logits = np.asarray(jax.jit(llama.Llama(config).apply)({"params": params}, texts), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  scored = []
  for row, new in enumerate(complete):
    total = sum(log_p[row, len(prompt) - 1 + i, token] for i, token in enumerate(new))
    scored.append((new, total / float(penalty(alpha)(len(new)))))
  scored.sort(key=lambda text: -text[1])

  beams = vocab_size**steps
  options = {"steps": steps, "beams": beams, "eos_id": eos_id, "config": config}
  result = search(params, [prompt], penalty=penalty, alpha=alpha, **options)
  assert len(scored) == 1 + 2 + 4 * 3
  assert np.all(result.scores_BK[0, len(scored) :] == -np.inf)
  result = decode.Beams(result.tokens_BKS, result.scores_BK[:, : len(scored)])
  assert_found(result, 0, scored, eos_id)


@pytest.fixture(scope="module")
def forward(params):
  """Logits after a text, one text at a time."""
  apply = jax.jit(lambda text, at: llama.Llama(CONFIG).apply({"params": params}, text)[0, at])
  return lambda text: apply(jnp.array([text + [0] * (16 - len(text))]), len(text) - 1)


@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("alpha", "eos_id"), [(0.0, EOS), (2.0, EOS), (1.0, None)])
def test_prompts_of_different_length_together_are_the_plain_twin_of_each(
  params, forward, alpha, eos_id, cached
):
  result = search(params, PROMPTS, alpha=alpha, eos_id=eos_id, cached=cached)
  ended = 0
  for row, prompt in enumerate(PROMPTS):
    expected = plain_search(forward, prompt, 8, 3, decode.power(alpha), eos_id)
    assert_found(result, row, expected, eos_id)
    ended += sum(new[-1] == eos_id for new, _ in expected)
  assert (ended > 0) == (eos_id is not None)


def test_one_beam_is_greedy(params):
  tokens, lengths = decode.pad_prompts(PROMPTS, pad_id=0)
  greedy = functools.partial(
    decode.decode,
    llama.Llama(CONFIG).apply,
    steps=8,
    choose=decode.greedy,
    key=jax.random.key(0),
    eos_id=EOS,
    cache=None,
  )
  greedy = jax.jit(greedy)(params, tokens, lengths)
  np.testing.assert_array_equal(search(params, PROMPTS, beams=1).tokens_BKS[:, 0], greedy)


def test_adapted_weights_give_the_texts_of_merged_ones(params):
  specs = lora_jax.match(params, [(".*mlp/.*kernel", lora_jax.LoRA(rank=2, alpha=4.0))])
  axes = lora_jax.trace_axes(
    lambda p, t: llama.Llama(CONFIG).apply({"params": p}, t), params, jnp.zeros((1, 2), jnp.int32)
  )
  fresh = jax.jit(lambda key: lora_jax.init(key, params, specs, axes))(jax.random.key(0))
  adapters = jax.tree.map(lambda x: x + 0.2, fresh)
  adapted = search(lora_jax.attach(params, adapters), PROMPTS, adapted=True)
  merged = search(jax.jit(lora_jax.merge)(params, adapters), PROMPTS)
  np.testing.assert_array_equal(adapted.tokens_BKS, merged.tokens_BKS)
  assert (adapted.tokens_BKS != search(params, PROMPTS).tokens_BKS).any()


def peer_search(peer, prompts, *, steps, beams, alpha, eos_id, exact):
  """The same by transformers: `(tokens_BKS, scores_BK)`, prompts padded on the left."""
  width = max(map(len, prompts))
  tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
  mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
  with torch.no_grad():
    out = peer.generate(
      tokens,
      attention_mask=mask,
      max_new_tokens=steps,
      num_beams=beams,
      num_return_sequences=beams,
      do_sample=False,
      length_penalty=alpha,
      early_stopping="never" if exact else False,
      eos_token_id=np.ravel(eos_id).tolist(),
      pad_token_id=np.ravel(eos_id)[0].item(),
      return_dict_in_generate=True,
      output_scores=True,
    )
  new = np.full((len(tokens) * beams, steps), np.ravel(eos_id)[0])
  found = out.sequences[:, width:].numpy()
  new[:, : found.shape[1]] = found
  return new.reshape(len(prompts), beams, steps), out.sequences_scores.reshape(-1, beams).numpy()


@pytest.fixture(scope="module")
def tiny_peer(params):
  """The same random model in transformers."""
  config = transformers.LlamaConfig(
    vocab_size=CONFIG.vocab_size,
    hidden_size=CONFIG.width,
    intermediate_size=CONFIG.mlp_width,
    num_hidden_layers=CONFIG.num_layers,
    num_attention_heads=CONFIG.num_heads,
    num_key_value_heads=CONFIG.num_kv_heads,
    head_dim=CONFIG.head_dim,
    rms_norm_eps=CONFIG.norm_eps,
    rope_theta=CONFIG.rope_theta,
    tie_word_embeddings=False,
  )
  leaves = tree.flatten(layers.unstack_layers(params))
  tensors = {
    name: torch.tensor(np.asarray(leaves[path].T if path.endswith("/kernel") else leaves[path]))
    for path, name in names.file_names(leaves, names.LLAMA_HF).items()
  }
  peer = transformers.LlamaForCausalLM(config).eval()
  peer.load_state_dict(tensors)
  return peer


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("beams", "alpha"), [(3, 1.0), (4, 0.0), (4, 1.5)])
def test_transformers_finds_the_same_texts_with_the_same_scores(
  params, tiny_peer, beams, alpha, exact
):
  options = {"steps": 8, "beams": beams, "eos_id": EOS, "exact": exact}
  tokens, scores = peer_search(tiny_peer, PROMPTS, alpha=alpha, **options)
  ours = search(params, PROMPTS, alpha=alpha, **options)
  np.testing.assert_array_equal(ours.tokens_BKS, tokens)
  np.testing.assert_allclose(ours.scores_BK, scores, rtol=1e-4, atol=1e-5)


def test_a_text_ends_at_each_of_several_tokens_as_in_transformers(params, tiny_peer):
  """With three ends of 31 tokens, so that more than twice as many candidates as beams end."""
  ends = (EOS, 3, 5)
  options = {"steps": 6, "beams": 3, "eos_id": ends, "exact": False}
  tokens, scores = peer_search(tiny_peer, PROMPTS, alpha=1.0, **options)
  ours = search(params, PROMPTS, alpha=1.0, **options)
  np.testing.assert_array_equal(ours.tokens_BKS, tokens)
  np.testing.assert_allclose(ours.scores_BK, scores, rtol=1e-4, atol=1e-5)
  found = [next((x for x in text if x in ends), None) for text in tokens.reshape(-1, 6).tolist()]
  assert len(set(found) - {None}) > 1  # more than one of them is met


def test_the_penalties_are_their_formulas():
  lengths = np.array([1, 7, 40])
  np.testing.assert_allclose(decode.power(0.9)(lengths), lengths**0.9, rtol=1e-6)
  np.testing.assert_allclose(decode.gnmt(0.6)(lengths), (5 + lengths) ** 0.6 / 6**0.6, rtol=1e-6)


def test_no_beam_is_refused(params):
  with pytest.raises(ValueError, match="beams is 0"):
    search(params, PROMPTS, beams=0)


@pytest.mark.slow
@pytest.mark.parametrize(("beams", "alpha", "exact"), [(4, 1.0, False), (5, 0.9, True)])
def test_smollm2_writes_what_it_writes_in_transformers(smollm2, beams, alpha, exact):
  path = assets.resolve(pretrained.DEFAULT)
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  ).eval()
  texts = [
    "The capital of France is",
    "name[The Vaults], eatType[pub], priceRange[more than £30], near[Café Adriatic]\nText:",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
  ]
  prompts = [smollm2.tokenizer.encode(text) for text in texts]
  options = {"steps": 24, "beams": beams, "eos_id": smollm2.tokenizer.eos_id, "exact": exact}
  tokens, scores = peer_search(peer, prompts, alpha=alpha, **options)
  config = dataclasses.replace(smollm2.config, scan_layers=True)
  stacked = layers.stack_layers(smollm2.params)
  ours = search(stacked, prompts, config=config, alpha=alpha, **options)
  np.testing.assert_array_equal(ours.tokens_BKS, tokens)
  np.testing.assert_allclose(ours.scores_BK, scores, atol=1e-3)
