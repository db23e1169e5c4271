"""Special and stop tokens, settings and templates of a folder, held to what transformers reads."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_tokenizers
from peers import torch, transformers
from tiny_tokenizers import IDS, SETTINGS, write

from lora_jax.compress import storage
from lora_jax.io import export, gguf_model, pretrained, tokenizer


def exported(source, target):
  found = pretrained.load(source)
  export.save(target, found.params, found.config, found.tokenizer)
  return target


BOS, EOS, EOT = (tiny_tokenizers.byte_level().token_to_id(x) for x in ("<s>", "</s>", "<|eot|>"))


@pytest.mark.parametrize(
  ("files", "eos", "stops"),
  [
    ({"settings": SETTINGS}, EOS, (EOS,)),
    ({"settings": None, "map": {"eos_token": {"content": "</s>"}}}, EOS, (EOS,)),
    ({"settings": {"eos_token": None}, "map": {"eos_token": "</s>"}}, EOS, (EOS,)),
    ({"settings": None, "config": {"eos_token_id": [EOS, EOT]}}, EOS, (EOS, EOT)),
    ({"settings": None, "generation": {"eos_token_id": [EOT, EOS]}}, EOT, (EOT, EOS)),
    ({"settings": SETTINGS, "config": {"eos_token_id": EOT}}, EOS, (EOS, EOT)),
    ({"settings": SETTINGS, "map": {"eos_token": "<|eot|>"}}, EOS, (EOS, EOT)),
    ({"settings": None, "config": {"eos_token_id": None, "pad_token_id": -1}}, None, ()),
  ],
)
def test_a_text_ends_with_each_token_that_a_file_calls_eos(tmp_path, files, eos, stops):
  tiny_tokenizers.byte_level().save(str(tmp_path / "tokenizer.json"))
  names = {
    "settings": "tokenizer_config.json",
    "map": "special_tokens_map.json",
    "config": "config.json",
    "generation": "generation_config.json",
  }
  for name, content in files.items():
    if content is not None:
      (tmp_path / names[name]).write_text(json.dumps(content))
  found = tokenizer.from_folder(tmp_path)
  assert (found.eos_id, found.stop_ids) == (eos, stops)
  assert found.special.pad_id is None and found.pad_id == (eos or 0)


@pytest.mark.parametrize(
  ("name", "content", "words"),
  [
    ("special_tokens_map.json", {"eos_token": "<|nowhere|>"}, "special_tokens_map.json: eos_token"),
    ("config.json", {"eos_token_id": ["2"]}, r"eos_token_id \['2'\] is neither a token's id"),
    ("generation_config.json", {"eos_token_id": True}, "eos_token_id True is neither"),
    ("generation_config.json", [1], "generation_config.json: not a JSON object"),
  ],
)
def test_a_file_that_names_no_token_is_refused_by_name(tmp_path, name, content, words):
  tiny_tokenizers.byte_level().save(str(tmp_path / "tokenizer.json"))
  (tmp_path / name).write_text(json.dumps(content))
  with pytest.raises(ValueError, match=words):
    tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
  "case",
  [
    {"settings": None},
    {"settings": None, "config": {"bos_token_id": BOS, "eos_token_id": [EOS, EOT]}},
    {"config": {"eos_token_id": EOS}},
    {
      "settings": SETTINGS
      | {
        "pad_token": "<|eot|>",
        "padding_side": "left",
        "truncation_side": "left",
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
      },
      "generation": {
        "eos_token_id": [EOS, EOT],
        "temperature": 0.6,
        "top_p": 0.9,
        "do_sample": True,
      },
    },
  ],
)
def test_what_a_folder_says_is_exported_and_nothing_that_it_does_not(tmp_path, case):
  source = write(tmp_path / "source", **case)
  copy = exported(source, tmp_path / "copy")
  before, after = (transformers.AutoTokenizer.from_pretrained(x) for x in (source, copy))
  assert before.special_tokens_map == after.special_tokens_map
  for name in ("padding_side", "truncation_side", "model_max_length", "chat_template"):
    assert getattr(before, name) == getattr(after, name), name
  text = "hello world! how! are"
  ids = before(text).input_ids
  assert after(text).input_ids == ids
  assert after.decode(ids, skip_special_tokens=True) == before.decode(ids, skip_special_tokens=True)
  assert "!" in after.decode(ids, skip_special_tokens=True)
  models = [transformers.AutoModelForCausalLM.from_pretrained(x) for x in (source, copy)]
  assert models[0].generation_config.to_diff_dict() == models[1].generation_config.to_diff_dict()
  written = json.loads((copy / "config.json").read_text())
  assert {name: written[name] for name in IDS if name in written} == case.get("config", {})


def test_lengths_fixed_in_tokenizer_json_are_exported(tmp_path):
  words = tiny_tokenizers.byte_level()
  words.enable_truncation(3)
  source = write(tmp_path / "source", words)
  copy = exported(source, tmp_path / "copy")
  assert (copy / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
  assert len(tokenizer.from_folder(copy).encode("a b c d e f")) > 3


TEMPLATES = {"default": "{{ messages }}", "tool_use": "T"}


@pytest.mark.parametrize("form", ["list", "files", "default"])
def test_chat_templates_are_exported_by_name_to_a_folder_and_to_gguf(tmp_path, form):
  named = TEMPLATES if form != "default" else {"default": TEMPLATES["default"]}
  settings = (
    SETTINGS
    | {
      "list": {"chat_template": [{"name": k, "template": v} for k, v in TEMPLATES.items()]},
      "files": {"chat_template": "not this one"},
      "default": {"chat_template": TEMPLATES["default"]},
    }[form]
  )
  source = write(tmp_path / "source", settings=settings)
  if form == "files":
    (source / "chat_template.jinja").write_text(TEMPLATES["default"])
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATES["tool_use"])
  found = pretrained.load(source)
  assert found.tokenizer.chat_templates == named
  copy = exported(source, tmp_path / "copy")
  peers = [transformers.AutoTokenizer.from_pretrained(x).chat_template for x in (source, copy)]
  assert peers[0] == peers[1] == (named if len(named) > 1 else named["default"])
  gguf_model.save(tmp_path / "model.gguf", found.params, found.config, found.tokenizer)
  back = pretrained.load(tmp_path / "model.gguf").tokenizer
  assert back.chat_templates == named
  back.save(tmp_path / "again")
  assert tokenizer.from_folder(tmp_path / "again").chat_templates == named


def test_stop_tokens_and_those_around_a_text_come_back_from_gguf(tmp_path):
  words = tiny_tokenizers.byte_level(after=["</s>"])
  source = write(tmp_path / "source", words, generation={"eos_token_id": [EOS, EOT]})
  found = pretrained.load(source)
  gguf_model.save(tmp_path / "model.gguf", found.params, found.config, found.tokenizer)
  back = pretrained.load(tmp_path / "model.gguf").tokenizer
  assert back.special == found.tokenizer.special
  assert back.stop_ids == (EOS, EOT) and back.special.pad_id is None
  described = tokenizer.to_gguf(back, back.vocab_size)
  assert described["tokenizer.ggml.add_bos_token"] and described["tokenizer.ggml.add_eos_token"]
  # For transformers what a text ends with stays in tokenizer.json.
  export.save(tmp_path / "copy", found.params, found.config, back)
  ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")("film").input_ids
  assert ids == [BOS, *back.encode("film", add_special_tokens=False), EOS]
  written = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
  assert written["eos_token_id"] == [EOS, EOT] and written["pad_token_id"] is None


def test_a_compressed_models_folder_keeps_what_its_source_said(tmp_path):
  generation = {"eos_token_id": [EOS, EOT], "temperature": 0.6}
  config = {"eos_token_id": [EOS, EOT], "pad_token_id": EOT}
  source = write(tmp_path / "source", config=config, generation=generation)
  found = pretrained.load(source)
  storage.save(tmp_path / "small", found.params, found.config, found.tokenizer)
  small = storage.load(tmp_path / "small")
  assert small.tokenizer.special == found.tokenizer.special
  copy = tmp_path / "copy"
  export.save(copy, small.params, small.config, small.tokenizer)
  assert json.loads((copy / "generation_config.json").read_text()) == generation
  written = json.loads((copy / "config.json").read_text())
  assert {name: written[name] for name in config} == config and "bos_token_id" not in written


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_of_the_files_is_known_whatever_they_are_loaded_in(tmp_path, dtype):
  source = write(tmp_path / "source", dtype=getattr(torch, dtype))
  found = pretrained.load(source)
  assert found.stored_dtype == dtype and found.params["norm"]["scale"].dtype == jnp.float32
  gguf_model.save(tmp_path / "model.gguf", found.params, found.config, found.tokenizer, dtype=dtype)
  assert pretrained.load(tmp_path / "model.gguf").stored_dtype == dtype
  gguf_model.save(tmp_path / "q8.gguf", found.params, found.config, found.tokenizer, dtype="q8_0")
  assert pretrained.load(tmp_path / "q8.gguf").stored_dtype == "float32"
  assert pretrained.inspect(source).stored_dtype is None


def test_values_that_are_not_finite_are_refused_by_name(tmp_path):
  found = pretrained.load(write(tmp_path / "source"))
  half = {**found.params, "norm": {"scale": np.full(32, np.inf, np.float16)}}
  with pytest.raises(ValueError, match=r"not finite: model.norm.weight; .*use bfloat16 or float32"):
    export.save(tmp_path / "copy", half, found.config, found.tokenizer)
  assert not (tmp_path / "copy").exists()
