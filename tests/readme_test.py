"""The Python of README.md runs as it stands there."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(
  r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S
)


def test_there_are_snippets():
  assert len(SNIPPETS) >= 2


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs_as_it_stands(
  learned, tmp_path, monkeypatch, capsys, number
):
  # What the first command of README.md leaves, in small.
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs/quickstart").symlink_to(learned.workdir)
  monkeypatch.chdir(tmp_path)
  exec(compile(SNIPPETS[number], f"README.md, snippet {number}", "exec"), {})
  printed = capsys.readouterr().out
  assert re.search(r"Paris|Lima", printed), printed
