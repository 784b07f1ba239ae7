"""What every kind of index does alike: checks, save, load, refusals."""

import os
import sys

from absl import logging
from indexes import FINGERPRINTS
from indexes import assert_equal
from indexes import edit_manifest
from linen import normal
import numpy as np
import pytest

from rag_jax import artifacts
from rag_jax.config import IndexConfig
from rag_jax.retrieval import index_core
from rag_jax.retrieval.embeddings import EMBEDDINGS
from rag_jax.retrieval.embeddings import EmbeddingFile
from rag_jax.retrieval.embeddings import StoredEmbeddings
from rag_jax.retrieval.embeddings import open_embeddings
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import build_index
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.index import resolve_kind

BOTH = pytest.mark.parametrize("kind", ["exact", "scann"])
ALL = pytest.mark.parametrize("kind", ["exact", "scann", "device"])
P, R = 60, 8


def build(kind="exact", embeddings=None):
  embeddings = normal(P, R) if embeddings is None else embeddings
  return build_index(embeddings, IndexConfig(kind=kind), **FINGERPRINTS)


@pytest.fixture
def saved(tmp_path):
  build().save(tmp_path / "index")
  return tmp_path / "index"


@BOTH
def test_a_loaded_index_finds_the_same_wherever_it_was_moved_to(kind, tmp_path):
  index = build(kind)
  index.save(tmp_path / "built")
  moved = (tmp_path / "built").rename(tmp_path / "moved")
  loaded = load_index(moved, **FINGERPRINTS)
  assert isinstance(loaded, Index)
  assert loaded.info == index.info
  assert (loaded.kind, loaded.num_passages, loaded.embedding_dim) == (
    kind,
    P,
    R,
  )
  assert loaded.encoder_fingerprint == FINGERPRINTS["encoder_fingerprint"]
  assert loaded.passages_fingerprint == FINGERPRINTS["passages_fingerprint"]
  questions = normal(5, R, seed=1)
  assert_equal(index.search(questions, 7), loaded.search(questions, 7))


@ALL
def test_an_open_index_can_be_saved_over_itself(kind, tmp_path):
  build(kind).save(tmp_path)
  loaded = load_index(tmp_path)
  loaded.save(tmp_path)
  questions = normal(3, R, seed=1)
  expected, _ = build(kind).search(questions, 4)
  np.testing.assert_array_equal(loaded.search(questions, 4)[0], expected)
  again = load_index(tmp_path).search(questions, 4)[0]
  np.testing.assert_array_equal(again, expected)


@BOTH
def test_nothing_that_is_not_finished_stays_beside_an_index(kind, tmp_path):
  build(kind).save(tmp_path)
  names = {p.name for p in tmp_path.iterdir()}
  folder = {"scann"} if kind == "scann" else set()
  assert names == {"embeddings.npy", "manifest.json"} | folder


@BOTH
def test_an_index_goes_to_a_bucket_and_back(kind, tmp_path, monkeypatch):
  # A bucket has no rename and no memory map; a folder can stand for one.
  monkeypatch.setattr(artifacts, "is_local", lambda path: False)
  index = build(kind)
  index.save(tmp_path)
  questions = normal(3, R, seed=1)
  np.testing.assert_array_equal(
    load_index(tmp_path).search(questions, 4)[0],
    index.search(questions, 4)[0],
  )


def test_a_loaded_index_stays_on_the_disk_until_it_is_searched(saved):
  embeddings = load_index(saved).embeddings
  assert isinstance(embeddings, StoredEmbeddings)
  assert isinstance(embeddings.arrays[EMBEDDINGS], np.memmap)
  assert np.shares_memory(embeddings[2:4], embeddings.arrays[EMBEDDINGS])


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_an_index_of_stored_embeddings_searches_what_is_stored(
  tmp_path, kind, storage
):
  files = EmbeddingFile(tmp_path, P, R, storage)
  files.write(0, normal(P, R))
  before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
  index = build(kind, embeddings=open_embeddings(tmp_path))
  index.save(tmp_path)
  for name, data in before.items():
    assert (tmp_path / name).read_bytes() == data
  index.save(tmp_path / "copy")
  questions = normal(3, R, seed=1)
  stored = np.asarray(open_embeddings(tmp_path))
  expected = build(embeddings=stored).search(questions, 4)
  moved = (tmp_path / "copy").rename(tmp_path.parent / f"{kind} {storage}")
  for directory in (moved, tmp_path):
    assert_equal(load_index(directory).search(questions, 4), expected)


