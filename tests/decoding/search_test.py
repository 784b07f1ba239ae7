"""Search over a model that is a table, against searches written as loops."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.decoding.logits import PrefixTrie
from rag_jax.decoding.search import Search
from rag_jax.decoding.settings import GenerationSettings

START, EOS, PAD = 0, 1, 2
B, V, STATES, STEPS = 6, 9, 64, 7
BASE = GenerationSettings(
  max_new_tokens=STEPS,
  decoder_start_token_id=START,
  eos_token_id=(EOS,),
  pad_token_id=PAD,
)


def table(seed, scale=2.0, num_tokens=V):
  """Returns log-probabilities [B, STATES, V], some of them likely to end."""
  rng = np.random.default_rng(seed)
  logits = scale * rng.normal(size=(B, STATES, num_tokens))
  logits[:, 5::5, EOS] += 3
  return np.array(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))


class TableScorer:
  """What comes next depends on all that was written, through a number.

  The number is the cache: if beams took another's, all would be wrong.
  """

  def __init__(self, log_probs):
    self._log_probs = log_probs

  def step(self, tokens, position, cache):
    """Looks up."""
    cache = (cache * 7 + tokens * 3 + position) % STATES
    rows = jnp.arange(len(tokens))[:, None]
    scores = self._log_probs[rows, cache]
    return scores, scores, cache

  def reorder(self, cache, beams):
    """Follows."""
    return jnp.take_along_axis(cache, beams, axis=1)

  def explain(self, details, beams, tokens):
    """Invents a second document."""
    rows = jnp.arange(len(beams))[:, None]
    chosen = details[rows, beams, tokens]
    return jnp.stack([chosen, 2 * chosen], axis=-1)  # as if of two documents


@functools.partial(jax.jit, static_argnums=0)
def search(settings, log_probs, key, trie=None):
  loop = Search(settings, TableScorer(log_probs), trie)
  b = len(log_probs)
  state = loop.start(jnp.zeros((b, loop.width), jnp.int32), b, 2, key)
  state = loop.advance(state, settings.num_steps)
  return loop.finish(state), state.position


def run(settings, log_probs, seed=0, trie=None):
  found, position = search(
    settings, jnp.asarray(log_probs), jax.random.key(seed), trie
  )
  return jax.tree.map(np.asarray, found), int(position)


def next_log_probs(log_probs, row, prefix):
  """Returns the scores behind `prefix`, which has the start token."""
  cache = 0
  for position, token in enumerate(prefix):
    cache = (cache * 7 + token * 3 + position) % STATES
  return log_probs[row, cache]


def settings(**kwargs):
  return dataclasses.replace(BASE, **kwargs)


def sequences(found, row):
  """Returns the sequences of a row as lists, and checks what is behind."""
  out = []
  for r, length in enumerate(found.lengths[row]):
    tokens = found.tokens[row, r]
    assert np.all(tokens[length:] == PAD)
    assert not np.any(found.evidence[row, r, length:])
    out.append(tokens[:length].tolist())
  return out


def check_evidence(found, log_probs):
  """Compares the evidence of every sequence with the table."""
  for row in range(len(found.tokens)):
    for r, tokens in enumerate(sequences(found, row)):
      for t, token in enumerate(tokens):
        expected = next_log_probs(log_probs, row, [START, *tokens[:t]])[token]
        np.testing.assert_allclose(
          found.evidence[row, r, t], [expected, 2 * expected], rtol=1e-6
        )


def greedy_by_hand(log_probs, row, ends=(EOS,)):
  tokens = []
  while len(tokens) < STEPS and not (tokens and tokens[-1] in ends):
    scores = next_log_probs(log_probs, row, [START, *tokens])
    tokens.append(int(np.argmax(scores)))
  return tokens


@pytest.mark.parametrize("ends", [(EOS,), (EOS, 4), ()], ids=str)
def test_greedy_takes_the_best_token_until_an_end(ends):
  log_probs = table(0)
  static = settings(eos_token_id=ends)
  found, position = run(static, log_probs)
  expected = [greedy_by_hand(log_probs, row, ends) for row in range(B)]
  assert [sequences(found, row)[0] for row in range(B)] == expected
  lengths = [len(tokens) for tokens in expected]
  if ends:
    assert len(set(lengths)) > 2
  # The loop is over when the last row is.
  assert position == max(lengths)
  check_evidence(found, log_probs)
  np.testing.assert_allclose(
    found.scores, found.evidence[..., 0].sum(axis=2), rtol=1e-5
  )


def test_the_loop_ends_when_all_rows_have():
  log_probs = table(0)
  log_probs[:, :, EOS] = 10.0
  found, position = run(BASE, log_probs)
  assert position == 1
  assert np.all(found.lengths == 1)


def beams_by_hand(log_probs, row, static):
  """Returns beam search as it is told: lists of hypotheses, best first."""
  width, penalty = static.num_beams, static.length_penalty
  kept = max(2, 1 + len(static.eos_token_id)) * width
  running, ended = [(0.0, [])], []
  for length in range(1, STEPS + 1):
    grown = []
    for score, tokens in running:
      scores = next_log_probs(log_probs, row, [START, *tokens])
      grown += [(score + float(scores[v]), [*tokens, v]) for v in range(V)]
    grown = sorted(grown, key=lambda x: -x[0])[:kept]
    is_end = [t[-1] in static.eos_token_id or length == STEPS for _, t in grown]
    ended += [
      (score / length**penalty, tokens)
      for (score, tokens), end in zip(grown[:width], is_end, strict=False)
      if end
    ]
    ended = sorted(ended, key=lambda x: -x[0])[:width]
    running = [x for x, end in zip(grown, is_end, strict=True) if not end]
    running = running[:width]
    if not running:
      break
    if len(ended) == width:
      guess = length
      if static.early_stopping == "never" and penalty > 0:
        guess = STEPS
      best = running[0][0] / guess**penalty
      if static.early_stopping is True or best <= ended[-1][0]:
        break
  return ended


BEAM_SETTINGS = [
  {"num_beams": 2},
  {"num_beams": 3, "early_stopping": True},
  {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0},
  {"num_beams": 4, "early_stopping": "never", "length_penalty": -1.0},
  {"num_beams": 3, "length_penalty": 0.0, "eos_token_id": (EOS, 5)},
  {"num_beams": 4, "length_penalty": 1.5, "num_return_sequences": 3},
]


@pytest.mark.parametrize("kwargs", BEAM_SETTINGS, ids=str)
def test_beams_are_those_of_a_search_written_as_a_loop(kwargs):
  static = settings(**{"num_return_sequences": kwargs["num_beams"]} | kwargs)
  lengths = set()
  for seed in range(4):
    log_probs = table(seed, scale=1.5)
    found, _ = run(static, log_probs)
    for row in range(B):
      expected = beams_by_hand(log_probs, row, static)
      expected = expected[: static.num_return_sequences]
      assert sequences(found, row) == [tokens for _, tokens in expected]
      np.testing.assert_allclose(
        found.scores[row], [score for score, _ in expected], rtol=1e-5
      )
      lengths |= {len(tokens) for _, tokens in expected}
    check_evidence(found, log_probs)
  assert len(lengths) > 2  # or there was nothing to get wrong


def test_beams_wide_enough_find_the_likeliest_of_all_sequences():
  """Without a length penalty; three tokens, so all can be written down."""
  log_probs = table(3, scale=1.0, num_tokens=3)
  static = settings(
    num_beams=16, max_new_tokens=4, length_penalty=0.0, early_stopping="never"
  )
  found, _ = run(static, log_probs)
  for row in range(B):
    scored = {}
    for tokens in itertools.product(range(3), repeat=4):
      if EOS in tokens:
        tokens = tokens[: tokens.index(EOS) + 1]
      scored[tokens] = sum(
        next_log_probs(log_probs, row, [START, *tokens[:t]])[token]
        for t, token in enumerate(tokens)
      )
    best = max(scored, key=lambda tokens: scored[tokens])
    assert sequences(found, row)[0] == list(best)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_row_does_not_depend_on_the_others(num_beams):
  static = settings(num_beams=num_beams, num_return_sequences=num_beams)
  log_probs = table(1)
  together, _ = run(static, log_probs)
  for row in (0, 3):
    repeated = np.repeat(log_probs[row : row + 1], B, axis=0)
    alone, _ = run(static, repeated)
    assert sequences(alone, 0) == sequences(together, row)
    np.testing.assert_array_equal(alone.scores[0], together.scores[row])


def test_ties_go_to_the_lowest_beam_and_token():
  log_probs = np.full((B, STATES, V), -np.log(V), np.float32)
  found, _ = run(settings(max_new_tokens=2), log_probs)
  assert np.all(found.tokens == 0)
  static = settings(max_new_tokens=2, num_beams=3, num_return_sequences=3)
  found, _ = run(static, log_probs)
  # The first step keeps 0, 2 and 3, and 1 has ended; lengths are divided out.
  assert sequences(found, 0) == [[1], [0, 0], [0, 1]]


def test_a_trie_with_fewer_sequences_than_beams_gives_those():
  trie = PrefixTrie.from_sequences([[3, 4], [3, 5, 6]], EOS)
  static = settings(num_beams=4, num_return_sequences=4)
  log_probs = table(2)
  found, _ = run(static, log_probs, trie=trie)
  for row in range(B):
    written = sequences(found, row)
    assert sorted(written[:2]) == [[3, 4, EOS], [3, 5, 6, EOS]]
    assert written[2:] == [[], []]
    assert np.all(found.scores[row, 2:] < -1e30)


def test_one_beam_of_a_trie_writes_its_likeliest_path():
  trie = PrefixTrie.from_sequences([[3, 4], [5, 5], [6, 7]], EOS)
  log_probs = table(2)
  found, _ = run(BASE, log_probs, trie=trie)
  for row in range(B):
    first = next_log_probs(log_probs, row, [START])
    best = max((3, 5, 6), key=lambda token: first[token])
    expected = {3: [3, 4, EOS], 5: [5, 5, EOS], 6: [6, 7, EOS]}[best]
    assert sequences(found, row)[0] == expected


SAMPLES = 4000


def distribution(logits, temperature=1.0):
  p = np.exp((logits / temperature).astype(np.float64))
  return p / p.sum()


def check_frequencies(tokens, p):
  """Compares counts with probabilities: within 5 standard deviations."""
  count = np.bincount(tokens.ravel(), minlength=len(p))
  n = tokens.size
  assert np.all(np.abs(count - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1e-9)


@pytest.mark.parametrize("top_k", [0, 4])
def test_samples_have_the_probabilities_of_the_model(top_k):
  """A thousand of each row, of which the second token is looked at too."""
  static = settings(
    do_sample=True,
    top_k=top_k,
    temperature=1.3,
    max_new_tokens=2,
    num_return_sequences=SAMPLES // B,
  )
  log_probs = table(5, scale=1.0)
  found, _ = run(static, log_probs)

  def expected(row, prefix):
    scores = next_log_probs(log_probs, row, prefix).copy()
    if top_k:
      scores[np.argsort(-scores)[top_k:]] = -np.inf
    return distribution(scores, 1.3)

  for row in range(B):
    first = expected(row, [START])
    check_frequencies(found.tokens[row, :, 0], first)
    likeliest = int(np.argmax(np.where(np.arange(V) == EOS, 0, first)))
    second = found.tokens[row, found.tokens[row, :, 0] == likeliest, 1]
    check_frequencies(second, expected(row, [START, likeliest]))
  check_evidence(found, log_probs)


def test_beams_are_sampled_without_replacement_in_their_order():
  """One step: the first beam is drawn as one token is, then the others."""
  static = settings(
    do_sample=True, top_k=0, num_beams=2, max_new_tokens=1, early_stopping=True
  )
  log_probs = np.repeat(table(6, scale=1.0)[:1], SAMPLES, axis=0)
  loop = Search(static, TableScorer(jnp.asarray(log_probs)))

  @jax.jit
  def draw(key):
    state = loop.start(jnp.zeros((SAMPLES, 2), jnp.int32), SAMPLES, 2, key)
    scores, _, _ = loop._scores(state)
    return loop._continuations(state, scores, 4)

  values, beams, tokens = (np.asarray(x) for x in draw(jax.random.key(1)))
  assert np.all(beams == 0)  # the others do not count yet
  scores = next_log_probs(log_probs, 0, [START])
  np.testing.assert_allclose(values, scores[tokens], rtol=1e-6)
  assert all(len(set(row)) == 4 for row in tokens.tolist())
  p = distribution(scores)
  check_frequencies(tokens[:, 0], p)
  first = int(np.argmax(p))
  rest = np.where(np.arange(V) == first, 0.0, p) / (1 - p[first])
  check_frequencies(tokens[tokens[:, 0] == first, 1], rest)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_same_seed_gives_the_same_samples_and_another_gives_others(
  num_beams,
):
  static = settings(do_sample=True, num_beams=num_beams, eos_token_id=())
  log_probs = table(7, scale=0.5)
  first, _ = run(static, log_probs, seed=1)
  again, _ = run(static, log_probs, seed=1)
  other, _ = run(static, log_probs, seed=2)
  np.testing.assert_array_equal(first.tokens, again.tokens)
  assert np.any(first.tokens != other.tokens)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=str)
def test_stopping_in_between_changes_nothing(kwargs):
  static = settings(**kwargs)
  log_probs = jnp.asarray(table(8))
  loop = Search(static, TableScorer(log_probs))
  advance = jax.jit(loop.advance)
  width = static.num_beams
  state = loop.start(jnp.zeros((B, width), jnp.int32), B, 2, jax.random.key(0))
  for limit in (1, 3, STEPS):
    state = advance(state, limit)
    assert int(state.position) <= limit
  found = loop.finish(state)
  whole, _ = run(static, log_probs)
  np.testing.assert_array_equal(found.tokens, whole.tokens)
  np.testing.assert_array_equal(found.evidence, whole.evidence)
