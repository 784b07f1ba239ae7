r"""RAG-Token with T5 v1.1 XL as generator (3B parameters), on a v5p slice.

  python tools/train.py --distributed --config=configs/nq_t5_xl.py \
      --workdir=gs://BUCKET/nq_t5 --config.data.questions=nq/ \
      --config.data.passages=/shared/wiki/passages \
      --config.data.token_cache=/shared/tokens

Retriever, passages and settings as configs/nq_rag_token.py. Parameters and
optimizer are split over eight chips.

Not run yet. Its plan (`rag-jax plan`, JAX 0.12, v5p:4x4x4): 12.4 GiB of 95 per
chip, 268 GB of memory traffic and 24 GB over the interconnect per step. The
bound of a step is 0.220 s of arithmetic, at an MFU of at most 0.79; the
compiler itself expects 908 million cycles.
"""

import pathlib
import runpy

from rag_jax.config import Config


def get_config() -> Config:
  """Returns the settings of nq_rag_token.py, with another generator."""
  token = pathlib.Path(__file__).with_name("nq_rag_token.py")
  c = runpy.run_path(str(token))["get_config"]()
  g = c.generator
  g.init_from = "hf:google/t5-v1_1-xl"
  g.vocab_size = 32_128
  g.num_layers = 24
  g.embed_dim = 2048
  g.num_heads = 32
  g.head_dim = 64
  g.mlp_dim = 5120
  g.activation = "gelu_new"
  g.gated = True
  g.norm = "pre"
  g.norm_kind = "rms"
  g.norm_eps = 1e-6
  g.use_bias = False
  g.relative_buckets = 32
  g.relative_shared = True
  g.scale_attention = False
  g.embedding_norm = False
  g.positions = "none"
  g.tied_output = False
  g.logits_bias = False
  g.decoder_start_id = 0
  g.fixed = ()

  c.optimizer.kind = "adafactor"
  c.optimizer.momentum_dtype = "float32"
  c.optimizer.peak_lr = 1e-4
  c.mesh.fsdp = 8
  return c
