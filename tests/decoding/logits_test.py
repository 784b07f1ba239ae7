"""What settings do to scores, against loops that a reader can check."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.decoding.logits import MIN
from rag_jax.decoding.logits import PrefixTrie
from rag_jax.decoding.logits import process
from rag_jax.decoding.logits import top_k
from rag_jax.decoding.logits import warp
from rag_jax.decoding.settings import GenerationSettings

B, W, V, STEPS = 3, 2, 7, 8
EOS = 2


def settings(**kwargs):
  kwargs = {"max_new_tokens": STEPS, "eos_token_id": (EOS,)} | kwargs
  return GenerationSettings(**kwargs)


@functools.partial(jax.jit, static_argnums=3)
def compiled(scores, written, position, static, trie, nodes):
  return process(scores, written, position, static, trie, nodes)


def run(scores, written, position, static, trie=None, nodes=None):
  out = compiled(
    jnp.asarray(scores), jnp.asarray(written), position, static, trie, nodes
  )
  return np.asarray(out)


def draw(seed):
  """Returns scores and sequences of few different tokens: they repeat."""
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=(B, W, V)).astype(np.float32)
  written = rng.integers(4, size=(B, W, STEPS + 1), dtype=np.int32)
  return scores, written


def each_row():
  return [(b, w) for b in range(B) for w in range(W)]


def check(static, expected_row):
  """Compares `process` at every position with a function of one row."""
  seen_change = False
  for position in range(STEPS):
    scores, written = draw(position)
    out = run(scores, written, position, static)
    for b, w in each_row():
      prefix = written[b, w, : position + 1].tolist()
      expected = expected_row(scores[b, w].copy(), prefix)
      seen_change |= bool(np.any(expected != scores[b, w]))
      np.testing.assert_allclose(out[b, w], expected, rtol=1e-6)
  assert seen_change


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_token_that_would_repeat_an_ngram_is_banned(size):
  def expected(scores, prefix):
    ngrams = [prefix[i : i + size] for i in range(len(prefix) - size + 1)]
    for token in range(V):
      if [*prefix, token][-size:] in ngrams:
        scores[token] = MIN
    return scores

  check(settings(no_repeat_ngram_size=size), expected)


def test_ngrams_longer_than_the_sequence_ban_nothing():
  static = settings(no_repeat_ngram_size=STEPS + 2)
  scores, written = draw(0)
  np.testing.assert_array_equal(run(scores, written, 3, static), scores)


@pytest.mark.parametrize("penalty", [1.5, 0.7])
def test_tokens_that_were_written_are_penalized_the_start_token_too(penalty):
  def expected(scores, prefix):
    for token in set(prefix):
      x = scores[token]
      scores[token] = x * penalty if x < 0 else x / penalty
    return scores

  check(settings(repetition_penalty=penalty), expected)


def test_bad_words_are_banned_where_they_would_be_completed():
  words = ((5,), (1, 3), (2, 1, 0), (0, 1, 0), (EOS,), tuple(range(12)))

  def expected(scores, prefix):
    for word in words:
      start, last = list(word[:-1]), word[-1]
      fits = len(start) <= len(prefix)
      if (
        word != (EOS,) and fits and prefix[len(prefix) - len(start) :] == start
      ):
        scores[last] = MIN
    return scores

  static = settings(bad_words_ids=words)
  check(static, expected)


def test_the_end_is_banned_before_the_shortest_length():
  static = settings(min_new_tokens=3, eos_token_id=(EOS, 5))
  for position in range(STEPS):
    scores, written = draw(position)
    expected = scores.copy()
    if position < 3:  # so many tokens would stand before the end
      expected[:, :, [EOS, 5]] = MIN
    np.testing.assert_array_equal(
      run(scores, written, position, static), expected
    )


def test_forced_tokens_are_certain_at_the_first_and_the_last_step():
  static = settings(forced_bos_token_id=6, forced_eos_token_id=(EOS, 4))
  for position in range(STEPS):
    scores, written = draw(position)
    expected = scores.copy()
    if position in (0, STEPS - 1):
      expected[:] = MIN
      expected[:, :, [6] if position == 0 else [EOS, 4]] = 0
    np.testing.assert_array_equal(
      run(scores, written, position, static), expected
    )


def test_a_ban_comes_after_the_repetition_penalty_and_before_a_forced_token():
  scores, written = draw(1)
  static = settings(
    repetition_penalty=2.0,
    no_repeat_ngram_size=1,
    forced_eos_token_id=(1,),
    min_new_tokens=STEPS,
  )
  written[:] = 1
  out = run(scores, written, 3, static)
  assert np.all(out[:, :, 1] == MIN)  # not MIN * 2 = -inf
  out = run(scores, written, STEPS - 1, static)
  assert np.all(out[:, :, 1] == 0)


SEQUENCES = [[3, 1], [3, 1, 4], [3, 5, 5, EOS], [0, 6], [5]]


def allowed_by_hand(prefix):
  """Returns what may follow, straight from the sequences."""
  whole = [s if s[-1] == EOS else [*s, EOS] for s in SEQUENCES]
  n = len(prefix)
  follow = {s[n] for s in whole if s[:n] == prefix and len(s) > n}
  return sorted(follow) or [EOS]


PREFIXES = [[], [3], [3, 1], [3, 1, 4], [3, 5], [3, 5, 5], [0], [5], [5, EOS]]
PREFIXES += [[3, 5, 5, EOS], [6], [3, 3], [3, 3, 1], [0, 6, EOS, EOS]]


@pytest.mark.parametrize("prefix", PREFIXES, ids=str)
def test_the_trie_allows_what_its_sequences_go_on_with(prefix):
  trie = PrefixTrie.from_sequences(SEQUENCES, EOS)
  expected = allowed_by_hand(prefix)
  assert trie.allowed(prefix) == expected
  nodes = jnp.zeros((B, W), jnp.int32)
  for token in prefix:
    nodes = trie.advance(nodes, jnp.full((B, W), token, jnp.int32))
  scores, written = draw(0)
  out = run(scores, written, len(prefix), settings(), trie, nodes)
  kept = np.isin(np.arange(V), expected)
  np.testing.assert_array_equal(out, np.where(kept, scores, np.float32(MIN)))


def test_a_large_trie_is_the_same_as_a_small_one():
  """One whose start has more children than are looked at elsewhere."""
  size, eos = 400, 399
  rng = np.random.default_rng(0)
  sequences = [[i, *rng.integers(size - 1, size=3)] for i in range(350)]
  sequences += [[7, i] for i in range(100)]  # a large node that is no start
  trie = PrefixTrie.from_sequences(sequences, eos)
  assert trie.most_children == 350
  scores = rng.normal(size=(2, 2, size)).astype(np.float32)
  constrain = jax.jit(functools.partial(trie.constrain, together=False))
  advance = jax.jit(trie.advance)
  prefixes = np.array(
    [[sequences[5][:3], sequences[9][:3]], [[7, 3, 3], [350, 0, 0]]], np.int32
  )  # 2 2 3
  nodes = jnp.zeros((2, 2), jnp.int32)
  for length in range(4):
    out = np.asarray(constrain(scores, nodes))
    for b in range(2):
      for w in range(2):
        kept = np.isin(
          np.arange(size), trie.allowed(prefixes[b, w, :length].tolist())
        )
        expected = np.where(kept, scores[b, w], np.float32(MIN))
        np.testing.assert_array_equal(out[b, w], expected)
    if length < 3:
      nodes = advance(nodes, prefixes[:, :, length])


def test_the_trie_wins_over_bans_where_nothing_else_is_left():
  trie = PrefixTrie.from_sequences([[3], [4, 4]], EOS)
  nodes = jnp.array([[trie_node(trie, [3]), trie_node(trie, [3])]] * B)
  scores, written = draw(0)
  static = settings(min_new_tokens=4)  # bans the end, all that may follow
  out = run(scores, written, 1, static, trie, nodes)
  expected = np.full_like(scores, MIN)
  expected[:, :, EOS] = 0
  np.testing.assert_array_equal(out, expected)

  # Beams share this: while another beam can go on, nothing is forced.
  nodes = jnp.array([[trie_node(trie, [3]), trie_node(trie, [4])]] * B)
  static = dataclasses.replace(static, num_beams=W)
  out = run(scores, written, 1, static, trie, nodes)
  assert np.all(out[:, 0] == MIN)
  np.testing.assert_array_equal(out[:, 1, 4], scores[:, 1, 4])
  # Samples of one question are rows of their own in Hugging Face.
  static = dataclasses.replace(static, num_beams=1, do_sample=True)
  out = run(scores, written, 1, static, trie, nodes)
  assert np.all(out[:, 0, EOS] == 0)


def trie_node(trie, prefix):
  nodes = jnp.zeros((1, 1), jnp.int32)
  for token in prefix:
    nodes = trie.advance(nodes, jnp.full((1, 1), token, jnp.int32))
  return int(nodes[0, 0])


@pytest.mark.parametrize(
  ("sequences", "message"),
  [
    ([], "the trie has no sequence"),
    ([[3], []], r"sequence 1 of the trie is \[\], expected one or more"),
    ([[EOS]], r"sequence 0 of the trie is \[2\]"),
    ([[3, -1]], r"sequence 0 of the trie is \[3, -1\]"),
  ],
)
def test_sequences_that_make_no_trie_are_refused(sequences, message):
  with pytest.raises(ValueError, match=message):
    PrefixTrie.from_sequences(sequences, EOS)


@pytest.mark.parametrize("n", [5, 256 * 40, 256 * 40 + 77])
@pytest.mark.parametrize("k", [1, 5])
def test_top_k_is_that_of_jax_ties_included(n, k):
  rng = np.random.default_rng(n + k)
  mine = jax.jit(top_k, static_argnums=1)
  for case in range(3):
    if case == 0:
      x = rng.normal(size=(4, n))
    elif case == 1:  # few values: ties everywhere
      x = rng.integers(2, size=(4, n))
    else:  # all alike but for the end
      x = np.zeros((4, n))
      x[:, -3:] = 1
    x = jnp.asarray(x, jnp.float32)
    for ours, theirs in zip(mine(x, k), jax.lax.top_k(x, k), strict=True):
      np.testing.assert_array_equal(ours, theirs)


def warped(scores, static):
  """Returns `warp`'s scores, all V of them."""
  values, tokens = jax.jit(warp, static_argnums=1)(jnp.asarray(scores), static)
  if tokens is None:
    return np.asarray(values)
  out = np.full(scores.shape, MIN, np.float32)
  np.put_along_axis(out, np.asarray(tokens), np.asarray(values), axis=-1)
  return out


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("top_k_", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.8, 1.0])
def test_warping_keeps_the_likeliest_tokens(num_beams, top_k_, top_p):
  static = settings(
    temperature=0.7, top_k=top_k_, top_p=top_p, num_beams=num_beams
  )
  scores, _ = draw(4)
  out = warped(scores, static)
  least = 2 if num_beams > 1 else 1  # beams need one beside the end
  for b, w in each_row():
    x = scores[b, w] / np.float32(0.7)
    order = np.argsort(-x)
    kept = order[: max(top_k_ or V, least)]
    p = np.exp(x[kept].astype(np.float64))
    p /= p.sum()
    # A token stays while those before it have less than top_p.
    before = np.cumsum(p) - p
    stays = (before < top_p) if top_p < 1 else np.ones(len(kept), bool)
    stays[:least] = True
    expected = np.full(V, MIN, np.float32)
    expected[kept[stays]] = x[kept[stays]]
    np.testing.assert_allclose(out[b, w], expected, rtol=1e-6)


def test_warping_makes_no_infinity_of_what_is_banned():
  scores, _ = draw(0)
  scores[:, :, 1:] = MIN
  for k in (0, 3):
    static = settings(temperature=0.5, top_k=k, top_p=0.9)
    out = warped(scores, static)
    assert np.all(out[:, :, 1:] == MIN)
    np.testing.assert_allclose(out[:, :, 0], scores[:, :, 0] / 0.5)
