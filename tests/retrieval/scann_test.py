"""ScaNN against exact search, and where it would answer wrongly alone."""

from disks import full_disk
from etils import epath
from indexes import FINGERPRINTS
from indexes import assert_equal
from indexes import content_of
from indexes import edit_manifest
from indexes import exact
from indexes import overlap
from linen import normal
import numpy as np
import pytest

from rag_jax import artifacts
from rag_jax.config import IndexConfig
from rag_jax.disk import UnwritableError
from rag_jax.retrieval.embeddings import open_embeddings
from rag_jax.retrieval.embeddings import save_embeddings
from rag_jax.retrieval.index import build_index_directory
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.index_core import IndexInfo
from rag_jax.retrieval.scann import ScannIndex


def clusters(num_passages, dim, seed=0):
  """Returns vectors around 100 centres, as passages about 100 topics."""
  rng = np.random.default_rng(seed)
  centres = rng.normal(size=(100, dim))
  spread = 0.3 * rng.normal(size=(num_passages, dim))
  return (centres[rng.integers(100, size=num_passages)] + spread).astype(
    np.float32
  )


def build(embeddings, **config):
  config = IndexConfig(kind="scann", **config)
  return ScannIndex.build(exact(embeddings), config)


def info_of(path):
  return IndexInfo.from_content(content_of(path), "", ["scann"])


def exact_search(embeddings, questions, n_docs):
  return exact(embeddings).search(questions, n_docs)


@pytest.fixture(scope="module")
def short_of_passages():
  """An index with about two passages a leaf that searches one leaf."""
  return build(
    normal(100, 8),
    scann_tree_passages=1,
    scann_num_leaves=50,
    scann_leaves_to_search=1,
  )


def test_below_the_threshold_it_finds_what_exact_search_finds():
  embeddings, questions = normal(3000, 24), normal(50, 24, seed=1)
  index = build(embeddings, scann_tree_passages=3001)
  assert index.settings["num_leaves"] == 0
  expected = exact_search(embeddings, questions, 20)
  assert_equal(index.search(questions, 20), expected)


@pytest.mark.parametrize("num_passages", [1, 2, 15])
def test_a_handful_of_passages_is_never_quantised(num_passages):
  embeddings = normal(num_passages, 5)
  index = build(embeddings, scann_tree_passages=0, scann_num_leaves=3)
  ids, _ = index.search(embeddings, num_passages)
  expected, _ = exact_search(embeddings, embeddings, num_passages)
  np.testing.assert_array_equal(ids, expected)


def test_a_tree_finds_nine_of_ten_passages():
  embeddings = clusters(30_000, 32)
  questions = embeddings[::300] + 0.1 * normal(100, 32, seed=1)
  index = build(embeddings)
  assert index.settings == {
    "num_leaves": 173,  # the square root of 30,000
    "leaves_to_search": 17,
    "reorder": 100,
    "pca_dims": 0,
    "dims_per_block": 2,
    "anisotropic_threshold": 0.2,
    "soar_lambda": 0.0,
    "soar_overretrieve": 0.0,
    "reorder_dtype": "float32",
  }
  ids, scores = index.search(questions, 10)
  expected, expected_scores = exact_search(embeddings, questions, 10)
  assert overlap(ids, expected) >= 0.9
  # Ranked by exact scores, whatever the 4-bit codes said.
  same = ids == expected
  assert same.mean() > 0.5
  np.testing.assert_array_equal(scores[same], expected_scores[same])


def test_the_same_passages_give_the_same_index_each_time():
  embeddings, questions = clusters(2000, 16), normal(40, 16, seed=1)
  found = [
    build(embeddings, scann_tree_passages=1).search(questions, 10)
    for _ in range(5)
  ]
  for again in found[1:]:
    assert_equal(again, found[0])


def test_a_tree_finds_the_same_after_it_was_saved_and_moved(tmp_path):
  index = build(clusters(2000, 16), scann_tree_passages=1)
  index.save(tmp_path / "built")
  loaded = load_index((tmp_path / "built").rename(tmp_path / "moved"))
  assert loaded.settings == index.settings
  questions = normal(40, 16, seed=1)
  np.testing.assert_array_equal(
    loaded.search(questions, 10)[0], index.search(questions, 10)[0]
  )


