"""RAG-Token from scratch on the bundled corpus, in minutes on two CPU cores.

  python tools/train.py --config=configs/quickstart.py --workdir=runs/quickstart

A retriever and a generator, both fresh, learn from questions and answers alone
to look up facts of the world. The warm-up reads passages without questions; the
main stage maximises the marginal likelihood of the answers. The measured
results, and what each seed gave, stand in configs/README.md.

The closed-book baseline is the same command with --config.data.n_docs=0.
"""

from rag_jax.config import Config


def get_config() -> Config:
  """Returns the settings that differ from the defaults."""
  c = Config()
  c.data.passages = "world_facts"
  c.data.questions = "world_facts"
  c.data.n_docs = 2
  c.data.question_length = 28
  c.data.passage_length = 50
  c.data.context_length = 64
  c.data.target_length = 12
  c.data.substitute_answers = 0.75
  c.data.substitute_subjects = 0.5
  c.data.informal_questions = 0.25
  c.tokenizer.vocab_size = 2048
  c.tokenizer.retriever = "uncased"

  # A bag of trained word vectors: it starts from lexical overlap, which random
  # transformer layers would first destroy.
  c.encoder.num_layers = 0
  c.encoder.pooling = "learned"
  c.encoder.projection_dim = 128
  c.encoder.normalize = True
  c.encoder.score_scale = 10.0
  c.encoder.learn_score_scale = True

  # T5, narrow, whose attention starts by copying, and a pointer that goes on
  # where it copied. Hugging Face has no form for a pointer: without it
  # (generator.pointer=False), tools/convert_hf.py exports the trained model.
  c.generator.norm = "pre"
  c.generator.norm_kind = "rms"
  c.generator.norm_eps = 1e-6
  c.generator.use_bias = False
  c.generator.embedding_norm = False
  c.generator.positions = "none"
  c.generator.relative_buckets = 32
  c.generator.relative_shared = True
  c.generator.scale_attention = False
  c.generator.logits_bias = False
  c.generator.init = "copy"
  c.generator.pointer = True

  c.warmup.num_steps = 160
  c.warmup.window_tokens = 8  # about as long as a question

  c.optimizer.peak_lr = 2e-3
  c.optimizer.retriever_lr = 2e-3
  c.optimizer.warmup_steps = 50
  c.optimizer.schedule = "cosine"
  c.optimizer.b2 = 0.98
  c.optimizer.weight_decay = 0.01
  c.optimizer.clip_norm = 1.0

  c.train.batch_size = 48
  c.train.num_steps = 800
  c.train.validate_steps = 100
  c.train.checkpoint_steps = 100
  return c
