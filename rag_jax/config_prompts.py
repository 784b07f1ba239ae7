"""Checks the settings of prompts: the template, and what goes with it.

In: a `Config`. Out: its problems. Also makes the template of a prompt, which
data/prompts.py renders.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import typing

from rag_jax.config import Config
from rag_jax.config import PromptConfig

if typing.TYPE_CHECKING:
  import jinja2

_EXPECTED = (
  "Expected a Jinja template such as '{% for passage in passages %}"
  "{{ passage.title }} {{ passage.text }}\\n{% endfor %}{{ question }}'."
)
_NAMES = {"question", "passages"}
_HISTORY = "history"
_EXAMPLE = {"title": "Title", "text": "Text."}


def compile_template(template: str) -> "jinja2.Template":
  """Returns a template that cannot reach anything but what it is given.

  Raises:
    jinja2.TemplateError: it is no template.
  """
  return _environment().from_string(template)


def history_of(turns: Sequence[str]) -> list[dict[str, str]]:
  """Returns earlier turns of a dialogue as a template reads them.

  Args:
    turns: the oldest first; the last one answers the one who asks now.
  """
  speakers = "assistant", "user"
  return [
    {"speaker": speakers[(len(turns) - 1 - i) % 2], "text": turn}
    for i, turn in enumerate(turns)
  ]


def shows_history(template: str) -> bool:
  """Returns whether a template shows earlier turns by itself."""
  import jinja2.meta

  tree = _environment().parse(template)
  return _HISTORY in jinja2.meta.find_undeclared_variables(tree)


def _environment() -> "jinja2.Environment":
  import jinja2.sandbox  # most runs have no prompts

  return jinja2.sandbox.ImmutableSandboxedEnvironment(
    autoescape=False,  # a prompt is text, not HTML
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
  )


def template_problem(template: str, n_docs: int) -> str:
  """Returns what is wrong with prompt.template, or "".

  Args:
    template: of a prompt.
    n_docs: documents per question.
  """
  import jinja2.meta

  environment = _environment()
  try:
    compiled = environment.from_string(template)
    tree = environment.parse(template)
  except (jinja2.TemplateError, RecursionError) as error:
    line = getattr(error, "lineno", 1)
    return (
      f"prompt.template is no Jinja template: line {line}, {error}. {_EXPECTED}"
      " Correct it."
    )
  names = jinja2.meta.find_undeclared_variables(tree) - set(environment.globals)
  if unknown := sorted(names - _NAMES - {_HISTORY}):
    return (
      f"prompt.template uses {unknown}, but there are only"
      f" {sorted(_NAMES | {_HISTORY})}. {_EXPECTED} Rename or remove them."
    )
  for name in sorted(_NAMES - names):
    if name == "question" or n_docs:
      return (
        f"prompt.template={template[:60]!r} does not use {name!r}, so that the"
        f" generator would read none (data.n_docs={n_docs}). {_EXPECTED} Add"
        " it."
      )
  # A question is also asked without passages, for train/doc_utility.
  for num in sorted({0, min(n_docs, 1), n_docs}):
    try:
      for turns in ((), ("Who?", "Ada")):
        compiled.render(
          question="Who?",
          passages=[_EXAMPLE] * num,
          history=history_of(turns),
        )
    except Exception as error:  # a template can fail in any way
      return (
        f"prompt.template fails for {num} passages ({error}). {_EXPECTED} It"
        " has to work with passages and without, so a loop is best. Correct"
        " it."
      )
  return ""


def prompt_problems(c: Config) -> Iterator[str]:
  """Yields the problems of the section `prompt` and of joined contexts."""
  if c.data.context_style == "prompt":
    yield from _own_problems(c.prompt, c.data.n_docs)
  else:
    default = PromptConfig()
    for field in dataclasses.fields(PromptConfig):
      value = getattr(c.prompt, field.name)
      if value != getattr(default, field.name):
        yield (
          f"prompt.{field.name}={str(value)[:60]!r} is for data.context_style="
          f"'prompt', but it is {c.data.context_style!r}. Set that, or leave"
          " out the settings of prompts."
        )
  yield from _joining_problems(c)


def _own_problems(prompt: PromptConfig, n_docs: int) -> Iterator[str]:
  if problem := template_problem(prompt.template, n_docs):
    yield problem
  if prompt.system and not prompt.chat:
    yield (
      f"prompt.system={prompt.system[:60]!r} is a message of a chat, but"
      " prompt.chat=False. Set prompt.chat=True, or write the text into"
      " prompt.template."
    )
  default = PromptConfig()
  for name in ("before_answer", "shot_separator"):
    value = getattr(prompt, name)
    if prompt.chat and value != getattr(default, name):
      yield (
        f"prompt.{name}={value[:60]!r} is for plain prompts, but with"
        " prompt.chat=True the template of the chat separates messages. Leave"
        f" prompt.{name} out, or set prompt.chat=False."
      )


def dialogue_problems(c: Config) -> Iterator[str]:
  """Yields the problems of the section `dialogue`."""
  d = c.dialogue
  if d.history_length and not d.turns:
    yield (
      f"dialogue.history_length={d.history_length} limits earlier turns, but"
      " with dialogue.turns=0 the generator reads none. Set one of them"
      " otherwise."
    )
  if d.history_length >= c.data.context_length:
    yield (
      f"dialogue.history_length={d.history_length} leaves no room for the"
      f" question in data.context_length={c.data.context_length}. Lower it, or"
      " raise data.context_length."
    )
  shown = "history" in c.prompt.template
  if c.prompt.chat and not shown and d.turns > 0 and d.turns % 2:
    yield (
      f"dialogue.turns={d.turns} begins with an answer, but messages of a chat"
      " (prompt.chat=True) begin with the one who asks. Set it to an even"
      " number, or to -1."
    )
  if d.retriever_turns > 0 and not c.data.n_docs:
    yield (
      f"dialogue.retriever_turns={d.retriever_turns} is for a retriever, but"
      " data.n_docs=0 is closed book and has none. Set it to -1."
    )
  if not d.separator and d.turns and not (d.user and d.assistant):
    yield (
      "dialogue.separator='' leaves nothing between turns. Expected"
      " a text such as '\\n', or dialogue.user and dialogue.assistant. Set one."
    )


def _joining_problems(c: Config) -> Iterator[str]:
  """Yields the problems of one context that holds all documents."""
  joins = {"loss": c.loss, "decoding.mode": c.decoding.mode}
  named = [name for name, value in joins.items() if value == "concatenate"]
  if not named:
    return
  if c.data.context_style != "prompt":
    yield (
      f"{named[0]}='concatenate' puts all documents into one prompt, which"
      f" needs data.context_style='prompt', but it is {c.data.context_style!r}."
      f" Set that, or choose {named[0]}='rag_token'."
    )
  if c.loss != "concatenate" or c.decoding.mode not in ("auto", "concatenate"):
    yield (
      f"loss={c.loss!r} and decoding.mode={c.decoding.mode!r}: a run reads all"
      " documents in one context or each in its own, in training and decoding"
      " alike. Set loss='concatenate' and decoding.mode='auto', or neither to"
      " 'concatenate'."
    )
