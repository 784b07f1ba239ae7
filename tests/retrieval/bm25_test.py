"""BM25 against a loop over its formula, and what a saved index refuses."""

import collections
import math
import pathlib
import random
import re
import subprocess
import sys

from indexes import assert_equal
from indexes import content_of
import numpy as np
import pytest

from rag_jax import artifacts
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.text_files import shorten
from rag_jax.corpus.words import WordTokenizer
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.bm25 import Bm25Settings
from rag_jax.retrieval.bm25 import read_stop_words

TEXTS = [
  ("Paris", "Paris is the capital of France, on the river Seine."),
  ("Seine", "The Seine is a river in the north of France."),
  ("", "Berlin is the capital of Germany."),
  ("", "東京は日本の首都。"),
  ("", "..."),  # no word at all
  ("", "Berlin is the capital of Germany."),  # the same once more
]

LOWEST = np.finfo(np.float32).min  # in place of a score


def passages(texts=TEXTS):
  return [Passage(str(i), *text) for i, text in enumerate(texts)]


def build(texts=TEXTS, **settings):
  return Bm25Index.build(
    passages(texts),
    passages_fingerprint="3c4d",
    settings=Bm25Settings(**settings),
  )


def random_texts(seed, num_passages=60, vocabulary=80):
  rng = random.Random(seed)
  words = [f"w{i}" for i in range(vocabulary)]
  weights = [1 / (1 + i) for i in range(vocabulary)]

  def some(longest):
    return " ".join(rng.choices(words, weights, k=rng.randrange(longest)))

  return [(some(4), some(30)) for _ in range(num_passages)], [
    some(9) + " unheard" for _ in range(25)
  ]


def slow_scores(texts, question, k1, b, stemmer="", stop_words=()):
  """Returns the score of each passage: the formula, word by word."""
  split = WordTokenizer(stemmer, stop_words)
  docs = [split(f"{title} {text}") for title, text in texts]
  mean_length = sum(map(len, docs)) / len(docs)
  scores = []
  for doc in docs:
    counts, score = collections.Counter(doc), 0.0
    for word in split(question):
      if not counts[word]:
        continue
      n = sum(word in other for other in docs)
      idf = math.log(1 + (len(docs) - n + 0.5) / (n + 0.5))
      length = 1 - b + b * len(doc) / mean_length
      score += idf * counts[word] / (counts[word] + k1 * length)
    scores.append(score)
  return np.array(scores)


@pytest.mark.parametrize(
  "settings",
  [
    {"k1": 0.9, "b": 0.4},
    {"k1": 1.5, "b": 0.75},
    {"k1": 0.0, "b": 0.0},
    {"k1": 1.2, "b": 1.0},
    {"k1": 0.9, "b": 0.4, "stop_words": ("w0", "w3")},
  ],
)
def test_scores_are_those_of_a_loop_over_the_formula(settings):
  texts, questions = random_texts(seed=0)
  index = build(texts, **settings)
  ids, scores = index.search(questions, 60)
  assert ids.dtype == np.int32
  assert scores.dtype == np.float32
  for question, row, got in zip(questions, ids, scores, strict=True):
    expected = slow_scores(texts, question, **settings)
    found = row >= 0
    np.testing.assert_allclose(got[found], expected[row[found]], rtol=1e-5)
    # What has no word of the question is not found.
    assert sorted(row[found]) == np.flatnonzero(expected > 0).tolist()
    assert not found[sum(found) :].any()
    assert np.all(got[~found] == LOWEST)


@pytest.mark.parametrize("n_docs", [1, 2, 7, 59, 60])
def test_the_best_are_found_and_ties_go_to_the_smaller_id(n_docs):
  texts, questions = random_texts(seed=1)
  texts = [texts[i % 20] for i in range(60)]  # each is there three times
  index = build(texts)
  scores = index.score(
    questions, np.tile(np.arange(60, dtype=np.int32), (25, 1))
  )
  ids, found = index.search(questions, n_docs)
  for row in range(25):
    order = sorted(range(60), key=lambda i: (-scores[row, i], i))[:n_docs]
    order = [i for i in order if scores[row, i] > 0]
    assert ids[row].tolist() == order + [-1] * (n_docs - len(order))
    np.testing.assert_array_equal(found[row, : len(order)], scores[row, order])


