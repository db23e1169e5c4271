"""Writes COVERAGE.md from the tables that the tests run: `python tests/coverage_table.py`.

`test_coverage_table.py` holds the file to the table, so neither can say what the other does not.
"""

import pathlib

from programs import PROGRAMS
from test_frameworks import LINEN
from test_transformers_flax import MODELS
from weight_table import WEIGHTS

FILE = pathlib.Path(__file__).parents[1] / "COVERAGE.md"

HEADER = f"""\
# What the transform covers

Written by `python tests/coverage_table.py` from the tables that the tests run; do not edit.

Every program below is run on these weights: {", ".join(WEIGHTS)}.
Its values under `adapt`, and its values and gradients under `jit`, equal those of the materialised
oracle, `adapt(f)(tree, x) == f(materialize(tree), x)`, a second call compiles nothing, and `vmap`
over adapters gives what each gives alone (but where JAX has no `vmap` of the program itself).
*Factored*: strict mode succeeds, and no value of the full matrix's shape is formed, forward or
backward. *Materialised*: the full matrix is formed, or, in strict mode, refused for the reason.
What is coded or pruned ({", ".join(name for name, kind in WEIGHTS.items() if kind.is_formed)})
is formed for one use at a time, whatever the program is.

| program | |
| --- | --- |
"""


def table() -> str:
  rows = [
    f"| {name} | {f'materialised: {program.refused}' if program.refused else 'factored'} |"
    for name, program in PROGRAMS.items()
  ]
  models = [
    f"- Linen, untouched: {', '.join(LINEN)}.",
    "- NNX, by split state or by `lora_jax.nnx.split`; Haiku; Equinox.",
    f'- transformers 4.57, untouched, with the preset "all-linear": {", ".join(MODELS)}.',
  ]
  return HEADER + "\n".join(rows) + "\n\nModels\n\n" + "\n".join(models) + "\n"


if __name__ == "__main__":
  FILE.write_text(table())
