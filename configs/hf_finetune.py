"""RAG fine-tuned from DPR and BART, with the settings of its paper.

  python tools/train.py --config=configs/hf_finetune.py --workdir=runs/bart \
      --config.data.passages=passages.jsonl --config.data.questions=questions/

Question encoder and generator learn, passages keep the embeddings of DPR's
encoder (Lewis et al. 2020, https://arxiv.org/abs/2005.11401, section 2.4 and
appendix D). Dropout, the scale of the scores and how answers are written are
those of the checkpoints. Other checkpoints by --config.encoder.init_from,
encoder.passage_init_from and generator.init_from; a RAG directory, for instance
hf:facebook/rag-token-nq, may be given as encoder and generator.

Not measured here: it needs an accelerator.
"""

from rag_jax.config import Config


def get_config() -> Config:
  """Returns the settings that differ from the defaults."""
  c = Config()
  c.encoder.init_from = "hf:facebook/dpr-question_encoder-single-nq-base"
  c.encoder.passage_init_from = "hf:facebook/dpr-ctx_encoder-single-nq-base"
  c.encoder.tied = False
  c.encoder.train_passage_encoder = False
  c.generator.init_from = "hf:facebook/bart-base"

  c.data.n_docs = 5
  c.data.question_length = 128
  c.data.passage_length = 256  # DPR's; the paper's passages have 100 words
  c.data.context_length = 300
  c.data.target_length = 25
  # As RagRetriever of transformers writes them, so that an export reads there
  # what it was trained on.
  c.data.context_style = "rag"

  c.label_smoothing = 0.1
  c.optimizer.peak_lr = 3e-5
  c.optimizer.retriever_lr = 3e-5
  c.optimizer.warmup_steps = 500
  c.optimizer.schedule = "linear"
  c.optimizer.weight_decay = 1e-3
  c.optimizer.clip_norm = 0.1

  c.train.batch_size = 64
  c.train.length_groups = 4  # contexts have about half of the 300 tokens
  c.train.num_steps = 20_000
  c.train.validate_steps = 1000
  c.train.checkpoint_steps = 1000
  return c