def test_float64_embeddings_are_searched_in_float32():
  index = build(embeddings=normal(P, R).astype(np.float64))
  assert index.embeddings.dtype == np.float32
  np.testing.assert_array_equal(index.embeddings, normal(P, R))


@pytest.mark.parametrize(
  "embeddings",
  [np.zeros(3), np.zeros((2, 3, 4)), np.zeros((2, 3), int), np.zeros((2, 0))],
  ids=["1-d", "3-d", "integers", "empty rows"],
)
def test_embeddings_that_are_no_matrix_of_numbers_are_refused(embeddings):
  with pytest.raises(ValueError, match=r"shape .* expected \(passages, emb"):
    build(embeddings=embeddings)


def test_an_index_without_passages_is_refused():
  with pytest.raises(ValueError, match=r"no passages.*is data.passages empty"):
    build(embeddings=np.zeros((0, R), np.float32))


@BOTH
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_passages_that_are_not_finite_are_refused_by_row(kind, value):
  embeddings = normal(P, R).astype(np.float64)
  embeddings[[4, 17], 2] = value
  with pytest.raises(
    ValueError, match=f"2 of {P} passages hold NaN.*rows 4, 17. .*encoder"
  ):
    build(kind, embeddings)


def test_only_the_first_bad_rows_are_named():
  with pytest.raises(ValueError, match=r"rows 0, 1, 2, 3, 4, \.\.\.\. Exp"):
    build(embeddings=np.full((P, R), np.nan, np.float32))


@ALL
def test_questions_that_are_not_finite_are_refused_by_row(kind):
  questions = normal(3, R)
  questions[1, 0] = np.nan
  with pytest.raises(ValueError, match=r"1 of 3 questions hold NaN.*rows 1\. "):
    build(kind).search(questions, 2)


@ALL
def test_questions_of_another_size_are_refused(kind):
  with pytest.raises(
    ValueError, match=r"shape \(3, 9\), but the index holds 8-dimensional"
  ):
    build(kind).search(normal(3, 9), 2)


@ALL
@pytest.mark.parametrize("n_docs", [0, P + 1])
def test_more_passages_than_there_are_cannot_be_asked_for(kind, n_docs):
  with pytest.raises(
    ValueError, match=f"data.n_docs={n_docs} .*expected 1 to {P}"
  ):
    build(kind).search(normal(3, R), n_docs)


@BOTH
def test_all_passages_can_be_asked_for(kind):
  ids, _ = build(kind).search(normal(3, R), P)
  np.testing.assert_array_equal(np.sort(ids, axis=1), [np.arange(P)] * 3)


@ALL
def test_no_questions_find_nothing(kind):
  ids, scores = build(kind).search(np.zeros((0, R), np.float32), 2)
  assert ids.shape == scores.shape == (0, 2)


