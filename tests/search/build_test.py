"""A folder of text becomes a directory that answers, whatever happens."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from small_encoder import POSITIONS
from small_encoder import write_encoder
from small_search import QUESTION
from small_search import build
from small_search import config
from small_search import files_of

from rag_jax.corpus.splitting import SplitConfig
from rag_jax.directory_lock import building
from rag_jax.retrieval import certified_index
from rag_jax.search import build as search_build
from rag_jax.search.build import BuildConfig
from rag_jax.search.directory import OpenedDirectory
from rag_jax.search.directory import write_content
from rag_jax.search.update import update_search_directory


@pytest.fixture(scope="module")
def uninterrupted(built):
  return files_of(built.path)


def test_the_certificate_stands_in_the_manifest(built):
  manifest = json.loads((built.path / "index/manifest.json").read_text())
  certificate = manifest["content"]["certificate"]
  assert [r["k"] for r in certificate["recalls"]] == [1, 10, 39]
  assert all(r["mean"] == 1.0 for r in certificate["recalls"])
  assert certificate["sample"] == "passages"


def test_questions_certify_the_index_where_they_are_given(
  corpus, encoder, tmp_path
):
  made = build(corpus, encoder, tmp_path, questions=[QUESTION, "the cows"])
  assert made.index.certificate.sample == "questions"
  assert made.index.certificate.num_questions == 2


def test_a_tuned_index_reaches_its_target_on_questions_of_its_own(
  corpus, encoder, texts, tmp_path
):
  pytest.importorskip("scann")
  made = config(target_recall=0.9)
  made.index.kind = "scann"
  questions = [text.removeprefix("the ") for text in texts]
  directory = build(corpus, encoder, tmp_path, made, questions=questions)
  assert directory.index.kind == "scann"
  certificate = directory.index.certificate
  assert certificate.num_questions == len(questions) // 2
  assert certificate.recall(10).high >= 0.9


@pytest.mark.parametrize(
  ("kind", "target", "questions", "message"),
  [
    ("exact", 0.9, 30, "kind 'exact'; expected .* kind 'scann'"),
    ("scann", 1.5, 30, "target_recall=1.5 .* at most 1"),
    ("scann", 0.9, 19, "there are 19; expected at least 20"),
  ],
)
def test_tuning_that_cannot_be_done_is_refused(
  corpus, encoder, tmp_path, kind, target, questions, message
):
  if kind == "scann":
    pytest.importorskip("scann")
  made = config(target_recall=target)
  made.index.kind = kind
  with pytest.raises(ValueError, match=message):
    build(corpus, encoder, tmp_path, made, questions=["a"] * questions)


def test_long_passages_are_cut_where_the_encoder_says_and_counted(
  encoder, tmp_path, texts
):
  (tmp_path / "docs").mkdir()
  (tmp_path / "docs/long.txt").write_text(" ".join(texts))
  (tmp_path / "docs/short.txt").write_text("the owls live")
  made = build(tmp_path / "docs", encoder, tmp_path / "index")
  assert made.content["num_cut"] == 1
  short = build(
    tmp_path / "docs",
    encoder,
    tmp_path / "short",
    config(passage_length=POSITIONS - 4),
  )
  assert not np.array_equal(short.index.embeddings[0], made.index.embeddings[0])
  np.testing.assert_allclose(
    short.index.embeddings[1], made.index.embeddings[1], rtol=1e-5
  )


def test_by_default_all_of_a_document_is_embedded(encoder, tmp_path, texts):
  (tmp_path / "docs").mkdir()
  (tmp_path / "docs/long.md").write_text(
    "# The north\n" + ". ".join(texts) + f"\n## Hills\n{'ab3X' * 500}\n"
  )
  default = BuildConfig()
  made = config(split=default.split)
  directory = build(tmp_path / "docs", encoder, tmp_path / "fits", made)
  assert len(directory.passages) > 1
  assert directory.content["num_cut"] == 0
  coverage = directory.index.certificate.coverage
  assert (coverage.lost, coverage.left_out_chars) == (0, 2000)
  assert coverage.tokens > 0
  text = " ".join(p.text for p in directory.passages)
  assert text.split() == [*". ".join(texts).split(), "Hills"]
  # By words, as it was, much is cut off: the certificate says how much.
  words = config(split=SplitConfig())
  before = build(tmp_path / "docs", encoder, tmp_path / "words", words)
  coverage = before.index.certificate.coverage
  assert 0.2 < coverage.lost / coverage.tokens < 1
  share = f"{coverage.lost / coverage.tokens:.1%}"
  assert f"| not embedded | {share} of the tokens" in (
    before.index.certificate.table()
  )
  assert before.content["coverage"]["lost"] == coverage.lost
  # What was built goes on to be split as it was built.
  update_search_directory(before.path, upsert=str(tmp_path / "docs"))
  before.reload()
  assert before.version.name == ""
  (tmp_path / "docs/new.txt").write_text(" ".join(["word"] * 150))
  update_search_directory(before.path, upsert=str(tmp_path / "docs"))
  before.reload()
  parts = [p.text for p in before.passages if p.id.startswith("new")]
  assert [len(part.split()) for part in parts] == [100, 50]
  after = before.index.certificate.coverage
  assert after.tokens > coverage.tokens
  assert after.lost > coverage.lost


def test_a_directory_of_an_older_version_is_still_complete(
  corpus, encoder, built, tmp_path
):
  """Its plan does not name settings that came later."""
  shutil.copytree(built.path, tmp_path / "old")
  content = dict(built.content)
  plan = dict(content["plan"])
  plan["split"] = {
    k: v for k, v in plan["split"].items() if k != "drop_encoded"
  }
  content["plan"] = plan
  write_content(tmp_path / "old", content)
  again = build(corpus, encoder, tmp_path / "old")
  assert again.passages.fingerprint == built.passages.fingerprint


@pytest.mark.parametrize("length", [3, POSITIONS + 1])
def test_a_length_that_the_encoder_does_not_have_is_refused(
  corpus, encoder, tmp_path, length
):
  with pytest.raises(ValueError, match=f"={length} tokens .* 8 to {POSITIONS}"):
    build(corpus, encoder, tmp_path, config(passage_length=length))


def test_dpr_needs_both_of_its_encoders(corpus, texts, tmp_path):
  passages = write_encoder(tmp_path / "ctx", texts, "dpr_context", seed=1)
  questions = write_encoder(tmp_path / "q", texts, "dpr_question", seed=2)
  with pytest.raises(ValueError, match="--question_encoder"):
    build(corpus, passages, tmp_path / "a")
  with pytest.raises(ValueError, match=r"dpr_question encoder.*embed passages"):
    build(corpus, questions, tmp_path / "a")
  with pytest.raises(ValueError, match=r"dpr_context encoder.*embed questions"):
    build(corpus, passages, tmp_path / "a", question_encoder=str(passages))
  made = build(
    corpus, passages, tmp_path / "a", question_encoder=str(questions)
  )
  assert made.encoder.kind == "dpr_question"
  assert made.encoder.fingerprint != made.index.encoder_fingerprint


def test_the_same_call_again_only_opens(built, corpus, encoder, monkeypatch):
  def never(*args, **kwargs):
    raise AssertionError

  for name in ("write_store", "embed_corpus", "save_encoder"):
    monkeypatch.setattr(search_build, name, never)
  monkeypatch.setattr(certified_index, "build_index", never)
  again = build(corpus, encoder, built.path)
  assert again.passages.fingerprint == built.passages.fingerprint


def test_a_directory_of_other_inputs_is_not_written_over(
  built, corpus, encoder, texts, tmp_path, uninterrupted
):
  other = write_encoder(tmp_path / "other", texts, seed=5)
  with pytest.raises(ValueError, match="of other inputs: passage_encoder is"):
    build(corpus, other, built.path)
  with pytest.raises(ValueError, match="storage is 'float32' there and 'int8'"):
    build(corpus, encoder, built.path, config(storage="int8"))
  copied = shutil.copy(corpus, tmp_path / "changed.jsonl")
  with pytest.raises(ValueError, match="corpus is"):
    build(copied, encoder, built.path)
  assert files_of(built.path) == uninterrupted


def test_a_corpus_that_changed_is_noticed(corpus, encoder, tmp_path):
  copied = pathlib.Path(shutil.copy(corpus, tmp_path / "copy.jsonl"))
  build(copied, encoder, tmp_path / "index")
  with copied.open("a") as f:
    f.write('{"id": "new", "title": "", "text": "the yaks live here"}\n')
  with pytest.raises(ValueError, match="sources is"):
    build(copied, encoder, tmp_path / "index")


@pytest.mark.parametrize(
  "step",
  [
    "write_tokens",
    "embed_corpus",
    "build_index",
    "certify",
    "remove_job_files",
  ],
)
def test_interrupted_before_any_step_it_goes_on_to_the_same_files(
  corpus, encoder, tmp_path, monkeypatch, uninterrupted, step
):
  def stop(*args, **kwargs):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    module = certified_index if hasattr(certified_index, step) else search_build
    patch.setattr(module, step, stop)
    with pytest.raises(KeyboardInterrupt):
      build(corpus, encoder, tmp_path)
  if step != "remove_job_files":
    with pytest.raises(FileNotFoundError, match="build was cut off"):
      OpenedDirectory(tmp_path)
  build(corpus, encoder, tmp_path)
  assert files_of(tmp_path) == uninterrupted
  assert not list(tmp_path.glob("**/.*done*"))


def test_many_searchers_find_what_one_does_and_store_embeddings_once(
  corpus, encoder, tmp_path, built, monkeypatch
):
  made = config()
  made.index.passages_per_shard = 15

  def stop(*args, **kwargs):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:  # between the shards and the certificate
    patch.setattr(certified_index, "certify", stop)
    with pytest.raises(KeyboardInterrupt):
      build(corpus, encoder, tmp_path, made)
  sharded = build(corpus, encoder, tmp_path, made)
  assert sharded.index.kind == "sharded"
  assert len(sharded.index.shards) == 3
  assert sharded.index.certificate.recall(10).mean == 1.0
  for k in (1, 7, 40):
    assert sharded.search([QUESTION], k) == built.search([QUESTION], k)
  # 40 x 16 float32; the rest of index/ are manifests.
  sizes = {p: p.stat().st_size for p in (tmp_path / "index").rglob("*.npy")}
  assert list(sizes) == [tmp_path / "index/embeddings.npy"]
  assert sum(sizes.values()) < 40 * 16 * 4 + 200


@pytest.mark.parametrize(
  ("target", "per_shard", "message"),
  [(0.9, 10, "expected one of the two"), (0.0, -1, "per_shard=-1; expected")],
)
def test_shards_that_cannot_be_are_refused(
  corpus, encoder, tmp_path, target, per_shard, message
):
  pytest.importorskip("scann")
  made = config(target_recall=target)
  made.index.kind, made.index.passages_per_shard = "scann", per_shard
  with pytest.raises(ValueError, match=message):
    build(corpus, encoder, tmp_path, made, questions=["a"] * 30)


def test_two_builds_at_once_are_refused(corpus, encoder, tmp_path):
  with (
    building(tmp_path, kind="search directory", own=lambda name: True),
    pytest.raises(ValueError, match="Somebody else is building"),
  ):
    build(corpus, encoder, tmp_path)


def test_a_directory_with_other_things_in_it_is_refused(
  corpus, encoder, tmp_path
):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(ValueError, match=r"thesis\.tex"):
    build(corpus, encoder, tmp_path)
  assert (tmp_path / "thesis.tex").read_text() == "years of work"


_SLOW_BUILD = """
import sys
import time

