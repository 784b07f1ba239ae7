"""The likelihood of given answers, and answers chosen from labels."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_rag import EOS
from small_rag import GREEDY
from small_rag import MODEL
from small_rag import PAD
from small_rag import STEPS
from small_rag import B
from small_rag import apply
from small_rag import inputs
from small_rag import params

from rag_jax.config import PromptConfig
from rag_jax.config_models import CausalConfig
from rag_jax.data.experiment import open_experiment
from rag_jax.decoding.answerer import Answerer
from rag_jax.decoding.rag import MODES
from rag_jax.decoding.rag import RagDecoder
from rag_jax.losses import rag_sequence_nll
from rag_jax.losses import rag_token_nll
from rag_jax.serving.pipeline import RagPipeline

GIVEN = [
  [5, 4, EOS], [5, EOS], [7, 8, 6, EOS], [5, 4, 6, EOS],
  [4, 5, 6, 7, EOS],
]  # fmt: skip
LOSSES = {
  "rag_token": rag_token_nll,
  "rag_sequence": rag_sequence_nll,
  "rag_sequence_fast": rag_sequence_nll,
}


def given_logits(tokens):
  """Returns logits [B, K, T, V] of one sequence, without a cache or a tree."""
  _, contexts, mask = inputs()
  b, k, c = contexts.shape
  logits = apply(
    "__call__",
    contexts.reshape(-1, c),
    mask.reshape(-1, c),
    np.tile(tokens, (b * k, 1)),
  )
  return logits.reshape(b, k, len(tokens), -1)


@pytest.mark.parametrize("mode", LOSSES)
def test_given_sequences_are_as_likely_as_the_loss_says(mode):
  decoder = RagDecoder(MODEL, GREEDY, mode)
  out = decoder.score(params(), *inputs(), GIVEN)
  scores = inputs()[0]
  expected = np.zeros((B, len(GIVEN)))
  for i, sequence in enumerate(GIVEN):
    tokens = np.full(STEPS, PAD, np.int32)
    tokens[: len(sequence)] = sequence
    real = np.tile(np.arange(STEPS) < len(sequence), (B, 1))
    expected[:, i] = -LOSSES[mode](
      *map(jnp.asarray, (scores, given_logits(tokens))),
      *map(jnp.asarray, (np.tile(tokens, (B, 1)), real)),
    )
  order = np.argsort(-expected, axis=1)
  for b in range(B):
    found = [
      out.tokens[b, r, : out.lengths[b, r]].tolist() for r in range(len(GIVEN))
    ]
    assert found == [GIVEN[i] for i in order[b]]
    np.testing.assert_allclose(
      out.log_probs[b], expected[b, order[b]], rtol=1e-4
    )


@pytest.mark.parametrize("mode", MODES)
def test_what_is_written_is_as_likely_when_it_is_given(mode):
  arrays = inputs()
  if mode == "concatenate":
    arrays = arrays[0], arrays[1][:, :1], arrays[2][:, :1]
  decoder = RagDecoder(MODEL, GREEDY, mode)
  written = decoder(params(), *arrays)
  for b in range(B):
    sequence = written.tokens[b, 0, : written.lengths[b, 0]].tolist()
    out = decoder.score(params(), *arrays, [[7, EOS], sequence])
    row = int(np.argmax(np.asarray(out.lengths[b]) == len(sequence)))
    if mode == "rag_sequence_fast":  # a lower bound
      assert out.log_probs[b, row] > written.log_probs[b, 0] - 1e-4
      continue
    np.testing.assert_allclose(
      out.log_probs[b, row], written.log_probs[b, 0], rtol=1e-4
    )
    np.testing.assert_allclose(
      out.token_log_probs[b, row, :, : len(sequence)],
      written.token_log_probs[b, 0, :, : len(sequence)],
      rtol=1e-3,
      atol=1e-5,
    )


CONTINENTS = ("Africa", "Asia", "Europe", "South America")
COUNTRIES = {"Kenya": "Africa", "France": "Europe", "Peru": "South America"}


def test_a_model_chooses_the_label_that_its_passages_state(learned):
  pipeline = RagPipeline.load(learned.workdir)
  questions = [f"What is the continent of {name}?" for name in COUNTRIES]
  answers = pipeline.answer(questions, labels=CONTINENTS)
  for answer, right in zip(answers, COUNTRIES.values(), strict=True):
    assert answer.text == right
    assert answer.labels[0][0] == right
    assert {label for label, _ in answer.labels} == set(CONTINENTS)
    probs = [p for _, p in answer.labels]
    assert probs == sorted(probs, reverse=True)
    assert sum(probs) == pytest.approx(1)
    assert probs[0] > 0.9
    assert sum(doc.posterior for doc in answer.docs) == pytest.approx(1)
  (written,) = pipeline.answer(questions[1])
  assert written.labels == ()
  assert written.text == "Europe"
  assert answers[1].log_prob == pytest.approx(written.log_prob, abs=1e-3)
  assert answers[1].tokens == written.tokens


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    (("Asia",), "labels 'Asia' are 1 that the tokenizer tells apart"),
    (("Asia", "Asia"), "'Asia', 'Asia' are 1 that the tokenizer tells apart"),
    (("Asia", "Asia " * 20), "'Asia Asia .* is longer than an answer of 16"),
  ],
)
def test_labels_that_cannot_be_told_apart_are_refused(learned, labels, message):
  pipeline = RagPipeline.load(learned.workdir)
  with pytest.raises(ValueError, match=message):
    pipeline.answer("What is the continent of Kenya?", labels=labels)


@pytest.mark.parametrize("loss", ["rag_token", "rag_sequence", "concatenate"])
def test_a_decoder_alone_chooses_as_likely_as_it_writes(tiny, loss):
  config = tiny.config(
    generator__kind="causal",
    causal=CausalConfig(
      num_layers=2, embed_dim=16, mlp_dim=16, num_heads=2, num_kv_heads=1
    ),
    loss=loss,
    retriever_loss="none" if loss == "concatenate" else "marginal",
    data__context_style="prompt",
    data__context_length=120,
    data__substitute_answers=0.0,
    warmup__num_steps=0,
    train__compute_dtype="float32",
    prompt=PromptConfig(stop="o"),
  )
  experiment = open_experiment(config)
  fresh = nn.meta.unbox(experiment.init(jax.random.key(0)))
  retriever = {k: v for k, v in fresh.items() if k != "generator"}
  index = experiment.index_builder.build(retriever)
  answerer = Answerer(experiment)
  ask = functools.partial(
    answerer.answer, fresh, index, ["What is the river of Balania?"], n_docs=2
  )
  (chosen,) = ask(labels=("Balania", "Corburg"))
  assert chosen.tokens[-1] == "o"  # where an answer ends
  both = {label: p for label, p in chosen.labels}
  # What training would say of the same answers.
  context = experiment.context
  ids, _ = context.targets(context.encode_answers(tuple(both)))
  stop = context.stop_ids[0]
  expected = {}
  for label, row in zip(both, ids, strict=True):
    size = row.tolist().index(experiment.tokenizer.eos_id)
    expected[label] = [*row[:size].tolist(), stop]
  decoder = answerer._decode
  _, contexts = context.encode_questions(["What is the river of Balania?"])
  tokens, mask = context.contexts(contexts, np.array([chosen.retrieved[:2]]))
  scores = np.array([[doc.score for doc in chosen.docs]], np.float32)
  log_probs = []
  for label in both:
    out = decoder.score(
      fresh, scores, tokens, mask, [expected[label], [stop]]
    )  # in another tree, and without what contexts share
    row = int(np.argmax(np.asarray(out.lengths[0]) > 1))
    log_probs.append(float(out.log_probs[0, row]))
  found = np.exp(log_probs - np.logaddexp.reduce(log_probs))
  np.testing.assert_allclose(found, list(both.values()), rtol=1e-4)
