"""Decoding with documents, against losses and searches of one document.

The oracle: what `losses` says of the sequences that were written, from logits
of all tokens at once; and for RAG-Sequence, each document searched by itself.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_rag import BEAMS
from small_rag import EOS
from small_rag import GREEDY
from small_rag import MODEL
from small_rag import PAD
from small_rag import STEPS
from small_rag import B
from small_rag import C
from small_rag import D
from small_rag import K
from small_rag import V
from small_rag import W
from small_rag import apply
from small_rag import inputs
from small_rag import params

from rag_jax.decoding import compiled
from rag_jax.decoding.candidates import build_tree
from rag_jax.decoding.logits import PrefixTrie
from rag_jax.decoding.rag import MODES
from rag_jax.decoding.rag import RagDecoder
from rag_jax.decoding.ranking import HfParity
from rag_jax.losses import rag_sequence_nll
from rag_jax.losses import rag_token_nll


def decode(mode, settings=BEAMS, arrays=None, **kwargs):
  decoder = RagDecoder(MODEL, settings, mode, **kwargs)
  out = decoder(params(), *(inputs() if arrays is None else arrays))
  return jax.tree.map(np.asarray, out)


def sequences(out, row):
  """Returns the sequences of a question, and checks what is behind them."""
  found = []
  for r, length in enumerate(out.lengths[row]):
    assert np.all(out.tokens[row, r, length:] == PAD)
    found.append(tuple(out.tokens[row, r, :length].tolist()))
  return found


def logits_at_once(tokens, mask, targets):
  """Returns logits [R, B, K, T, V] of R targets a question, no cache used."""
  count = targets.shape[1]

  def spread(x):  # B K C to B*R*K C
    return np.repeat(x[:, None], count, axis=1).reshape(-1, C)

  out = apply(
    "__call__",
    spread(tokens),
    spread(mask),
    np.repeat(targets.reshape(-1, STEPS), K, axis=0),
  )
  return np.swapaxes(out.reshape(B, count, K, STEPS, V), 0, 1)


def nll(loss, out):
  """Returns what `losses` says of R sequences [B, R]."""
  scores, tokens, mask = inputs()
  logits = logits_at_once(tokens, mask, out.tokens)
  real = jnp.arange(STEPS) < out.lengths[..., None]
  each = jax.jit(jax.vmap(loss, in_axes=(None, 0, 1, 1), out_axes=1))
  return each(scores, jnp.asarray(logits), out.tokens, real)


def check_explained(out):
  """Compares each document's part with the logits of all tokens at once."""
  _, tokens, mask = inputs()
  logits = logits_at_once(tokens, mask, out.tokens)
  log_probs = np.asarray(jax.nn.log_softmax(logits))  # R B K T V
  for b in range(B):
    for r, sequence in enumerate(sequences(out, b)):
      expected = np.zeros((K, STEPS))
      for t, token in enumerate(sequence):
        expected[:, t] = log_probs[r, b, :, t, token]
      np.testing.assert_allclose(
        out.token_log_probs[b, r], expected, rtol=1e-4, atol=1e-5
      )


@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_rag_token_says_how_likely_its_sequences_are(settings):
  out = decode("rag_token", settings)
  np.testing.assert_allclose(out.log_probs, -nll(rag_token_nll, out), rtol=1e-5)
  # Without a length penalty in the way, that is what beams are ranked by.
  expected = out.log_probs
  if settings is BEAMS:
    expected = out.log_probs / out.lengths
  np.testing.assert_allclose(out.scores, expected, rtol=1e-5)
  check_explained(out)
  assert len(set(out.lengths.ravel())) > 1
  prior = np.exp(inputs()[0]) / np.exp(inputs()[0]).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(np.exp(out.doc_log_probs), prior, rtol=1e-5)


def test_greedy_rag_token_takes_the_likeliest_token_of_the_marginal():
  out = decode("rag_token", GREEDY)
  _, tokens, mask = inputs()
  logits = logits_at_once(tokens, mask, out.tokens)[0]
  p = np.einsum(
    "BK,BKTV->BTV", np.exp(out.doc_log_probs), jax.nn.softmax(logits)
  )
  for b in range(B):
    written = list(sequences(out, b)[0])
    assert written == p[b].argmax(axis=-1)[: len(written)].tolist()
    assert written[-1] == EOS or len(written) == STEPS


def test_the_order_of_documents_changes_nothing():
  order = np.array([2, 0, 1])
  out = decode("rag_token")
  other = decode("rag_token", arrays=[x[:, order] for x in inputs()])
  np.testing.assert_array_equal(out.tokens, other.tokens)
  np.testing.assert_allclose(
    out.token_log_probs[:, :, order], other.token_log_probs, atol=1e-5
  )


@functools.cache
def candidates_by_hand(num_beams):
  """Returns, a question, each document's sequences, searched by itself."""
  settings = dataclasses.replace(
    BEAMS, num_beams=num_beams, num_return_sequences=num_beams
  )
  found = [[[] for _ in range(K)] for _ in range(B)]
  for k in range(K):
    out = decode("single", settings, [x[:, k : k + 1] for x in inputs()])
    for b in range(B):
      found[b][k] = sequences(out, b)
  return found


