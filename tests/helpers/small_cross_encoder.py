"""A checkpoint of a small random cross-encoder, as others publish them."""

import json
import pathlib

import jax
import numpy as np
from safetensors import numpy as safetensors
from small_checkpoints import random_params
from tokenizers.processors import TemplateProcessing

from rag_jax.config_models import EncoderConfig
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.weights.cross_encoder import cross_encoder
from rag_jax.weights.mapping import put
from rag_jax.weights.tensors import write_tensors

POSITIONS = 40  # tokens of a pair


def write_cross_encoder(
  path: pathlib.Path, texts: list[str], seed: int = 0
) -> pathlib.Path:
  """Writes an XLM-RoBERTa that learnt the words of `texts`; returns `path`."""
  tokenizer = train_tokenizer(texts, 400)
  bos, pad, eos = tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id
  tokenizer.backend.backend_tokenizer.post_processor = TemplateProcessing(
    single="<s> $A </s>",
    pair="<s> $A </s> </s> $B </s>",
    special_tokens=[("<s>", bos), ("</s>", eos)],
  )
  tokenizer.save(path)
  (path / "manifest.json").unlink()  # of the tokenizer alone
  encoder = EncoderConfig(
    vocab_size=tokenizer.vocab_size, num_layers=1, embed_dim=16, num_heads=2,
    mlp_dim=24, max_positions=POSITIONS, position_offset=pad + 1,
    num_token_types=1,
  )  # fmt: skip
  architecture = cross_encoder(encoder, "xlm-roberta")
  # Smaller than 1, so that nothing is saturated and every pair differs.
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: 0.4 * x + (path[-1].key == "scale"),
    random_params(architecture, seed),
  )
  write_tensors(path, put(params, architecture))
  config = {
    "architectures": [architecture.name],
    "model_type": "xlm-roberta",
    "vocab_size": encoder.vocab_size,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": POSITIONS + pad + 1,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": pad,
    "bos_token_id": bos,
    "eos_token_id": eos,
    "id2label": {"0": "LABEL_0"},
    "sentence_transformers": {"version": "5.0.0"},
  }
  (path / "config.json").write_text(json.dumps(config))
  return path


def rewrite(path: pathlib.Path, **changes: object) -> None:
  """Changes fields of config.json."""
  config = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(config | changes))


def change_tensors(path: pathlib.Path, **tensors: np.ndarray | None) -> None:
  """Replaces tensors; None removes one. "__" in a name stands for a dot."""
  found = dict(safetensors.load_file(path / "model.safetensors"))
  for name, x in tensors.items():
    name = name.replace("__", ".")
    found.pop(name, None)
    if x is not None:
      found[name] = x
  safetensors.save_file(found, path / "model.safetensors")
