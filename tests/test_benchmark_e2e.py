import json
import re

import pytest
from main_programs import imported

e2e = imported("benchmarks.e2e")

LORA = {"method": "lora", "rank": 8}


def write_run(path, adapter, seed, bleu, **result):
  """The folder of an evaluated run, as far as the table reads it."""
  path.mkdir()
  config = {"seed": seed, "adapter": adapter, "train": {"steps": 3, "batch_size": 16}}
  (path / "config.json").write_text(json.dumps(config))
  rates = (100.0, 400.0, 300.0)
  lines = [{"step": n, "tokens_per_second": rate} for n, rate in enumerate(rates, start=1)]
  (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  (path / "adapter").mkdir()
  (path / "adapter" / "adapter_model.safetensors").write_bytes(bytes(2_500_000))
  score = {"texts": 547, "signature": "nrefs:var|tok:13a"}
  scores = {f"beams {n}": score | {"bleu": bleu + n, "seconds": 1.0} for n in (1, 4)}
  common = {"split": "test", "length_penalty": 1.0, "max_tokens": 80}
  text = json.dumps(common | result | {"adapter": {"loss": 1.25, **scores}})
  (path / "eval_test.json").write_text(text)
  return e2e.read_run(path)


def test_runs_that_differ_in_their_seed_share_a_row_with_mean_and_deviation(tmp_path):
  runs = [
    write_run(tmp_path / "a", LORA, 0, 60.0),
    write_run(tmp_path / "b", {"method": "full"}, 0, 61.0),
    write_run(tmp_path / "c", LORA, 1, 63.0),
  ]
  report = e2e.describe(runs)
  rows = [line for line in report.splitlines() if line.startswith("|")]
  assert rows[0].startswith(
    "| fine-tuning | steps × batch | seeds | loss | BLEU, beams 1 | BLEU, b"
  )
  assert rows[2:] == [
    "| lora, rank 8 | 3 × 16 | 0, 1 | 1.250 ± 0.000 | 62.5 ± 2.1 | 65.5 ± 2.1 | 300 | 2.5 |",
    "| full | 3 × 16 | 0 | 1.250 | 62.0 | 65.0 | 300 | 2.5 |",
  ]
  assert re.search(r"texts 547, max_tokens 80, length_penalty 1.0; nrefs:var\|tok:13a\.", report)


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
  runs = [
    write_run(tmp_path / "a", LORA, 0, 60.0),
    write_run(tmp_path / "b", LORA, 1, 61.0, length_penalty=0.9),
  ]
  with pytest.raises(ValueError, match="decoded in several ways"):
    e2e.describe(runs)


def test_a_run_without_bleu_is_refused(tmp_path):
  write_run(tmp_path / "a", LORA, 0, 60.0)
  file = tmp_path / "a" / "eval_test.json"
  file.write_text(json.dumps({"split": "test", "adapter": {"loss": 1.0}}))
  with pytest.raises(ValueError, match=r"has no BLEU.*--beams"):
    e2e.read_run(tmp_path / "a")
  file.unlink()
  with pytest.raises(FileNotFoundError, match=r"eval_test\.json: not there.*--beams"):
    e2e.read_run(tmp_path / "a")