def test_given_passages_have_the_scores_that_search_finds():
  texts, questions = random_texts(seed=2)
  questions[0] = "w0 w0 w1 w0"  # a word counts as often as it is asked for
  index = build(texts)
  ids, scores = index.search(questions, 60)
  scores = np.where(ids < 0, 0, scores)
  some = np.maximum(ids, 0)
  scored = np.where(ids < 0, 0, index.score(questions, some))
  np.testing.assert_array_equal(scored, scores)
  np.testing.assert_array_equal(
    index.score(questions, some[:, 5:2:-1])[ids[:, 5:2:-1] >= 0],
    scores[:, 5:2:-1][ids[:, 5:2:-1] >= 0],
  )


def test_a_question_is_answered_alike_in_any_batch():
  texts, questions = random_texts(seed=3)
  index = build(texts)
  ids, scores = index.search(questions, 9)
  for row, question in enumerate(questions):
    alone = slice(row, row + 1)
    assert_equal(index.search([question], 9), (ids[alone], scores[alone]))


def test_title_and_text_are_both_searched():
  ids, scores = build().search(["PARIS", "north france"], 2)
  assert ids.tolist() == [[0, -1], [1, 0]]
  assert scores[0, 0] > 0


def test_languages_without_spaces_are_searched():
  ids, scores = build().search(["日本の首都はどこ"], 2)
  assert ids.tolist() == [[3, -1]]
  assert scores[0, 0] > 0


@pytest.mark.parametrize("question", ["", "unheard words?!"])
def test_a_question_without_a_known_word_finds_nothing(question):
  ids, scores = build().search([question], 4)
  assert ids.tolist() == [[-1, -1, -1, -1]]
  assert scores.tolist() == [[LOWEST] * 4]


def test_passages_without_any_word_can_be_searched():
  index = build([("", "..."), ("", "?!")])
  ids, scores = index.search(["anything", "..."], 2)
  assert ids.tolist() == [[-1, -1], [-1, -1]]
  assert np.all(scores == LOWEST)
  np.testing.assert_array_equal(index.score(["a"], np.array([[0, 1]])), 0)


def test_no_questions_find_nothing():
  ids, scores = build().search([], 3)
  assert (ids.shape, scores.shape) == ((0, 3), (0, 3))
  assert build().score([], ids).shape == (0, 3)


def test_word_endings_are_cut_off_if_asked_for():
  assert build().search(["rivers"], 1)[0] == -1
  assert build(stemmer="english").search(["rivers"], 1)[1] > 0


def test_the_passages_are_read_once_one_by_one():
  index = Bm25Index.build((p for p in passages()), passages_fingerprint="3c4d")
  np.testing.assert_array_equal(
    index.search(["river in france"], 6)[1],
    build().search(["river in france"], 6)[1],
  )


