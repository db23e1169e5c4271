import functools
import json

import pytest

from lora_jax.run.metrics import MetricsWriter
from lora_jax.run.report import write_report
from lora_jax.run.workdir import open_workdir, write_json
from lora_jax.tasks import completion

CONFIG = {"train": {"steps": 1200}, "adapter": {"rank": 8}}
BEFORE = {"loss": 5.5, "accuracy": 0.25, "rows": 1400}
AFTER = {"loss": 0.5, "accuracy": 0.875, "rows": 1400}
LINES = functools.partial(completion.Completion.lines, None)  # it reads no field of the task
SAMPLE = {"prompt": "2 + 2 =", "wanted": " 4", "before": "```\n5", "after": " 4"}


@pytest.fixture
def run(tmp_path):
  with open_workdir(tmp_path / "quick", CONFIG) as workdir:
    yield workdir


def log(workdir, losses):
  with MetricsWriter(workdir.metrics, workdir.tensorboard, step=0) as writer:
    for n, loss in enumerate(losses, start=1):
      writer.write(100 * n, {"loss": loss, "tokens_per_second": 1000.0 * n})


def page(workdir):
  write_report(
    workdir, targets="query  LoRA(rank=8)", command="python -m x --workdir=runs/quick", lines=LINES
  )
  return workdir.readme.read_text()


def test_a_run_that_has_just_begun_has_its_config_its_targets_and_the_command(run):
  text = page(run)
  assert text.startswith("# quick\n\nNot finished: 0 of 1,200 steps were logged")
  assert "```bash\npython -m x --workdir=runs/quick\n```" in text
  assert "```text\nquery  LoRA(rank=8)\n```" in text
  assert json.loads(text.partition("```json\n")[2].partition("```")[0]) == CONFIG
  assert "## Results" not in text and "## Losses" not in text and "## Samples" not in text
  assert not run.plot.exists()


def test_the_page_says_how_it_is_computed(run):
  how = ["attention: plain", "rematerialization: dots"]
  write_report(run, targets="", command="", lines=LINES, how=how)
  expected = "## How it is computed\n\n- attention: plain\n- rematerialization: dots\n"
  assert expected in run.readme.read_text()
  assert "computed" not in page(run)


def test_a_run_that_was_stopped_says_how_far_it_came_and_shows_its_losses(run):
  log(run, [3.0, 1.0, 2.0])
  write_json(run.evaluation, {"split": "dev", "before": BEFORE, "samples": []})
  text = page(run)
  assert "Not finished: 300 of 1,200 steps" in text
  assert "## Results on dev\n\n|  | before |\n| --- | ---: |\n| loss | 5.5000 |\n" in text
  assert "from 3.000 (step 100) to 2.000 (step 300), the lowest 1.000 (step 200)" in text
  assert "2,000 tokens/s" in text
  assert run.plot.read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_has_results_before_and_after_and_its_samples(run):
  log(run, [3.0])
  results = {"split": "dev", "before": BEFORE, "samples": [SAMPLE], "after": AFTER}
  write_json(run.evaluation, results)
  text = page(run)
  assert "Finished: 1,200 steps." in text
  assert "| accuracy | 0.2500 | 0.8750 |\n| rows | 1,400 | 1,400 |" in text
  sample = "2 + 2 =\n\nwanted:   4\nbefore:  ```\n5\nafter:    4"
  assert f"````text\n{sample}\n````" in text  # what the model writes does not end the block


def test_the_page_says_how_many_prompts_were_cut_and_how_many_positions_there_are(run):
  splits = {
    "training": {"examples": 1200, "cut": 30, "shared": 0, "longest": 79},
    "held_out": {"examples": 40, "cut": 0, "shared": 40, "longest": 71},
  }
  data = {"max_length": 80, "positions": 2048, "splits": splits}
  write_json(run.evaluation, {"split": "dev", "data": data, "before": BEFORE, "samples": []})
  text = page(run)
  assert (
    "## Data\n\n- training: 30 of 1,200 prompts cut to max_length 80; the longest input has 79 "
    "tokens, the model 2,048 positions\n- held_out: 0 of 40 prompts cut"
  ) in text
  assert "; 40 prompts share a token with their completion" in text
  assert text.count("share a token") == 1


def test_the_page_of_a_run_that_goes_on_is_that_of_one_that_never_stopped(run, tmp_path):
  log(run, [3.0, 1.0])
  page(run)
  log(run, [3.0, 1.0, 0.5])  # from the beginning again, over what there was
  with open_workdir(tmp_path / "other" / "quick", CONFIG) as other:
    log(other, [3.0, 1.0, 0.5])
    assert page(run) == page(other)


def test_a_page_that_cannot_be_written_is_named(run):
  run.readme.mkdir()
  with pytest.raises(OSError, match=r"README\.md: cannot be written"):
    page(run)
