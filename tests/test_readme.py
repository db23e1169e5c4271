"""The README's own code and commands."""

import pathlib
import re

import jax

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
  return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_flow_runs_as_printed_in_fifteen_lines_and_learns():
  code, _ = blocks("python")
  scope = {}
  exec(code, scope)
  lines = [line for line in code.splitlines() if line.strip() and not line.startswith("import")]
  assert len(lines) == 15
  model, params, x, y = (scope[name] for name in ("model", "params", "x", "y"))
  start = scope["lora_jax"].init(jax.random.key(2), params, scope["specs"])
  assert scope["loss"](scope["adapters"]) < 0.2 * scope["loss"](start)
  assert (model.apply({"params": scope["merged"]}, x).argmax(-1) == y).mean() > 0.9


def test_the_set_up_is_two_commands():
  setup = blocks("bash")[0].splitlines()
  assert len(setup) == 2
  assert setup[1] == 'pip install -e ".[test]" && pytest'


def test_every_program_and_file_that_is_named_exists():
  root = pathlib.Path(__file__).parents[1]
  for name in re.findall(r"python -m (\w+)\.(\w+)", README):
    assert (root / name[0] / f"{name[1]}.py").is_file(), name
  for path in re.findall(r"(?:configs|notebooks|lora_jax)/[\w/]+\.(?:py|ipynb)", README):
    assert (root / path).is_file(), path
