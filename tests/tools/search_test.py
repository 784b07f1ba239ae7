"""tools/build_index.py and tools/search.py as a person runs them."""

import json
import re

import numpy as np
from processes import ROOT
from processes import run_tool
from processes import run_tool_on_hosts
import pytest
from small_cross_encoder import write_cross_encoder
from small_encoder import write_encoder

from rag_jax.search.directory import OpenedDirectory
from rag_jax.search.reranker import Reranker

DOCUMENTS = {
  "mole.md": "# Mount Mole\nMount Mole is 1,863 metres high.\n",
  "contract.txt": "The contract ends in March. Either side can leave it.\n",
  "deep/bread.html": "<title>Bread</title><p>Bake it for 40 minutes.</p>",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Documents, an encoder, and what was built of them."""
  root = tmp_path_factory.mktemp("own")
  for name, text in DOCUMENTS.items():
    path = root / "documents" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  write_encoder(root / "encoder", list(DOCUMENTS.values()) * 4)
  return root


def build(folder, *arguments, output="index"):
  return run_tool(
    "build_index.py",
    f"--corpus={folder / 'documents'}",
    f"--encoder={folder / 'encoder'}",
    f"--output={folder / output}",
    *arguments,
  )


@pytest.fixture(scope="module")
def built(folder):
  process = build(folder, "--kind=exact")
  assert process.returncode == 0, process.stderr
  return process


def test_a_folder_of_text_is_built_and_certified(folder, built):
  assert "| index_recall@1 | 1.0000" in built.stdout
  assert "3 passages can be searched in" in built.stdout
  assert "3  documents read" in built.stderr
  manifest = json.loads((folder / "index/index/manifest.json").read_text())
  printed = manifest["content"]["certificate"]["recalls"][0]
  assert printed["mean"] == 1.0


def test_the_answer_is_printed_with_its_title_and_file(folder, built):
  process = run_tool(
    "search.py",
    f"--index={folder / 'index'}",
    "--n_docs=1",
    "--mode=bm25",
    "how high is the mount?",
    "baking for minutes",
  )
  assert process.returncode == 0, process.stderr
  first, second = process.stdout.split("\n\nbaking for minutes\n")
  assert "Mount Mole  [mole.md]" in first
  assert "1,863 metres" in first
  assert "Bread  [deep/bread.html]" in second


def test_of_a_small_folder_all_passages_are_shown(folder, built):
  process = run_tool(
    "search.py", f"--index={folder / 'index'}", "how high is the mount?"
  )
  assert process.returncode == 0, process.stderr
  assert process.stdout.count("[") == len(DOCUMENTS)


def test_a_cross_encoder_chooses_from_the_candidates(folder, built):
  write_cross_encoder(folder / "cross", list(DOCUMENTS.values()) * 4)
  process = run_tool(
    "search.py",
    f"--index={folder / 'index'}",
    f"--rerank={folder / 'cross'}",
    "--candidates=2",
    "--n_docs=1",
    "--json",
    "how high is the mount?",
  )
  assert process.returncode == 0, process.stderr
  (hit,) = json.loads(process.stdout)["passages"]
  first = OpenedDirectory(folder / "index").search(
    ["how high is the mount?"], 2
  )[0]
  reranker = Reranker.open(folder / "cross")
  texts = [f"{h.passage.title} {h.passage.text}" for h in first]
  (logits,) = reranker.score(["how high is the mount?"], [texts])
  assert hit["id"] == first[int(np.argmax(logits))].passage.id
  assert hit["score"] == pytest.approx(float(logits.max()), abs=1e-5)


def test_where_nothing_is_found_it_is_said(folder, built):
  process = run_tool(
    "search.py",
    f"--index={folder / 'index'}",
    "--filter=lang=en",
    "how high is the mount?",
  )
  assert process.returncode == 0, process.stderr
  assert "No passage was found" in process.stdout
  assert "None of 3 passages was found that meets lang=en" in process.stderr


def test_json_is_for_programs_and_questions_come_through_a_pipe(folder, built):
  process = run_tool(
    "search.py",
    f"--index={folder / 'index'}",
    "--n_docs=2",
    "--json",
    "-",
    input="the contract\n\nBread\n",
  )
  assert process.returncode == 0, process.stderr
  found = [json.loads(line) for line in process.stdout.splitlines()]
  assert [one["question"] for one in found] == ["the contract", "Bread"]
  assert all(len(one["passages"]) == 2 for one in found)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--n_docs=0", "a"], "n_docs=0 .* expected at least 1"),
    (["--filter=lang", "a"], "'lang' is not understood"),
    ([], "Give a question"),
    (["--candidates=9", "a"], "names no cross-encoder, and there was none"),
    (["--rerank={}/encoder", "a"], "the head that scores a pair"),
  ],
)
def test_a_search_that_cannot_be_done_is_a_message(
  folder, built, arguments, message
):
  given = [argument.format(folder) for argument in arguments]
  process = run_tool("search.py", f"--index={folder / 'index'}", *given)
  assert process.returncode == 1
  assert "Traceback" not in process.stderr
  text = process.stderr + process.stdout
  assert re.search(message, text)


@pytest.mark.parametrize(
  ("name", "data", "message"),
  [
    ("bad.txt", b"caf\xe9", r"bad\.txt.*not UTF-8"),
    ("empty.md", b"", r"empty\.md"),
  ],
)
def test_a_bad_file_stops_the_build_or_is_counted(
  folder, built, name, data, message
):
  bad = folder / "documents" / name
  bad.write_bytes(data)
  try:
    process = build(folder, "--kind=exact", output=f"{name} fails")
    assert process.returncode == 1
    assert re.search(message, process.stderr, re.S)
    assert "Traceback" not in process.stderr
    process = build(
      folder, "--kind=exact", "--on_bad_record=skip", output=f"{name} skips"
    )
    assert process.returncode == 0, process.stderr
    assert name in process.stderr
    assert "3 passages can be searched" in process.stdout
  finally:
    bad.unlink()


def test_an_encoder_that_is_not_there_is_a_message(folder):
  process = run_tool(
    "build_index.py",
    f"--corpus={folder / 'documents'}",
    f"--encoder={folder / 'nothing'}",
    f"--output={folder / 'x'}",
  )
  assert process.returncode == 1
  assert "There is no directory" in process.stderr
  assert "Traceback" not in process.stderr


def test_two_hosts_build_and_search_as_one_does(folder, built):
  pair = run_tool_on_hosts(
    "build_index.py",
    f"--corpus={folder / 'documents'}",
    f"--encoder={folder / 'encoder'}",
    f"--output={folder / 'of two'}",
    "--kind=exact",
  )
  for number, (status, text, _) in enumerate(pair):
    assert status == 0, text
    assert ("3 passages can be searched" in text) == (not number)
  asked = ("--json", "how high is the mount?", "who can leave?", "the oven")
  alone = run_tool("search.py", f"--index={folder / 'index'}", *asked)
  (_, first, _), (_, second, _) = run_tool_on_hosts(
    "search.py", f"--index={folder / 'of two'}", *asked
  )

  def answers(text):
    lines = [x for x in text.splitlines() if x.startswith('{"question')]
    return [
      (line["question"], [p["id"] for p in line["passages"]])
      for line in map(json.loads, lines)
    ]

  assert len(answers(alone.stdout)) == 3
  assert answers(first) == answers(alone.stdout)
  assert not answers(second)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ("quickstart", "The config names no encoder.init_from. Expected a checkp"),
    ("nq_rag_token", "index.kind='device' is an index in the memory of accel"),
  ],
)
def test_a_config_that_names_no_index_of_a_directory_is_refused(
  config, message, tmp_path
):
  process = run_tool(
    "build_index.py",
    f"--config={ROOT / 'configs' / config}.py",
    f"--output={tmp_path / 'index'}",
  )
  assert process.returncode == 1
  assert process.stderr.startswith(f"ValueError: {message}")
  assert not (tmp_path / "index").exists()


def test_flags_come_before_the_config_of_an_experiment(folder):
  process = build(
    folder,
    f"--config={ROOT / 'configs/wiki_embed.py'}",
    "--config.index.embed_batch_size=4",
    "--config.data.passage_length=20",
    "--kind=exact",
    output="by_config",
  )
  assert process.returncode == 0, process.stderr
  plan = json.loads((folder / "by_config/manifest.json").read_text())
  plan = plan["content"]["plan"]
  assert plan["index"]["kind"] == "exact"
  assert plan["index"]["passages_per_shard"] == 330_000
  assert (plan["passage_length"], plan["embed_batch_size"]) == (20, 4)


def test_without_a_config_corpus_and_encoder_are_required(folder):
  process = run_tool("build_index.py", f"--output={folder / 'none'}")
  assert process.returncode == 1
  assert "Flag --corpus must have a value other than None" in process.stderr
