"""Rules and layouts on meshes without devices, and training on eight: `sharding_worker.py`."""

import dataclasses
import pathlib

import device_processes
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

import lora_jax
from lora_jax import families, sharding, tree
from lora_jax.hlo import collectives
from lora_jax.models import llama
from lora_jax.weights import Weight

WORKER = pathlib.Path(__file__).with_name("sharding_worker.py")
STATEMENTS = [
  "the_losses_over_all_three_axes_are_those_of_one_device",
  "the_losses_of_pmap_are_those_of_one_device",
  "data_parallel_training_moves_the_gradient_of_the_adapters_and_nothing_else",
  "on_no_mesh_is_anything_of_a_kernels_size_reduced",
  "over_tensor_no_kernel_is_gathered",
  "over_fsdp_kernels_are_gathered_for_use_over_that_axis_alone",
  "base_adapters_and_moments_lie_where_the_rules_say",
  "pieces_are_read_once_and_each_device_gets_its_own_part",
]
SLOW_STATEMENTS = [
  "the_losses_over_data_are_those_of_one_device",
  "the_losses_over_fsdp_are_those_of_one_device",
  "the_losses_over_four_devices_on_tensor_are_those_of_one_device",
  "the_losses_of_a_model_with_experts_are_those_of_one_device",
  "the_losses_of_a_relative_of_llama_are_those_of_one_device",
  "the_losses_with_fused_kernels_are_those_of_one_device",
  "the_losses_of_a_model_with_norms_over_all_heads_are_those_of_one_device",
  "the_losses_of_a_model_with_sinks_and_biased_experts_are_those_of_one_device",
  "the_losses_of_gpt_2_are_those_of_one_device",
  "the_losses_of_gemma_4_are_those_of_one_device",
  "the_losses_of_an_encoder_are_those_of_one_device",
  "the_losses_over_two_devices_on_tensor_are_those_of_one_device",
  "the_losses_of_layers_apart_and_a_head_of_its_own_are_those_of_one_device",
  "the_losses_on_a_quantised_base_are_those_of_one_device",
]


def on_eight_devices(statements):
  # The compiler's last passes would take half of the time, and the program is what is looked at.
  flags = "--xla_backend_optimization_level=0"
  return device_processes.run(WORKER, statements, devices=8, flags=flags)


@pytest.fixture(scope="module")
def done():
  return on_eight_devices(STATEMENTS)


@pytest.fixture(scope="module")
def slowly_done():
  return on_eight_devices(SLOW_STATEMENTS)


