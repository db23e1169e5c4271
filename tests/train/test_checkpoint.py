import gc
import json
import logging
import os
import pathlib
import re
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from lora_jax.train import checkpoint
from lora_jax.train.checkpoint import Checkpoints, DamagedCheckpointError
from lora_jax.train.step import State, init_state
from lora_jax.tree import flatten


def open_checkpoints(folder, keep=2, fingerprint="abc"):
  return Checkpoints(folder, keep=keep, fingerprint=fingerprint)


def trained(steps):
  """The state after some steps, and the state it came from for a template."""
  state, frozen, train_step = tiny_run.make_run()
  like = jax.eval_shape(lambda: state)
  batches = tiny_run.CountingBatches(0)
  for _ in range(steps):
    state, _ = train_step(state, frozen, next(batches))
  return state, like


def save_steps(folder, steps):
  """Saves random states, {step: the state}."""
  states = {}
  with open_checkpoints(folder) as checkpoints:
    for step in steps:
      noise = {"a": jax.random.normal(jax.random.key(step), (64, 8))}
      states[step] = State(jnp.int32(step), noise, {"mu": noise["a"] * 2})
      checkpoints.save(states[step], {"position": step})
  return states


def assert_same_bits(left, right):
  left, right = flatten(left), flatten(right)
  assert left.keys() == right.keys()
  for path in left:
    assert left[path].dtype == right[path].dtype, path
    assert np.asarray(left[path]).tobytes() == np.asarray(right[path]).tobytes(), path


def largest_file(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path):
  state, like = trained(steps=3)
  with open_checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, {"position": 7, "nested": {"epoch": [1, 2]}})
  with open_checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(like)
  assert_same_bits(restored.state, state)
  assert type(restored.state.opt_state) is type(state.opt_state)
  assert restored.data_state == {"position": 7, "nested": {"epoch": [1, 2]}}


def test_bfloat16_and_values_that_are_not_finite_keep_their_bits(tmp_path):
  values = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-40, 3.1415926])
  state = State(jnp.int32(1), {"half": values.astype(jnp.bfloat16), "full": values}, ())
  with open_checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, {})
    checkpoints.wait()
    assert_same_bits(checkpoints.restore(state).state, state)


def test_a_state_that_is_saved_may_be_donated_at_once(tmp_path):
  state = State(jnp.int32(1), {"w": jnp.arange(1_000_000.0)}, ())
  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  with open_checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, {})
    like = jax.eval_shape(lambda: state)
    overwrite(state)
    checkpoints.wait()
    restored = checkpoints.restore(like)
  np.testing.assert_array_equal(restored.state.trainable["w"], np.arange(1_000_000.0))


def test_a_save_returns_before_the_checkpoint_is_written(tmp_path, monkeypatch):
  state, like = trained(steps=1)
  go_on, rename = threading.Event(), os.rename

  def held_up(*paths, **options):
    assert go_on.wait(timeout=60), "nothing else runs while it is written"
    return rename(*paths, **options)

  monkeypatch.setattr(os, "rename", held_up)  # by which Orbax makes a checkpoint of its files
  with open_checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, {})
    assert not checkpoints.path(1).exists()
    go_on.set()
    checkpoints.wait()
    assert_same_bits(checkpoints.restore(like).state, state)


def test_a_checkpoint_is_as_large_as_what_trains_and_its_two_moments(tmp_path):
  trainable = {
    f"block_{i}": {"w": None, "a": jax.random.normal(jax.random.key(i), (512, 8))} for i in range(8)
  }
  state = init_state(trainable, tiny_run.make_optimizer())
  noise = jax.tree.map(
    lambda x: x + jax.random.normal(jax.random.key(9), x.shape, x.dtype) if x.ndim else x, state
  )
  with open_checkpoints(tmp_path) as checkpoints:
    checkpoints.save(noise, {})
  size = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
  arrays = 3 * 4 * 8 * 512 * 8
  assert 0.8 * arrays < size < arrays + 40_000


def test_only_the_latest_are_kept(tmp_path):
  save_steps(tmp_path, [1, 2, 3, 4])
  assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]


def test_there_is_nothing_to_restore_before_the_first_save(tmp_path):
  with open_checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(State(jnp.int32(0), {}, ())) is None
    assert checkpoints.latest() is None


