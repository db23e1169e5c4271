"""Patterns match as they do in `peft`, and none of them for long."""

import re
import time

import pytest

from lora_jax.exchange import peft_patterns

NAMES = [
  "q_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj",
  "model.layers.10.mlp.up_proj", "model.layers.1.mlp.up_proj", "h.1.fc", "h.11.fc", "xq_proj",
]  # fmt: skip
PATTERNS = [
  "q_proj", "^q_proj", "layers.1.self_attn.v_proj", r"layers\.1\.mlp\.up_proj", r".*\.mlp\..*",
  r"layers\.\d+\.self_attn\.(q|v)_proj", r"^model\.layers\.[01]\..*", r"layers.1.*", "h.1.fc",
  r"model\.layers\.1?0\..*", "up_proj$", "attn",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_it_matches_in_peft(pattern):
  patterns = peft_patterns.compiled({pattern: True})
  for name in NAMES:
    theirs = re.match(rf"(.*\.)?({pattern})$", name) is not None  # peft's get_pattern_key
    assert peft_patterns.first_match(patterns, name, False) == theirs, name


def test_the_first_pattern_decides():
  patterns = peft_patterns.compiled({"v_proj": 1, "self_attn.v_proj": 2, "q_proj": 3})
  assert peft_patterns.first_match(patterns, "model.layers.1.self_attn.v_proj", 0) == 1
  assert peft_patterns.first_match(patterns, "model.lm_head", 0) == 0


@pytest.mark.parametrize(
  "pattern",
  [
    "(a+)+", "(a*)*$", "(a|a)*", "((a|a)|a)+b", "(.*)*x", "(?:a+)+", "(a|b|ab)*c", "(x+x+)+y",
    ".*.*.*.*x", "a?" * 13 + "a" * 13, r"(\w+\.)+x", r"(a)\1", "a{1,9999}", "(?=a)",
    "(?P<n>a)", "[z-a]", "[", "(", "a" * 1001, "(" * 500,
    "(a|a)" * 13 + "b",
  ],
)  # fmt: skip
def test_a_pattern_that_may_take_long_is_refused(pattern):
  start = time.process_time()
  with pytest.raises(ValueError, match="a regular expression out of a file may run for ever"):
    peft_patterns.compiled({pattern: 1})
  assert time.process_time() - start < 1


def test_the_worst_patterns_that_are_accepted_take_little_time():
  worst = {f".*(a|b)(a|b).*x{n}": n for n in range(32)}
  patterns = peft_patterns.compiled(worst)
  start = time.process_time()
  for n in range(20):
    peft_patterns.first_match(patterns, "model.layers.10." + "a" * 60 + str(n), None)
  assert time.process_time() - start < 5
  with pytest.raises(ValueError, match="10001 patterns; at most 10000 are read"):
    peft_patterns.compiled({f"layers.{n}": 1 for n in range(10_001)})
  with pytest.raises(ValueError, match="33 patterns have wildcards"):
    peft_patterns.compiled(worst | {".*": 1})
