r"""RAG-Token on Natural Questions over all of Wikipedia, on a v5e pod slice.

  python tools/train.py --distributed --config=configs/nq_rag_token.py \
      --workdir=gs://BUCKET/nq --config.data.questions=nq/ \
      --config.data.passages=/shared/wiki/passages \
      --config.data.token_cache=/shared/tokens

The sizes of Lewis et al. 2020 (https://arxiv.org/abs/2005.11401): DPR's two
BERT-base towers, BART-large, 21,015,300 passages of 100 words, 5 documents. As
in REALM, and other than in the paper, the passage tower learns too: the index
is in the memory of the chips, the step searches it, and embeds some passages
again.

Not run yet. Its plan (`rag-jax plan`, JAX 0.12, v5e:8x8): 11.5 GiB of 16 per
chip, 59 GB of memory traffic and 2.8 GB over the interconnect per step. The
bound of a step is 0.098 s of arithmetic, at an MFU of at most 0.82; the
compiler itself expects 536 million cycles. With train.attention_rows=0 it is
67 GB, but 471 million cycles: time both.
"""

from rag_jax.config import Config


def get_config() -> Config:
  """Returns the settings that differ from the defaults."""
  c = Config()
  c.loss = "rag_token"

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
  e.dropout = 0.1
  e.attention_dropout = 0.0
  g = c.generator
  g.init_from = "hf:facebook/bart-large"
  g.vocab_size = 50_265
  g.num_layers = 12
  g.embed_dim = 1024
  g.num_heads = 16
  g.mlp_dim = 4096
  g.max_positions = 1024
  g.dropout = 0.1
  g.attention_dropout = 0.0

  d = c.data
  d.num_passages = 21_015_300
  d.n_docs = 5
  d.question_length = 32
  d.passage_length = 160  # of tokens; a passage of 100 words has about 130
  d.context_length = 192
  d.target_length = 32

  c.index.kind = "device"
  c.index.device_storage = "bfloat16"
  c.index.refresh_rows = 4096

  c.label_smoothing = 0.1
  c.optimizer.peak_lr = 3e-5
  c.optimizer.retriever_lr = 3e-5
  c.optimizer.warmup_steps = 500
  c.optimizer.schedule = "linear"
  c.optimizer.weight_decay = 1e-3
  c.optimizer.clip_norm = 0.1
  c.optimizer.momentum_dtype = "bfloat16"

  c.eval.batch_size = 512

  t = c.train
  t.batch_size = 512
  t.num_steps = 10_000
  t.validate_steps = 1000
  t.checkpoint_steps = 1000
  t.compute_dtype = "bfloat16"
  t.scan_layers = True
  t.remat = "attention"
  t.attention_rows = 10
  return c
