"""Every task of a config has what `lora_jax.tasks.NamedTask` promises to the main programs."""

import pytest

from lora_jax import tasks

PROMISED = {
  name
  for protocol in (tasks.Task, tasks.NamedTask)
  for name in vars(protocol).keys() | protocol.__annotations__.keys()
  if not name.startswith("_")
}


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_has_every_method_and_constant(name):
  assert {"of", "FIELDS", "TRAINS", "mark", "answers", "chat_format"} <= PROMISED
  assert not [x for x in sorted(PROMISED) if not hasattr(tasks.TASKS[name], x)]
