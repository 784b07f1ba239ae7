"""The READMEs: their Python and their cheap commands run as they stand there.

Of every other command the flags exist and have values that the tool accepts.
Their links lead somewhere.
"""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

from processes import ROOT
import pytest
from small_cross_encoder import write_cross_encoder
from small_encoder import write_encoder

from rag_jax.config import Config

READMES = [
  ROOT / folder / "README.md"
  for folder in (
    "",
    "configs",
    "rag_jax",
    "rag_jax/corpus/world_facts",
    "tools",
  )
]
PAGES = [*READMES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
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
# Commands that end within seconds with the small models of the tests.
CHEAP = re.compile(
  r"sed |python tools/(ask\.py --workdir|build_index|search|update_index)"
)
ENCODER = "hf:sentence-transformers/all-MiniLM-L6-v2"
CROSS_ENCODER = "hf:cross-encoder/ms-marco-MiniLM-L6-v2"
DOCUMENTS = {
  "contract.txt": "The contract ends on 31 March 2027.\n",
  "house.md": "# House\nThe house has two doors.\n",
}

# Parses each command line as its tool does, in a fork: flags are global, and
# the imports are slow. Prints the flags of the tool and why a line is refused.
PARSE = """
import json, os, runpy, sys
from absl import flags
import rag_jax.benchmarks.run, rag_jax.commands.command
import rag_jax.serving.pipeline
for argv in json.load(sys.stdin):
  if not os.fork():
    sys.argv, error = argv, ""
    runpy.run_path(argv[0], run_name="tool")
    names = list(flags.FLAGS)
    try:
      flags.FLAGS(argv)
    except Exception as e:
      error = repr(e)
    found = {"argv": argv, "names": names, "error": error}
    print(json.dumps(found), flush=True)
    os._exit(0)
  os.wait()
"""


def name(path):
  return str(path.relative_to(ROOT))


def commands(path):
  """Returns the command lines of a page, in order, continued lines joined."""
  text = re.sub(r"\\\n\s*", "", path.read_text())
  return re.findall(
    r"^(?:    )?((?:gcloud|pip|pytest|python|ruff|sed|xpk) .*)$", text, re.M
  )


def spans(path):
  """Returns what stands between backticks in a page."""
  return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", path.read_text())


def tool_calls(path):
  """Returns [tool, argument, ...] of each call of a tool in a page."""
  calls = []
  for line in [*commands(path), *spans(path)]:
    inner = re.search(r'--command="(.*)"', line)  # on the hosts of a pod
    for call in re.findall(
      r"python (tools/[^&|<>#]*)", inner[1] if inner else line
    ):
      tool, *arguments = shlex.split(call)
      if pathlib.Path(tool).name in TOOLS:
        calls.append([tool, *arguments])
  return calls


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


@pytest.fixture(scope="module")
def parsed():
  """What the tools say of each command line, and of no argument at all."""
  lines = [call for path in PAGES for call in tool_calls(path)]
  assert len(lines) >= 20
  done = subprocess.run(
    [sys.executable, "-c", PARSE],
    input=json.dumps([*lines, *([f"tools/{tool}"] for tool in TOOLS)]),
    env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"},
    cwd=ROOT,
    capture_output=True,
    encoding="utf-8",
    check=True,
  )
  found = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(found) == len(lines) + len(TOOLS), done.stderr
  return found[: len(lines)], found[len(lines) :]


def test_tools_accept_the_flags_of_every_command(parsed):
  # A tool that is only named has no arguments, which some require.
  refused = [line for line in parsed[0] if line["argv"][1:] and line["error"]]
  assert not refused, [(line["argv"], line["error"]) for line in refused]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_flag_that_a_page_names_exists(parsed, path):
  known = {flag for tool in parsed[1] for flag in tool["names"]} | {"help"}
  for span in spans(path):
    for flag in re.findall(r"(?:^| )--([a-z]\w*)", span):
      if not span.startswith(("ruff", "pytest")):
        assert flag in known, span
    for setting in re.findall(r"--config\.([a-z_.0-9]+)", span):
      section = Config()
      for part in setting.split("."):
        section = getattr(section, part)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_files_and_extras_that_commands_name_exist(path):
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
  ]
  for line in [*commands(path), *spans(path)]:
    for file in re.findall(r"\b(?:tests|configs|tools)/[\w/]+\.\w+", line):
      assert (ROOT / file).exists(), line
    if "pip install" in line:
      for names in re.findall(r"(?:\.|rag_jax)\[([a-z,]+)\]", line):
        assert set(names.split(",")) <= set(extras), line


@pytest.mark.parametrize(
  "path", [ROOT / "README.md", ROOT / "tools/README.md"], ids=name
)
def test_cheap_commands_run_one_after_the_other(learned, tmp_path, path):
  for folder in ("tools", "rag_jax", "configs"):
    (tmp_path / folder).symlink_to(ROOT / folder)
  (tmp_path / "runs").mkdir()
  for run in ("quickstart", "dialogue"):
    (tmp_path / "runs" / run).symlink_to(learned.workdir)
  (tmp_path / "other.jsonl").symlink_to(learned.passages)
  (tmp_path / "questions.txt").write_text("What is the capital of Peru?\n")
  documents = tmp_path / "documents"
  documents.mkdir()
  for file, text in DOCUMENTS.items():
    (documents / file).write_text(text)
  encoder = write_encoder(tmp_path / "encoder", [*DOCUMENTS.values()] * 4)
  cross = write_cross_encoder(tmp_path / "cross", [*DOCUMENTS.values()] * 4)
  printed = {}
  for line in filter(CHEAP.match, commands(path)):
    if "update_index" in line:  # what came, changed and went since the build
      (documents / "deposit.txt").write_text("The deposit is 900 euros.\n")
      (documents / "contract.txt").write_text("The contract has no end.\n")
      (documents / "house.md").unlink()
    done = subprocess.run(
      line.replace(ENCODER, str(encoder)).replace(CROSS_ENCODER, str(cross)),
      shell=True,
      cwd=tmp_path,
      env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
      stdin=subprocess.DEVNULL,
      capture_output=True,
      encoding="utf-8",
      check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
    printed[line] = done.stdout
  shown = "\n".join(printed.values())
  assert "\nParis   (p = " in shown
  assert "[contract.txt]" in shown
  if path.parent == ROOT:
    assert "\nMarseille   (p = " in shown
  else:
    assert '"text": "Lima"' in shown
    assert "1 documents deleted: house.md" in shown
