"""What a batch says of itself."""

import numpy as np
import pytest

from rag_jax.models.batch import RagBatch
from rag_jax.models.batch import padding_share


def real(*shape, count):
  """A mask with `count` real tokens, of tokens that are not looked at."""
  mask = np.arange(np.prod(shape)) < count
  return np.zeros(shape, np.int32), mask.reshape(shape)


def test_padding_is_counted_in_all_inputs_together():
  alone = (*real(2, 3, 10, count=45), *real(2, 4, count=3))
  assert padding_share(RagBatch(*alone)) == pytest.approx(1 - 48 / 68)
  with_docs = (*alone, *real(2, 5, count=7), *real(2, 3, 6, count=30))
  assert padding_share(RagBatch(*with_docs)) == pytest.approx(1 - 85 / 114)
