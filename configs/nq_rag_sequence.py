r"""RAG-Sequence on Natural Questions, with 10 documents per question.

  python tools/train.py --distributed --config=configs/nq_rag_sequence.py \
      --workdir=gs://BUCKET/nq_sequence --config.data.passages=psgs/passages \
      --config.data.questions=nq/

All else as configs/nq_rag_token.py.

PLAN
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
