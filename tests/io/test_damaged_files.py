"""Damaged files of every kind that is read of a model or an adapter.

What is refused is refused by ValueError or FileNotFoundError, in bounded time and memory, with a
message that names the file and is not long. What is accepted is read as the whole file is, or as
another that nothing in it tells from a whole one: no more things than were changed are read
otherwise, each of a kind that its sample in `mutated_samples` lists, and every value is finite.
"""

import dataclasses
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import mutated_samples
import mutation_worker
import mutations
import numpy as np
import pytest

from lora_jax.data import records, templates
from lora_jax.io import pretrained, safetensors
from lora_jax.io.tokenizer import from_folder

HERE = Path(__file__).parent
CORPUS = HERE.parent / "corpus"
READERS = {"gguf8": "gguf q8", "sharded": "index"}
NAN = np.full(32, np.nan, np.float32)
GROUPS = {
  "gguf": ["gguf", "gguf q8", "gguf lora"],
  "folders": ["safetensors", "shards", "index", "config", "inspect", "mxfp4"],
  "words and compressed": ["tokenizer", "compressed", "encoder"],
  "adapters": [f"peft {name}" for name in mutated_samples.METHODS],
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
  return mutated_samples.write(tmp_path_factory.mktemp("samples"), ["peft lora"])


def run(folder, kinds, seed, count):
  """What the worker says of each kind; its end, if it ended otherwise."""
  root = HERE.parents[1]
  paths = os.pathsep.join(map(str, (root, HERE.parent, HERE)))
  result = subprocess.run(
    [sys.executable, HERE / "mutation_worker.py", folder, ",".join(kinds), str(seed), str(count)],
    env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  at = (folder / "current").read_text().splitlines()[-1:] if (folder / "current").exists() else []
  assert result.returncode == 0, f"ended at {at}: {result.stderr[-3000:]}"
  return [json.loads(line) for line in result.stdout.splitlines()]


def fail(message):
  raise ValueError(message)


def check(found, kinds, count):
  assert [each["kind"] for each in found] == kinds
  for each in found:
    assert not each["wrong"], "\n".join(each["wrong"][:10])
    assert each["refused"] + each["same"] + each["other"] == count
    assert count / 4 < each["refused"] < count, each


@pytest.mark.parametrize("group", GROUPS)
def test_damage_of_any_kind_is_refused_or_read_for_what_it_is(tmp_path, group):
  check(run(tmp_path, GROUPS[group], seed=0, count=25), GROUPS[group], count=25)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", [kind for kinds in GROUPS.values() for kind in kinds])
def test_damage_by_the_thousand_is_refused_or_read_for_what_it_is(tmp_path, kind):
  check(run(tmp_path, [kind], seed=1, count=3000), [kind], count=3000)


@pytest.mark.parametrize(
  ("observe", "words"),
  [
    (lambda whole, path: {}["x"], "KeyError: 'x'"),
    (lambda whole, path: fail(f"{path}: {'x' * 3000}"), "a message of 3"),
    (lambda whole, path: fail("no name"), "names no file"),
    (lambda whole, path: whole | {"config/width": 33}, "differs in .*config/width"),
    (lambda whole, path: whole | {"params/norm/scale": NAN}, "not finite"),
    (lambda whole, path: whole | dict.fromkeys(list(whole)[-4:], NAN), "4 things, .* by 1 edits"),
    (lambda whole, path: whole, "^same$"),
    (lambda whole, path: whole | {"params/norm/scale": np.ones(32, np.float32)}, "^other$"),
    (lambda whole, path: fail(f"{path}: is damaged"), "^refused$"),
  ],
)
def test_the_worker_sees_what_is_wrong(samples, observe, words):
  sample = samples["safetensors"]
  whole = sample.observe(sample.path)
  sample = dataclasses.replace(sample, observe=lambda path: observe(whole, path))
  damage = mutations.Damage(b"", "", 1)
  assert re.search(words, mutation_worker.outcome(sample, whole, sample.path, damage))


def damaged(sample, tmp_path, name, content):
  """A copy of a sample with one file of it in another's place."""
  target = tmp_path / sample.path.name
  if sample.path.is_file():
    target.write_bytes(content)
  else:
    shutil.copytree(sample.path, target)
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_bytes(content)
  return target


@pytest.mark.timeout(60)
@pytest.mark.parametrize("path", sorted(CORPUS.glob("*_*.*[!l]")), ids=lambda path: path.name)
def test_what_was_once_taken_wrongly_is_refused(samples, tmp_path, path):
  reader, _, _, name = path.name.split("_", 3)
  sample = samples[READERS.get(reader, reader)]
  target = damaged(sample, tmp_path, name, path.read_bytes())
  with pytest.raises(ValueError, match=target.name) as caught:
    sample.observe(target)
  assert len(str(caught.value)) < 2000


def test_data_that_was_once_taken_wrongly_is_refused():
  (path,) = CORPUS.glob("*.jsonl")
  found = records.read(path)
  with pytest.raises(ValueError, match="column 'label' of record 8 holds a dict"):
    templates.check("{text} {label}", found, "prompt")


def test_the_corpus_is_small():
  sizes = [path.stat().st_size for path in CORPUS.iterdir()]
  assert len(sizes) > 15 and max(sizes) < 100_000 and sum(sizes) < 1_000_000


def set_entries(file, **values):
  """Puts metadata into a GGUF file: a type and the bytes of the value by the key."""
  keys = {key.replace("__", ".").encode(): value for key, value in values.items()}
  file.entries = [x for x in file.entries if x[0] not in keys]
  file.entries += [[key, *value] for key, value in keys.items()]
  file.counts[1] = len(file.entries)


def u32(value):
  return (4, struct.pack("<I", value))


def f64(value):
  return (12, struct.pack("<d", value))


def without_rotations(file):
  file.entries = [x for x in file.entries if x[0] != b"llama.rope.dimension_count"]
  set_entries(file, llama__attention__key_length=(10, struct.pack("<Q", 10**9)))


def retyped(file):
  file.tensors[5][2] = 9
  text = struct.pack("<IQ", 8, 2) + bytes(16)
  set_entries(file, tokenizer__ggml__pre=(9, text))


def swapped(file):
  one, two = (x for x in file.tensors if x[0] in (b"blk.0.attn_k.weight", b"blk.0.attn_v.weight"))
  one[3], two[3] = two[3], one[3]


def overlapping(file):
  file.tensors[3][3] = file.tensors[2][3]


def misaligned(file):
  file.tensors[-1][3] -= 4


def huge_vocabulary(file):
  file.tensors[[x[0] for x in file.tensors].index(b"token_embd.weight")][1] = [32, 2**40]
  set_entries(file, llama__vocab_size=(10, struct.pack("<Q", 2**40)))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
  ("change", "words"),
  [
    (without_rotations, "head_dim 1000000000 is over the limit"),
    (retyped, "type|tensor"),
    (lambda f: set_entries(f, llama__vocab_size=u32(2**32 - 1)), "vocab_size 4294967295 is over"),
    (lambda f: set_entries(f, llama__vocab_size=u32(1 << 24)), "configuration says .16777216, 32"),
    (huge_vocabulary, "token_embd.weight' of shape .1099511627776, 32. ends at byte"),
    (lambda f: set_entries(f, llama__block_count=u32(10**9)), "num_layers 1000000000 is over"),
    (lambda f: set_entries(f, llama__embedding_length=u32(2**31)), "width 2147483648 is over"),
    (lambda f: set_entries(f, general__alignment=u32(8)), "begins at byte|ends at byte"),
    (lambda f: set_entries(f, general__alignment=(7, b"\x01")), "alignment is True"),
    (swapped, "begins at byte"),
    (overlapping, "begins at byte"),
    (misaligned, "begins at byte"),
    (
      lambda f: set_entries(f, llama__attention__layer_norm_rms_epsilon=f64(1e300)),
      "norm_eps must be a number from 1e-30 to 0.1, not 1e.300",
    ),
    (lambda f: set_entries(f, llama__rope__freq_base=f64(1e-300)), "rope_theta must be a number"),
    (
      lambda f: set_entries(
        f, llama__rope__scaling__type=(8, struct.pack("<Q", 6) + b"linear"),
        llama__rope__scaling__factor=f64(0.0),
      ),
      "LinearRope: factor must be a number from 1",
    ),
    (lambda f: set_entries(f, tokenizer__ggml__eos_token_id=(7, b"\x01")), "eos_token_id=True is"),
    (lambda f: set_entries(f, tokenizer__ggml__add_bos_token=u32(1)), "must be a bool, not 1"),
    (lambda f: set_entries(f, llama__attention__value_length=u32(4)), "value_length=4"),
  ],
)  # fmt: skip
def test_gguf_files_that_would_be_read_wrongly_or_without_end_are_refused(
  samples, tmp_path, change, words
):
  file = mutations.Gguf(samples["gguf"].path.read_bytes())
  change(file)
  path = tmp_path / "f32.gguf"
  path.write_bytes(file.written())
  with pytest.raises(ValueError, match=rf"f32.gguf: .*({words})"):
    pretrained.load(path)


def test_the_parts_of_a_gguf_file_are_written_together_as_they_were(samples):
  content = samples["gguf"].path.read_bytes()
  assert mutations.Gguf(content).written() == content


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
  ("name", "raw", "words"),
  [
    ("head_dim", "1000000000", "head_dim 1000000000 is over the limit of 16,384"),
    ("num_hidden_layers", "4294967295", "num_layers 4294967295 is over the limit of 1,024"),
    ("num_hidden_layers", "1000000000", "num_layers 1000000000 is over the limit of 1,024"),
    ("hidden_size", "2147483648", "width 2147483648 is over the limit"),
    ("hidden_size", "1e1", "hidden_size must be a positive integer, not 10.0"),
    ("num_attention_heads", "true", "num_attention_heads must be a positive integer, not True"),
    ("max_position_embeddings", "true", "max_length must be a positive integer, not True"),
    ("rms_norm_eps", "1e400", "1e400 is beyond what a float holds"),
    ("rms_norm_eps", "1e38", "norm_eps must be a number"),
    ("rope_theta", "1e-300", "rope_theta must be a number from 1.0"),
    ("rope_parameters", '{"rope_theta": true}', "rope_theta must be a number"),
    ("rope_parameters", '{"rope_type": "linear", "factor": 0}', "factor must be a number from 1"),
    (
      "rope_parameters",
      '{"rope_type": "linear", "factor": -2.0}',
      "factor must be a number from 1",
    ),
    (
      "rope_parameters",
      '{"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,'
      '"original_max_position_embeddings": 32}',
      "low_freq_factor 4 and high_freq_factor 4",
    ),
    ("rope_parameters", "[]", "rope_parameters must be an object"),
    ("partial_rotary_factor", "0.5", "partial_rotary_factor"),
    ("tie_word_embeddings", '"false"', "tie_embeddings must be True or False, not 'false'"),
    ("eos_token_id", "true", "eos_token_id True is neither"),
    ("eos_token_id", "263", "special token 263 has no row in the embedding of 263"),
    ("eos_token_id", "1" * 30, "is neither a token's id"),
    ("mlp_bias", "[" * 100_000, "nested more than 64 deep"),
    ("num_key_value_heads", "0", "num_kv_heads must be a positive integer"),
  ],
)
@pytest.mark.parametrize("reader", [pretrained.load, pretrained.inspect])
def test_a_configuration_that_no_model_has_is_refused(samples, tmp_path, reader, name, raw, words):
  sample = samples["config"]
  fields = json.loads((sample.path / "config.json").read_text())
  if name == "rope_theta":
    del fields["rope_parameters"]
  text = json.dumps(fields | {name: "@@"}).replace('"@@"', raw)
  target = damaged(sample, tmp_path, "config.json", text.encode())
  with pytest.raises(ValueError, match=words) as caught:
    reader(target)
  assert str(target) in str(caught.value)
  assert len(str(caught.value)) < 1000


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda f: f["model"]["vocab"].update(Ġthe=2**32 - 1), "largest id of its 263 tokens must be"),
    (lambda f: f["added_tokens"][0].update(id=2**32 - 2), "has the id 4294967294 there, and 261"),
    (lambda f: f["model"]["vocab"].update(Ġthe=3), "two of its tokens have one id"),
    (lambda f: f["model"].update(continuing_subword_prefix="é"), "not a tokenizer"),
    (
      lambda f: f.update(
        normalizer={
          "type": "Sequence",
          "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}]
          * 40,
        }
      ),
      "may make a text 10000 times as long",
    ),
    (
      lambda f: f.update(
        post_processor={
          "type": "TemplateProcessing",
          "pair": [],
          "single": [
            {"SpecialToken": {"id": "x", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
          ],
          "special_tokens": {"x": {"id": "x", "ids": [2**31], "tokens": ["x"]}},
        }
      ),
      "puts tokens around a text that it has not: .2147483648.",
    ),
  ],
)
def test_a_tokenizer_that_would_take_all_memory_or_contradicts_itself_is_refused(
  samples, tmp_path, change, words
):
  sample = samples["tokenizer"]
  fields = json.loads((sample.path / "tokenizer.json").read_text())
  change(fields)
  target = damaged(sample, tmp_path, "tokenizer.json", json.dumps(fields).encode())
  with pytest.raises(ValueError, match=words) as caught:
    sample.observe(target)
  assert str(target / "tokenizer.json") in str(caught.value)