@functools.cache
def log_joint(b, sequence):
  """Returns log p(z|x) p(y|x,z) of each document: [K]."""
  scores, tokens, mask = inputs()
  targets = np.full((B, 1, STEPS), PAD, np.int32)
  targets[b, 0, : len(sequence)] = sequence
  logits = logits_at_once(tokens, mask, targets)[0, b]  # K T V
  log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
  each = log_probs[:, np.arange(len(sequence)), list(sequence)].sum(axis=1)
  x = scores[b].astype(np.float64)
  return each + x - np.log(np.exp(x).sum())


def ranked_by_hand(fast, num_beams):
  """Returns, a question, sequences with log p(y|x), the best first."""
  ranked = []
  for b, found in enumerate(candidates_by_hand(num_beams)):
    scored = {}
    for sequence in {s for part in found for s in part}:
      joint = log_joint(b, sequence)
      if fast:
        joint = joint[[sequence in part for part in found]]
      scored[sequence] = np.log(np.exp(joint).sum())
    ranked.append(sorted(scored.items(), key=lambda x: -x[1]))
  return ranked


@pytest.mark.parametrize("num_beams", [1, W])
@pytest.mark.parametrize("mode", ["rag_sequence", "rag_sequence_fast"])
def test_rag_sequence_ranks_the_candidates_of_every_document(mode, num_beams):
  settings = dataclasses.replace(
    BEAMS, num_beams=num_beams, num_return_sequences=K
  )
  out = decode(mode, settings)
  expected = ranked_by_hand(mode == "rag_sequence_fast", num_beams)
  for b in range(B):
    best = expected[b][:K]
    assert sequences(out, b)[: len(best)] == [s for s, _ in best]
    np.testing.assert_allclose(
      out.log_probs[b, : len(best)], [x for _, x in best], rtol=1e-4
    )
    # There may be fewer that differ than were asked for.
    assert sequences(out, b)[len(best) :] == [()] * (K - len(best))
  np.testing.assert_array_equal(out.scores, out.log_probs)


def test_thorough_and_fast_differ_here():
  """Or the test above would not tell one from the other."""
  thorough, fast = (ranked_by_hand(x, W) for x in (False, True))
  assert [r[0][0] for r in thorough] != [r[0][0] for r in fast]


def test_rag_sequence_says_how_likely_its_sequences_are():
  out = decode("rag_sequence")
  np.testing.assert_allclose(
    out.log_probs, -nll(rag_sequence_nll, out), rtol=1e-5
  )
  check_explained(out)


def test_fast_explains_with_the_documents_that_wrote_the_sequence():
  out = decode("rag_sequence_fast")
  total = out.doc_log_probs[:, None] + out.token_log_probs.sum(axis=-1)
  np.testing.assert_allclose(
    jax.nn.logsumexp(total, axis=-1), out.log_probs, rtol=1e-5
  )
  wrote = out.token_log_probs[..., 0] > -1e8
  for b, found in enumerate(candidates_by_hand(W)):
    for r, sequence in enumerate(sequences(out, b)):
      assert wrote[b, r].tolist() == [sequence in part for part in found]
  assert not np.all(wrote)


@pytest.mark.parametrize("mode", ["rag_sequence", "rag_sequence_fast"])
def test_without_deduplication_a_candidate_comes_as_often_as_it_was_found(mode):
  settings = dataclasses.replace(
    BEAMS, num_return_sequences=K * W, do_deduplication=False
  )
  out = decode(mode, settings)
  unique = decode(mode, dataclasses.replace(settings, do_deduplication=True))
  repeated = False
  for b, found in enumerate(candidates_by_hand(W)):
    every = sorted(s for part in found for s in part)
    assert sorted(sequences(out, b)) == every
    kept = [s for s in sequences(unique, b) if s]
    assert sorted(kept) == sorted(set(every))
    repeated |= len(kept) < len(every)
  assert repeated


def test_fid_looks_at_all_documents_at_once():
  """Against the decoder over the memories, one behind the other."""
  out = decode("fid")
  _, tokens, mask = inputs()
  memory = apply("encode", tokens.reshape(B * K, C), mask.reshape(B * K, C))
  log_probs = apply(
    "score",
    out.tokens,
    memory.reshape(B, 1, K * C, D),
    mask.reshape(B, 1, K * C),
    tokens.reshape(B, 1, K * C),
  )  # B R 1 T
  real = (np.arange(STEPS) < out.lengths[..., None])[:, :, None]
  np.testing.assert_allclose(
    out.token_log_probs, np.where(real, log_probs, 0), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    out.log_probs, out.token_log_probs.sum(axis=(2, 3)), rtol=1e-5
  )
  assert not np.any(out.doc_log_probs)


