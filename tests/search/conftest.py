"""A corpus, an encoder, and the directory that is built of them."""

import json

import pytest
from small_encoder import write_encoder
from small_search import ANIMALS
from small_search import PLACES
from small_search import build
from small_search import sentence


@pytest.fixture(scope="module")
def texts():
  return [sentence(a, p) for a in ANIMALS for p in PLACES]


@pytest.fixture(scope="module")
def encoder(texts, tmp_path_factory):
  return write_encoder(tmp_path_factory.mktemp("encoder") / "model", texts)


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory):
  """A .jsonl file with a language in each second record."""
  path = tmp_path_factory.mktemp("corpus") / "animals.jsonl"
  records = [
    {"id": f"p{i}", "title": "", "text": text, "lang": ("en", "de")[i % 2]}
    for i, text in enumerate(texts)
  ]
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


@pytest.fixture(scope="module")
def built(corpus, encoder, tmp_path_factory):
  return build(corpus, encoder, tmp_path_factory.mktemp("built") / "index")
