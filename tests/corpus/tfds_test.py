"""Documents of TFDS: written by it, made up, damaged or not to be had."""

import json
import re

from corpora import read
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants

from rag_jax.corpus.document import Document
from rag_jax.corpus.document import FieldNames


def write_tfds(data_dir, name, config, features, splits):
  """Writes a small data set as TFDS stores it: rows by split."""
  # Otherwise TFDS has two builders of that name.
  with tfds.core.registered.skip_registration():

    class Builder(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")
      BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] * bool(config)
      # Nothing of it is stored beside its code.
      pkg_dir_path = None
      code_path = None

      def _info(self):
        text = dict.fromkeys(features, tfds.features.Text())
        return tfds.core.DatasetInfo(
          builder=self, features=tfds.features.FeaturesDict(text)
        )

      def _split_generators(self, dl_manager):
        return {s: enumerate(rows) for s, rows in splits.items()}

      def _generate_examples(self):
        raise AssertionError  # the rows are given above

  Builder.name = name
  Builder(data_dir=data_dir, file_format="array_record").download_and_prepare()


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
  tfds.disable_progress_bar()
  monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
  return tmp_path


def beir_row(i, metadata):
  return {
    "passage_id": f"MED-{i}",
    "passage": f"Passage é {i}.",
    "passage_metadata": metadata,
    "query": "",
  }


def test_the_passages_of_a_beir_data_set_are_documents(data_dir):
  rows = [
    beir_row(i, json.dumps({"title": f"T {i}", "url": f"u{i}"}))
    for i in range(5)
  ]
  question = {"query": rows, "passage": rows, "test": rows[:2]}
  write_tfds(data_dir, "beir", "nfcorpus", rows[0], question)
  documents, report = read("tfds:beir/nfcorpus")
  assert report.documents == 5
  by_id = sorted(documents, key=lambda d: d.id)
  assert [(d.id, d.title, d.text, d.metadata) for d in by_id] == [
    (f"MED-{i}", f"T {i}", f"Passage é {i}.", (("url", f"u{i}"),))
    for i in range(5)
  ]
  assert [d.where for d in documents] == [
    f"tfds:beir/nfcorpus:passage[{i}]" for i in range(5)
  ]


def mock_rows(rows):
  """TFDS answers with these rows, whatever the split."""
  return tfds.testing.mock_data(as_data_source_fn=lambda self, **kwargs: rows)


@pytest.mark.parametrize("metadata", ["no", "[1]", "{"])
def test_metadata_of_beir_that_is_no_object_is_named_or_skipped(metadata):
  rows = [beir_row(0, metadata), beir_row(1, "")]
  with mock_rows(rows):
    where = re.escape("tfds:beir/nfcorpus:passage[0]: passage_metadata is")
    with pytest.raises(ValueError, match=where):
      read("tfds:beir/nfcorpus")
    documents, report = read("tfds:beir/nfcorpus", "skip")
  assert [d.id for d in documents] == ["MED-1"]
  assert report.dropped["bad_record"] == 1


def test_the_paragraphs_of_squad_are_documents_of_all_splits():
  row = {"id": b"q1", "title": b"New_York", "question": b"?", "context": b"Is."}
  row |= {"answers": {"text": [b"x"]}}
  with mock_rows({"train": [row], "validation": [row | {"id": "q2"}]}):
    documents, _ = read("tfds:squad")
  assert documents == [
    Document("q1", "New York", "Is.", (), "tfds:squad:train[0]"),
    Document("q2", "New York", "Is.", (), "tfds:squad:validation[0]"),
  ]


def test_of_other_data_sets_the_fields_are_named_and_documents_numbered():
  rows = [{"title": "T", "description": f"text {i}", "label": 3} for i in "ab"]
  with mock_rows({"train": rows}):
    documents, _ = read(
      "tfds:ag_news_subset", fields=FieldNames(text="description")
    )
  label = (("label", "3"),)
  assert documents == [
    Document(f"train/{i}", "T", text, label, f"tfds:ag_news_subset:train[{i}]")
    for i, text in enumerate(["text a", "text b"])
  ]


def test_a_feature_that_is_not_there_is_refused_with_those_that_are():
  with (
    mock_rows({"train": [{"title": "T", "description": "x"}]}),
    pytest.raises(ValueError, match="no feature 'text'; it has") as info,
  ):
    read("tfds:ag_news_subset", "skip")
  assert "['description', 'title']" in str(info.value)
  assert "Set the names of the fields" in str(info.value)


@pytest.mark.parametrize(
  "name", ["cnn_dailymail", "wikipedia/20230601.en", "x"]
)
def test_a_data_set_that_needs_tensorflow_is_refused_with_the_extra(name):
  with pytest.raises(ValueError, match=f"tfds:{name} is not a data") as info:
    read(f"tfds:{name}", "skip")
  for part in ("needs no TensorFlow", "pip install 'rag_jax[tf]'"):
    assert part in str(info.value)


def test_damaged_files_are_refused(data_dir):
  rows = [beir_row(i, "{}") for i in range(50)]
  write_tfds(data_dir, "beir", "nfcorpus", rows[0], {"passage": rows})
  (path,) = data_dir.glob("beir/nfcorpus/*/*passage.array_record*")
  data = bytearray(path.read_bytes())
  data[600] ^= 0xFF  # in the compressed examples, not the padding
  path.write_bytes(data)
  with pytest.raises(ValueError, match="tfds:beir/nfcorpus cannot be read"):
    read("tfds:beir/nfcorpus", "skip")