def test_single_reads_the_document_with_the_highest_score():
  order = np.array([1, 0, 2])  # the best is not the first
  out = decode("single", arrays=[x[:, order] for x in inputs()])
  alone = decode("rag_token", arrays=[x[:, :1] for x in inputs()])
  np.testing.assert_array_equal(out.tokens, alone.tokens)
  np.testing.assert_allclose(out.log_probs, alone.log_probs, rtol=1e-5)


@pytest.mark.parametrize("mode", ["rag_token", "rag_sequence"])
def test_fewer_documents_are_the_first(mode):
  settings = dataclasses.replace(GREEDY, n_docs=2)
  out = decode(mode, settings)
  few = decode(mode, GREEDY, [x[:, :2] for x in inputs()])
  np.testing.assert_array_equal(out.tokens, few.tokens)
  np.testing.assert_array_equal(out.log_probs, few.log_probs)


def test_contexts_are_encoded_once_and_candidates_scored_from_that(monkeypatch):
  calls = []
  encode = compiled.encode

  def counted(*args):
    calls.append(args)
    return encode(*args)

  monkeypatch.setattr(compiled, "encode", counted)
  for mode in MODES:
    calls.clear()
    one = [x[:, :1] for x in inputs()]
    decode(mode, arrays=one if mode == "concatenate" else None)
    assert len(calls) == 1

  # Nothing after it could encode: it has no encoder.
  scores, tokens, mask = (jnp.asarray(x) for x in inputs())
  whole = params()["generator"]
  rest = {name: part for name, part in whole.items() if name != "encoder"}
  memory = encode(MODEL, whole, tokens, mask)
  decoder = RagDecoder(MODEL, BEAMS, "rag_sequence")
  found = compiled.find_candidates(
    decoder.plan, rest, None, memory, decoder.key()
  )
  tree = build_tree(np.asarray(found.tokens), np.asarray(found.lengths), EOS)
  ranked = compiled.score_and_rank(
    compiled.Ranking(MODEL, BEAMS), rest, scores, memory, found, tree
  )
  np.testing.assert_array_equal(ranked.tokens, decode("rag_sequence").tokens)


def test_one_shape_is_compiled_once_also_for_another_decoder():
  settings = dataclasses.replace(GREEDY, max_new_tokens=2)
  arrays = [x[:, :1] for x in inputs()]
  before = compiled.decode._cache_size()
  for seed in (0, 1):
    other = dataclasses.replace(settings, seed=seed)
    decode("rag_token", other, arrays)
    decode("rag_token", other, [x[::-1] for x in arrays])
  assert compiled.decode._cache_size() == before + 1


def test_a_trie_holds_for_every_mode():
  trie = PrefixTrie.from_sequences([[5, 6], [7], [8, 9, 10]], EOS)
  allowed = {(5, 6, EOS), (7, EOS), (8, 9, 10, EOS)}
  for mode in ("rag_token", "rag_sequence_fast"):
    out = decode(mode, GREEDY, trie=trie)
    assert {sequences(out, b)[0] for b in range(B)} <= allowed


def test_samples_of_a_question_differ_and_follow_the_seed():
  settings = dataclasses.replace(
    GREEDY, do_sample=True, num_return_sequences=5, top_k=0
  )
  decoder = RagDecoder(MODEL, settings)
  out, again, other = (
    jax.tree.map(np.asarray, decoder(params(), *inputs(), seed=seed))
    for seed in (0, None, 1)
  )
  np.testing.assert_array_equal(out.tokens, again.tokens)
  assert np.any(out.tokens != other.tokens)
  assert all(len(set(sequences(out, b))) > 1 for b in range(B))
  np.testing.assert_allclose(out.log_probs, -nll(rag_token_nll, out), rtol=1e-4)


def test_what_cannot_be_decoded_is_refused():
  with pytest.raises(ValueError, match=r"mode='fusion' .*'fid'.*Choose one"):
    RagDecoder(MODEL, BEAMS, "fusion")
  with pytest.raises(ValueError, match="above the decoder's 8 learned posit"):
    RagDecoder(MODEL, dataclasses.replace(BEAMS, max_new_tokens=9))
  with pytest.raises(ValueError, match="from 0 to 12, the last of the vocab"):
    RagDecoder(MODEL, dataclasses.replace(BEAMS, eos_token_id=(13,)))
  with pytest.raises(ValueError, match="n_docs=4 is above the 3 documents"):
    decode("rag_token", dataclasses.replace(BEAMS, n_docs=4))
  with pytest.raises(ValueError, match="n_docs=0 must be at least 1"):
    RagDecoder(MODEL, dataclasses.replace(BEAMS, n_docs=0))
  many = dataclasses.replace(BEAMS, num_return_sequences=10)
  with pytest.raises(ValueError, match=r"=10 is above the 9 candidates .*3"):
    decode("rag_sequence", many)
  with pytest.raises(ValueError, match="=10 is above num_beams=3"):
    decode("rag_token", many)
  with pytest.raises(ValueError, match=r"HfParity\(n_docs=4\) ranks with more"):
    decode("rag_sequence", hf_parity=HfParity(n_docs=4))
