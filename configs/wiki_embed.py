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

from rag_jax.config import Config


def get_config() -> Config:
  """Returns the settings that differ from the defaults."""
  c = Config()
  c.train.num_steps = 0  # nothing is trained: a plan is of the embedding alone

  # The checkpoints give these sizes too; `rag-jax plan` reads only the config.
  e = c.encoder
  e.init_from = "hf:facebook/dpr-question_encoder-single-nq-base"
  e.passage_init_from = "hf:facebook/dpr-ctx_encoder-single-nq-base"
  e.vocab_size = 30_522
  e.num_layers = 12
  e.embed_dim = 768
  e.num_heads = 12
  e.mlp_dim = 3072
  e.max_positions = 512
  e.num_token_types = 2
  e.pooling = "cls"
  e.tied = False

  c.data.num_passages = 21_015_300
  c.data.passage_length = 160  # of tokens; a passage of 100 words has about 130

  c.index.kind = "scann"
  c.index.embed_batch_size = 2048  # of a host, which has four chips
  # ScaNN copies what it indexes: a part at a time keeps the first host's memory
  # near the size of the embeddings.
  c.index.passages_per_shard = 1_500_000
  c.index.scann_reorder_dtype = "bfloat16"
  return c
