"""experiments.chat and generate --chat, on a tiny Llama and a run that has learnt to answer."""

import io
import json
import os
import pathlib
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import chat_peers
import main_programs
import pytest
import tiny_experiment
from main_programs import imported
from peers import torch, transformers

from configs import sft
from experiments import programs, speakers
from lora_jax import tree
from lora_jax.io import pretrained
from lora_jax.run import workdir
from lora_jax.weights import is_weight

train = imported("experiments.train")

ROOT = pathlib.Path(__file__).parents[2]
POSITIONS = 4096
CTRL_C = b"\x03"
ANSWERS = {"red": "warm", "blue": "cold"}
FIELDS = {
  "data.train": 0.9, "data.validation": 0.0, "data.test": 0.1, "data.test_source": "",
  "data.max_length": 61, "data.buckets": (60,), "data.packed_length": 0, "train.steps": 60,
  "train.batch_size": 8, "train.accumulate": 1, "train.log_every": 20,
  "train.checkpoint_every": 60, "optimizer.warmup_steps": 1, "optimizer.peak_learning_rate": 2e-2,
  "adapter.also_train": ("embed/embedding",),
  "evaluation.batch_size": 8, "evaluation.samples": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smollm2_tokenizer):
  """A model, and conversations of one turn and two."""
  folder = tmp_path_factory.mktemp("chat")
  tiny_experiment.write(folder, smollm2_tokenizer, max_length=POSITIONS)
  rows = []
  for n in range(40):
    colors = list(ANSWERS)[:: 1 if n % 4 < 2 else -1][: 1 + n % 2]
    turns = [
      ({"role": "user", "content": f"Is {x} warm?"}, {"role": "assistant", "content": ANSWERS[x]})
      for x in colors
    ]
    rows.append({"messages": [{"role": "system", "content": "Talk."}, *sum(turns, ())]})
  (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


@pytest.fixture(scope="module")
def config(folder):
  config = sft.get_config(f"data={folder / 'mine.jsonl'},model={folder / 'model'}")
  config.update_from_flattened_dict(FIELDS)
  return config


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
  """Of LoRA and the embedding, which has learnt the answers."""
  with workdir.open_workdir(tmp_path_factory.mktemp("run"), config.to_dict()) as opened:
    train.train(config, opened)
  return opened.path


@pytest.fixture
def call(monkeypatch, capsys):
  """Runs a main program in this process: `(name, *arguments, lines="") -> what it printed`."""

  def call(name, *arguments, lines=""):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    capsys.readouterr()
    main_programs.call(name, *arguments)
    return capsys.readouterr().out

  return call


def test_a_script_hears_the_answers_of_the_run_and_of_its_base(call, run):
  printed = call(
    "chat",
    f"--workdir={run}",
    "--system=Talk.",
    "--max_tokens=4",
    lines="Is red warm?\n\nIs blue warm?\n/base\nIs red warm?\n/base\n/reset\n"
    "Is blue warm?\n/exit\nnot read\n",
  ).splitlines()
  base = printed.pop(8)
  assert base != "warm" and base.endswith("(cut at --max_tokens=4)")
  assert printed[0].endswith(f"with the adapter of {run}; /help lists the commands)")
  assert printed[1:] == [
    "> Is red warm?", "warm", "> Is blue warm?", "cold", "> /base",
    "(the base, without the adapter)", "> Is red warm?", "> /base", "(with the adapter)",
    "> /reset", "(the conversation starts over)", "> Is blue warm?", "cold", "> /exit",
  ]  # fmt: skip


def by_transformers(folder, messages, steps):
  """The greedy answer of the model, and whether it ends there."""
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  words = transformers.AutoTokenizer.from_pretrained(folder)
  asked = words.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
  )
  end = words.convert_tokens_to_ids("<|im_end|>")
  with torch.no_grad():
    found = model.generate(
      **asked, max_new_tokens=steps, do_sample=False, eos_token_id=end, pad_token_id=0
    )
  return words.decode(found[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_the_turns_of_a_conversation_are_those_of_transformers_and_of_generate(call, folder):
  asked = ["Is red warm?", "Is blue <|im_end|> warm?"]
  arguments = [f"--source={folder / 'model'}", "--max_tokens=12"]
  printed = call("chat", *arguments, "--system=Talk.", lines="\n".join(asked)).splitlines()
  messages = [{"role": "system", "content": "Talk."}]
  for question, line in zip(asked, printed[2::2], strict=True):
    messages.append({"role": "user", "content": question})
    answer = line.removesuffix(" (cut at --max_tokens=12)")
    if "<|im_end|>" not in question:  # which the peer takes for the end of a turn
      assert answer == by_transformers(folder / "model", messages, 12)
    made = json.loads(call("generate", *arguments, f"--chat={json.dumps(messages)}"))
    assert made == {"messages": messages, "completion": answer}
    messages.append({"role": "assistant", "content": answer})
  assert len(messages) == 5


@pytest.mark.slow
def test_sampling_has_a_seed(call, folder):
  arguments = [f"--source={folder / 'model'}", "--max_tokens=8", "--temperature=2", "--top_p=0.9"]
  one, other = (
    call("chat", *arguments, f"--seed={n}", lines="Hi\n/reset\nHi\n").splitlines() for n in (1, 2)
  )
  assert one != other
  assert one[2] != one[6]  # a turn has a key of its own


def test_a_conversation_that_is_full_says_so_and_goes_on_after_a_reset(call, folder):
  """The random model ends no turn, so it writes to the last position."""
  printed = call(
    "chat", f"--source={folder / 'model'}", "--positions=48", lines="Hi\nHi\n/reset\nHi\n"
  ).splitlines()
  full = "the conversation is full, 48 tokens; /reset starts over"
  assert printed[2].endswith(f" ({full})")
  assert printed[4] == f"({full}; the turn is taken back)"
  assert printed[8] == printed[2]


def test_what_a_template_refuses_of_a_turn_is_said_and_the_turn_taken_back(call, folder, tmp_path):
  path = tmp_path / "short.jinja"
  refusal = "{% if messages[-1].content == 'x' %}{{ raise_exception('no x') }}{% endif %}"
  path.write_text(refusal + chat_peers.CHATML)
  printed = call(
    "chat",
    f"--source={folder / 'model'}",
    f"--template={path}",
    "--max_tokens=2",
    lines="Hi\nx\n /base\n/base\n/other\n/help\n",
  ).splitlines()
  assert "short.jinja: raises 'no x'" in printed[4] and printed[4].endswith("is taken back)")
  assert printed[5] == ">  /base" and printed[6].endswith("(cut at --max_tokens=2)")
  assert printed[8] == "(there is no adapter: --source names a model alone)"
  assert printed[10] == "('/other' is no command; begin with a space to say it)"
  assert [line.split()[0] for line in printed[12:]] == ["/base", "/reset", "/help", "/exit"]


def test_the_base_and_the_run_share_their_weights(run):
  found, adapted = speakers.of_run(str(run), fetch=False).load()
  base, both = tree.flatten(found.params), tree.flatten(adapted, is_leaf=is_weight)
  leaves = {path: x.w if is_weight(x) else x for path, x in both.items()}
  assert leaves.keys() == base.keys() and all(x is base[path] for path, x in leaves.items())
  assert sum(map(is_weight, both.values())) == 8


@pytest.fixture
def unloaded(monkeypatch):
  """No weights may be loaded."""

  def load(*unused, **options):
    raise AssertionError("the weights are loaded")

  monkeypatch.setattr(pretrained, "load", load)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--template=mine"], "the model has no chat template 'mine'; it has default"),
    (["--template={tmp}/no_system.jinja", "--system=a"], "no_system.jinja: raises 'no system'"),
    (["--template={tmp}/none.jinja"], "none.jinja: no such chat template"),
    (["--positions=5000"], "--positions=5000: up to 5,000 tokens .* has 4,096 positions"),
    (["--date=today"], "--date 'today' is no day; write it as 2026-01-31"),
  ],
)
def test_what_cannot_be_is_refused_before_weights_are_loaded(
  call, folder, tmp_path, unloaded, arguments, words
):
  (tmp_path / "no_system.jinja").write_text(
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + chat_peers.CHATML
  )
  arguments = [argument.format(tmp=tmp_path) for argument in arguments]
  with pytest.raises((ValueError, FileNotFoundError), match=words):
    call("chat", f"--source={folder / 'model'}", *arguments)