def test_scann_alone_would_pad_with_passage_0(short_of_passages):
  # If this ever fails, ScaNN changed and the exact search may go.
  ids, distances = short_of_passages._searcher.search_batched(
    normal(20, 8, seed=1), final_num_neighbors=5
  )
  assert np.isnan(distances).any()
  assert not ids[np.isnan(distances)].any()


@pytest.mark.parametrize("n_docs", [5, 50, 100])
def test_questions_that_come_short_are_answered_by_exact_search(
  short_of_passages, n_docs
):
  questions = normal(20, 8, seed=1)
  found = short_of_passages.search(questions, n_docs)
  assert_equal(
    found, exact_search(short_of_passages.embeddings, questions, n_docs)
  )
  assert all(len(set(row)) == n_docs for row in found[0].tolist())


def test_an_answer_narrower_than_n_docs_is_answered_by_exact_search(
  short_of_passages, monkeypatch
):
  # ScaNN pads to n_docs here, but does not promise to.
  class Narrow:
    def search_batched_parallel(self, questions, **_):
      shape = (len(questions), 3)
      return np.zeros(shape, np.uint32), np.zeros(shape)

  monkeypatch.setattr(short_of_passages, "_searcher", Narrow())
  questions = normal(4, 8, seed=1)
  ids, _ = short_of_passages.search(questions, 20)
  expected, _ = exact_search(short_of_passages.embeddings, questions, 20)
  np.testing.assert_array_equal(ids, expected)


def test_questions_that_do_not_come_short_keep_what_scann_found(
  short_of_passages,
):
  questions = normal(20, 8, seed=1)
  raw, distances = short_of_passages._searcher.search_batched(
    questions, final_num_neighbors=2
  )
  full = ~np.isnan(distances).any(axis=1)
  assert full.any()
  assert not full.all()
  ids, _ = short_of_passages.search(questions, 2)
  np.testing.assert_array_equal(
    np.sort(ids[full], axis=1), np.sort(raw[full], axis=1)
  )
  expected, _ = exact_search(short_of_passages.embeddings, questions, 2)
  assert np.any(ids[full] != expected[full])
  np.testing.assert_array_equal(ids[~full], expected[~full])


def test_passage_0_is_not_found_where_it_scores_worst():
  embeddings = normal(100, 8)
  embeddings[0] = -100.0
  questions = np.abs(normal(20, 8, seed=1))
  index = build(
    embeddings,
    scann_tree_passages=1,
    scann_num_leaves=50,
    scann_leaves_to_search=1,
  )
  ids, _ = index.search(questions, 10)
  assert not np.any(ids == 0)


def test_more_passages_than_are_reordered_can_be_asked_for(monkeypatch):
  embeddings = clusters(500, 8)
  index = build(
    embeddings,
    scann_tree_passages=1,
    scann_leaves_to_search=22,  # all of them
    scann_reorder=1,
  )
  questions = normal(5, 8, seed=1)
  monkeypatch.setattr(index, "_exact", None)  # ScaNN has to find them itself
  ids, _ = index.search(questions, 500)
  expected, _ = exact_search(embeddings, questions, 500)
  np.testing.assert_array_equal(ids, expected)


def test_more_leaves_than_passages_become_as_many_as_passages():
  index = build(
    normal(40, 6),
    scann_tree_passages=1,
    scann_num_leaves=1000,
    scann_leaves_to_search=2000,
  )
  assert index.settings["num_leaves"] == 40
  assert index.settings["leaves_to_search"] == 40
  ids, _ = index.search(normal(3, 6, seed=1), 5)
  assert all(len(set(row)) == 5 for row in ids.tolist())


def test_the_files_of_scann_must_fit_the_embeddings(tmp_path):
  build(normal(50, 4)).save(tmp_path / "a")
  build(normal(49, 4)).save(tmp_path / "b")
  (tmp_path / "a" / "scann").rename(tmp_path / "old")
  (tmp_path / "b" / "scann").rename(tmp_path / "a" / "scann")
  content = content_of(tmp_path / "a")
  artifacts.write_manifest(
    tmp_path / "a", kind="index", format=1, content=content
  )
  with pytest.raises(
    ValueError, match=r"49 passages, the embeddings 50; .*mix"
  ):
    load_index(tmp_path / "a")


