"""Chat templates: rendered as `transformers` renders them, within limits of time and memory."""

import copy
import datetime
import json
import time

import chat_peers
import pytest

from lora_jax.data import chat_templates, messages

SHORT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, smollm2_tokenizer):
  return chat_peers.both(chat_peers.write(tmp_path_factory.mktemp("words"), smollm2_tokenizer))


def rendered(renderer, conversation, prompt=False):
  found = renderer.render(*conversation, [(len(conversation.messages), prompt)])
  return chat_templates.read(found[0]).text


def theirs(tokenizer, source, conversation, **options):
  return tokenizer.apply_chat_template(
    copy.deepcopy(conversation.messages), tools=conversation.tools, chat_template=source, **options
  )


def check_same_text(tokenizers, source, conversations):
  """Returns how many texts there are; a conversation that one refuses the other refuses too."""
  ours, peer = tokenizers
  count = 0
  with chat_peers.renderer(ours, source) as renderer:
    for conversation in conversations:
      for prompt in (False, True):
        try:
          expected = theirs(
            peer, source, conversation, tokenize=False, add_generation_prompt=prompt
          )
        except Exception:
          with pytest.raises(chat_templates.TemplateError):
            rendered(renderer, conversation, prompt)
          continue
        assert rendered(renderer, conversation, prompt) == expected
        count += 1
  return count


@pytest.mark.parametrize("name", chat_peers.OWN)
def test_texts_are_those_of_transformers(tokenizers, conversations, name):
  count = check_same_text(tokenizers, chat_peers.OWN[name], conversations)
  # Calls that are wrapped in no function are undefined to one, roles that do not alternate another.
  assert count >= {"alternating": 14, "marked": 36}.get(name, 48)


def test_the_text_of_smollm2s_own_template_is_that_of_transformers(
  tmp_path, smollm2_tokenizer, conversations
):
  smollm2_tokenizer.save(tmp_path)
  ours, peer = chat_peers.both(tmp_path)
  template = chat_templates.find(ours, None)
  assert template.source == peer.chat_template
  assert check_same_text((ours, peer), template.source, conversations) == 48


@pytest.mark.parametrize("name", chat_peers.STOCK)
def test_texts_of_stock_templates_are_those_of_transformers(tokenizers, conversations, name):
  source = (chat_peers.stock_folder() / f"{name}.jinja").read_text()
  assert check_same_text(tokenizers, source, conversations) >= 36


@pytest.mark.slow
def test_texts_of_all_published_templates_are_those_of_transformers(tokenizers, conversations):
  for path in sorted(chat_peers.stock_folder().glob("*.jinja")):
    check_same_text(tokenizers, path.read_text(), conversations)


def test_the_values_that_templates_print_are_those_of_transformers(tokenizers):
  source = """{{ messages[0].content | tojson }} {{ messages | tojson(indent=1, sort_keys=true) }}
    {{- {'ü': '<a>'} | tojson(ensure_ascii=true, separators=(',', ':')) }} {{ unknown is defined }}
    {{- pad_token }}{{ unk_token }} {{ documents }} {{ tools }} {{ dict(a=1).items() | list }}
    {{- [1.5, none, true] }} {{ 'a' ~ 1 }} {{ '%s' % 2 }} {{ messages | length }}
    {%- for x in range(5) %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% endfor %}
  """
  given = messages.Conversation([{"role": "user", "content": "<b> \"é\" 'q' &"}, SHORT[1]], None)
  assert check_same_text(tokenizers, source, [given]) == 2


def test_templates_know_the_tokens_that_transformers_tells_them(tmp_path, smollm2_tokenizer):
  folder = chat_peers.write(tmp_path, smollm2_tokenizer)
  path = folder / "tokenizer_config.json"
  token = {"content": "<|user|>", "lstrip": False, "special": True, "__type": "AddedToken"}
  extra = {"extra_special_tokens": {"image_token": "<|tool|>"}, "unk_token": token}
  path.write_text(json.dumps(json.loads(path.read_text()) | extra))
  ours, peer = chat_peers.both(folder)
  assert ours.named_tokens == peer.special_tokens_map and len(ours.named_tokens) == 5


def test_the_day_is_the_one_that_is_given(tokenizers):
  template = chat_peers.template_of(tokenizers[0], "{{ strftime_now('%A %d %b %Y') }}")
  with chat_templates.Renderer(template, date="2024-02-29") as renderer:
    expected = datetime.date(2024, 2, 29).strftime("%A %d %b %Y")
    assert renderer.render(SHORT, None, [(2, False)]) == [expected]
  with pytest.raises(ValueError, match=r"task\.date '29\.2\.2024' is no day"):
    chat_templates.check_date("task.date", "29.2.2024")