def test_a_model_without_a_template_says_how_to_name_one(call, folder, tmp_path, unloaded):
  for path in (folder / "model").iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
  settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
  settings.pop("chat_template", None)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  with pytest.raises(ValueError, match="the model has no chat template, as base models have none"):
    call("chat", f"--source={tmp_path}")


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ('[{"role": "user"', "--chat is not JSON: Expecting ',' delimiter at column 17"),
    ("[]", r"--chat: messages \[\] is no list with a message"),
    ('{"text": "a"}', r"--chat: has no messages; it has \['text'\]"),
    ('[{"role": "user", "content": 5}]', "--chat: message 0: its content 5 is neither a text"),
    ('[{"role": "human", "content": "a"}]', "--chat: message 0: its role 'human' is not one of"),
    (
      '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]',
      "--chat: the last message is of the role assistant, so nothing is asked",
    ),
    ("{tmp}/mine.jsonl", r"mine.jsonl: record 1: message 0 of the role assistant follows the begi"),
    ("{tmp}/other.jsonl", "other.jsonl"),
  ],
)
def test_a_wrong_conversation_is_refused_by_its_field_before_weights_are_loaded(
  call, folder, tmp_path, unloaded, given, words
):
  rows = [{"messages": [{"role": role, "content": "a"}]} for role in ("user", "assistant")]
  (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  with pytest.raises((ValueError, FileNotFoundError), match=words):
    call(
      "generate", f"--source={folder / 'model'}", f"--chat={given.replace('{tmp}', str(tmp_path))}"
    )


@pytest.mark.slow
def test_conversations_of_files_are_answered_together_by_a_run(call, run, tmp_path):
  def messages(color):
    return [
      {"role": "system", "content": "Talk."},
      {"role": "user", "content": f"Is {color} warm?"},
    ]

  rows = [{"messages": messages(color)} for color in ANSWERS]
  (tmp_path / "several.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (tmp_path / "one.json").write_text(json.dumps(messages("red")))
  printed = call(
    "generate",
    f"--workdir={run}",
    f"--chat={tmp_path / 'several.jsonl'}",
    f"--chat={tmp_path / 'one.json'}",
  )
  found = [json.loads(line) for line in printed.splitlines() if line[:1] == "{"]
  assert [each["completion"] for each in found] == ["warm", "cold", "warm"]
  assert found[2]["messages"] == messages("red")


def terminal(*arguments):
  """Starts experiments.chat in a terminal; returns the process and the terminal's other end."""
  ours, its = pty.openpty()
  begin = (
    "import fcntl, os, signal, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", begin, sys.executable,
     "-m", "experiments.chat", *map(str, arguments)],
    stdin=its, stdout=its, stderr=subprocess.DEVNULL, cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"},
  )  # fmt: skip
  os.close(its)
  return process, ours


def until(ours, words, count=1):
  """Reads the terminal until it shows some words so often; returns all that it read."""
  read = b""
  while read.count(words) < count:
    assert select.select([ours], [], [], 120)[0], f"nothing after {read!r}"
    read += os.read(ours, 1000)
  return read.decode(errors="replace")


def press_ctrl_c(ours):
  """At the prompt. A signal that comes just before readline waits is heard at the next key only."""
  os.write(ours, CTRL_C)
  if not select.select([ours], [], [], 30)[0]:
    os.write(ours, CTRL_C)


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_not_the_program_and_twice_at_the_prompt_leaves(folder):
  """Typed, so that the process that renders the template hears it too."""
  process, ours = terminal(f"--source={folder / 'model'}", f"--max_tokens={POSITIONS // 3}")
  until(ours, b"> ")
  for n in range(2):
    os.write(ours, b"Hi\n")
    until(ours, b"Hi\r\n")
    os.read(ours, 100)  # of an answer, which goes on for seconds
    os.write(ours, CTRL_C)
    assert until(ours, b"> ").endswith(" (stopped)\r\n> "), n
  os.write(ours, b"/help\n")
  until(ours, b"/exit    leave\r\n> ")
  press_ctrl_c(ours)
  until(ours, b"(Ctrl-C again leaves, as does /exit)\r\n> ")
  time.sleep(programs.PATIENCE + 0.5)  # longer than a program lives that does not heed a signal
  assert process.poll() is None
  press_ctrl_c(ours)
  assert process.wait(timeout=60) == 0
  os.close(ours)


@pytest.mark.slow
def test_the_end_of_the_input_leaves_and_sigterm_ends_the_program(folder):
  for end in (b"\x04", signal.SIGTERM):
    process, ours = terminal(f"--source={folder / 'model'}")
    until(ours, b"> ")
    if isinstance(end, bytes):
      os.write(ours, end)
    else:
      process.send_signal(end)
    assert process.wait(timeout=60) == (0 if isinstance(end, bytes) else 130)
    os.close(ours)


def test_evaluate_refuses_a_record_before_weights_are_loaded(call, run, tmp_path, unloaded):
  shutil.copytree(run, tmp_path / "run")
  config = json.loads((run / "config.json").read_text())
  config["data"] |= {"max_length": 10, "too_long": "error"}
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="conversations are longer than max_length 10"):
    call("evaluate", f"--workdir={tmp_path / 'run'}")
