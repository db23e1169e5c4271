"""experiments.combine on two adapters of a tiny Llama, and its methods by PEFT's names."""

import jax
import jax.numpy as jnp
import pytest
from main_programs import imported, run
from tolerances import assert_close
from weight_table import factors

import lora_jax
from experiments import parts
from lora_jax import LowRank, exchange
from lora_jax.compose import combiners
from lora_jax.io import export, names
from lora_jax.models import llama

program = imported("experiments.combine")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, smollm2):
  """A folder with a tiny model and two adapters of it, with the params, the axes and both."""
  folder = tmp_path_factory.mktemp("combine")
  config = llama.LlamaConfig(
    vocab_size=smollm2.config.vocab_size,
    width=8,
    mlp_width=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_length=64,
    tie_embeddings=True,
  )
  params = jax.jit(llama.Llama(config).init)(jax.random.key(0), jnp.zeros((1, 2), int))["params"]
  export.save(folder / "model", params, config, smollm2.tokenizer)
  axes = parts.trace_axes(llama.Llama(config), params)
  leaves = lora_jax.tree.flatten(params)
  both = []
  for seed, pattern in ((1, r".*/(query|down)/kernel"), (2, r".*/(query|up)/kernel")):
    adapters = {}
    for path in lora_jax.match(params, [(pattern, lora_jax.LoRA(rank=2, alpha=4.0))], axes):
      a, b = factors(leaves[path].shape, "io", seed)
      adapters[path] = LowRank(None, a, b, 2.0)
    name = str(folder / "model")
    exchange.save(
      folder / f"adapter_{seed}", adapters, params, axes, base_model=name, table=names.LLAMA_HF
    )
    both.append(adapters)
  return folder, params, axes, both


@pytest.mark.parametrize(
  ("arguments", "method"),
  [
    (("--method=cat",), combiners.cat),
    pytest.param(
      ("--method=ties_svd", "--density=0.5", "--rank=3", "--elect=frequency"),
      combiners.on_delta(combiners.ties(0.5, combiners.by_frequency), rank=3),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_two_adapters_are_combined_into_a_folder_that_loads(tiny, tmp_path, arguments, method):
  folder, params, axes, both = tiny
  adapters = f"{folder / 'adapter_1'},{folder / 'adapter_2'}"
  output = tmp_path / "combined"
  printed = run(
    "combine", f"--adapters={adapters}", "--weights=0.7,-0.3", f"--output={output}", *arguments
  )
  assert f"combined 2 adapters of 6 kernels into {output}" in printed
  expected = lora_jax.combine(both, [0.7, -0.3], method)
  assert len(expected) == 6
  found = exchange.load(output, params, axes, table=names.LLAMA_HF)
  assert_close(lora_jax.merge(params, found), lora_jax.merge(params, expected))


def test_an_option_that_the_method_has_not_is_refused_before_anything_is_read():
  adapters = "--adapters=no/such/folder,nor/this"
  printed = run(
    "combine",
    adapters,
    "--weights=1,2",
    "--method=cat",
    "--density=0.5",
    "--output=out",
    fails=True,
  )
  assert "--density has no meaning for --method=cat" in printed


@pytest.mark.parametrize("name", program.METHODS)
def test_every_method_of_peft_s_makes_an_adapter(name):
  adapters = [{"w": LowRank(None, *factors((11, 13), "io", seed))} for seed in (1, 2)]
  options = {"density": 0.5} if name.removesuffix("_svd") in program.MIXES else {}
  method = program.make_combiner(name, 3 if name.endswith("svd") else None, **options)
  combined = lora_jax.combine(adapters, [1.0, 0.5], method, key=jax.random.key(0))
  assert combined["w"].rank == {"cat": 4}.get(name, 3 if name.endswith("svd") else 2)


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("cat", {"rank": 2}, "--rank has no meaning for --method=cat"),
    ("linear", {"density": 0.5}, "--density has no meaning for --method=linear"),
    ("ties", {"density": 0.5, "rank": 3}, "--rank has no meaning for --method=ties"),
    ("ties", {"density": 0.5, "seed": 1}, "--seed has no meaning for --method=ties"),
    ("dare_linear", {"density": 0.5, "elect": "total"}, "--elect has no meaning"),
    ("dare_ties_svd", {"rank": 3}, "--method=dare_ties_svd needs a --density"),
    ("ties", {"density": 1.5}, "density 1.5 is not in"),
  ],
)
def test_options_that_do_not_belong_to_a_method_are_refused(name, options, words):
  with pytest.raises(ValueError, match=words):
    program.make_combiner(name, **{"rank": None} | options)


def test_adapters_of_different_models_need_to_be_told_their_base(tiny, tmp_path):
  folder, params, axes, (adapters, _) = tiny
  exchange.save(
    tmp_path / "other", adapters, params, axes, base_model="somewhere/else", table=names.LLAMA_HF
  )
  one = str(folder / "adapter_1")
  assert program.common_base([one, one]) == str(folder / "model")
  with pytest.raises(ValueError, match=r"name no common model .*'somewhere/else'.*--base"):
    program.common_base([one, str(tmp_path / "other")])