def test_templates_are_found_by_name_by_file_and_for_tools(tmp_path, smollm2_tokenizer):
  folder = chat_peers.write(tmp_path, smollm2_tokenizer)
  ours = chat_peers.both(folder)[0]
  with pytest.raises(ValueError, match="the model has no chat template, as base models"):
    chat_templates.find(ours, None)

  settings = json.loads((folder / "tokenizer_config.json").read_text())
  named = [{"name": n, "template": f"{n}!"} for n in ("default", "tool_use", "rag")]
  (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
  ours, peer = chat_peers.both(folder)
  for tools in (None, [{"name": "f"}]):
    expected = peer.get_chat_template(tools=tools)
    assert chat_templates.find(ours, None, tools=bool(tools)).source == expected
  assert chat_templates.find(ours, "rag", tools=True).source == "rag!"
  with pytest.raises(ValueError, match="no chat template 'rga'; it has default, rag, tool_use"):
    chat_templates.find(ours, "rga")

  (folder / "chat_template.jinja").write_text("a file")
  (folder / "additional_chat_templates").mkdir()
  (folder / "additional_chat_templates" / "long.jinja").write_text("another")
  ours, peer = chat_peers.both(folder)
  assert chat_templates.find(ours, None).source == peer.get_chat_template() == "a file"
  assert chat_templates.find(ours, "long").source == peer.get_chat_template("long") == "another"
  mine = tmp_path / "mine.jinja"
  mine.write_text("my own")
  assert chat_templates.find(ours, str(mine)).source == "my own"
  with pytest.raises(FileNotFoundError, match=r"yours\.jinja: no such chat template"):
    chat_templates.find(ours, str(tmp_path / "yours.jinja"))
  mine.write_text("a \ufdd3 mark")
  with pytest.raises(ValueError, match=r"mine.jinja: holds U\+FDD3, which is no character"):
    chat_templates.find(ours, str(mine))


@pytest.mark.parametrize(
  ("source", "words"),
  [
    ("{{ raise_exception('no system messages') }}", "raises 'no system messages' .its line 1."),
    ("a\n{{ messages[7].content.x }}", "fails .its line 2.: UndefinedError"),
    ("{{ 1 / 0 }}", "fails .its line 1.: ZeroDivisionError"),
    ("{{ 'a' * 10 ** 10 }}", "asks for more memory than a template may have"),
    ("{{ 'a' | center(10 ** 10) }}", "asks for more memory than a template may have"),
    ("{% for x in range(90000) %}{{ 'a' * 9999 }}{% endfor %}", "writes more than 67,108,864 ch"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without an end"),
    ("{{ ''.__class__.__mro__ }}", "reaches outside its sandbox"),
    ("{{ ''['__class__']['__mro__'] }}", "reaches outside its sandbox"),
    ("{{ (messages | attr('append')).__globals__ }}", "reaches outside its sandbox"),
    ("{{ '{0.__class__.__mro__}'.format('') }}", "reaches outside its sandbox"),
    ("{{ messages.append(1) }}", "reaches outside its sandbox"),
    ("{{ raise_exception.__globals__.json }}", "reaches outside its sandbox"),
    ("{{ strftime_now.__self__.year }}", "reaches outside its sandbox"),
    ("{{ dict.__base__ }}{{ dict.mro() }}", "reaches outside its sandbox|has no attribute 'mro'"),
    ("{% set n = namespace(__class__=1) %}", "reaches outside its sandbox"),
    ("{% set n = namespace() %}{% set n._x = 1 %}", "reaches outside its sandbox"),
    ("{{ 7 ** (10 ** 9 * messages | length) }}", "renders for more than 2 seconds"),
    ("{{ 7 ** (10 ** 9) }}", "renders for more than 2 seconds"),  # already as it is compiled
  ],
)
def test_a_hostile_template_is_an_error_with_words(tokenizers, source, words):
  with (
    pytest.raises(chat_templates.TemplateError, match=words) as caught,
    chat_peers.renderer(tokenizers[0], source, seconds=2.0) as renderer,
    renderer.named(),
  ):
    renderer.render(SHORT, None, [(2, False)])
  assert str(caught.value).startswith("the template: ") and len(str(caught.value)) < 500


def test_a_template_that_loops_for_ever_ends(tokenizers):
  source = (
    "{% for x in range(99999) %}{% for y in range(99999) %}{% for z in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
  )
  with chat_peers.renderer(tokenizers[0], source, seconds=0.5) as renderer:
    started = time.process_time()
    with pytest.raises(chat_templates.TemplateError, match=r"renders for more than 0\.5 seconds"):
      renderer.render(SHORT, None, [(2, False)])
    assert time.process_time() - started < 0.5  # here nothing was computed


@pytest.mark.parametrize(
  ("source", "words"),
  [
    ("{% for x in y %}", r"is no Jinja template \(its line 1\): Unexpected end of template"),
    ("{% include '/etc/passwd' %}", None),
    ("{% import 'os' as os %}", None),
    ("{% generation %}a", "is no Jinja template"),
    ("{{ x | nofilter }}", "No filter named 'nofilter'"),
  ],
)
def test_a_template_that_is_none_is_refused(tokenizers, source, words):
  words = words or "no loader for this env"
  with (
    pytest.raises(chat_templates.TemplateError, match=words),
    chat_peers.renderer(tokenizers[0], source) as renderer,
  ):
    renderer.render(SHORT, None, [(2, False)])


def test_a_renderer_that_is_closed_leaves_no_process(tokenizers):
  with chat_peers.renderer(tokenizers[0], chat_peers.CHATML) as renderer:
    process = renderer._process
    assert process.poll() is None
  assert process.poll() is not None


def test_without_jinja2_the_error_says_what_to_install(tokenizers, monkeypatch, tmp_path):
  (tmp_path / "jinja2.py").write_text("raise ImportError('none')")
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
  with pytest.raises(ImportError, match="chat templates need jinja2; pip install"):
    chat_peers.renderer(tokenizers[0], chat_peers.CHATML)


def test_marks_that_do_not_pair_are_refused():
  assert chat_templates.read("a\ufdd1b\ufdd2c").pieces == [("a", True), ("b", False), ("c", True)]
  assert chat_templates.read("a\ufdd3b\ufdd4c\ufdd3\ufdd4").learnt == [(1, 2), (3, 3)]
  for text in ("\ufdd1a", "a\ufdd2", "\ufdd3\ufdd3", "\ufdd4", "\ufdd1\ufdd1\ufdd2\ufdd2"):
    with pytest.raises(chat_templates.TemplateError, match="within a special token's text"):
      chat_templates.read(text)
