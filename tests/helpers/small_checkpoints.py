"""Tiny checkpoints as others publish them: DPR's encoders, a BART, a T5."""

import numpy as np

from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.encoder_tensors import dpr
from rag_jax.weights.export import TokenizerFiles
from rag_jax.weights.export import export_encoder
from rag_jax.weights.export import export_generator
from rag_jax.weights.generator_tensors import generator_architecture

V = 600
ENCODER = EncoderConfig(
  num_layers=1,
  embed_dim=8,
  num_heads=2,
  mlp_dim=12,
  max_positions=30,
  num_token_types=2,
  pooling="cls",
  vocab_size=V,
  dropout=0.2,
  attention_dropout=0.1,
)
GENERATOR = GeneratorConfig(
  num_layers=1, embed_dim=8, num_heads=2, mlp_dim=12, max_positions=50,
  vocab_size=V, dropout=0.2, attention_dropout=0.1, activation_dropout=0.3,
)  # fmt: skip
# As T5 v1.1.
T5 = GeneratorConfig(
  num_layers=2, embed_dim=16, num_heads=2, head_dim=4, mlp_dim=24, gated=True,
  activation="gelu_new", vocab_size=V, dropout=0.1, attention_dropout=0.1,
  activation_dropout=0.1, norm="pre", norm_kind="rms", norm_eps=1e-6,
  use_bias=False, embedding_norm=False, positions="none", relative_buckets=8,
  relative_shared=True, scale_attention=False, tied_output=False,
  logits_bias=False, decoder_start_id=0, fixed=(),
)  # fmt: skip
# How the generator wants to answer.
GENERATION = {
  "num_beams": 2,
  "no_repeat_ngram_size": 3,
  "min_length": 3,
  "max_length": 12,
  "forced_bos_token_id": 0,
  "repetition_penalty": 1.5,
}


def random_params(architecture, seed):
  """Returns parameters of the shapes that an architecture has, nested."""
  rng = np.random.default_rng(seed)
  params = {}
  for rule in architecture.rules:
    *parents, name = rule.ours.split("/")
    tree = params
    for parent in parents:
      tree = tree.setdefault(parent, {})
    tree[name] = rng.normal(size=rule.shape).astype(np.float32)
  return params


def write_checkpoints(root, texts):
  """Writes "question", "passage" and "generator" below `root`.

  Retriever and generator have tokenizers of different sizes.

  Returns:
    The parameters of the three, by name.
  """
  made = {}
  tokenizer = train_tokenizer(texts, 400)
  tokenizer.save(root / "encoder_tokenizer")
  ids = SpecialIds(
    pad=tokenizer.pad_id, bos=tokenizer.bos_id, eos=tokenizer.eos_id
  )
  for seed, name in enumerate(("question", "passage")):
    made[name] = random_params(dpr(ENCODER, name), seed)
    export_encoder(
      root / name,
      ENCODER,
      made[name],
      kind={"question": "dpr_question", "passage": "dpr_context"}[name],
      tokenizer=TokenizerFiles(str(root / "encoder_tokenizer"), ids),
    )
  tokenizer = train_tokenizer([*texts, "Quite another text."], 500)
  tokenizer.save(root / "generator_tokenizer")
  made["generator"] = random_params(
    generator_architecture(GENERATOR, "bart"), 2
  )
  export_generator(
    root / "generator",
    GENERATOR,
    made["generator"],
    tokenizer=TokenizerFiles(str(root / "generator_tokenizer"), ids),
    generation=GENERATION,
  )
  return made


def write_t5(root):
  """Writes "t5" below `root`, beside what `write_checkpoints` wrote."""
  ids = SpecialIds(pad=0, bos=0, eos=1)
  export_generator(
    root / "t5",
    T5,
    random_params(generator_architecture(T5, "t5"), 3),
    tokenizer=TokenizerFiles(str(root / "generator_tokenizer"), ids),
  )
