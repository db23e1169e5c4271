from lora_jax.train.progress import Progress


def test_the_bar_shows_loss_speed_and_time_left_and_goes_on_from_where_it_was(capsys):
  with Progress(start=40, total=42) as progress:
    progress.update(loss=0.7119, tokens_per_second=1234.5)
    progress.update(loss=0.4123, tokens_per_second=812.4)
  text = capsys.readouterr().err
  first, last = text.strip().split("\r")[0], text.strip().split("\r")[-1]
  assert first.startswith("train:  95%") and "40/42 [" in first
  assert last.startswith("train: 100%") and "42/42 [" in last
  assert last.endswith("<00:00, loss 0.412, 812 tokens/s]")


def test_a_log_file_is_not_filled_with_bars(capsys):
  with Progress(start=0, total=500) as progress:
    for _ in range(500):
      progress.update(loss=1.0, tokens_per_second=1.0)
  assert capsys.readouterr().err.count("\r") <= 4