def test_an_index_without_the_folder_of_scann_is_refused(tmp_path):
  exact(normal(50, 4)).save(tmp_path)
  edit_manifest(tmp_path, kind="scann")
  with pytest.raises(ValueError, match=r"kind 'scann', but there is no scann/"):
    load_index(tmp_path)


KINDS = [
  {"scann_soar_lambda": 1.5},
  {"scann_soar_lambda": 1.0, "scann_soar_overretrieve": 1.2},
  {"scann_reorder_dtype": "bfloat16", "scann_dims_per_block": 4},
  {"scann_reorder_dtype": "int8", "scann_anisotropic_threshold": 0.0},
  {"scann_reorder_dtype": "int8", "scann_soar_lambda": 1.5},
  {"scann_pca_dims": 23},
  {"scann_pca_dims": 24, "scann_soar_lambda": 0.5},
]


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_every_way_to_build_finds_most_and_stays_the_same_when_saved(
  config, tmp_path
):
  embeddings = clusters(4000, 33)
  questions = embeddings[::70] + 0.1 * normal(58, 33, seed=1)
  index = build(embeddings, scann_tree_passages=1, **config)
  assert {f"scann_{k}": v for k, v in index.settings.items()}.items() >= (
    config.items()
  )
  ids, scores = index.search(questions, 10)
  assert all(len(set(row)) == 10 for row in ids.tolist())  # also in two leaves
  expected, _ = exact_search(embeddings, questions, 10)
  assert overlap(ids, expected) > 0.8
  again = build(embeddings, scann_tree_passages=1, **config)
  np.testing.assert_array_equal(again.search(questions, 10)[0], ids)
  index.save(tmp_path)
  loaded = load_index(tmp_path)
  assert loaded.settings == index.settings
  np.testing.assert_array_equal(loaded.search(questions, 10)[1], scores)


@pytest.mark.parametrize("config", [{}, *KINDS], ids=str)
def test_what_scann_keeps_is_counted_as_it_is_saved(config, tmp_path):
  index = build(
    clusters(4000, 33), scann_tree_passages=1, scann_num_leaves=20, **config
  )
  index.save(tmp_path)
  saved = sum(f.stat().st_size for f in (tmp_path / "scann").iterdir())
  counted = index.memory_bytes - index.embeddings.nbytes
  # The rest are codebooks and settings, of a size of their own.
  assert saved - 25_000 < counted <= saved


def test_more_principal_components_than_dimensions_are_refused():
  with pytest.raises(ValueError, match=r"pca_dims=17 .* of 16 dimensions"):
    build(clusters(100, 16), scann_tree_passages=1, scann_pca_dims=17)


def test_half_the_components_are_half_the_codes_and_find_what_matters():
  rng = np.random.default_rng(0)
  # Eight directions hold nearly all that differs.
  scales = np.r_[np.full(8, 1.0), np.full(24, 0.01)]
  embeddings = (rng.normal(size=(3000, 32)) * scales).astype(np.float32)
  options = {"scann_tree_passages": 1, "scann_leaves_to_search": 54}
  every = build(embeddings, **options)
  half = build(embeddings, scann_pca_dims=8, **options)
  assert every.memory_bytes - half.memory_bytes >= 3000 * 24 / 2
  expected, _ = exact_search(embeddings, embeddings[:100], 10)
  found, _ = half.search(embeddings[:100], 10)
  assert overlap(found, expected) > 0.97


def test_the_search_can_change_without_a_new_build():
  index = build(clusters(2000, 16), scann_tree_passages=1)
  questions = normal(50, 16, seed=1)
  found = {
    leaves: index.with_search_settings(leaves_to_search=leaves, reorder=50)
    for leaves in (1, 44)
  }
  assert found[1].settings == index.settings | {
    "leaves_to_search": 1,
    "reorder": 50,
  }
  assert found[1].certificate is None
  expected, _ = exact_search(index.embeddings, questions, 5)
  hits = {
    leaves: (other.search(questions, 5)[0] == expected).mean()
    for leaves, other in found.items()
  }
  assert hits[1] < 0.7 < hits[44]


