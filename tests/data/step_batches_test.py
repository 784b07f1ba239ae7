"""Contexts joined on devices are those that the host builds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.config import Config
from rag_jax.config import DataConfig
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.data.context import ContextBuilder
from rag_jax.data.pipeline import QuestionBatches
from rag_jax.data.questions import Question
from rag_jax.data.step_batches import StepBatches
from rag_jax.data.step_batches import add_start
from rag_jax.data.step_batches import join_contexts
from rag_jax.retrieval.retriever import Embedder

PASSAGES = (
  Passage("a", "Andorra", "The capital is Andorra la Vella."),
  Passage("b", "", "No title."),
  Passage("c", "France", "Paris is the capital."),
  Passage("d", "", "Yes"),
)
QUESTIONS = (
  Question("What is the capital of Andorra?", ("Andorra la Vella",), ""),
  Question("Paris?", ("Yes",), ""),
  Question("Which is the shorter of the two?", ("No",), ""),
)
DOCS = np.random.default_rng(0).integers(0, 4, (3, 5))


@pytest.fixture(scope="module")
def tokenizer():
  return train_tokenizer([f"{p.title} {p.text}" for p in PASSAGES], 512)


def builder(tokenizer, **lengths):
  config = DataConfig(**lengths)
  passages = TokenizedPassages(PASSAGES, tokenizer, config.passage_length)
  return passages, ContextBuilder(tokenizer, passages, config)


def gathered(passages, rows):
  """Tokens and mask of passages, as a step gathers them."""
  tokens = jnp.asarray(passages.tokens)[rows]
  lengths = jnp.asarray(passages.lengths)[rows]
  return tokens, jnp.arange(tokens.shape[-1]) < lengths[..., None]


# Room for all, for the questions alone, and for parts of both.
@pytest.mark.parametrize("context_length", [96, 40, 24, 12, 8])
@pytest.mark.parametrize("passage_length", [64, 16])
def test_contexts_are_those_of_the_host(
  tokenizer, context_length, passage_length
):
  passages, host = builder(
    tokenizer, context_length=context_length, passage_length=passage_length
  )
  ids = tokenizer.encode([q.question for q in QUESTIONS])
  tokens, mask = host.contexts(ids, DOCS)
  cut = host.counts["contexts_cut"]
  heads, head_mask = host.contexts(ids, np.zeros((3, 0), np.int32))
  questions_cut = host.counts["contexts_cut"] - cut
  got, got_mask, num_cut = jax.jit(join_contexts)(
    jnp.asarray(heads[:, 0]),
    jnp.asarray(head_mask[:, 0]),
    *gathered(passages, DOCS),
  )
  np.testing.assert_array_equal(got, tokens)
  np.testing.assert_array_equal(got_mask, mask)
  # The host counts a question that is cut as well, once.
  assert num_cut == cut - questions_cut
  assert (num_cut > 0) == (context_length < 40)


@pytest.mark.parametrize("passage_length", [64, 16])
def test_passages_are_those_of_the_host(tokenizer, passage_length):
  passages, host = builder(tokenizer, passage_length=passage_length)
  tokens, mask = host.passages(DOCS)
  got = add_start(*gathered(passages, DOCS), tokenizer.bos_id)
  np.testing.assert_array_equal(got[0], tokens)
  np.testing.assert_array_equal(got[1], mask)
  alone = gathered(passages, DOCS)
  for x, y in zip(add_start(*alone, None), alone, strict=True):
    np.testing.assert_array_equal(x, y)


class Fixed(Embedder):
  """Embeds nothing."""

  def __init__(self):
    pass


def test_questions_and_answers_are_those_of_a_batch_with_documents(tokenizer):
  _, host = builder(tokenizer, n_docs=0)
  config = Config(seed=3)
  config.train.batch_size = 2
  made = [
    kind(QUESTIONS, host, Fixed(), config)
    for kind in (QuestionBatches, StepBatches)
  ]
  for step in range(4):
    expected, got = (batches.prepare(step, {}, None) for batches in made)
    for mine, theirs in (
      ("head_tokens", "context_tokens"),
      ("head_mask", "context_mask"),
    ):
      np.testing.assert_array_equal(
        getattr(got.batch, mine), getattr(expected.batch, theirs)[:, 0]
      )
    for name in ("target_tokens", "target_mask"):
      np.testing.assert_array_equal(
        getattr(got.batch, name), getattr(expected.batch, name)
      )
    rows = made[1].rows(step)
    ids = tokenizer.encode([QUESTIONS[i].question for i in rows])
    tokens, mask = host.questions(ids)
    np.testing.assert_array_equal(got.batch.question_tokens, tokens)
    np.testing.assert_array_equal(got.batch.question_mask, mask)
    assert got.doc_ids.shape == (2, 0)
