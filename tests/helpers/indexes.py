"""Indexes in tests: exact ones, what they find, their manifests."""

import json

import numpy as np

from rag_jax.retrieval.exact import ExactIndex

FINGERPRINTS = {"encoder_fingerprint": "1a2b", "passages_fingerprint": "3c4d"}


def exact(embeddings):
  return ExactIndex(embeddings, **FINGERPRINTS)


def assert_equal(found, expected):
  """Ids and scores of two searches are equal to the last bit."""
  for ours, theirs in zip(found, expected, strict=True):
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


def overlap(ids, expected):
  """Returns the mean share of the expected ids that were found."""
  shares = [np.isin(b, a).mean() for a, b in zip(ids, expected, strict=True)]
  return np.mean(shares)


def content_of(path):
  return json.loads((path / "manifest.json").read_text())["content"]


def edit_manifest(path, **content):
  """Changes the content of a manifest, and no file."""
  manifest = json.loads((path / "manifest.json").read_text())
  manifest.pop("sha256", None)  # the first manifests had no digest
  manifest["content"] |= content
  (path / "manifest.json").write_text(json.dumps(manifest))