def test_importing_the_module_does_not_start_the_devices():
  # bm25s does, and then jax.distributed.initialize would be too late.
  code = (
    "import rag_jax.retrieval.hybrid, sys; assert 'bm25s' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_no_passages_are_refused():
  with pytest.raises(ValueError, match="no passages to index by their words"):
    build([])


@pytest.mark.parametrize("k1", [-0.1, math.nan, math.inf, 1000.5, 1e300])
def test_a_k1_outside_0_to_1000_is_refused(k1):
  shown = re.escape(shorten(k1))
  with pytest.raises(ValueError, match=f"k1={shown} is not from 0 to 1,000. E"):
    build(k1=k1)


@pytest.mark.parametrize("b", [-0.1, 1.1, math.nan])
def test_a_b_outside_0_to_1_is_refused(b):
  with pytest.raises(ValueError, match=rf"b={b} is not from 0 to 1. Expected"):
    build(b=b)


@pytest.mark.parametrize("n_docs", [0, -1, 7])
def test_a_number_of_passages_that_is_not_there_is_refused(n_docs):
  with pytest.raises(ValueError, match=f"n_docs={n_docs} .*expected 1 to 6"):
    build().search(["river"], n_docs)


@pytest.mark.parametrize("ids", [[[0, 6]], [[-1, 2]]])
def test_scores_of_what_is_no_passage_are_refused(ids):
  with pytest.raises(ValueError, match=r"ids has passages .* expected 0 to 5"):
    build().score(["river"], np.array(ids))


def test_scores_need_a_row_for_each_question():
  with pytest.raises(ValueError, match="ids has 1 rows for 2 questions; exp"):
    build().score(["a", "b"], np.zeros((1, 2), np.int32))


def test_one_string_is_no_list_of_questions():
  with pytest.raises(TypeError, match="questions='river' is one string; exp"):
    build().search("river", 1)
  with pytest.raises(TypeError, match="questions='river' is one string; exp"):
    build().score("river", np.zeros((5, 1), np.int32))


QUESTIONS = ["the river Seine", "Berlin", "首都", "unheard"]


@pytest.fixture
def saved(tmp_path):
  build(stemmer="english", stop_words=("the",)).save(tmp_path / "index")
  return tmp_path / "index"


def test_a_loaded_index_finds_the_same_wherever_it_was_moved_to(saved):
  index = build(stemmer="english", stop_words=("the",))
  loaded = Bm25Index.load(
    saved.rename(saved.with_name("moved")), passages_fingerprint="3c4d"
  )
  assert loaded.settings == index.settings
  assert loaded.num_passages == 6
  assert loaded.passages_fingerprint == "3c4d"
  assert_equal(index.search(QUESTIONS, 6), loaded.search(QUESTIONS, 6))
  ids = np.tile(np.arange(6), (4, 1))
  np.testing.assert_array_equal(
    loaded.score(QUESTIONS, ids), index.score(QUESTIONS, ids)
  )


def test_an_older_index_goes_on_by_the_rule_it_was_built_with(tmp_path):
  texts = [("", "Straße 1,000"), ("", "1000 strasse")]
  build(texts, word_rule=1).save(tmp_path)
  content = content_of(tmp_path)
  assert content.pop("word_rule") == 1
  # As it was written when there was no other rule.
  artifacts.write_manifest(tmp_path, kind="bm25", format=1, content=content)
  old = Bm25Index.load(tmp_path)
  questions = ["STRASSE", "straße", "1,000"]
  found = [[1, -1], [0, -1], [0, -1]]
  assert old.search(questions, 2)[0].tolist() == found
  old.save(tmp_path / "again")
  again = Bm25Index.load(tmp_path / "again")
  assert again.search(questions, 2)[0].tolist() == found
  assert build(texts).search(questions, 2)[0].tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(
  ("source", "expected"),
  [
    ("", ()),
    ("the", ("the",)),
    ("the, of,,und", ("the", "of", "und")),
    ("FILE", ("der", "die das")),
  ],
)
def test_stop_words_are_a_list_or_a_file(tmp_path, source, expected):
  (tmp_path / "words.txt").write_text("der\n\n die das \n")
  source = source.replace("FILE", str(tmp_path / "words.txt"))
  assert read_stop_words(source) == expected


def test_stop_words_are_known_of_some_languages():
  assert {"the", "of"} < {*read_stop_words("english")}
  assert {"der", "und"} < {*read_stop_words("german")}
  with pytest.raises(ValueError, match=r"'englsh' .*Did you mean 'english'"):
    read_stop_words("englsh")
  with pytest.raises(ValueError, match=r"no/file.txt.* is no file"):
    read_stop_words("no/file.txt")


def test_an_index_without_words_can_be_saved(tmp_path):
  build([("", "...")]).save(tmp_path)
  assert Bm25Index.load(tmp_path).search(["a"], 1)[0].tolist() == [[-1]]


def test_an_open_index_can_be_saved_over_itself(saved):
  Bm25Index.load(saved).save(saved)
  np.testing.assert_array_equal(
    Bm25Index.load(saved).search(["seine"], 6)[0],
    build(stemmer="english", stop_words=("the",)).search(["seine"], 6)[0],
  )


def test_an_index_goes_to_a_bucket_and_back(tmp_path, monkeypatch):
  # A bucket has no rename and no memory map; a folder can stand for one.
  monkeypatch.setattr(artifacts, "is_local", lambda path: False)
  build().save(tmp_path)
  np.testing.assert_array_equal(
    Bm25Index.load(tmp_path).search(QUESTIONS, 4)[0],
    build().search(QUESTIONS, 4)[0],
  )


def test_a_loaded_index_stays_on_the_disk_until_it_is_searched(saved):
  arrays = Bm25Index.load(saved)._arrays
  assert all(isinstance(array, np.memmap) for array in arrays.values())


def test_the_same_passages_give_the_same_files(saved):
  again = saved.with_name("again")
  build(stemmer="english", stop_words=("the",)).save(again)
  names = {p.name for p in saved.iterdir()}
  assert names == {
    "manifest.json",
    "passages.npy",
    "scores.npy",
    "starts.npy",
    "vocabulary.json",
  }
  for name in names:
    assert (saved / name).read_bytes() == (again / name).read_bytes()


def write_manifest(path, **changes):
  """Writes the manifest again, for the files as they are now."""
  content = content_of(path) | changes
  artifacts.write_manifest(path, kind="bm25", format=1, content=content)


def damage(file: pathlib.Path, kind: str):
  data = bytearray(file.read_bytes())
  if kind == "missing":
    file.unlink()
  elif kind == "cut off":
    file.write_bytes(data[:-1])
  else:
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["missing", "cut off", "damaged"])
@pytest.mark.parametrize("name", ["scores.npy", "vocabulary.json"])
def test_a_file_that_is_not_whole_is_refused_by_name(saved, name, kind):
  damage(saved / name, kind)
  with pytest.raises(ValueError, match=f"{name} .*{kind}.*Build the BM25"):
    Bm25Index.load(saved)


