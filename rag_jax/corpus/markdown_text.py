"""The title, text and headings of Markdown.

In: a text with Markdown's marks. Out: what a person reads of it once it is
rendered: without marks, a line for each paragraph, code as it is. The one file
that imports markdown-it, which follows CommonMark, https://spec.commonmark.org,
and is given GitHub's tables and strikethrough.
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

from rag_jax.corpus.encoded_data import DATA_ADDRESS
from rag_jax.corpus.html_text import Page
from rag_jax.corpus.html_text import read_html

_MAX_NESTING = 150  # of lists and quotes; what is deeper is not read
# Settings of a site's generator, before the text.
_FRONT = re.compile(
  r"\A\ufeff?(---|\+\+\+)[ \t]*\r?\n(.*?)^(?:\1|\.\.\.)[ \t]*\r?(?:\n|\Z)",
  re.DOTALL | re.MULTILINE,
)
# GitHub shows their tags: what follows would be their text.
_SWALLOWS = re.compile(
  r"(?i)<(/?(?:title|textarea|style|xmp|iframe|noembed|noframes|script"
  r"|plaintext|template|noscript|select|head|body|html|frameset)\b)"
)
_PLAIN_TITLE = re.compile(r"(?m)^title[ \t]*[:=][ \t]*(.+?)[ \t]*$")


def without_data(text: str) -> tuple[str, int]:
  """Returns Markdown without pictures in addresses, and their characters."""
  kept, num = DATA_ADDRESS.subn("data:,", text)
  return kept, len(text) - len(kept) if num else 0


def read_markdown(text: str) -> Page:
  """Returns what a person reads of Markdown.

  The title is that of the front matter (YAML or TOML before the text, which is
  no text), else the first heading.
  """
  title = ""
  if front := _FRONT.match(text):
    found = _front_title(front[2], toml=front[1] == "+++")
    if found is not None:
      title, text = found, text[front.end() :]
  page = read_html(_parser().render(text))
  return dataclasses.replace(page, title=title or page.title)


def markdown_html(text: str) -> str:
  """Returns Markdown as HTML, for a document that holds some."""
  return _parser().render(text)


def _front_title(front: str, toml: bool) -> str | None:
  """Returns the title that front matter names, or ""; None if it is text."""
  try:
    fields = tomllib.loads(front) if toml else yaml.safe_load(front)
  except (tomllib.TOMLDecodeError, yaml.YAMLError, ValueError, RecursionError):
    # Generators are more lenient than YAML: "title: A: b".
    plain = _PLAIN_TITLE.search(front)
    return plain[1].strip("\"'") if plain else None
  if fields is None:
    return ""
  if not isinstance(fields, dict):
    return None  # a paragraph between two lines
  title = fields.get("title", fields.get("Title"))
  return "" if title is None or isinstance(title, dict | list) else str(title)


def _escaped(self: Any, tokens: Any, index: int, *_: Any) -> str:
  """Renders HTML inside of Markdown, but for what would swallow the rest."""
  content = tokens[index].content
  name = _SWALLOWS.search(content)
  if name and tokens[index].type == "html_block":
    tag = name[1].lower().lstrip("/")
    if len(re.findall(rf"(?i)<{tag}\b", content)) == len(
      re.findall(rf"(?i)</{tag}\b", content)
    ):
      return content  # it ends where it began
  return _SWALLOWS.sub(r"&lt;\1", content)


def _fence(self: Any, tokens: Any, index: int, *_: Any) -> str:
  return f"<pre><code>{escapeHtml(tokens[index].content)}</code></pre>\n"


def _image(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
  """Renders what is written in the place of a picture."""
  inner = self.renderInlineAsText(tokens[index].children, options, env)
  return f" {escapeHtml(inner)} "


@functools.cache
def _parser() -> MarkdownIt:
  parser = MarkdownIt("commonmark", {"maxNesting": _MAX_NESTING}).enable(
    ["table", "strikethrough"]
  )
  parser.use(footnote_plugin).use(deflist_plugin).use(tasklists_plugin)
  # Nothing is fetched, and an address that is not allowed would be text.
  parser.validateLink = lambda url: True
  parser.add_render_rule("html_inline", _escaped)
  parser.add_render_rule("html_block", _escaped)
  parser.add_render_rule("fence", _fence)
  parser.add_render_rule("image", _image)
  parser.add_render_rule("footnote_anchor", lambda *_: "")
  return parser
