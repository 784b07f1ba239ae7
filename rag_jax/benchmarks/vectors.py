"""Makes many vectors from a few real embeddings, to test indexes of any size.

In: a corpus. Out: its texts, long and short; and mixtures of embeddings.
"""

from collections.abc import Iterable, Iterator

from jaxtyping import Float
import numpy as np

from rag_jax.corpus.document import Document
from rag_jax.corpus.text_spans import sentence_spans

_BLOCK = 65_536  # mixed at a time


def long_and_short_texts(documents: Iterable[Document]) -> Iterator[str]:
  """Yields each document's text, and its sentences if it has several."""
  for document in documents:
    yield document.text
    spans = list(sentence_spans(document.text))
    if len(spans) > 1:
      yield from (document.text[start:stop] for start, stop in spans)


def mix_embeddings(
  real: Float[np.ndarray, "N R"], num: int, *, beta: float, seed: int
) -> Float[np.ndarray, "P R"]:
  """Returns `num` vectors of length 1: the real ones first, then mixtures.

  A mixture is w a + (1 - w) b, divided by its length: a and b are two different
  real vectors of length 1 that are drawn at random, w is drawn from
  Beta(beta, beta). With beta below 1 most weights are near 0 or 1, so that most
  mixtures are close to one real vector, like texts about the same subject.

  Args:
    real: at least two.
    num: of the result (P).
    beta: above 0.
    seed: equal seeds give equal results.

  Raises:
    ValueError: a number is out of range, or a real vector is 0.
  """
  lengths = np.linalg.norm(real, axis=1, keepdims=True)
  if len(real) < 2 or num < 1 or beta <= 0 or not np.all(lengths > 0):
    raise ValueError(
      f"num={num} mixtures with beta={beta} of {len(real)} embeddings, of which"
      f" {np.sum(~(lengths > 0))} are 0 or NaN, were asked for; expected num of"
      " at least 1, beta above 0, and two or more embeddings that are not 0."
      " Change them."
    )
  real = (real / lengths).astype(np.float32)
  rng = np.random.default_rng(seed)
  mixed = np.empty((num, real.shape[1]), np.float32)
  mixed[: len(real)] = real[:num]
  for start in range(len(real), num, _BLOCK):
    size = min(_BLOCK, num - start)
    one = rng.integers(len(real), size=size)
    other = (one + rng.integers(1, len(real), size=size)) % len(real)
    weights = rng.beta(beta, beta, size=(size, 1)).astype(np.float32)
    rows = weights * real[one] + (1 - weights) * real[other]
    # Opposite vectors could cancel out.
    length = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    mixed[start : start + size] = rows / length
  return mixed