def test_a_save_that_was_cut_off_is_no_checkpoint(tmp_path):
  states = save_steps(tmp_path, [1])
  unfinished = tmp_path / "2.orbax-checkpoint-tmp"
  unfinished.mkdir()
  (unfinished / "state").write_text("half")
  with open_checkpoints(tmp_path) as checkpoints:
    assert_same_bits(checkpoints.restore(states[1]).state, states[1])
  assert not unfinished.exists()


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
  path.write_bytes(b"")


def flip_a_bit(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(bytes(content))


def change_the_position(path):
  """Damage that is valid JSON: the data would go on from another batch."""
  content = path.read_text()
  assert content.count('"position": 2') == 1
  path.write_text(content.replace('"position": 2', '"position": 3'))


# Orbax leaves a coroutine behind that fails when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("harm", [truncate, flip_a_bit, pathlib.Path.unlink])
@pytest.mark.parametrize("where", ["arrays", "record"])
def test_a_damaged_checkpoint_is_named_and_passed_over_for_the_one_before(
  tmp_path, caplog, harm, where
):
  states = save_steps(tmp_path, [1, 2])
  damaged = tmp_path / "2"
  harm(largest_file(damaged / "state") if where == "arrays" else damaged / "record" / "metadata")
  with caplog.at_level(logging.WARNING), open_checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(states[1])
    gc.collect()
    assert_same_bits(restored.state, states[1])
    assert restored.data_state == {"position": 1}
    assert f"{damaged}: " in caplog.text
    assert "passed over for the one before it" in caplog.text
    # Nothing is lost, and the step can be saved again.
    assert (tmp_path / "damaged-2").is_dir()
    checkpoints.save(states[2], {"position": 2})
  with open_checkpoints(tmp_path) as checkpoints:
    assert_same_bits(checkpoints.restore(states[2]).state, states[2])


def test_a_record_that_is_not_the_one_that_was_saved_is_damage_though_it_can_be_read(
  tmp_path, caplog
):
  states = save_steps(tmp_path, [1, 2])
  change_the_position(tmp_path / "2" / "record" / "metadata")
  with open_checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(states[1]).data_state == {"position": 1}
  assert "its record is not what was saved" in caplog.text


@pytest.mark.parametrize("item", ["state", "record", "."])
def test_a_checkpoint_that_lacks_a_whole_folder_is_passed_over(tmp_path, caplog, item):
  states = save_steps(tmp_path, [1, 2])
  shutil.rmtree(tmp_path / "2" / item)
  (tmp_path / "2").mkdir(exist_ok=True)
  with open_checkpoints(tmp_path) as checkpoints:
    assert_same_bits(checkpoints.restore(states[1]).state, states[1])
  assert f"{tmp_path / '2'}: " in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("harm", [truncate, empty, flip_a_bit, pathlib.Path.unlink])
def test_whatever_file_is_harmed_what_is_restored_was_saved_or_is_named_and_passed_over(
  tmp_path, caplog, harm
):
  """Orbax writes files that it can do without; harm to those costs nothing."""
  states = save_steps(tmp_path / "whole", [1, 2])
  files = [p for p in (tmp_path / "whole" / "2").rglob("*") if p.stat().st_size and p.is_file()]
  passed_over = set()
  for number, file in enumerate(files):
    folder = tmp_path / str(number)
    shutil.copytree(tmp_path / "whole", folder)
    harm(folder / file.relative_to(tmp_path / "whole"))
    caplog.clear()
    with open_checkpoints(folder) as checkpoints:
      restored = checkpoints.restore(states[1])
    step = int(restored.state.step)
    assert_same_bits(restored.state, states[step])
    assert restored.data_state == {"position": step}
    assert (f"{folder / '2'}: " in caplog.text) == (step == 1) == (folder / "damaged-2").exists()
    if step == 1:
      passed_over.add(file)
  assert largest_file(tmp_path / "whole" / "2" / "state") in passed_over
  assert tmp_path / "whole" / "2" / "record" / "metadata" in passed_over


def test_a_flipped_bit_names_the_array_it_is_in(tmp_path, caplog):
  states = save_steps(tmp_path, [1, 2])
  flip_a_bit(largest_file(tmp_path / "2" / "state"))
  with open_checkpoints(tmp_path) as checkpoints:
    checkpoints.restore(states[1])
  assert "trainable/a" in caplog.text or "opt_state/mu" in caplog.text


def test_when_no_checkpoint_can_be_read_all_stay_where_they_are(tmp_path):
  states = save_steps(tmp_path, [1, 2])
  for step in (1, 2):
    truncate(tmp_path / str(step) / "record" / "metadata")
  with (
    open_checkpoints(tmp_path) as checkpoints,
    pytest.raises(
      DamagedCheckpointError, match=r"(?s)no checkpoint can be read.*/2: .*/1: .*afresh"
    ),
  ):
    checkpoints.restore(states[1])
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
  "trainable, words",
  [
    ({"a": jnp.zeros((32, 8))}, r"trainable/a: float32\[64, 8\] in the .*, float32\[32, 8\] here"),
    ({"a": jnp.zeros((64, 8), jnp.bfloat16)}, r"float32\[64, 8\] in .* bfloat16\[64, 8\] here"),
    ({"b": jnp.zeros((64, 8))}, r"(?s)a: only in the checkpoint.*b: not in the checkpoint"),
  ],
)
def test_a_checkpoint_of_another_structure_is_refused_and_kept(tmp_path, trainable, words):
  states = save_steps(tmp_path, [1, 2])
  with (
    open_checkpoints(tmp_path) as checkpoints,
    pytest.raises(ValueError, match=words) as error,
  ):
    checkpoints.restore(states[2]._replace(trainable=trainable))
  assert f"{tmp_path / '2'}: the checkpoint does not fit" in str(error.value)
  assert not isinstance(error.value, DamagedCheckpointError)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
  states = save_steps(tmp_path, [1])
  with (
    open_checkpoints(tmp_path, fingerprint="xyz") as checkpoints,
    pytest.raises(ValueError, match=r"made with another config \(abc, now xyz\)"),
  ):
    checkpoints.restore(states[1])


