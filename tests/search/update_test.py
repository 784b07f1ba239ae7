"""An updated directory against one that is built of the same documents."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from small_encoder import write_encoder
from small_search import QUESTION
from small_search import build
from small_search import config

from rag_jax.corpus.splitting import SplitConfig
from rag_jax.corpus.store import PassageStore
from rag_jax.directory_lock import lock
from rag_jax.evaluation.search_modes import fit_search_modes
from rag_jax.models.hybrid import HybridWeights
from rag_jax.retrieval.hybrid import HybridRetriever
from rag_jax.retrieval.retriever import Embedder
from rag_jax.search import compact as search_compact
from rag_jax.search import update as search_update
from rag_jax.search.compact import compact_search_directory
from rag_jax.search.directory import OpenedDirectory
from rag_jax.search.update import update_search_directory as update
from rag_jax.serving.open_model import open_corpus

QUESTIONS = [QUESTION, "the yaks of the moors", "rams in the woods by night"]


def record(id_, text, lang="en"):
  return {"id": id_, "title": "", "text": text, "lang": lang}


def write(path, records):
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return str(path)


@pytest.fixture
def copy(built, tmp_path):
  path = tmp_path / "copy"
  shutil.copytree(built.path, path)
  return path


@pytest.fixture(scope="module")
def records(corpus):
  return [json.loads(line) for line in corpus.read_text().splitlines()]


UPSERTS = [
  record("p3", "the yaks of the north live in the moors by day", "fr"),
  record("new", "the yaks of the south live in the woods by night", "de"),
]


def found(directory, **kwargs):
  """Returns ids and scores of all modes."""
  result = []
  for mode in ("dense", "bm25", "hybrid"):
    for hits in directory.search(QUESTIONS, 9, mode=mode, **kwargs):
      result.append([(hit.passage.id, hit.score) for hit in hits])
  return result


def assert_same(one, other):
  for hits, expected in zip(one, other, strict=True):
    assert [i for i, _ in hits] == [i for i, _ in expected]
    np.testing.assert_allclose(
      [s for _, s in hits], [s for _, s in expected], rtol=1e-4
    )


def test_it_finds_what_a_directory_of_these_documents_finds(
  copy, records, encoder, tmp_path
):
  reader = OpenedDirectory(copy)
  before = found(reader)
  report = update(
    copy, upsert=write(tmp_path / "up.jsonl", UPSERTS), delete=["p7", "p8"]
  )
  assert (report.added, report.changed) == (("new",), ("p3",))
  assert report.deleted == ("p7", "p8")
  assert (report.passages_added, report.passages_removed) == (2, 3)
  # Who has it open goes on with what it opened, until it looks again.
  assert found(reader) == before
  assert reader.reload()
  assert not reader.reload()
  updated = OpenedDirectory(copy)
  assert found(updated) == found(reader)
  after = [r for r in records if r["id"] not in ("p3", "p7", "p8")] + UPSERTS
  fresh = build(
    write(tmp_path / "all.jsonl", after), encoder, tmp_path / "fresh"
  )
  assert updated.passages.fingerprint == fresh.passages.fingerprint
  assert_same(found(updated), found(fresh))
  german = {"filters": ["lang=de"]}
  assert_same(found(updated, **german), found(fresh, **german))
  assert len(updated.search([QUESTION], 40)[0]) == 39


def test_updates_follow_each_other_and_old_versions_are_removed(
  copy, encoder, tmp_path, records, monkeypatch
):
  one = write(tmp_path / "1.jsonl", UPSERTS)
  assert update(copy, upsert=one).version == "v000001"
  reader = OpenedDirectory(copy)
  second = [record("new", "the hens of the moors"), record("more", "the eels")]
  two = write(tmp_path / "2.jsonl", second)
  report = update(copy, upsert=two, delete=["p3", "p0"])
  assert (report.added, report.changed) == (("more",), ("new",))
  rest = ("p3", "p0")
  after = [r for r in records if r["id"] not in rest] + second
  all_ = write(tmp_path / "all.jsonl", after)
  fresh = build(all_, encoder, tmp_path / "fresh")
  assert_same(found(OpenedDirectory(copy)), found(fresh))
  # Nothing is new in what is there already: no version, nothing embedded.
  monkeypatch.setattr(search_update, "_embed", None)
  report = update(copy, upsert=all_)
  assert report.version == "v000002"
  assert report.unchanged == len(after)
  assert "Nothing changed" in report.text()
  monkeypatch.undo()
  old = found(reader)
  update(copy, delete=["more"])
  names = {p.name for p in (copy / "updates").iterdir()}
  assert names == {"CURRENT", "v000002", "v000003"}
  assert found(reader) == old  # of v000001, which is gone
  # Where it came from can be moved, and built again only opens it.
  assert len(OpenedDirectory(copy).passages) == len(after) - 1


def test_only_what_is_new_is_embedded(copy, tmp_path, monkeypatch, records):
  embedded = []
  inner = Embedder.rows

  def counted(self, params, passage_tokens, rows):
    embedded.append(len(rows))
    return inner(self, params, passage_tokens, rows)

  monkeypatch.setattr(Embedder, "rows", counted)
  changed = [*records[:5], *UPSERTS, record("p6", records[6]["text"], "fr")]
  report = update(copy, upsert=write(tmp_path / "up.jsonl", changed[:3]))
  assert not report.passages_added
  del changed[3]  # the old p3
  report = update(copy, upsert=write(tmp_path / "up.jsonl", changed))
  assert embedded == [2]  # "p3" and "new"
  assert report.embedded == 2
  assert (report.passages_added, report.unchanged) == (3, 4)
  hits = OpenedDirectory(copy).search([QUESTION], 2, filters=["lang=fr"])[0]
  assert {hit.passage.id for hit in hits} == {"p3", "p6"}


def test_documents_are_split_as_the_directory_was(encoder, texts, tmp_path):
  folder = tmp_path / "docs"
  folder.mkdir()
  (folder / "a.txt").write_text(" ".join(texts[:3]))
  (folder / "b.txt").write_text(texts[5])
  made = config(
    split=SplitConfig(method="sentences", unit="tokens", size=9), bm25=False
  )
  build(folder, encoder, tmp_path / "index", made)
  (folder / "a.txt").write_text(f"{texts[9]} {texts[0]}")
  report = update(tmp_path / "index", upsert=str(folder))
  assert (report.changed, report.unchanged) == (("a.txt",), 1)
  fresh = build(folder, encoder, tmp_path / "fresh", made)
  updated = OpenedDirectory(tmp_path / "index")
  assert set(updated.passages) == set(fresh.passages)
  assert len(updated.passages) == len(fresh.passages) > 4
  assert updated.bm25 is None
  # Built again of what it was built of, it only opens; of others it does not.
  with pytest.raises(ValueError, match="sources is"):
    build(folder, encoder, tmp_path / "index", made)


def modes_find(path, id_, question):
  """Returns whether each mode finds one passage under an id, and others."""
  directory = OpenedDirectory(path)
  for mode in ("dense", "bm25", "hybrid"):
    hits = directory.search([question], 40, mode=mode)[0]
    same = [h for h in hits if id_ in (h.passage.id, *h.also)]
    assert len(same) <= 1
    yield same[0] if same else None


def test_a_text_is_found_as_long_as_one_of_its_documents_is_there(
  records, encoder, tmp_path, monkeypatch
):
  text = records[3]["text"]
  twins = [record("t1", text, "fr"), record("t2", text, "es")]
  path = tmp_path / "index"
  build(write(tmp_path / "c.jsonl", [*records, *twins]), encoder, path)
  (hit, *_) = modes_find(path, "p3", text)
  assert (hit.passage.id, hit.also) == ("p3", ("t1", "t2"))
  # It is found by the metadata of each.
  directory = OpenedDirectory(path)
  for name, lang in (("t1", "fr"), ("t2", "es")):
    (found,) = directory.search([text], 5, filters=[f"lang={lang}"])[0]
    assert (found.passage.id, len(found.also)) == (name, 2)
  # Of the twins nothing is embedded, whatever becomes of the first.
  monkeypatch.setattr(Embedder, "rows", None)
  report = update(path, delete=["p3"])
  assert (report.passages_added, report.embedded) == (1, 0)
  for hit in modes_find(path, "t2", text):
    assert (hit.passage.id, hit.also) == ("t1", ("t2",))
  fourth = [record("t4", text, "it"), twins[1]]
  report = update(path, upsert=write(tmp_path / "u.jsonl", fourth))
  assert (report.added, report.unchanged) == (("t4",), 1)
  assert not report.passages_added
  assert "2 passages have the text of another" in report.text()
  assert f"version {OpenedDirectory(path).version.name}" in report.text()
  update(path, delete=["t1", "t2"])
  assert [h and h.passage.id for h in modes_find(path, "t4", text)] == [
    "t4"
  ] * 3
  update(path, delete=["t4"])
  assert not any(modes_find(path, "t4", text))
  hits = OpenedDirectory(path).search([text], 40)[0]
  assert len(hits) == len(records) - 1
  with pytest.raises(ValueError, match=r"not there: \['t2'\]"):
    update(path, delete=["t2"])


def test_a_directory_that_forgot_its_twins_says_so_and_learns_them(
  records, encoder, tmp_path, caplog
):
  path = tmp_path / "index"
  twin = record("t1", records[3]["text"], "fr")
  corpus = write(tmp_path / "c.jsonl", [*records, twin])
  build(corpus, encoder, path)
  # As it was written before twins were kept.
  shutil.rmtree(path / "twins")
  manifest = json.loads((path / "manifest.json").read_text())
  del manifest["sha256"], manifest["files"]["twins/manifest.json"]
  (path / "manifest.json").write_text(json.dumps(manifest))
  assert OpenedDirectory(path).search([QUESTION], 1)[0][0].also == ()
  update(path, delete=["p9"])
  assert "their ids forgotten, 1 of them" in caplog.text
  caplog.clear()
  report = update(path, upsert=corpus)
  assert report.added == ("p9", "t1")
  update(path, delete=["p3"])
  assert "forgotten" not in caplog.text
  (hit, *_) = modes_find(path, "t1", records[3]["text"])
  assert hit.passage.id == "t1"


def holds(path, text):
  """Returns whether a file of a directory, or an array in it, has a text."""
  stores = [p.parent for p in path.rglob("manifest.json")
            if json.loads(p.read_text())["kind"] == "passages"]  # fmt: skip
  return any(text in p.text for s in stores for p in PassageStore(s))


def test_compacting_leaves_nothing_of_what_went_and_finds_the_same(
  copy, records, encoder, corpus, tmp_path
):
  gone = records[7]["text"]
  old = OpenedDirectory(copy)
  fit_search_modes(copy, known_questions(records, tmp_path / "q.jsonl"))
  twin = record("t", records[5]["text"])
  upserts = [*UPSERTS, twin]
  update(copy, upsert=write(tmp_path / "1.jsonl", upserts), delete=["p7", "p8"])
  before = OpenedDirectory(copy)
  assert holds(copy, gone)
  assert compact_search_directory(copy) == 39
  assert not holds(copy, gone)
  names = {p.name for p in copy.iterdir() if not p.name.startswith(".")}
  assert names == {"manifest.json", "encoder", "b000001"}
  after = OpenedDirectory(copy)
  assert_same(found(after), found(before))
  assert len(open_corpus(copy)) == 39  # what questions are answered from
  assert after.version.name == ""
  assert after.index.kind == "exact"
  assert after.index.certificate.modes == before.index.certificate.modes
  assert after.passages.fingerprint == before.passages.fingerprint
  # Who had it open goes on, and then opens what there is now.
  assert len(old.search([QUESTION], 40)[0]) == 40
  assert before.reload()
  assert not before.reload()
  assert found(before) == found(after)
  # The same build only opens it; updates and compacting go on from there.
  assert len(build(corpus, encoder, copy).passages) == 39
  update(copy, delete=["p5", "p9"])
  hits = OpenedDirectory(copy).search([records[5]["text"]], 40)[0]
  assert "t" in {hit.passage.id for hit in hits}
  assert compact_search_directory(copy) == 38
  assert not holds(copy, records[9]["text"])
  assert holds(copy, records[5]["text"])
  assert compact_search_directory(copy) == 38
  assert "b000002" in {p.name for p in copy.iterdir()}


@pytest.mark.parametrize("at", ["build", "switch", "removal"])
def test_compacting_that_is_cut_off_leaves_the_directory_whole(
  copy, records, monkeypatch, at
):
  update(copy, delete=["p7"])
  before = found(OpenedDirectory(copy))

  def cut(*args, **kwargs):
    raise KeyboardInterrupt

  # The functions that are cut off, at their first call or at the second.
  name, second = {
    "build": ("build_certified_index", False),
    "switch": ("write_content", False),
    "removal": ("remove_left_over", True),
  }[at]
  calls = [getattr(search_compact, name), cut] if second else [cut]
  monkeypatch.setattr(
    search_compact, name, lambda *args, **kw: calls.pop(0)(*args, **kw)
  )
  with pytest.raises(KeyboardInterrupt):
    compact_search_directory(copy)
  monkeypatch.undo()
  assert_same(found(OpenedDirectory(copy)), before)
  assert holds(copy, records[7]["text"])
  compact_search_directory(copy)
  assert_same(found(OpenedDirectory(copy)), before)
  if at == "removal":  # it was compact, but for what was left over
    assert not (copy / "passages").exists()
  assert not holds(copy, records[7]["text"])
  update(copy, delete=["p8"])
  assert len(OpenedDirectory(copy).passages) == 38


def known_questions(records, path, field="gold"):
  """Of each text three words, which together only it has, and its id."""
  rows = []
  for number, r in enumerate(records):
    words = r["text"].split()
    row = {"question": f"{words[1]} {words[8]} north", "answers": []}
    row |= {field: [r["id"]] if field == "gold" else [r["text"]]}
    rows += [row] if number % 2 else []
  return write(path, rows)


def test_the_weights_of_both_are_fitted_and_kept_with_the_index(
  copy, records, tmp_path
):
  before = found(OpenedDirectory(copy))
  modes = fit_search_modes(copy, known_questions(records, tmp_path / "q.jsonl"))
  assert modes.num_questions == 20
  assert modes.metrics["bm25"].first == 1.0  # all words fit
  assert modes.metrics["dense"].mrr < 0.9  # the encoder is a random one
  assert modes.best == "bm25"
  assert modes.metrics["hybrid"].mrr >= modes.metrics["reciprocal ranks"].mrr
  directory = OpenedDirectory(copy)
  certificate = directory.index.certificate
  assert certificate.modes == modes
  assert "| best mode | bm25 (on 20 questions among 40" in certificate.table()
  # Embeddings and words find what they found; both by the fitted weights.
  assert found(directory)[:6] == before[:6]
  weights = HybridWeights(*modes.weights)
  both = HybridRetriever(directory.index, directory.bm25, weights)
  rows, scores = both.search(directory.embed_questions(QUESTIONS), QUESTIONS, 9)
  for hits, row, best in zip(found(directory)[6:], rows, scores, strict=True):
    assert [i for i, _ in hits] == [directory.passages[r].id for r in row]
    np.testing.assert_allclose([s for _, s in hits], best)
  one = directory.search([QUESTION], 3, mode="best")
  assert one == directory.search([QUESTION], 3, mode="bm25")
  # An update goes on with them.
  update(copy, upsert=write(tmp_path / "up.jsonl", UPSERTS))
  assert OpenedDirectory(copy).index.certificate.modes == modes


def test_weights_need_questions_that_are_of_this_corpus(copy, tmp_path, caplog):
  few = known_questions(
    [record("x", "the yaks of the south live in the moors")] * 50,
    tmp_path / "q.jsonl",
    "answers",
  )
  with pytest.raises(ValueError, match=r"Of 25 questions .* 0 have a relevant"):
    fit_search_modes(copy, few)
  assert OpenedDirectory(copy).version.name == ""
  with caplog.at_level("WARNING"):
    best = OpenedDirectory(copy).search([QUESTION], 3, mode="best")
  assert best == OpenedDirectory(copy).search([QUESTION], 3)
  assert "Which mode is best was not measured" in caplog.text


def test_the_drift_is_measured_and_a_rebuild_recommended(copy, tmp_path):
  few = update(copy, delete=["p0"])
  assert few.before.sample == few.now.sample == "passages"
  assert few.drift == 0.0
  assert not few.rebuild
  assert "drift +0.0000" in few.text()
  assert "2.5% of the passages changed" in few.text()
  many = update(copy, delete=[f"p{i}" for i in range(1, 5)])
  assert many.changed_share == 5 / 40
  assert "Build a new directory" in many.text()
  asked = update(copy, delete=["p9"], questions=QUESTIONS)
  assert asked.before.sample == asked.now.sample == "questions"
  now = OpenedDirectory(copy).index.certificate
  assert (now.sample, now.num_passages, now.kind) == (
    "questions",
    34,
    "updated",
  )


def test_dpr_needs_the_encoder_of_its_passages_again(corpus, texts, tmp_path):
  passages = write_encoder(tmp_path / "ctx", texts, "dpr_context", seed=1)
  questions = write_encoder(tmp_path / "q", texts, "dpr_question", seed=2)
  other = write_encoder(tmp_path / "other", texts, "dpr_context", seed=3)
  path = tmp_path / "index"
  build(corpus, passages, path, question_encoder=str(questions))
  up = write(tmp_path / "up.jsonl", UPSERTS)
  with pytest.raises(
    ValueError, match=r"encoder of questions alone.*--encoder"
  ):
    update(path, upsert=up)
  with pytest.raises(ValueError, match="other is not what embedded the pass"):
    update(path, upsert=up, encoder=str(other))
  # What is deleted is not embedded.
  gone = OpenedDirectory(path).passages[0].id
  assert update(path, delete=[gone]).embedded == 0
  left = OpenedDirectory(path)
  assert gone not in {passage.id for passage in left.passages}
  assert left.index.certificate.coverage is None
  assert update(path, upsert=up, encoder=str(passages)).embedded == 2
  assert len(OpenedDirectory(path).search(["the yaks"], 1)[0]) == 1


def test_an_update_that_cannot_be_done_is_refused(copy, tmp_path):
  before = found(OpenedDirectory(copy))
  empty = tmp_path / "empty.jsonl"
  empty.write_text("")
  bad = tmp_path / "bad.jsonl"
  bad.write_text('{"id": "x"}\n')
  for kwargs, message in (
    ({}, "Nothing is to be put into .* Give --upsert, --delete or --compact"),
    ({"delete": ["nobody"]}, r"not there: \['nobody'\]"),
    ({"upsert": str(empty)}, "empty.jsonl holds no passages"),
    ({"upsert": str(bad)}, r"bad\.jsonl:1"),
    ({"upsert": str(bad), "on_bad_record": "skip"}, "holds no passages"),
  ):
    with pytest.raises(ValueError, match=message):
      update(copy, **kwargs)
  with pytest.raises(FileNotFoundError, match="there is no directory"):
    update(tmp_path / "nothing", delete=["a"])
  with (
    lock(copy, kind="thing"),
    pytest.raises(ValueError, match="Somebody else is building a search direc"),
  ):
    update(copy, delete=["p0"])
  assert found(OpenedDirectory(copy)) == before


def test_embeddings_that_are_not_numbers_change_nothing(
  copy, tmp_path, monkeypatch
):
  def broken(self, params, tokens, rows):
    return np.full((len(rows), 16), np.nan, np.float32)

  monkeypatch.setattr("rag_jax.retrieval.retriever.Embedder.rows", broken)
  with pytest.raises(
    ValueError, match=r"2 of 2 passages hold NaN.*'p3', 'new'"
  ):
    update(copy, upsert=write(tmp_path / "up.jsonl", UPSERTS))
  assert OpenedDirectory(copy).version.name == ""


def test_a_damaged_version_is_refused_and_the_open_one_stays(copy):
  reader = OpenedDirectory(copy)
  before = found(reader)
  update(copy, delete=["p0"])
  current = copy / "updates" / "CURRENT"
  named = current.read_text()
  for name in ("gone.npy", "manifest.json", "bm25/scores.npy"):
    file = copy / "updates/v000001" / name
    data = file.read_bytes()
    file.write_bytes(data[:-3])
    with pytest.raises(ValueError, match=pathlib.Path(name).stem):
      OpenedDirectory(copy)
    with pytest.raises(ValueError, match=pathlib.Path(name).stem):
      reader.reload()
    file.write_bytes(data)
  assert found(reader) == before
  current.write_text("v1")
  with pytest.raises(ValueError, match=r"names 'v1'.*Restore the directory"):
    OpenedDirectory(copy)
  current.write_text(named)
  (copy / "manifest.json").write_bytes(
    (copy / "manifest.json").read_bytes() + b"\n"
  )
  with pytest.raises(ValueError, match="is an update of another build"):
    OpenedDirectory(copy)


def state(directory):
  """Returns all that is searched; unlike `found`, without the encoder."""
  index, bm25 = directory.index, directory.bm25
  num = index.num_passages
  ids, scores = index.search(np.ones((1, index.embedding_dim), np.float32), num)
  words = bm25.search([QUESTION], num)
  return [
    directory.version.name,
    [p.id for p in directory.passages],
    *(a.tolist() for a in (ids, scores, *words)),
  ]


_WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def test_killed_before_any_change_of_the_disk_it_leaves_old_or_new(
  copy, tmp_path
):
  """Copies the directory before each change of it, as a kill would leave it."""
  update(copy, delete=["p20"])  # so that there is a version to go on from
  before = state(OpenedDirectory(copy))
  shots, busy = [], [False]

  def shoot(event, args):
    writes = event in _WRITES or (
      event == "open"
      and isinstance(args[2], int)
      and args[2] & (os.O_WRONLY | os.O_RDWR)
    )
    if busy[0] or not writes or not str(args[0]).startswith(str(copy)):
      return
    busy[0] = True
    shots.append(tmp_path / f"shot{len(shots)}")
    shutil.copytree(copy, shots[-1])
    busy[0] = False

  sys.addaudithook(shoot)  # which cannot be taken away
  kwargs = {"upsert": write(tmp_path / "u.jsonl", UPSERTS), "delete": ["p7"]}
  try:
    update(copy, **kwargs)
  finally:
    busy[0] = True
  after = state(OpenedDirectory(copy))
  assert len(shots) > 10
  states = [state(OpenedDirectory(shot)) for shot in shots]
  switched = states.index(after)
  assert states == [before] * switched + [after] * (len(shots) - switched)
  assert 0 < switched < len(shots)
  # Before the new version had its name; and after, but not in use yet. Whether
  # one behind was ever in use, nobody can tell: its name is not used again.
  for shot, kept in (
    (shots[switched // 2], {"v000001", "v000002"}),
    (shots[switched - 1], {"v000002", "v000003"}),
  ):
    update(shot, **kwargs)
    now = state(OpenedDirectory(shot))
    assert now == [max(kept), *after[1:]]
    names = {p.name for p in (shot / "updates").iterdir()}
    assert names == {"CURRENT", *kept}


_KILLED = """
import sys
from rag_jax.search import update as search_update

