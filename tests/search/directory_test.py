"""What was built is searched, and refused where it is not whole."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from small_encoder import write_encoder
from small_search import QUESTION
from small_search import build
from small_search import config

from rag_jax.corpus.store import PassageStore
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.bm25 import Bm25Settings
from rag_jax.retrieval.retriever import Embedder
from rag_jax.search.directory import OpenedDirectory
from rag_jax.search.directory import write_content
from rag_jax.search.text_encoder import open_checkpoint


def test_dense_search_finds_what_inner_products_of_the_encoder_find(
  built, encoder, texts
):
  tower = open_checkpoint(encoder, "question")
  embedder = Embedder(tower.model, 1)
  # The slow way: each text alone, as a question, which this encoder treats as
  # it does a passage without a title.
  embeddings = np.concatenate(
    [tower.embed_questions(embedder, [text]) for text in texts]
  )
  questions = [QUESTION, "the bees of the woods", texts[7]]
  asked = tower.embed_questions(embedder, questions)
  scores = asked @ embeddings.T
  found = built.search(questions, 5)
  for hits, row in zip(found, scores, strict=True):
    np.testing.assert_allclose(
      [hit.score for hit in hits], -np.sort(-row)[:5], rtol=1e-5
    )
    for hit in hits:
      assert row[texts.index(hit.passage.text)] == pytest.approx(
        hit.score, rel=1e-5
      )
  assert found[2][0].passage.text == texts[7]


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_every_mode_finds_the_passage_with_the_words(built, mode):
  hits = built.search([QUESTION], 3, mode=mode)[0]
  assert len(hits) == 3
  # More than there are is all; by words, all with one of them.
  assert len(built.search([QUESTION], 99, mode=mode)[0]) == 40
  bees, unheard = built.search(["bees", "unheard"], 99, mode=mode)
  assert len(bees) == (5 if mode == "bm25" else 40)
  assert len(unheard) == (0 if mode == "bm25" else 40)
  if mode != "dense":
    assert "owls" in hits[0].passage.text
    assert "caves" in hits[0].passage.text


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_a_filter_keeps_the_passages_that_meet_it(built, mode):
  hits = built.search([QUESTION], 20, mode=mode, filters=["lang=de"])[0]
  assert len({hit.passage.id for hit in hits}) == 20
  assert all(dict(hit.passage.metadata)["lang"] == "de" for hit in hits)
  more = built.search([QUESTION], 21, mode=mode, filters=["lang=de"])[0]
  assert [hit.passage.id for hit in more] == [hit.passage.id for hit in hits]
  none = built.search([QUESTION], 5, mode=mode, filters=["lang=es"])
  assert none == [[]]


def test_a_directory_can_be_moved(built, corpus, encoder, tmp_path):
  build(corpus, encoder, tmp_path / "here")
  (tmp_path / "here").rename(tmp_path / "there")
  moved = OpenedDirectory(tmp_path / "there")
  assert moved.search([QUESTION], 7) == built.search([QUESTION], 7)


def test_a_corpus_of_one_passage_is_searched_for_one(encoder, tmp_path):
  (tmp_path / "one.txt").write_text("the owls live in the caves")
  made = build(tmp_path / "one.txt", encoder, tmp_path / "index")
  assert len(made.search([QUESTION], 1)[0]) == 1
  assert len(made.search([QUESTION], 5)[0]) == 1


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"mode": "sparse"}, r"mode='sparse' is not one of"),
    ({"n_docs": 0}, "n_docs=0"),
    ({"questions": ["a", " "]}, "Question 2 of 2 is empty"),
  ],
)
def test_a_search_that_cannot_be_done_is_refused(built, kwargs, message):
  arguments = {"questions": [QUESTION], "n_docs": 2} | kwargs
  with pytest.raises(ValueError, match=message):
    built.search(
      arguments["questions"],
      arguments["n_docs"],
      mode=arguments.get("mode", "dense"),
    )


def test_words_are_searched_as_the_settings_say(
  built, corpus, encoder, tmp_path
):
  words = Bm25Settings(stemmer="english", stop_words=("the",), k1=1.2, b=0.75)
  made = build(corpus, encoder, tmp_path / "index", config(words=words))
  assert OpenedDirectory(made.path).bm25.settings == words
  (hits,) = made.search(["owl"], 9, mode="bm25")
  assert {"owls" in hit.passage.text for hit in hits} == {True}
  assert made.search(["the"], 9, mode="bm25") == [[]]
  # Tried on what was built otherwise, it finds the same.
  other = OpenedDirectory(built.path)
  assert other.search(["owl"], 9, mode="bm25") == [[]]
  other.set_words(stemmer="english", stop_words="the", k1=1.2)
  assert other.bm25.settings.b == 0.4
  other.set_words(b=0.75)
  assert other.search(["owl"], 9, mode="bm25") == [hits]
  with pytest.raises(ValueError, match=r"b=2\.0 is not from 0 to 1"):
    build(corpus, encoder, tmp_path / "b", config(words=Bm25Settings(b=2.0)))
  assert not (tmp_path / "b").exists()
  # What was built when there was no choice is complete by default alone.
  manifest = json.loads((built.path / "manifest.json").read_text())
  copy = tmp_path / "copy"
  shutil.copytree(built.path, copy)
  del manifest["sha256"], manifest["content"]["plan"]["words"]
  (copy / "manifest.json").write_text(json.dumps(manifest))
  assert len(build(corpus, encoder, copy).passages) == 40
  with pytest.raises(ValueError, match=r"other inputs: words is .*'k1': 1\.2"):
    build(corpus, encoder, copy, config(words=words))


def test_without_words_only_embeddings_are_searched(corpus, encoder, tmp_path):
  made = build(corpus, encoder, tmp_path, config(bm25=False))
  assert made.search([QUESTION], 2)
  with pytest.raises(ValueError, match="was built without them"):
    made.search([QUESTION], 2, mode="hybrid")


def test_no_questions_have_no_hits(built):
  assert built.search([], 3) == []


@pytest.mark.parametrize(
  "name",
  [
    "manifest.json",
    "index/embeddings.npy",
    "index/manifest.json",
    "bm25/scores.npy",
    "encoder/params.safetensors",
    "encoder/tokenizer/tokenizer.json",
    "passages/manifest.json",
  ],
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_part_is_noticed_when_it_is_opened(
  built, tmp_path, name, damage
):
  path = tmp_path / "copy"
  shutil.copytree(built.path, path)
  file = path / name
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  if damage == "remove":
    file.unlink()
  else:
    file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
  with pytest.raises((ValueError, FileNotFoundError)) as error:
    OpenedDirectory(path)
  assert damage == "flip" or pathlib.Path(name).name in str(error.value)


def test_a_pickle_beside_the_index_is_refused(built, tmp_path):
  path = tmp_path / "copy"
  shutil.copytree(built.path, path)
  (path / "index/scann").mkdir()
  (path / "index/scann/scann_docids.pkl").write_bytes(b"cos\nsystem\n")
  with pytest.raises(ValueError, match=r"scann_docids\.pkl, a pickle"):
    OpenedDirectory(path)


def test_a_part_of_another_build_is_refused(
  built, corpus, encoder, texts, tmp_path
):
  other = write_encoder(tmp_path / "other", texts, seed=5)
  build(corpus, other, tmp_path / "index")
  shutil.rmtree(tmp_path / "index/index")
  shutil.copytree(built.path / "index", tmp_path / "index/index")
  with pytest.raises(ValueError, match=r"index/manifest\.json"):
    OpenedDirectory(tmp_path / "index")


def test_words_of_other_passages_are_refused(built, tmp_path, monkeypatch):
  path = tmp_path / "copy"
  shutil.copytree(built.path, path)
  words = Bm25Index.build(
    PassageStore(path / "passages")[:5], passages_fingerprint="of others"
  )
  words.save(path / "bm25")
  manifest = json.loads((path / "manifest.json").read_text())
  write_content(path, manifest["content"])
  with pytest.raises(ValueError, match="of others"):
    OpenedDirectory(path)
