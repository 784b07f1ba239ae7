"""A cross-encoder orders what a search found, whatever the batches."""

import functools
import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
from processes import ROOT
import pytest
from small_cross_encoder import POSITIONS
from small_cross_encoder import change_tensors
from small_cross_encoder import rewrite
from small_cross_encoder import write_cross_encoder
from small_search import QUESTION
from small_search import build

from rag_jax.config import RerankConfig
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import PassageList
from rag_jax.corpus.tokenizer import load_tokenizer
from rag_jax.models.cross_encoder import CrossEncoder
from rag_jax.models.encoders import RetrieverEncoder
from rag_jax.search.reranker import Reranker
from rag_jax.search.reranker import rerank_config
from rag_jax.weights.cross_encoder import load_cross_encoder

QUESTIONS = [QUESTION, "the bees of the woods", "where?"]


@pytest.fixture(scope="module")
def model(texts, tmp_path_factory):
  folder = tmp_path_factory.mktemp("cross")
  return write_cross_encoder(folder / "model", texts)


@pytest.fixture(scope="module")
def reranker(model):
  return Reranker.open(model, candidates=12)


@pytest.fixture(scope="module")
def slow(model):
  """Returns a function: the logit of one pair, alone in its batch."""
  loaded, tokenizer = load_cross_encoder(model), load_tokenizer(model)
  module = CrossEncoder(
    RetrieverEncoder(loaded.encoder, dtype=jnp.float32), loaded.activation
  )
  apply = jax.jit(
    lambda *inputs: module.apply({"params": loaded.params}, *inputs)
  )

  @functools.cache
  def score(question, text):
    q, p = tokenizer.encode([question, text])
    while len(q) + len(p) + 4 > POSITIONS:
      (q if len(q) > len(p) else p).pop()
    row = [tokenizer.bos_id, *q, *[tokenizer.eos_id] * 2, *p, tokenizer.eos_id]
    mask = np.arange(POSITIONS)[None] < len(row)
    tokens = np.full((1, POSITIONS), tokenizer.pad_id, np.int32)
    tokens[mask] = row
    return float(apply(tokens, mask, np.zeros_like(tokens))[0])

  return score


def ids_of(hits):
  return [hit.passage.id for hit in hits]


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_the_candidates_are_those_of_the_mode_and_ordered_by_the_slow_loop(
  built, reranker, slow, mode
):
  first = built.search(QUESTIONS, 12, mode=mode)
  found = built.search(QUESTIONS, 5, mode=mode, reranker=reranker)
  moved = 0
  for question, candidates, hits in zip(QUESTIONS, first, found, strict=True):
    logits = [slow(question, hit.passage.text) for hit in candidates]
    order = np.argsort(-np.array(logits), kind="stable")[:5]
    assert ids_of(hits) == [candidates[i].passage.id for i in order]
    np.testing.assert_allclose(
      [hit.score for hit in hits], [logits[i] for i in order], atol=1e-5
    )
    moved += ids_of(hits) != ids_of(candidates)[:5]
  assert moved >= 2


def test_a_filter_comes_before_the_reranker(built, reranker):
  (hits,) = built.search([QUESTION], 12, filters=["lang=de"], reranker=reranker)
  assert {dict(hit.passage.metadata)["lang"] for hit in hits} == {"de"}
  (first,) = built.search([QUESTION], 12, filters=["lang=de"])
  assert sorted(ids_of(first)) == sorted(ids_of(hits))
  none = built.search([QUESTION], 2, filters=["lang=es"], reranker=reranker)
  assert none == [[]]
  assert built.search([], 2, reranker=reranker) == []


def test_fewer_passages_than_candidates_are_all_read(encoder, model, tmp_path):
  (tmp_path / "one.txt").write_text("the owls live in the caves")
  made = build(tmp_path / "one.txt", encoder, tmp_path / "index")
  (hits,) = made.search([QUESTION], 3, reranker=Reranker.open(model))
  assert ids_of(hits) == ["one.txt"]


@pytest.mark.parametrize("n_docs", [13, 0])
def test_passages_that_are_not_among_the_candidates_are_refused(
  built, reranker, n_docs
):
  message = rf"n_docs={n_docs} .* of rerank\.candidates=12; expected at least 1"
  with pytest.raises(ValueError, match=message):
    built.search([QUESTION], n_docs, reranker=reranker)


def test_logits_do_not_depend_on_the_batch_around_a_pair(model, texts, slow):
  texts = [*texts[:9], "", "owls " * 60]
  expected = [[slow(q, text) for text in texts] for q in QUESTIONS]
  for batch_size in (3, 64):
    found = Reranker.open(model, batch_size=batch_size)
    np.testing.assert_allclose(
      found.score(QUESTIONS, [texts] * 3), expected, atol=1e-5
    )
  assert [len(x) for x in found.score(QUESTIONS, [[], texts[:2], []])] == [
    0, 2, 0
  ]  # fmt: skip


def test_a_question_longer_than_the_positions_is_cut(reranker, texts, slow):
  long = " ".join(["owls"] * 300)
  (found,) = reranker.score([long], [texts[:3]])
  np.testing.assert_allclose(
    found, [slow(long, text) for text in texts[:3]], atol=1e-5
  )
  assert len(set(found.tolist())) > 1  # the passages are still read