def test_to_keep_no_checkpoint_is_refused(tmp_path):
  with pytest.raises(ValueError, match="at least one checkpoint must stay"):
    open_checkpoints(tmp_path, keep=0)


def restored_step(folder, like):
  """The step that is restored, or the words of the refusal."""
  with open_checkpoints(folder) as checkpoints:
    try:
      found = checkpoints.restore(like)
      step = found and int(found.state.step)
      if step is not None:  # the run can go on from there, and save
        checkpoints.save(found.state._replace(step=jnp.int32(9)), {})
        checkpoints.wait()
    except ValueError as error:
      return str(error)
  return step


@pytest.mark.parametrize("name", ["2", "4", "7"])
def test_an_older_checkpoint_under_a_higher_number_is_named_and_set_aside(tmp_path, caplog, name):
  """Or the next save of that step would find it taken, at each start anew."""
  like = save_steps(tmp_path, [1, 3])[3]
  shutil.copytree(tmp_path / "1", tmp_path / name)
  assert restored_step(tmp_path, like) == 3
  if int(name) > 3:
    assert f"{tmp_path / name}: is the checkpoint of step 1 under another name" in caplog.text
    assert (tmp_path / f"damaged-{name}").is_dir()


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    ("data_state", 3, "data_state is 3"),
    ("data_state", None, "data_state is None"),
    ("fingerprint", 7, "fingerprint is 7"),
    ("arrays", [], r"arrays is \[\]"),
    ("arrays", {"step": 3}, "step is 3"),
    ("arrays", {"step": {"shape": "x", "dtype": "int32", "crc32": 1}}, "step is {"),
    ("arrays", {"step": {"shape": [], "dtype": "int32"}}, "step is {"),
  ],
)
def test_a_record_with_a_right_checksum_and_wrong_fields_is_passed_over(
  tmp_path, caplog, field, value, words
):
  like = save_steps(tmp_path, [1, 2])[2]
  path = tmp_path / "2" / "record" / "metadata"
  record = json.loads(path.read_text()) | {field: value}
  record["crc32"] = checkpoint._crc32_of_record(record)
  path.write_text(json.dumps(record))
  assert restored_step(tmp_path, like) == 1
  assert f"{tmp_path / '2'}: its record is not that of a checkpoint, " in caplog.text
  assert re.search(words, caplog.text)


@pytest.mark.parametrize("name", ["5", "5.orbax-checkpoint-tmp", "99999999999999999999", "x"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_checkpoint_is_in_nobodys_way(tmp_path, name, kind):
  like = save_steps(tmp_path, [1, 2])[2]
  path = tmp_path / name
  path.mkdir() if kind == "folder" else path.write_text("mine")
  assert restored_step(tmp_path, like) == 2
