"""tools/update_index.py as a person runs it."""

import json
import re

from processes import run_tool
import pytest
from small_encoder import write_encoder
from small_search import build
from small_search import config

from rag_jax.search.directory import OpenedDirectory

DOCUMENTS = {
  "mole.md": "# Mount Mole\nMount Mole is 1,863 metres high.\n",
  "contract.txt": "The contract ends in March. Either side can leave it.\n",
  "deep/bread.html": "<title>Bread</title><p>Bake it for 40 minutes.</p>",
}


def run(*arguments):
  """Returns the finished process."""
  return run_tool("update_index.py", *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Documents, and what was built of them."""
  root = tmp_path_factory.mktemp("own")
  for name, text in DOCUMENTS.items():
    path = root / "documents" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  encoder = write_encoder(root / "encoder", list(DOCUMENTS.values()) * 4)
  build(root / "documents", encoder, root / "index", config())
  return root


def test_a_changed_folder_is_put_in_and_ids_are_taken_out(folder):
  documents = folder / "documents"
  (documents / "contract.txt").write_text("The contract ends in May.")
  (documents / "rent.txt").write_text("The rent is paid in advance.")
  (folder / "ids.txt").write_text("mole.md\n\n")
  (documents / "mole.md").unlink()
  process = run(
    f"--index={folder / 'index'}",
    f"--upsert={documents}",
    f"--delete={folder / 'ids.txt'}",
  )
  assert process.returncode == 0, process.stderr
  assert process.stdout.splitlines()[:5] == [
    "1 documents added: rent.txt",
    "1 documents changed: contract.txt",
    "1 documents deleted: mole.md",
    "1 documents as they were",
    "2 passages added (2 embedded), 2 removed: version v000001",
  ]
  assert "index_recall@2 1.0000" in process.stdout
  assert "Build a new directory" in process.stdout
  hits = OpenedDirectory(folder / "index").search(["x"], 3)[0]
  assert {h.passage.id for h in hits} == {
    "contract.txt", "rent.txt", "deep/bread.html"
  }  # fmt: skip


def test_weights_are_fitted_and_what_went_is_purged(folder):
  rows = [
    {"question": question, "answers": [], "gold": [gold], "id": str(number)}
    for number in range(10)
    for question, gold in (("when is rent paid?", "rent.txt"),
                           ("how long do I bake it?", "deep/bread.html"))
  ]  # fmt: skip
  file = folder / "questions.jsonl"
  for number, row in enumerate(rows):
    row["id"] = str(number)
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  index = folder / "index"
  process = run(f"--index={index}", f"--fit_hybrid={file}", "--compact")
  assert process.returncode == 0, process.stderr
  assert re.search(r"best mode: \w+ \(on 20 questions among 3", process.stdout)
  assert "3 passages are left; deleted texts are removed" in process.stdout
  directory = OpenedDirectory(index)
  assert directory.root.name == "b000001"
  assert directory.index.certificate.modes.num_questions == 20
  process = run_tool(
    "search.py", f"--index={index}", "--mode=bm25", "--json",
    "--stemmer=english", "--stop_words=english", "the rents", "the",
  )  # fmt: skip
  assert process.returncode == 0, process.stderr
  found = [json.loads(line) for line in process.stdout.splitlines()]
  ids = [[p["id"] for p in one["passages"]] for one in found]
  assert ids == [["rent.txt"], []]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "Nothing is to be put"),
    (["--delete=a,b"], r"not there: \['a', 'b'\]"),
    (["--upsert=nowhere.txt"], "nowhere.txt"),
  ],
)
def test_an_update_that_cannot_be_done_is_a_message(folder, arguments, message):
  process = run(f"--index={folder / 'index'}", *arguments)
  assert process.returncode == 1
  assert "Traceback" not in process.stderr
  assert re.search(message, process.stderr)
