"""What adapter_config.json may say."""

import json

import pytest

from lora_jax.exchange import peft_config

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 6.5, "target_modules": ["q_proj"]}


def parse(**fields):
  return peft_config.parse(json.dumps(PLAIN | fields).encode())


def test_absent_fields_have_the_defaults_of_peft():
  peft = pytest.importorskip("peft", reason="peft, which reads these files, is not installed")
  for kind, config in {
    "LORA": peft.LoraConfig(), "ADALORA": peft.AdaLoraConfig(total_step=9),
    "LOHA": peft.LoHaConfig(), "LOKR": peft.LoKrConfig(), "VERA": peft.VeraConfig(),
    "LN_TUNING": peft.LNTuningConfig(), "TRAINABLE_TOKENS": peft.TrainableTokensConfig(),
  }.items():  # fmt: skip
    theirs = config.to_dict()
    for name, field in peft_config.FIELDS[kind].items():
      assert field.accepts(field.default), name
      if name in theirs:  # VeRA and TRAINABLE_TOKENS cannot exclude modules
        assert (theirs[name] or None) == (field.default or None), f"{kind} {name}"


def test_every_default_config_of_peft_is_read():
  peft = pytest.importorskip("peft", reason="peft, which reads these files, is not installed")
  for config in (
    peft.LoraConfig(), peft.AdaLoraConfig(total_step=9), peft.LoHaConfig(), peft.LoKrConfig(),
    peft.VeraConfig(), peft.LNTuningConfig(), peft.TrainableTokensConfig(),
  ):  # fmt: skip
    found = peft_config.parse(json.dumps(config.to_dict()).encode())
    assert found["peft_type"] == config.peft_type.value


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; supported: LORA, ADALORA, LOHA"),
    ({"peft_type": ["LORA"]}, "is not supported"),
    ({"r": 0}, "r must be a whole number from 1 to 1048576, not 0"),
    ({"r": 10**9}, "r must be a whole number from 1 to 1048576, not 1000000000"),
    ({"r": 4.0}, "r must be a whole number"),
    ({"r": True}, "r must be a whole number"),
    ({"r": "4"}, "r must be a whole number"),
    ({"r": None}, "r must be a whole number"),
    ({"lora_alpha": "6"}, "lora_alpha must be a finite number"),
    ({"lora_alpha": 10**400}, "is an integer of 401 digits"),
    ({"lora_alpha": [1]}, "lora_alpha must be a finite number"),
    ({"use_rslora": 1}, "use_rslora must be true or false"),
    ({"lora_dropout": 1.5}, "lora_dropout must be a number from 0 to 1"),
    ({"bias": "some"}, "bias must be one of none, all"),
    ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern must be an object of ranks"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern must be an object of ranks"),
    ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern must be an object of numbers"),
    ({"rank_pattern": {"(a+)+": 4}}, r"the pattern '\(a\+\)\+' is not read"),
    ({"modules_to_save": "norm"}, "modules_to_save must be a list of names"),
    ({"target_modules": [1]}, "target_modules must be a string or a list of names"),
    ({"trainable_token_indices": [1.5]}, "must be a list of token ids"),
    ({"trainable_token_indices": [True]}, "must be a list of token ids"),
    ({"base_model_name_or_path": 3}, "must be a string"),
    ({"layer_replication": [[0, 2]]}, "layer_replication is not supported: the adapted model has"),
    ({"target_parameters": "x"}, "target_parameters must be a list of names, not 'x'"),
    ({"megatron_config": {"x": 1}}, "megatron_config is not supported: the layers are those of"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is not supported"),
    ({"lora_bias": True}, "lora_bias is not supported: B has a bias of its own"),
    ({"kasa_config": {"beta": 1}}, "kasa_config is not supported"),
    ({"use_of_next_year": True}, "'use_of_next_year' is no field that is known"),
  ],
)
def test_a_field_that_is_wrong_or_not_supported_is_refused_with_the_reason(fields, words):
  with pytest.raises(ValueError, match=words):
    parse(**fields)


def test_fields_without_bearing_and_unknown_ones_that_are_off_are_let_through():
  config = parse(
    task_type="CAUSAL_LM", inference_mode=True, eva_config={"rho": 2.0}, of_next_year=False
  )
  assert config["lora_alpha"] == 6.5
  assert config["rank_pattern"] == {}


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[]", "not a JSON object"),
    (b"null", "not a JSON object"),
    (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN is no JSON number"),
    (b'{"peft_type": "LORA", "lora_alpha": -Infinity}', "-Infinity is no JSON number"),
    (b'{"peft_type": "LORA", "lora_alpha": 1e999}', "1e999 is beyond what a float holds"),
    (b'{"peft_type": "LORA", "r": 4, "r": 8}', "'r' is there twice"),
    (b"[" * 200_000, "not JSON"),
    (b'{"r": ' + b"9" * 10_000 + b"}", "not JSON"),
  ],
)
def test_what_is_no_json_object_is_refused(content, words):
  with pytest.raises(ValueError, match=words):
    peft_config.parse(content)