def test_a_regular_expression_without_end_is_refused_where_a_text_meets_it(samples, tmp_path):
  sample = samples["tokenizer"]
  fields = json.loads((sample.path / "tokenizer.json").read_text())
  pattern = {"Regex": "(a+)+$"}
  split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
  text = json.dumps(fields | {"pre_tokenizer": split})
  target = damaged(sample, tmp_path, "tokenizer.json", text.encode())
  tokenizer = from_folder(target)
  with pytest.raises(ValueError, match=r"the tokenizer cannot encode 'aaaa.*retry-limit"):
    tokenizer.encode("a" * 60 + "b")


@pytest.mark.parametrize(
  ("name", "content", "words"),
  [
    ("chat_template.jinja", b"{{ \xff }}", "chat_template.jinja: byte 3 is not UTF-8"),
    ("additional_chat_templates/tool.jinja", b"\xff", "tool.jinja: byte 0 is not UTF-8"),
    ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template .* is neither a text"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": "x"}]}', "chat_template .* is neither"),
    ("tokenizer_config.json", b'{"bos_token": {}}', "bos_token .* is neither a token nor"),
    ("tokenizer_config.json", b'{"bos_token": "x<y"}', "bos_token 'x<y' is not in tokenizer.json"),
    ("generation_config.json", b'{"eos_token_id": [true]}', "eos_token_id .True. is neither"),
  ],
)
def test_a_file_beside_the_tokenizer_that_says_nothing_of_it_is_refused(
  samples, tmp_path, name, content, words
):
  target = damaged(samples["tokenizer"], tmp_path, name, content)
  with pytest.raises(ValueError, match=words):
    from_folder(target)