@pytest.mark.parametrize(
  ("settings", "problem"),
  [
    ({"leaves_to_search": 45, "reorder": 5}, "=45 and reorder=5 .*1 to 44"),
    ({"leaves_to_search": 0, "reorder": 5}, "leaves_to_search=0 and"),
    ({"leaves_to_search": 4, "reorder": 0}, "reorder=0 were asked"),
  ],
)
def test_a_search_that_cannot_be_is_refused(settings, problem):
  index = build(clusters(2000, 16), scann_tree_passages=1)
  with pytest.raises(ValueError, match=problem):
    index.with_search_settings(**settings)


def test_without_a_tree_there_is_nothing_to_set():
  with pytest.raises(ValueError, match="scores all of its 50 passages"):
    build(normal(50, 4)).with_search_settings(leaves_to_search=1, reorder=1)


def test_an_old_manifest_is_completed_with_what_its_index_was_built_with(
  tmp_path,
):
  index = build(clusters(2000, 16), scann_tree_passages=1)
  index.save(tmp_path)
  old = ("num_leaves", "leaves_to_search", "reorder")
  edit_manifest(tmp_path, settings={k: index.settings[k] for k in old})
  loaded = load_index(tmp_path)
  assert loaded.settings == index.settings
  questions = normal(20, 16, seed=1)
  np.testing.assert_array_equal(
    loaded.search(questions, 5)[0], index.search(questions, 5)[0]
  )


@pytest.mark.parametrize(
  "name",
  ["/etc/passwd", "../embeddings.npy", "a/b.npy", "..", ".x.npy", "x.pkl"],
)
def test_a_list_of_files_that_names_others_is_refused(tmp_path, name):
  build(normal(50, 8)).save(tmp_path)
  for path in ("x.pkl", "a/b.npy", ".x.npy"):
    (tmp_path / "scann" / path).parent.mkdir(exist_ok=True)
    (tmp_path / "scann" / path).write_text("x")
  listed = tmp_path / "scann/scann_assets.pbtxt"
  listed.write_text(listed.read_text().replace("dataset.npy", name))
  info = info_of(tmp_path)
  with pytest.raises(
    ValueError, match=r"scann_assets\.pbtxt is not what ScaNN wrote there"
  ):
    ScannIndex.load(tmp_path, info)


@pytest.mark.parametrize(
  "text", ["", "# x\n", 'assets { asset_path: "../y" }\n', "\udcff"]
)
def test_what_else_stands_in_the_list_is_refused(tmp_path, text):
  build(normal(50, 8)).save(tmp_path)
  listed = tmp_path / "scann/scann_assets.pbtxt"
  data = listed.read_bytes() + text.encode("utf-8", "surrogateescape")
  listed.write_bytes(data)
  info = info_of(tmp_path)
  if not text:
    assert ScannIndex.load(tmp_path, info).num_passages == 50
    return
  with pytest.raises(ValueError, match=r"is not what ScaNN wrote there"):
    ScannIndex.load(tmp_path, info)


def test_a_part_of_an_index_is_not_opened_alone(tmp_path):
  """Its embeddings lie outside: whoever wrote it could name any of them."""
  embeddings = normal(50, 8)
  config = IndexConfig(kind="exact", passages_per_shard=25)
  path = tmp_path / "index"
  path.mkdir()
  save_embeddings(epath.Path(path), embeddings)
  build_index_directory(path, open_embeddings(path), config, **FINGERPRINTS)
  load_index(path)
  with pytest.raises(ValueError, match=r"is one shard of an index.*Open the"):
    load_index(path / "shards/00000")


def test_a_full_disk_is_called_that(tmp_path):
  index = build(normal(500, 8))
  save_embeddings(epath.Path(tmp_path), index.embeddings)
  index.embeddings = open_embeddings(tmp_path)
  with (
    full_disk(5_000),
    pytest.raises(UnwritableError, match="Free some"),
  ):
    index.save(tmp_path)
