"""Greedy RAG-Token decoding against a loop without cache, one at a time."""

import dataclasses

from flax import linen as nn
import jax
import numpy as np
import pytest

from rag_jax.config import Config
from rag_jax.config import EncoderConfig
from rag_jax.config import GeneratorConfig
from rag_jax.decoding.greedy import make_greedy
from rag_jax.losses import rag_token_nll
from rag_jax.models import rag

B, C, T, V, D = 5, 6, 5, 11, 8
PAD, END = 1, 2
KS = pytest.mark.parametrize("k", [1, 3])


def make_model():
  config = Config()
  config.encoder = EncoderConfig(embed_dim=D, num_heads=2, mlp_dim=8)
  config.generator = GeneratorConfig(
    num_layers=1, embed_dim=D, num_heads=2, mlp_dim=8, max_positions=8
  )
  return rag.build_model(config, vocab_size=V, decoder_start_id=END)


def make_inputs(k):
  """Returns doc_scores and contexts of every length from 1 to C."""
  rng = np.random.default_rng(k)
  lengths = 1 + np.arange(B * k).reshape(B, k, 1) % C
  return {
    "doc_scores": 2 * rng.normal(size=(B, k)).astype(np.float32),
    "context_tokens": rng.integers(V, size=(B, k, C), dtype=np.int32),
    "context_mask": np.arange(C) < lengths,
  }


def random_params(model):
  def init(key, context_tokens, context_mask, target_tokens):
    boxed = model.init(key, context_tokens, context_mask, target_tokens)
    return nn.meta.unbox(boxed)["params"]

  rng = np.random.default_rng(19)
  params = jax.tree.map(
    lambda x: 0.7 * rng.normal(size=x.shape).astype(np.float32),
    jax.eval_shape(
      init,
      jax.random.key(0),
      *list(make_inputs(1).values())[1:],
      np.zeros((B, T), np.int32),
    ),
  )
  # So that some questions end early and some not at all.
  params["generator"]["final_logits_bias"][END] += 3.0
  return params


MODEL = make_model()
PARAMS = random_params(MODEL)
DECODE = make_greedy(MODEL, max_tokens=T, start_id=END, end_id=END, pad_id=PAD)


@jax.jit
def logits_at_once(params, context_tokens, context_mask, target_tokens):
  return MODEL.apply(
    {"params": params}, context_tokens, context_mask, target_tokens
  ).target_logits  # B K T V


def decode(inputs, decoder=DECODE):
  out = decoder(PARAMS, *inputs.values())
  return {
    f.name: np.asarray(getattr(out, f.name)) for f in dataclasses.fields(out)
  }


def row(inputs, b):
  return {name: x[b : b + 1] for name, x in inputs.items()}


def softmax(x):
  p = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
  return p / p.sum(axis=-1, keepdims=True)


def decode_by_hand(inputs):
  """Returns what `DECODE` should, for one question: every token anew."""
  k = inputs["doc_scores"].shape[1]
  prior = softmax(inputs["doc_scores"][0])  # K
  target = np.full((1, T), PAD, np.int32)
  mask, log_probs = np.zeros(T, bool), np.zeros(T)
  posterior, token_posterior = prior.copy(), np.tile(prior[:, None], T)
  for t in range(T):
    logits = logits_at_once(
      PARAMS, inputs["context_tokens"], inputs["context_mask"], target
    )
    p_token = softmax(np.asarray(logits)[0, :, t])  # K V
    p_marginal = sum(prior[z] * p_token[z] for z in range(k))  # V
    best = int(p_marginal.argmax())
    target[0, t], mask[t], log_probs[t] = best, True, np.log(p_marginal[best])
    token_posterior[:, t] = prior * p_token[:, best] / p_marginal[best]
    posterior = posterior * p_token[:, best]
    if best == END:
      break
  return {
    "tokens": target[0],
    "mask": mask,
    "token_log_probs": log_probs,
    "doc_log_probs": np.log(prior),
    "posterior": posterior / posterior.sum(),
    "token_posterior": token_posterior,
  }


@KS
def test_it_writes_what_a_loop_without_cache_writes(k):
  inputs = make_inputs(k)
  out = decode(inputs)
  for b in range(B):
    expected = decode_by_hand(row(inputs, b))
    for name, value in expected.items():
      np.testing.assert_allclose(
        out[name][b], value, rtol=1e-5, atol=1e-6, err_msg=f"{name} of {b}"
      )
  # The inputs are such that the loop above meets every way to end.
  lengths = out["mask"].sum(axis=1)
  ended = np.any((out["tokens"] == END) & out["mask"], axis=1)
  assert len(set(lengths[ended])) > 1
  assert np.any(~ended)