@pytest.mark.parametrize("statement", STATEMENTS)
def test_on_eight_devices(done, statement):
  assert statement in done.stdout.splitlines(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("statement", SLOW_STATEMENTS)
def test_on_eight_devices_slowly(slowly_done, statement):
  assert statement in slowly_done.stdout.splitlines(), slowly_done.stderr


# ---- layouts


def mesh(data=1, fsdp=2, tensor=4):
  return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def abstract(shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def specs_of(layout):
  return {path: s.spec for path, s in tree.flatten(layout.shardings).items()}


def low_rank(shape, roles="io"):
  inputs, outputs = shape[-2:]
  stack = shape[:-2]
  return lora_jax.LowRank(
    abstract(shape), abstract((*stack, inputs, 4)), abstract((*stack, 4, outputs)), roles=roles
  )


@pytest.mark.parametrize("stack", [(), (3,)])
def test_the_factors_of_a_kernel_are_cut_as_the_axes_that_they_share_with_it(stack):
  params = {
    "attn": {
      "query": {"kernel": low_rank((*stack, 16, 8))},
      "out": {"kernel": low_rank((*stack, 8, 16))},
    }
  }
  s = (None,) * len(stack)
  assert specs_of(sharding.lay_out(params, mesh(), families.DECODER_SHARDING)) == {
    "attn/query/kernel/w": jax.P(*s, "fsdp", "tensor"),
    "attn/query/kernel/a": jax.P(*s, "fsdp"),
    "attn/query/kernel/b": jax.P(*s, None, "tensor"),
    "attn/out/kernel/w": jax.P(*s, "tensor", "fsdp"),
    "attn/out/kernel/a": jax.P(*s, "tensor"),
    "attn/out/kernel/b": jax.P(*s, None, "fsdp"),
  }


def test_every_adapter_method_of_a_llama_can_be_laid_out():
  config = llama.LlamaConfig(
    vocab_size=24,
    width=16,
    mlp_width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    max_length=8,
    scan_layers=True,
  )
  params = jax.eval_shape(llama.Llama(config).init, jax.random.key(0), jnp.zeros((1, 2), int))[
    "params"
  ]
  for spec in (lora_jax.LoRA(rank=2, alpha=2.0), lora_jax.Full(), lora_jax.TokenRows(ids=(1, 2))):
    pattern = "embed/embedding"
    specs = lora_jax.match(params, [(pattern, spec)])
    adapters = jax.eval_shape(lambda p, s=specs: lora_jax.init(jax.random.key(0), p, s), params)
    layout = sharding.lay_out(lora_jax.attach(params, adapters), mesh(), families.DECODER_SHARDING)
    assert not any(p.why for p in layout.placements)


def test_a_size_that_does_not_divide_stays_whole_and_the_table_says_so():
  params = {"attn": {"key": {"kernel": low_rank((16, 6))}}, "norm": {"scale": abstract((16,))}}
  layout = sharding.lay_out(params, mesh(), families.DECODER_SHARDING)
  specs = specs_of(layout)
  assert specs["attn/key/kernel/w"] == jax.P("fsdp")
  assert specs["attn/key/kernel/b"] == jax.P()
  lines = str(layout).splitlines()
  (line,) = [line for line in lines if line.startswith("attn/key/kernel/w")]
  assert line.split() == [
    "attn/key/kernel/w", "1", "16×6", "float32", "fsdp", "0.00",
    "6", "does", "not", "divide", "over", "tensor,", "4", "devices",
  ]  # fmt: skip
  assert any(line.startswith("attn/key/kernel/b") and "6 does not divide" in line for line in lines)
  assert "mesh: data 1, fsdp 2, tensor 4; 0.0 MB a device" in lines
  assert lines[-1].startswith("rules that decided nothing: (.*/)?attn/out/kernel, ")


def test_the_table_counts_the_bytes_that_a_device_holds():
  params = {"a": {"mlp": {"up": {"kernel": abstract((2, 1000, 2000), jnp.bfloat16)}}}}
  layout = sharding.lay_out(params, mesh(), families.DECODER_SHARDING)
  assert "1.00" in str(layout).splitlines()[2].split()  # 2 · 1000 · 2000 · 2 bytes on 8 devices


def test_a_weight_that_does_not_say_how_it_is_sharded_stays_whole_and_the_table_says_so():
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass(frozen=True)
  class Silent(Weight):
    w: jax.Array

    def materialize(self):
      return self.w

  layout = sharding.lay_out(
    {"mlp": {"up": {"kernel": Silent(abstract((8, 8)))}}}, mesh(), families.DECODER_SHARDING
  )
  assert specs_of(layout) == {"mlp/up/kernel/w": jax.P()}
  assert "its kind does not say" in str(layout)


@pytest.mark.parametrize(
  ("rules", "words"),
  [
    ([("head", jax.P())], r'mlp/up/kernel: no rule .* end the rules with \("\.\*", jax\.P\(\)\)'),
    ([(".*", jax.P("model"))], "mlp/up/kernel.*over model, which the mesh does not have.*fsdp"),
    ([(".*", jax.P("data", None, None))], r"has 3 axes.*shape \(8, 8\) has 2"),
  ],
)
def test_rules_that_cannot_be_followed_are_refused(rules, words):
  with pytest.raises(ValueError, match=words):
    sharding.lay_out({"mlp": {"up": {"kernel": abstract((8, 8))}}}, mesh(), rules)


def test_what_an_optimiser_keeps_lies_where_its_parameter_lies():
  params = {"mlp": {"up": {"kernel": low_rank((16, 8))}}, "norm": {"kernel": abstract((16,))}}
  rules = [("norm/kernel", jax.P("fsdp")), *families.DECODER_SHARDING]
  layout = sharding.lay_out(params, mesh(), rules)
  mask = lora_jax.trainable_mask(params, also=["norm/kernel"])
  trainable, _ = lora_jax.partition(params, mask)
  labels = jax.tree.map(lambda x: "row" if x.ndim == 2 else "vector", trainable)
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.multi_transform({"row": optax.adamw(1e-3), "vector": optax.sgd(1e-3, 0.9)}, labels),
    optax.scale_by_factored_rms(min_dim_size_to_factor=1),
  )
  state = jax.eval_shape(tx.init, trainable)
  specs = {path: s.spec for path, s in tree.flatten(layout.follow(state)).items()}
  for name in ("mu", "nu"):
    (a,) = [specs[path] for path in specs if path.endswith(f"{name}/mlp/up/kernel/a")]
    (b,) = [specs[path] for path in specs if path.endswith(f"{name}/mlp/up/kernel/b")]
    assert (a, b) == (jax.P("fsdp"), jax.P(None, "tensor"))
  (trace,) = [specs[path] for path in specs if path.endswith("trace/norm/kernel")]
  assert trace == jax.P("fsdp")
  factored = [specs[path] for path in specs if "/v_row/" in path or path.endswith("count")]
  assert factored and set(factored) == {jax.P()}


# ---- the mesh and the rows


def test_the_mesh_takes_all_devices_or_says_why_not():
  devices = jax.device_count()
  assert sharding.make_mesh(data=-1, fsdp=1, tensor=1).shape == {
    "data": devices,
    "fsdp": 1,
    "tensor": 1,
  }
  with pytest.raises(ValueError, match=f"mesh data 7 x fsdp 11 x tensor 1 .* {devices} devices"):
    sharding.make_mesh(data=7, fsdp=11, tensor=1)
  with pytest.raises(ValueError, match="at least 1; one may be -1"):
    sharding.make_mesh(data=-1, fsdp=-1, tensor=1)
  with pytest.raises(ValueError, match="at least 1; one may be -1"):
    sharding.make_mesh(data=1, fsdp=0, tensor=1)
  with pytest.raises(ValueError, match="does not fit"):
    sharding.make_mesh(data=-1, fsdp=devices + 1, tensor=1)


def test_a_process_alone_reads_all_rows():
  alone = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  assert sharding.process_rows(alone, 16 * jax.device_count()) == (0, 1)


def test_the_text_of_a_program_is_read():
  text = """
%body.1 (p: f32[2]) -> f32[2] {
  %a.6 = (f32[4,64]{1,0}, /*index=5*/bf16[3]{0}) all-reduce(%x), metadata={op_name="jit(f)/dot"}
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %w = f32[2] while(%t), condition=%c, body=%body.1, meta={"known_trip_count":{"n":"3"}}
  %g = f32[8]{0} all-gather(%y), channel_id=1
}
"""
  reduced, gathered = collectives(text)
  assert reduced == ("all-reduce", ((4, 64), (3,)), 3 * (4 * 256 + 2 * 3), "jit(f)/dot")
  assert gathered == ("all-gather", ((8,),), 32, "")
