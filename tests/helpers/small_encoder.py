"""A checkpoint of a small random encoder, as sentence-transformers has them."""

import dataclasses
import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp

from rag_jax.config_models import EncoderConfig
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.models.rag import build_encoder
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.export import TokenizerFiles
from rag_jax.weights.export import export_encoder

POSITIONS, DIM = 24, 16


def write_encoder(
  path: pathlib.Path,
  texts: list[str],
  kind: str = "sentence_transformers",
  seed: int = 0,
) -> pathlib.Path:
  """Writes an encoder whose tokenizer learnt `texts`, and returns `path`.

  A mean of embeddings, hardly mixed: texts of the same words are near.
  """
  tokenizer = train_tokenizer(texts, 400)
  fields = dataclasses.replace(
    EncoderConfig(),
    vocab_size=tokenizer.vocab_size,
    max_positions=POSITIONS,
    num_layers=1,
    embed_dim=DIM,
    num_heads=2,
    mlp_dim=32,
    num_token_types=2,
    pooling="cls" if kind.startswith("dpr") else "mean",
    normalize=not kind.startswith("dpr"),
  )
  tower = build_encoder(
    fields, vocab_size=0, max_positions=0, dtype=jnp.float32
  )
  tokens = jnp.zeros((1, 4), jnp.int32)
  params = jax.jit(tower.init)(jax.random.key(seed), tokens, tokens == 0)
  params = jax.tree.map(lambda x: x * 2, nn.meta.unbox(params)["params"])
  tokenizer.save(path.parent / f"{path.name} tokenizer")
  assert tokenizer.bos_id is not None
  ids = SpecialIds(
    bos=tokenizer.bos_id, eos=tokenizer.eos_id, pad=tokenizer.pad_id
  )
  export_encoder(
    path,
    fields,
    params,
    kind=kind,
    tokenizer=TokenizerFiles(
      str(path.parent / f"{path.name} tokenizer"), ids, max_tokens=POSITIONS
    ),
  )
  return path