def test_after_the_end_there_is_padding_without_probability():
  out = decode(make_inputs(3))
  after = ~out["mask"]
  assert np.any(after)
  assert np.all(out["tokens"][after] == PAD)
  assert not np.any(out["token_log_probs"][after])
  for tokens, mask in zip(out["tokens"], out["mask"], strict=True):
    real = tokens[mask]
    assert END not in real[:-1]
    assert real[-1] == END or mask.all()


def test_an_end_token_that_also_pads_ends_once():
  pads = make_greedy(MODEL, max_tokens=T, start_id=END, end_id=END, pad_id=END)
  inputs = make_inputs(3)
  expected, out = decode(inputs), decode(inputs, pads)
  np.testing.assert_array_equal(out["mask"], expected["mask"])
  real = expected["mask"]
  np.testing.assert_array_equal(out["tokens"][real], expected["tokens"][real])
  assert np.all(out["tokens"][~real] == END)


def test_a_batch_in_which_every_question_ends_early_is_padded():
  inputs = make_inputs(3)
  ends = np.flatnonzero(~decode(inputs)["mask"].all(axis=1))
  out = decode({name: x[ends[[0, 0, 0, 0, 0]]] for name, x in inputs.items()})
  expected = decode_by_hand(row(inputs, ends[0]))
  np.testing.assert_array_equal(out["mask"], np.tile(expected["mask"], (B, 1)))
  np.testing.assert_array_equal(
    out["tokens"], np.tile(expected["tokens"], (B, 1))
  )


@KS
def test_an_answer_does_not_depend_on_the_rest_of_the_batch(k):
  inputs = make_inputs(k)
  together = decode(inputs)
  for b in range(B):
    for company in (b, (b + 1) % B):  # itself, or one other question
      rows = np.full(B, company)
      rows[2] = b
      out = decode({name: x[rows] for name, x in inputs.items()})
      for name, value in together.items():
        np.testing.assert_allclose(out[name][2], value[b], rtol=1e-5, atol=1e-6)


def test_the_order_of_documents_orders_the_posteriors_and_nothing_else():
  inputs = make_inputs(3)
  expected = decode(inputs)
  order = np.array([2, 0, 1])
  out = decode({name: x[:, order] for name, x in inputs.items()})
  for name in ("tokens", "mask"):
    np.testing.assert_array_equal(out[name], expected[name])
  np.testing.assert_allclose(
    out["token_log_probs"], expected["token_log_probs"], rtol=1e-5, atol=1e-6
  )
  for name in ("doc_log_probs", "posterior", "token_posterior"):
    assert not np.allclose(out[name], expected[name], rtol=1e-2)
    np.testing.assert_allclose(
      out[name], expected[name][:, order], rtol=1e-5, atol=1e-6
    )


def test_posteriors_sum_to_one_over_the_documents():
  out = decode(make_inputs(3))
  np.testing.assert_allclose(out["posterior"].sum(axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(out["token_posterior"].sum(axis=1), 1, rtol=1e-5)


def test_what_hidden_context_tokens_are_changes_nothing():
  inputs = make_inputs(3)
  hidden = inputs["context_tokens"].copy()
  hidden[~inputs["context_mask"]] = 0
  assert np.any(hidden != inputs["context_tokens"])
  for name, value in decode(inputs | {"context_tokens": hidden}).items():
    np.testing.assert_allclose(value, decode(inputs)[name], rtol=1e-5)


@KS
def test_the_log_probs_of_an_answer_sum_to_minus_its_training_loss(k):
  inputs = make_inputs(k)
  out = decode(inputs)
  logits = logits_at_once(
    PARAMS, inputs["context_tokens"], inputs["context_mask"], out["tokens"]
  )
  nll = jax.jit(rag_token_nll)(
    inputs["doc_scores"], logits, out["tokens"], out["mask"]
  )
  np.testing.assert_allclose(
    out["token_log_probs"].sum(axis=1), -np.asarray(nll), rtol=1e-5
  )


def test_one_shape_is_compiled_once():
  decoder = make_greedy(
    MODEL, max_tokens=2, start_id=END, end_id=END, pad_id=PAD
  )
  compiled = []
  for k in (1, 2, 1, 2):
    decode(make_inputs(k), decoder)
    decode({n: x[::-1] for n, x in make_inputs(k).items()}, decoder)
    compiled.append(decoder._cache_size())
  assert compiled == [1, 2, 2, 2]