def test_an_index_nested_without_end_is_refused(samples, tmp_path):
  sample = samples["index"]
  text = '{"metadata": {"total_size": ' + "[" * 200_000
  target = damaged(sample, tmp_path, "model.safetensors.index.json", text.encode())
  with pytest.raises(ValueError, match="nested more than 64 deep"):
    sample.observe(target)


@pytest.mark.parametrize(
  ("dtype", "value", "words"),
  [
    ("int32", 3, "model.norm.weight -> norm/scale: its dtype I32 is not one of F64, F32, F16"),
    ("uint32", 3, "its dtype U32 is not one of"),
    ("float64", 1e300, "beyond: model.norm.weight -> norm/scale"),
    ("float64", np.inf, "holds values that are not finite"),
  ],
)
@pytest.mark.parametrize("scan", [False, True])
def test_weights_that_float32_cannot_hold_are_refused(samples, tmp_path, dtype, value, words, scan):
  sample = samples["safetensors"]
  tensors = safetensors.load_file(sample.path / "model.safetensors")
  tensors["model.norm.weight"] = np.full(32, value, dtype)
  target = damaged(sample, tmp_path, "model.safetensors", b"")
  safetensors.save_file(tensors, target / "model.safetensors")
  with pytest.raises(ValueError, match=words):
    pretrained.load(target, scan_layers=scan)


