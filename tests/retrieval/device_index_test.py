"""An index on devices, as the host sees it."""

import dataclasses

from indexes import FINGERPRINTS
from indexes import assert_equal
from indexes import content_of
from indexes import edit_manifest
from indexes import exact
from linen import normal
import numpy as np
import pytest
from several_devices import mesh_of

from rag_jax.config import IndexConfig
from rag_jax.retrieval import device_index
from rag_jax.retrieval.device import place_arrays
from rag_jax.retrieval.device_index import DeviceIndex
from rag_jax.retrieval.device_index import RefreshedIndex
from rag_jax.retrieval.device_index import settings_of
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import build_index
from rag_jax.retrieval.index import load_index

P, R = 203, 16
MESH = mesh_of(1)


def build(embeddings, **settings):
  config = IndexConfig(kind="device", **settings)
  return build_index(embeddings, config, mesh=MESH, **FINGERPRINTS)


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_the_host_gets_exact_scores_whatever_is_stored(storage):
  embeddings, questions = normal(P, R), normal(300, R, seed=1)
  index = build(embeddings, device_storage=storage)
  ids, scores = index.search(questions, 4)
  rows = embeddings[ids].astype(np.float64)
  expected = np.einsum("BR,BKR->BK", questions.astype(np.float64), rows)
  np.testing.assert_array_equal(scores, expected.astype(np.float32))
  assert np.all(np.diff(scores) <= 0)
  if storage == "float32":
    assert_equal((ids, scores), exact(embeddings).search(questions, 4))


def test_a_loaded_index_searches_as_it_was_built_to(tmp_path):
  built = build(
    normal(P, R),
    device_storage="int8",
    device_recall_target=0.8,
    device_chunk_passages=40,
  )
  built.save(tmp_path)
  loaded = load_index(tmp_path, encoder_fingerprint="1a2b")
  assert isinstance(loaded, DeviceIndex)
  assert isinstance(loaded, Index)
  assert loaded.settings == built.settings
  assert loaded.arrays.recall_target == 0.8
  assert loaded.arrays.embeddings.dtype == np.int8
  assert loaded.arrays.num_chunks == 6  # of at most 40 of 203
  np.testing.assert_array_equal(
    loaded.search(normal(9, R, seed=1), 3)[0],
    built.search(normal(9, R, seed=1), 3)[0],
  )


def test_an_index_is_opened_on_the_devices_of_a_mesh(tmp_path):
  build(normal(P, R)).save(tmp_path)
  index = load_index(tmp_path, mesh=MESH)
  assert index.arrays.mesh == MESH
  assert load_index(tmp_path).arrays.mesh.axis_names == ("rows",)
  questions = normal(5, R, seed=1)
  np.testing.assert_array_equal(
    index.search(questions, 3)[0], exact(normal(P, R)).search(questions, 3)[0]
  )


def test_settings_that_no_device_index_has_are_refused(tmp_path):
  build(normal(P, R)).save(tmp_path)
  settings = content_of(tmp_path)["settings"]
  for wrong in ({}, settings | {"storage": "float8"}):
    edit_manifest(tmp_path, settings=wrong)
    with pytest.raises(ValueError, match=r"'device', but its settings .*Build"):
      load_index(tmp_path)


def test_a_block_of_questions_is_not_filled_up_with_zeros(monkeypatch):
  # To which all passages are equal, so that accelerators search twice.
  blocks = []

  def search(arrays, questions, n_docs):
    blocks.append(questions)
    return np.zeros((len(questions), n_docs), int), None

  monkeypatch.setattr(device_index, "_search", search)
  build(normal(P, R)).search(normal(5, R, seed=1), 2)
  (questions,) = blocks
  assert questions.shape == (8, R)
  assert np.all(np.any(questions != 0, axis=1))


def test_embeddings_with_nan_are_refused():
  embeddings = normal(P, R)
  embeddings[5, 2] = np.nan
  with pytest.raises(ValueError, match=r"1 of 203 passages hold NaN.*rows 5\."):
    build(embeddings)


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_arrays_of_a_step_are_an_index_for_the_host(storage):
  settings = settings_of(
    IndexConfig(device_storage=storage, device_chunk_passages=50)
  )
  arrays = place_arrays(normal(P, R), MESH, **settings)
  index = RefreshedIndex(
    dataclasses.replace(arrays, norms=None),  # as in a checkpoint
    settings,
    passages_fingerprint="3c4d",
  )
  assert isinstance(index, Index)
  assert index.encoder_fingerprint == ""  # rows are of several weights
  np.testing.assert_allclose(
    index.arrays.norms[:P], arrays.norms[:P], rtol=1e-6
  )
  rows = index.embeddings[:]
  np.testing.assert_allclose(
    rows, normal(P, R), atol={"float32": 0, "int8": 0.02}[storage]
  )
  for some in (np.array([[3, 202], [0, 7]]), slice(5, 5), slice(9, 150)):
    np.testing.assert_array_equal(index.embeddings[some], rows[some])
  questions = normal(9, R, seed=1)
  assert_equal(index.search(questions, 4), exact(rows).search(questions, 4))
