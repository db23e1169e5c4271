r"""Makes a run of an adapter that `peft` trained, for evaluate, generate and export.

    python -m experiments.import_adapter --adapter=downloads/adapter --workdir=runs/imported \
        --config=configs/quickstart.py --config.model.source=hf://HuggingFaceTB/SmolLM2-135M
    python -m experiments.evaluate --workdir=runs/imported

The config says what base the adapter belongs to, and on what data it is evaluated; its sections on
training are not read. The adapter is read as a whole or refused: its names, shapes, ranks and every
field of its config are checked against the model before a tensor is loaded, and nothing is written
before that.
"""

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import inputs, parts, programs
from lora_jax import exchange, tables
from lora_jax.exchange import peft_files
from lora_jax.run import workdir

_ADAPTER = flags.DEFINE_string("adapter", None, "The folder that peft wrote.", required=True)
_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; a new one.", required=True)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  file = peft_files.read(_ADAPTER.value)  # refuses what is damaged before anything else is done
  # In the place of the section on adapters, so that no training takes this run for one of its own.
  imported = {"adapter": {"method": "imported", "from": _ADAPTER.value}}
  with workdir.open_workdir(_WORKDIR.value, config.to_dict() | imported) as run:
    if run.adapter.exists():
      raise FileExistsError(f"{run.adapter}: is there already; name another workdir")
    workdir.settle_inputs(run, inputs.of_import(config, _ADAPTER.value))
    import_into(run, config, file)


def import_into(run: workdir.Workdir, config: ConfigDict, file: peft_files.AdapterFile):
  """Reads the adapter, as a whole or not at all, and writes it into the run's folder."""
  pretrained = parts.extend(parts.load_model(config.model), parts.make_task(config), config)
  params = pretrained.params
  axes = parts.trace_axes(parts.make_model(pretrained.config), params)
  table = pretrained.table
  adapters = exchange.load(_ADAPTER.value, params, axes, table=table)
  print(describe(adapters))
  base = file.config["base_model_name_or_path"]
  if base != config.model.source:
    print(f"the adapter was trained on {base!r}, and its base here is {config.model.source!r}")
  exchange.save(
    run.adapter,
    adapters,
    params,
    axes,
    base_model=config.model.source,
    table=table,
    task_type=pretrained.peft_task,
  )
  print(f"imported the adapters of {len(adapters)} leaves into {run.path}")


def describe(adapters) -> str:
  """A table of the adapted leaves, and the number of the adapters' parameters."""
  sizes = {
    path: sum(leaf.size for leaf in jax.tree.leaves(adapter)) for path, adapter in adapters.items()
  }
  kinds = tables.grouped(
    (path, (type(adapter).__name__, sizes[path])) for path, adapter in adapters.items()
  )
  rows = [(path, f"{n}", kind, f"{n * size:,}") for (path, kind, size), n in kinds.items()]
  table = tables.rendered(("path", "leaves", "kind", "parameters"), rows)
  return f"{table}\n{sum(sizes.values()):,} parameters of adapters"


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  programs.run(main)
