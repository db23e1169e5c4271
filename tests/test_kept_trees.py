"""Trees of adapters and Weights as users keep them: saved, exported, stacked, copied, averaged."""

import copy
import subprocess
import sys

import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from functions import normal
from tolerances import assert_close

import lora_jax
from lora_jax import LoRA, adapt, is_weight
from lora_jax.weights.quantized import NF4, Format, quantized

PARAMS = {
  "block_0": {"kernel": normal(12, 12), "bias": normal(12)},
  "block_1": {"kernel": normal(24, 12)[12:], "bias": normal(12)},
}
X = normal(3, 12)
SPECS = {
  "LoRA": LoRA(rank=2, alpha=4.0),
  "LoRA-FA": LoRA(rank=2, alpha=4.0, train_a=False),
  "DoRA": lora_jax.DoRA(rank=2, alpha=4.0),
  "VeRA": lora_jax.VeRA(rank=2),
  "PiSSA": lora_jax.PiSSA(rank=2, alpha=4.0, iterations=1),
  "LoKr": lora_jax.LoKr(rank=2, alpha=4.0),
  "Full": lora_jax.Full(),
}


def model(params, x):
  for name in ("block_0", "block_1"):
    x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
  return x


def specs_of(name):
  return lora_jax.match(PARAMS, [("all-linear", SPECS[name])])


def trained(name, seed=0, params=PARAMS):
  adapters = lora_jax.init(jax.random.key(seed), params, specs_of(name))
  return jax.tree.map(lambda x: x + 0.1 * normal(*x.shape), adapters)


def result(adapters):
  return adapt(model)(lora_jax.attach(PARAMS, adapters), X)


def assert_same(tree, other):
  assert jax.tree.structure(tree) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_an_adapter_is_saved_and_loaded_in_three_lines(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  # Of the README. What does not train is saved as well, so any key will do for the new adapters.
  code = """
pathlib.Path("adapter.msgpack").write_bytes(serialization.to_bytes(adapters))
like = lora_jax.init(jax.random.key(0), params, specs)
adapters = serialization.from_bytes(like, pathlib.Path("adapter.msgpack").read_bytes())
"""
  for name in SPECS:
    adapters = trained(name, seed=1)
    scope = {"adapters": adapters, "params": PARAMS, "specs": specs_of(name)}
    exec("import jax, lora_jax, pathlib\nfrom flax import serialization\n" + code, scope)
    assert_same(scope["adapters"], adapters)


def test_flax_saves_weights_and_the_state_of_an_optimizer():
  adapters = trained("DoRA", seed=1)
  weights, other = (lora_jax.attach(PARAMS, each) for each in (adapters, trained("DoRA", seed=3)))
  assert_same(flax.serialization.from_bytes(other, flax.serialization.to_bytes(weights)), weights)
  codes = jax.tree.map(
    lambda x: quantized(x, Format(levels="nf4", block=4, double=True), (-2,)) if x.ndim > 1 else x,
    PARAMS,
  )
  nested = lora_jax.attach(codes, trained("LoRA"))
  state = flax.serialization.to_state_dict(nested)
  assert set(state["block_0"]["kernel"]["w"]) == {"codes", "scale"}
  assert_same(flax.serialization.from_state_dict(nested, state), nested)
  run = TrainState.create(apply_fn=None, params=adapters, tx=optax.adamw(0.1))
  moved = run.apply_gradients(grads=jax.tree.map(jnp.ones_like, adapters))
  assert_same(flax.serialization.from_bytes(run, flax.serialization.to_bytes(moved)), moved)


def test_flax_restores_into_shapes_and_refuses_another_adapter():
  adapters = trained("LoRA", seed=1)
  data = flax.serialization.to_bytes(adapters)
  like = jax.eval_shape(lambda: lora_jax.init(jax.random.key(0), PARAMS, specs_of("LoRA")))
  assert_same(flax.serialization.from_bytes(like, data), adapters)
  with pytest.raises(ValueError, match=r"saved parts are a, b, and those .* a, b, magnitude, norm"):
    flax.serialization.from_bytes(trained("DoRA"), data)
  larger = lora_jax.init(
    jax.random.key(0), PARAMS, dict.fromkeys(adapters, LoRA(rank=3, alpha=1.0))
  )
  with pytest.raises(ValueError, match=r"a was saved with the shape \(12, 2\).*\(12, 3\)"):
    flax.serialization.from_bytes(larger, data)


def test_flax_imported_after_lora_jax_serializes_what_is_made_from_then_on():
  code = (
    "import jax.numpy as jnp, lora_jax; from flax import serialization;"
    "w = lora_jax.LowRank(jnp.ones((3, 3)), jnp.ones((3, 1)), jnp.ones((1, 3)));"
    "print(len(serialization.to_bytes({'w': w})) > 0)"
  )
  printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert printed.stdout.strip() == "True"


@pytest.mark.parametrize("name", ["LoRA-FA", "DoRA"])
def test_a_function_of_weights_or_adapters_is_exported_and_serialized(name):
  pytest.importorskip("flatbuffers", reason="flatbuffers, which jax.export writes by, is missing")
  adapters = trained(name)
  for f, tree in (
    (adapt(model), lora_jax.attach(PARAMS, adapters)),
    (lambda adapters, x: adapt(model)(lora_jax.attach(PARAMS, adapters), x), adapters),
  ):
    data = jax.export.export(jax.jit(f))(tree, X).serialize()
    again = jax.export.deserialize(data)
    assert again.in_tree == jax.tree.structure(((tree, X), {}))
    assert_close(again.call(tree, X), result(adapters), "float32")


def test_a_quantized_weight_s_static_fields_survive_the_export():
  pytest.importorskip("flatbuffers", reason="flatbuffers, which jax.export writes by, is missing")
  weights = {"w": quantized(normal(128, 4), NF4, (-2,))}
  exported = jax.export.export(jax.jit(adapt(lambda p, x: x @ p["w"])))(weights, normal(3, 128))
  again = jax.export.deserialize(exported.serialize())
  assert again.in_tree == jax.tree.structure(((weights, X), {}))


@pytest.mark.parametrize("name", SPECS)
def test_orbax_restores_unsealed_adapters_and_weights_into_shapes(name, tmp_path):
  adapters, spec = trained(name, seed=1), specs_of(name)
  weights = lora_jax.attach(PARAMS, adapters)

  def like():
    return lora_jax.init(jax.random.key(0), PARAMS, spec)

  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "adapters", lora_jax.unseal(adapters))
    checkpointer.save(tmp_path / "weights", weights)
    checkpointer.wait_until_finished()
    shapes = jax.eval_shape(lambda: lora_jax.unseal(like()))
    restored = lora_jax.seal(checkpointer.restore(tmp_path / "adapters", shapes))
    shapes = jax.eval_shape(lambda: lora_jax.attach(PARAMS, like()))
    assert_same(checkpointer.restore(tmp_path / "weights", shapes), weights)
  assert_same(restored, adapters)