def test_equal_pairs_keep_the_order_of_the_first_stage(reranker, texts):
  """Twins are in other batches than each other, and at other places."""
  chosen = [texts[i % 3] for i in range(30)]
  passages = PassageList(
    [Passage(id=str(i), title="", text=x) for i, x in enumerate(chosen)],
    "here",
  )
  order = np.random.default_rng(0).permutation(30).astype(np.int32)
  ids, logits = reranker.rank([QUESTION], order[None], passages)
  assert len(set(logits[0].tolist())) == 3
  for kind in range(3):
    alike = [i for i in ids[0].tolist() if i % 3 == kind]
    assert alike == [i for i in order.tolist() if i % 3 == kind]


def test_what_was_not_found_is_last(reranker, texts):
  passages = PassageList(
    [Passage(id=str(i), title=t[:9], text=t) for i, t in enumerate(texts)], ""
  )
  ids = np.array([[4, -1, 7], [-1, -1, -1], [3, 9, 1]], np.int32)
  found, logits = reranker.rank(QUESTIONS, ids, passages)
  assert sorted(found[0, :2].tolist()) == [4, 7]
  assert found[:, 2].tolist()[:2] == found[1].tolist()[:2] == [-1, -1]
  assert logits[1].tolist() == [float(np.finfo(np.float32).min)] * 3
  assert (np.diff(logits[2]) <= 0).all()
  (expected,) = reranker.score(
    QUESTIONS[2:], [[f"{texts[i][:9]} {texts[i]}" for i in found[2].tolist()]]
  )
  np.testing.assert_allclose(logits[2], expected, atol=1e-5)
  np.testing.assert_allclose(
    reranker.logits(QUESTIONS[2:], found[2:], passages)[0], expected, atol=1e-5
  )


def test_logits_that_are_no_numbers_are_an_error(model, tmp_path):
  path = shutil.copytree(model, tmp_path / "bad")
  # Finite, but their products are not.
  change_tensors(
    path,
    embeddings__LayerNorm__weight=np.full(16, 9e14, np.float32),
    encoder__layer__0__attention__self__query__weight=np.full(
      (16, 16), 9e14, np.float32
    ),
  )
  with pytest.raises(ValueError, match="gives nan for the question 'where"):
    Reranker.open(path).score([QUESTION], [["a passage"]])


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"candidates": 0}, "rerank.candidates=0 must be at least 1"),
    ({"length": 4}, "rerank.length=4 must be at least 8"),
    ({"batch_size": 0}, "rerank.batch_size=0 must be at least 1"),
    ({"prior": "both"}, "rerank.prior='both' is not one of"),
  ],
)
def test_settings_that_are_not_possible_are_named(model, settings, message):
  with pytest.raises(ValueError, match=message):
    Reranker.open(model, **settings)


def test_settings_are_given_as_a_name_or_by_name():
  old = RerankConfig(init_from="a", candidates=7)
  assert rerank_config(None, old) is old
  assert rerank_config("b", old).init_from == "b"
  assert rerank_config("", old).init_from == ""
  changed = rerank_config({"candidates": 9}, old)
  assert (changed.init_from, changed.candidates, old.candidates) == ("a", 9, 7)
  for given, message in (
    ({"canditates": 9}, "'canditates'; expected some of batch_size, candida"),
    ({"candidates": -1}, "rerank.candidates=-1 must be at least 1"),
  ):
    with pytest.raises(ValueError, match=message):
      rerank_config(given, old)
  with pytest.raises(ValueError, match="names no cross-encoder, and there was"):
    rerank_config({"candidates": 9}, RerankConfig())


def test_without_a_cross_encoder_it_says_what_to_give(tmp_path):
  with pytest.raises(ValueError, match="names no cross-encoder"):
    Reranker.open("")
  with pytest.raises(FileNotFoundError, match="There is no directory"):
    Reranker.open(tmp_path / "missing")


def test_positions_that_leave_no_room_are_an_error(model, tmp_path):
  path = shutil.copytree(model, tmp_path / "short")
  rewrite(path, max_position_embeddings=5 + 2)
  table = np.zeros((5 + 2, 16), np.float32)
  change_tensors(path, embeddings__position_embeddings__weight=table)
  with pytest.raises(ValueError, match=r"reads 5 tokens .* leave no room"):
    Reranker.open(path)


def test_identity_changes_with_what_changes_the_order(model, texts, tmp_path):
  same = Reranker.open(model, batch_size=3).identity
  assert Reranker.open(model).identity == same
  assert Reranker.open(model, candidates=9).identity != same
  other = write_cross_encoder(tmp_path / "other", texts, seed=1)
  assert Reranker.open(other).identity != same


def test_four_devices_share_each_batch_and_give_the_same_logits(
  reranker, model, texts
):
  code = f"""
    import json, jax
    from rag_jax.search.reranker import Reranker
    reranker = Reranker.open({str(model)!r}, batch_size=6)
    (found,) = reranker.score([{QUESTION!r}], [{texts[:9]!r}])
    devices = {{len(x.sharding.device_set) for x in
                jax.tree.leaves(reranker._params)}}
    print(json.dumps([found.tolist(), sorted(devices)]))
  """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)],
    env=os.environ
    | {
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    },
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  found, devices = json.loads(done.stdout)
  assert devices == [4]
  (expected,) = reranker.score([QUESTION], [texts[:9]])
  np.testing.assert_allclose(found, expected, atol=1e-5)