def stop(*args, **kwargs):
  print("certifying", flush=True)
  sys.stdin.read()

search_update.certify = stop
search_update.update_search_directory(sys.argv[1], delete=["p1"])
"""


def test_while_one_updates_others_wait_and_when_it_is_killed_they_can(copy):
  process = subprocess.Popen(
    [sys.executable, "-c", _KILLED, str(copy)],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == "certifying\n"
  with pytest.raises(ValueError, match="Somebody else"):
    update(copy, delete=["p2"])
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert OpenedDirectory(copy).version.name == ""
  update(copy, delete=["p2"])
  names = {p.name for p in (copy / "updates").iterdir()}
  assert names == {"CURRENT", "v000001"}
  assert OpenedDirectory(copy).passages.row_of("p1") is not None


def test_a_search_during_a_switch_sees_one_version(copy):
  reader = OpenedDirectory(copy)
  seen, done = set(), threading.Event()

  def search():
    while not done.is_set():
      hits = reader.search([QUESTION], 4, mode="hybrid")[0]
      seen.add(tuple((hit.passage.id, hit.score) for hit in hits))

  thread = threading.Thread(target=search)
  thread.start()
  expected = set()
  for _ in range(3):
    hits = OpenedDirectory(copy).search([QUESTION], 4, mode="hybrid")[0]
    expected.add(tuple((hit.passage.id, hit.score) for hit in hits))
    update(copy, delete=[hits[0].passage.id])
    reader.reload()
  hits = reader.search([QUESTION], 4, mode="hybrid")[0]
  expected.add(tuple((hit.passage.id, hit.score) for hit in hits))
  done.set()
  thread.join()
  assert len(seen) > 1
  assert seen <= expected