def test_orbax_refuses_sealed_adapters_and_says_what_to_save(tmp_path):
  checkpointer = ocp.Checkpointer(ocp.StandardCheckpointHandler())
  with pytest.raises(ValueError, match=r"sealed parts.* save lora_jax.unseal\(adapters\)"):
    checkpointer.save(tmp_path / "adapters", args=ocp.args.StandardSave(trained("LoRA-FA")))


@pytest.mark.parametrize("name", SPECS)
def test_attached_layers_are_stacked_by_tree_map_and_scanned(name):
  adapters = trained(name)
  weights = lora_jax.attach(PARAMS, adapters)
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), weights["block_0"], weights["block_1"])
  assert is_weight(stacked["kernel"]) and stacked["kernel"].shape == (2, 12, 12)

  def scanned(stacked, x):
    def layer(x, p):
      return jnp.tanh(x @ p["kernel"] + p["bias"]), None

    return jax.lax.scan(layer, x, stacked)[0]

  assert_close(adapt(scanned)(stacked, X), result(adapters), "float32")


def test_a_function_compiled_for_one_layer_takes_the_weight_of_another():
  weights = lora_jax.attach(PARAMS, trained("LoRA"))
  f = jax.jit(adapt(lambda p, x: x @ p["kernel"]))
  for name in PARAMS:
    layer = {"kernel": weights[name]["kernel"]}
    assert layer["kernel"].path == f"{name}/kernel"
    assert_close(f(layer, X), X @ lora_jax.materialize(layer)["kernel"], "float32")
  assert f._cache_size() == 1


def test_copies_averages_and_zeros_of_adapters():
  adapters = trained("DoRA")
  assert_same(copy.deepcopy(adapters), adapters)
  zeros = jax.tree.map(jnp.zeros_like, adapters)
  np.testing.assert_array_equal(zeros["block_0/kernel"].norm, adapters["block_0/kernel"].norm)
  assert_same(jax.tree.map(jnp.add, zeros, adapters), adapters)
  assert_same(jax.device_put(adapters, jax.devices()[0]), adapters)
  tx = optax.chain(optax.ema(0.9), optax.apply_if_finite(optax.adamw(0.1), 3))
  state = tx.init(adapters)
  updates, state = tx.update(adapters, state, adapters)
  moved = optax.apply_updates(adapters, updates)
  assert jax.tree.structure(moved) == jax.tree.structure(adapters)
  assert not np.allclose(result(moved), result(adapters))