def test_an_interrupted_build_is_refused(saved, monkeypatch):
  def interrupt(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(index_core.IndexInfo, "write", interrupt)
  with pytest.raises(KeyboardInterrupt):
    build().save(saved)  # over an index that was complete
  with pytest.raises(
    FileNotFoundError, match=r"no manifest.json.*cut off.*Build the index again"
  ):
    load_index(saved)


def test_a_directory_without_index_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no index was built there"):
    load_index(tmp_path)


@ALL
def test_a_missing_file_is_named(kind, tmp_path):
  build(kind).save(tmp_path)
  (tmp_path / "embeddings.npy").unlink()
  with pytest.raises(ValueError, match=r"embeddings.npy is missing.*again"):
    load_index(tmp_path)


def test_a_file_that_was_cut_off_is_named(saved):
  os.truncate(saved / "embeddings.npy", 500)
  with pytest.raises(ValueError, match=r"embeddings.npy.*cut off: it has 500"):
    load_index(saved)


@pytest.mark.parametrize("name", ["embeddings.npy", "scann/dataset.npy"])
def test_one_flipped_bit_is_noticed(name, tmp_path):
  build("scann").save(tmp_path)
  data = bytearray((tmp_path / name).read_bytes())
  data[-5] ^= 4
  (tmp_path / name).write_bytes(data)
  with pytest.raises(ValueError, match=f"{name}.*content changed"):
    load_index(tmp_path)


def test_a_planted_pickle_is_refused_before_scann_can_run_it(tmp_path):
  build("scann").save(tmp_path)
  ran = tmp_path / "ran"
  code = f"cos\nmkdir\n(S'{ran}'\ntR."  # what pickle.load would do
  (tmp_path / "scann" / "scann_docids.pkl").write_text(code)
  with pytest.raises(ValueError, match=r"scann/scann_docids\.pkl, a pickle"):
    load_index(tmp_path)
  assert not ran.exists()


def test_a_newer_format_is_refused(saved, monkeypatch):
  monkeypatch.setattr(index_core, "FORMAT", index_core.FORMAT + 1)
  build().save(saved)
  monkeypatch.undo()
  with pytest.raises(ValueError, match=r"format 2; .*up to 1. Upgrade rag_jax"):
    load_index(saved)


@pytest.mark.parametrize(
  "content", [{"kind": "annoy"}, {"num_passages": None}, {"settings": 3}]
)
def test_a_manifest_that_describes_no_index_is_refused(saved, content):
  edit_manifest(saved, **content)
  with pytest.raises(ValueError, match=f"{next(iter(content))} missing or wr"):
    load_index(saved)


def test_embeddings_of_another_build_are_refused(saved):
  edit_manifest(saved, num_passages=P + 1)
  with pytest.raises(
    ValueError, match=r"shape \(60, 8\), .*says \(61, 8\).*mixes two builds"
  ):
    load_index(saved)


@ALL
@pytest.mark.parametrize(
  ("fingerprint", "message"),
  [
    ("encoder", r"by other weights: .*'1a2b', .*'ffff'.*rebuild"),
    ("passages", r"of other passages: .*'3c4d', .*'ffff'.*rebuild"),
  ],
)
def test_an_index_of_other_weights_or_passages_is_refused(
  kind, tmp_path, fingerprint, message
):
  build(kind).save(tmp_path)
  with pytest.raises(ValueError, match=message):
    load_index(tmp_path, **{f"{fingerprint}_fingerprint": "ffff"})


@pytest.fixture
def info_log(monkeypatch):
  lines = []

  def record(level, message, *args):
    lines.append(message % args)

  monkeypatch.setattr(logging, "log", record)
  # `log_first_n` counts by file and line; start from zero.
  monkeypatch.setattr(logging, "_log_counter_per_token", {})
  return lines


def test_auto_is_scann_where_it_is_installed_and_says_so_once(info_log):
  assert resolve_kind("auto") == resolve_kind("auto") == "scann"
  assert info_log == [
    "index.kind='auto' is 'scann': the package scann is installed."
  ]


def test_auto_is_exact_without_the_package_and_says_why(info_log, monkeypatch):
  monkeypatch.setitem(sys.modules, "scann", None)
  assert resolve_kind("auto") == "exact"
  assert info_log == [
    "index.kind='auto' is 'exact': the package scann is not installed."
  ]
  assert build("auto").kind == "exact"


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_auto_is_exact_where_the_package_is_broken(
  error, info_log, monkeypatch, tmp_path
):
  (tmp_path / "scann.py").write_text(f"raise {error}('no libstdc++')")
  monkeypatch.delitem(sys.modules, "scann", raising=False)
  monkeypatch.syspath_prepend(tmp_path)
  assert resolve_kind("auto") == "exact"
  assert "cannot be imported (no libstdc++)" in info_log[0]


def test_scann_without_the_package_says_how_to_install_it(
  tmp_path, monkeypatch
):
  build("scann").save(tmp_path)
  monkeypatch.setitem(sys.modules, "scann", None)
  for use in (lambda: build("scann"), lambda: load_index(tmp_path)):
    with pytest.raises(ValueError, match=r"not installed.*pip install scann"):
      use()


def test_a_misspelt_kind_is_refused():
  with pytest.raises(ValueError, match=r"index.kind='scan'.*mean 'scann'"):
    resolve_kind("scan")


def test_an_explicit_kind_is_kept():
  assert [resolve_kind(k) for k in ("exact", "scann")] == ["exact", "scann"]
