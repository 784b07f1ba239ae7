"""The retriever alone, trained on questions with known passages, as in DPR.

  python tools/mine_negatives.py --questions=train.jsonl \
      --corpus=passages.jsonl --output=questions/train.jsonl
  python tools/train.py --config=configs/dpr.py --workdir=runs/dpr \
      --config.data.passages=passages.jsonl --config.data.questions=questions/

questions/ has validation.jsonl and test.jsonl too. Only the contrastive stage
has steps (Karpukhin et al. 2020, https://arxiv.org/abs/2004.04906): each
question has to find its own passage among those of the batch and the hard
negatives. The answer recall of the results is that of the trained retriever;
the generator is small, fresh and never trained. Other encoders by
--config.encoder.init_from. RAG goes on from there with train.num_steps, a
generator that can write, and data.n_docs of 2 or more.

The measured results stand in configs/README.md.
"""

from rag_jax.config import Config


def get_config() -> Config:
  """Returns the settings that differ from the defaults."""
  c = Config()
  c.encoder.init_from = "hf:sentence-transformers/all-MiniLM-L6-v2"
  c.encoder.score_scale = 20.0  # its embeddings have length 1
  c.generator.num_layers = 1
  c.generator.embed_dim = 32
  c.generator.mlp_dim = 32
  c.data.n_docs = 1
  c.data.target_length = 8

  c.contrastive.num_steps = 200
  c.contrastive.batch_size = 32
  c.contrastive.negatives = 1
  c.contrastive.retriever_lr = 3e-5
  c.contrastive.warmup_steps = 20
  c.optimizer.clip_norm = 1.0

  c.train.num_steps = 0
  return c
