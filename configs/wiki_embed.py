r"""Embeds all of Wikipedia with DPR's passage encoder, on a v5e pod slice.

  python tools/build_index.py --distributed --config=configs/wiki_embed.py \
      --corpus=psgs_w100.tsv --split=none --storage=bfloat16 --nobm25 \
      --output=/shared/wiki

The 21,015,300 passages of 100 words of Karpukhin et al. 2020
(https://arxiv.org/abs/2004.04906). --output is on a disk that all hosts see.
configs/nq_scann.py trains with the index that is written there; the other
configs read the passages alone.

Not run yet. Its plan (`rag-jax plan`, JAX 0.12, v5e:8x8): 3.0 GiB of 16 per
chip, and at least 47 s for all passages, of arithmetic and of memory traffic
alike: 0.84 chip-hours. The embeddings take 32 GB. Reading, tokenizing and
indexing are work of the first host, and take longer.
"""

import pathlib
import runpy

from rag_jax.config import Config


def get_config() -> Config:
  """Returns settings with the encoders and passages of nq_rag_token.py."""
  token = pathlib.Path(__file__).with_name("nq_rag_token.py")
  token = runpy.run_path(str(token))["get_config"]()
  c = Config()
  c.train.num_steps = 0  # nothing is trained: a plan is of the embedding alone
  c.encoder = token.encoder
  c.data.num_passages = token.data.num_passages
  c.data.passage_length = token.data.passage_length

  c.index.kind = "scann"
  c.index.embed_batch_size = 2048  # of a host, which has four chips
  # ScaNN copies what it indexes: a part at a time keeps the first host's memory
  # near the size of the embeddings. The hosts that train hold some of the 64
  # shards each, as many on each if there are 8, 16, 32 or 64.
  c.index.passages_per_shard = 330_000
  c.index.scann_reorder_dtype = "bfloat16"
  return c
