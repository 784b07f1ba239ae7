r"""RAG-Token on Natural Questions, with ScaNN on the hosts of a v5e pod slice.

  python tools/train.py --distributed --config=configs/nq_scann.py \
      --workdir=gs://BUCKET/nq_scann --config.data.questions=nq/ \
      --config.data.passages=/shared/wiki/passages \
      --config.data.token_cache=/shared/tokens \
      --config.index.path=/shared/wiki/index

As configs/nq_rag_token.py, but the passage tower stays as DPR trained it, as in
Lewis et al. 2020: the index is the one that configs/wiki_embed.py built, and
the hosts search it while the chips train. Each of the 16 hosts holds four of
its 64 shards, and searches them for the questions of all.

Not run yet. Its plan (`rag-jax plan`, JAX 0.12, v5e:8x8): 8.7 GiB of 16 per
chip, 6.1 of 192 GiB per host, 49 GB of memory traffic and 2.3 GB over the
interconnect per step. The bound of a step is 0.065 s of arithmetic, at an MFU
of at most 0.80; the compiler itself expects 326 million cycles. A plan does not
say whether the hosts search that fast.
"""

import pathlib
import runpy

from rag_jax.config import Config


def get_config() -> Config:
  """Returns the settings of nq_rag_token.py, changed."""
  token = pathlib.Path(__file__).with_name("nq_rag_token.py")
  c = runpy.run_path(str(token))["get_config"]()
  # A learning passage tower is possible too: a host then holds two versions of
  # its shards, and one of its chips embeds the next.
  c.encoder.train_passage_encoder = False
  i = c.index
  i.kind = "scann"
  i.refresh_rows = 0
  i.device_storage = "float32"
  # As configs/wiki_embed.py: these describe the index that index.path opens.
  i.passages_per_shard = 330_000
  i.scann_reorder_dtype = "bfloat16"
  return c
