"""Reads the title, text and headings of Markdown.

In: Markdown. Out: the text as it is rendered: without marks, one line per
paragraph, code unchanged. The only file that imports markdown-it, which follows
CommonMark, https://spec.commonmark.org, with GitHub's tables and strikethrough.
"""

import dataclasses
import functools
import re
import tomllib
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from mdit_py_plugins.deflist import deflist_plugin
from mdit_py_plugins.footnote import footnote_plugin
from mdit_py_plugins.tasklists import tasklists_plugin
import yaml

from rag_jax.corpus.html_text import Page
from rag_jax.corpus.html_text import read_html
from rag_jax.corpus.text_spans import DATA_ADDRESS

_MAX_NESTING = 150  # levels of lists and quotes; deeper ones are not read
# Front matter: the settings of a site generator before the text.
_FRONT = re.compile(
  r"\A\ufeff?(---|\+\+\+)[ \t]*\r?\n(.*?)^(?:\1|\.\.\.)[ \t]*\r?(?:\n|\Z)",
  re.DOTALL | re.MULTILINE,
)
# GitHub shows these tags as text; as HTML they would swallow what follows.
_SWALLOWS = re.compile(
  r"(?i)<(/?(?:title|textarea|style|xmp|iframe|noembed|noframes|script"
  r"|plaintext|template|noscript|select|head|body|html|frameset)\b)"
)
_PLAIN_TITLE = re.compile(r"(?m)^title[ \t]*[:=][ \t]*(.+?)[ \t]*$")


def without_data(text: str) -> tuple[str, int]:
  """Returns Markdown without data URLs, and how many characters they had."""
  kept, num = DATA_ADDRESS.subn("data:,", text)
  return kept, len(text) - len(kept) if num else 0


def read_markdown(text: str) -> Page:
  """Returns the page that Markdown is rendered to.

  The title is that of the front matter (YAML or TOML before the text), else the
  first heading. Front matter is not part of the text.
  """
  title = ""
  if front := _FRONT.match(text):
    found = _front_title(front[2], toml=front[1] == "+++")
    if found is not None:
      title, text = found, text[front.end() :]
  page = read_html(_parser().render(text))
  return dataclasses.replace(page, title=title or page.title)


def markdown_html(text: str) -> str:
  """Returns Markdown as HTML."""
  return _parser().render(text)


def _front_title(front: str, toml: bool) -> str | None:
  """Returns the title in front matter, or ""; None if it is ordinary text."""
  try:
    fields = tomllib.loads(front) if toml else yaml.safe_load(front)
  except (tomllib.TOMLDecodeError, yaml.YAMLError, ValueError, RecursionError):
    # Site generators accept more than YAML, for instance "title: A: b".
    plain = _PLAIN_TITLE.search(front)
    return plain[1].strip("\"'") if plain else None
  if fields is None:
    return ""
  if not isinstance(fields, dict):
    return None  # a paragraph between two rules
  title = fields.get("title", fields.get("Title"))
  return "" if title is None or isinstance(title, dict | list) else str(title)


def _escaped(self: Any, tokens: Any, index: int, *_: Any) -> str:
  """Renders HTML inside Markdown; tags that would swallow the rest are text."""
  content = tokens[index].content
  name = _SWALLOWS.search(content)
  if name and tokens[index].type == "html_block":
    tag = name[1].lower().lstrip("/")
    if len(re.findall(rf"(?i)<{tag}\b", content)) == len(
      re.findall(rf"(?i)</{tag}\b", content)
    ):
      return content  # every tag is closed in the same block
  return _SWALLOWS.sub(r"&lt;\1", content)


def _fence(self: Any, tokens: Any, index: int, *_: Any) -> str:
  return f"<pre><code>{escapeHtml(tokens[index].content)}</code></pre>\n"


def _image(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
  """Renders a picture as its alternative text."""
  inner = self.renderInlineAsText(tokens[index].children, options, env)
  return f" {escapeHtml(inner)} "


@functools.cache
def _parser() -> MarkdownIt:
  parser = MarkdownIt("commonmark", {"maxNesting": _MAX_NESTING}).enable(
    ["table", "strikethrough"]
  )
  parser.use(footnote_plugin).use(deflist_plugin).use(tasklists_plugin)
  # Nothing is fetched. A link that is not allowed would be shown as text.
  parser.validateLink = lambda url: True
  parser.add_render_rule("html_inline", _escaped)
  parser.add_render_rule("html_block", _escaped)
  parser.add_render_rule("fence", _fence)
  parser.add_render_rule("image", _image)
  parser.add_render_rule("footnote_anchor", lambda *_: "")
  return parser
