"""The READMEs: their Python runs as it stands there, their links exist."""

import re

from processes import ROOT
import pytest

READMES = [
  ROOT / folder / "README.md" for folder in ("", "configs", "rag_jax", "tools")
]
SNIPPETS = [
  (path, code)
  for path in READMES
  for code in re.findall(
    r"^```python\n(.*?)^```$", path.read_text(), re.M | re.S
  )
]
TOOLS = [
  path.name
  for path in (ROOT / "tools").glob("*.py")
  if '__name__ == "__main__"' in path.read_text()
]


def name(path):
  return str(path.relative_to(ROOT))


def test_there_are_snippets():
  assert len(SNIPPETS) >= 2


@pytest.mark.parametrize(
  ("path", "code"), SNIPPETS, ids=[name(path) for path, _ in SNIPPETS]
)
def test_a_snippet_runs_as_it_stands(
  learned, tmp_path, monkeypatch, capsys, path, code
):
  # What the first command of README.md leaves, in small.
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs/quickstart").symlink_to(learned.workdir)
  monkeypatch.chdir(tmp_path)
  exec(compile(code, name(path), "exec"), {})
  printed = capsys.readouterr().out
  assert re.search(r"Paris|Lima", printed), printed


def anchors(path):
  """Returns what the headings of a file are called in links."""
  text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
  return {
    re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
    for heading in re.findall(r"^#+ (.*)$", text, re.M)
  }


@pytest.mark.parametrize("path", READMES, ids=name)
def test_every_link_leads_somewhere(path):
  links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
  assert links
  for link in links:
    if link.startswith("http"):
      continue
    file, _, anchor = link.partition("#")
    target = path.parent / file if file else path
    assert target.exists(), link
    assert not anchor or anchor in anchors(target), link


def test_the_first_page_is_short():
  assert len((ROOT / "README.md").read_bytes()) <= 8 * 1024


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_is_in_the_list_of_tools(tool):
  assert f"[{tool}]({tool})" in (ROOT / "tools/README.md").read_text()