corpus, encoder, output, *folders = sys.argv[1:]
sys.path[:0] = folders
import small_search
from rag_jax.search import build as search_build

inner = search_build.embed_corpus

def slowly(*args):
  def wait(shard):
    print(shard, flush=True)
    time.sleep(0.3)

  return inner(*args, wait)

search_build.embed_corpus = slowly
small_search.build(corpus, encoder, output)
"""


def test_killed_in_the_middle_it_goes_on_to_the_same_files(
  corpus, encoder, tmp_path, uninterrupted
):
  helpers = pathlib.Path(__file__).parents[1] / "helpers"
  arguments = corpus, encoder, tmp_path, helpers
  process = subprocess.Popen(
    [sys.executable, "-c", _SLOW_BUILD, *map(os.fspath, arguments)],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  while (line := process.stdout.readline()) and line != "1\n":
    pass
  assert line == "1\n"
  process.send_signal(signal.SIGKILL)
  process.communicate()
  embedded = []
  inner = search_build.embed_corpus

  def counted(*args):
    return inner(*args, embedded.append)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(search_build, "embed_corpus", counted)
    build(corpus, encoder, tmp_path)
  assert embedded in ([2, 3], [3])
  assert files_of(tmp_path) == uninterrupted


_SHARED_BUILD = """
import sys

