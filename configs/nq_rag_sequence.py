r"""RAG-Sequence on Natural Questions, with 10 documents per question.

  python tools/train.py --distributed --config=configs/nq_rag_sequence.py \
      --workdir=gs://BUCKET/nq_sequence --config.data.questions=nq/ \
      --config.data.passages=/shared/wiki/passages \
      --config.data.token_cache=/shared/tokens

All else as configs/nq_rag_token.py.

Not run yet. Its plan (`rag-jax plan`, JAX 0.12, v5e:8x8): 14.0 GiB of 16 per
chip, 107 GB of memory traffic and 2.8 GB over the interconnect per step. The
bound of a step is 0.184 s of arithmetic, at an MFU of at most 0.81; the
compiler itself expects 983 million cycles. With train.attention_rows=0 it was
118 GB, but 860 million cycles: time both.
"""

import pathlib
import runpy

from rag_jax.config import Config


def get_config() -> Config:
  """Returns the settings of nq_rag_token.py, changed."""
  token = pathlib.Path(__file__).with_name("nq_rag_token.py")
  c = runpy.run_path(str(token))["get_config"]()
  c.loss = "rag_sequence"
  c.data.n_docs = 10
  return c