def test_float64_weights_that_float32_holds_are_read(samples, tmp_path):
  sample = samples["safetensors"]
  tensors = safetensors.load_file(sample.path / "model.safetensors")
  tensors["model.norm.weight"] = np.full(32, 0.5, np.float64)
  target = damaged(sample, tmp_path, "model.safetensors", b"")
  safetensors.save_file(tensors, target / "model.safetensors")
  np.testing.assert_array_equal(pretrained.load(target).params["norm"]["scale"], np.full(32, 0.5))


@pytest.mark.parametrize("cut", [100, 5000, 60_000])
@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_file_that_shrinks_while_it_is_read_is_said_and_does_not_end_the_process(
  samples, tmp_path, kind, cut
):
  sample = samples[kind]
  name = "model.safetensors" if kind == "safetensors" else ""
  whole = (sample.path / name if name else sample.path).read_bytes()
  target = damaged(sample, tmp_path, name, whole)
  path = target / name if name else target

  def shrink(paths):
    os.truncate(path, cut)
    return paths

  with pytest.raises(ValueError, match=r"ends before byte \d+; it was cut"):
    pretrained.load(target, watch=shrink)


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("config", "config.json"), ("config", "tokenizer.json"), ("config", "tokenizer_config.json"),
    ("config", "generation_config.json"), ("config", "model.safetensors"), ("gguf", ""),
    ("index", "one.safetensors"), ("index", "model.safetensors.index.json"),
    ("compressed", "compressed.json"), ("compressed", "compressed.safetensors"),
    ("peft lora", "adapter_config.json"), ("peft lora", "adapter_model.safetensors"),
  ],
)  # fmt: skip
@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(samples, tmp_path, kind, name):
  sample = samples[kind]
  target = damaged(sample, tmp_path, name, b"")
  path = target / name if name else target
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(ValueError, match="a pipe, a socket or a device"):
    sample.observe(target)


def test_mutations_are_the_same_at_each_run(samples):
  content = (samples["config"].path / "config.json").read_bytes()
  first = [mutations.mutate("config.json", content, random.Random(n)) for n in range(20)]
  assert first == [mutations.mutate("config.json", content, random.Random(n)) for n in range(20)]
  assert len({damage.content for damage in first}) > 15