import jax

process, port, corpus, encoder, output, *folders = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
  coordinator_address=f"localhost:{port}",
  num_processes=2,
  process_id=int(process),
)
sys.path[:0] = folders
import small_search

directory = small_search.build(corpus, encoder, output)
print("found", directory.search(["the bees"], 1, mode="bm25")[0][0].passage.id)
"""


def test_two_processes_build_what_one_does(
  corpus, encoder, tmp_path, uninterrupted, built
):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  helpers = pathlib.Path(__file__).parents[1] / "helpers"
  arguments = [os.fspath(x) for x in (corpus, encoder, tmp_path, helpers)]
  both = [
    subprocess.Popen(
      [sys.executable, "-c", _SHARED_BUILD, str(process), port, *arguments],
      env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
      | {"JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      text=True,
    )
    for process in range(2)
  ]
  printed = [process.communicate(timeout=200)[0] for process in both]
  best = built.search(["the bees"], 1, mode="bm25")[0][0].passage.id
  assert all(f"found {best}" in text for text in printed)
  assert files_of(tmp_path) == uninterrupted


@pytest.mark.parametrize("missing", ["corpus", "encoder"])
def test_what_is_not_there_is_said_before_anything_is_made(
  corpus, encoder, tmp_path, missing
):
  paths = {"corpus": corpus, "encoder": encoder} | {missing: tmp_path / "no"}
  with pytest.raises((FileNotFoundError, ValueError), match="no"):
    build(paths["corpus"], paths["encoder"], tmp_path / "index")
  assert not (tmp_path / "index").exists()


def test_prompts_titles_and_a_cut_are_part_of_what_is_embedded(
  encoder, tmp_path
):
  """As if they stood in the texts; and an update embeds as a build does."""

  def write(name, texts):
    rows = [("cows", text) for text in texts]
    if name == "written":
      rows = [("", f"passage: {title} {text}") for title, text in rows]
    path = tmp_path / f"{name}.jsonl"
    path.write_text(
      "".join(
        json.dumps({"id": str(i), "title": title, "text": text}) + "\n"
        for i, (title, text) in enumerate(rows)
      )
    )
    return path

  chosen = {"passage_prompt": "passage: ", "title_sep": " "}
  made = config(question_prompt="query: ", truncate_dim=3, **chosen)
  opened = {}
  for name, settings in (("plain", made), ("written", config())):
    corpus = write(name, ["live", "of the north"])
    opened[name] = build(corpus, encoder, tmp_path / name, settings)
    corpus = write(name, ["live", "of the north", "by day and by night"])
    update_search_directory(tmp_path / name, upsert=str(corpus))
    opened[name].reload()

  def cut(embeddings):
    first = embeddings[:, :3]
    return first / np.linalg.norm(first, axis=1, keepdims=True)

  short, full = opened["plain"], opened["written"]
  assert [p.id for p in short.passages] == [p.id for p in full.passages]
  rows = np.arange(3)
  np.testing.assert_allclose(
    short.index.embeddings[rows], cut(full.index.embeddings[rows]), rtol=1e-5
  )
  ask = OpenedDirectory(tmp_path / "plain").encoder
  np.testing.assert_allclose(
    ask.embed_questions(short._embedder, ["the owls"]),
    cut(full.encoder.embed_questions(full._embedder, ["query: the owls"])),
    rtol=1e-5,
  )
  assert ask.wording == short.encoder.wording
  with pytest.raises(ValueError, match=r"wording is .* is 3 there"):
    build(tmp_path / "plain.jsonl", encoder, tmp_path / "plain")
  with pytest.raises(ValueError, match=r"truncate_dim=999 numbers .* makes"):
    build(
      tmp_path / "plain.jsonl",
      encoder,
      tmp_path / "other",
      config(truncate_dim=999),
    )