def test_a_build_that_was_cut_off_is_refused(saved):
  (saved / "manifest.json").unlink()
  with pytest.raises(
    FileNotFoundError, match=r"no bm25 was built.*Build the B"
  ):
    Bm25Index.load(saved)


def test_a_pickle_beside_the_index_is_refused(saved):
  (saved / "corpus.pkl").write_bytes(b"")
  with pytest.raises(ValueError, match=r"corpus.pkl, a pickle.*Build the BM25"):
    Bm25Index.load(saved)


@pytest.mark.parametrize("local", [True, False])
def test_an_array_of_objects_is_never_unpickled(saved, local, monkeypatch):
  monkeypatch.setattr(artifacts, "is_local", lambda path: local)
  with (saved / "scores.npy").open("wb") as f:
    np.save(f, np.array([{}], object), allow_pickle=True)
  write_manifest(saved)
  with pytest.raises(ValueError, match=r"Python objects|allow_pickle=False"):
    Bm25Index.load(saved)


def test_other_passages_are_refused(saved):
  with pytest.raises(ValueError, match=r"other passages.*'3c4d'.*'ffff'.*Set"):
    Bm25Index.load(saved, passages_fingerprint="ffff")


@pytest.mark.parametrize("number", [-1, 1 << 31, 12_000_000_000])
def test_more_passages_than_have_numbers_are_refused(saved, number):
  write_manifest(saved, num_passages=number)
  with pytest.raises(ValueError, match=rf"there are {number} passages; expect"):
    Bm25Index.load(saved)


def test_a_manifest_that_lacks_a_setting_is_refused(saved):
  artifacts.write_manifest(saved, kind="bm25", format=1, content={"k1": "x"})
  with pytest.raises(
    ValueError, match=r"describes no BM25 index: num_passages.*k1.*expected"
  ):
    Bm25Index.load(saved)


@pytest.mark.parametrize(
  ("name", "array"),
  [
    ("starts", np.zeros(3, np.int64)),
    ("scores", np.zeros(2, np.float32)),
    ("scores", np.zeros(1, np.float64)),
    ("passages", np.zeros((2, 2), np.int32)),
  ],
)
def test_files_of_two_builds_are_refused(saved, name, array):
  np.save(saved / f"{name}.npy", array)
  write_manifest(saved)
  with pytest.raises(ValueError, match=r"holds arrays .* mixes two builds"):
    Bm25Index.load(saved)
