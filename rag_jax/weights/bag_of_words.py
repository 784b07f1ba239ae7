"""An encoder without layers, written exactly as a DPR encoder with one.

In: the parameters of a `RetrieverEncoder` with num_layers=0, which takes the
softmax-weighted sum of token embeddings, projects it and divides by the norm.
Out: fields and parameters of an encoder whose arithmetic is that of BERT's
layers, and whose result is the same up to rounding.

The first token of every input must be the same one, as it is where inputs begin
with the tokenizer's begin token. What each part of BERT then does:

- embeddings: row i is [x_i, -x_i, r_i, -r_i] with r_i = sqrt(C^2 - |x_i|^2). So
  every row has mean 0 and variance 2 C^2 / W, W the width, and the norm divides
  all of them by one number, with which its scale multiplies.
- attention, one head: the query is a bias alone, the key the pooling logit, the
  value the projection v of each row; the state of the first token becomes
  [v, -v, 0...] of the pooled row, as the output's bias takes away what the
  residual connection adds, which is always the first token's row.
- its norm: the mean is 0, so it divides by sqrt(2 |v|^2 / W): this is the L2
  norm. The norm after the MLP, which adds 0, does it again and changes nothing.
- the projection of DPR (encode_proj) takes v back out and brings the scale.
"""

import dataclasses
from typing import Any

from jaxtyping import PyTree
import numpy as np

from rag_jax.config_models import EncoderConfig
from rag_jax.weights.encoder_configs import BERT_LAYERS

# How much larger than the embeddings the values are made: what they are rounded
# by when the first token's row is added and taken away again is then small.
_GAIN = 256.0
_EPS = 1e-12  # of the norms, beside squares around 1e4


def to_bert(
  e: EncoderConfig,
  params: PyTree,
  *,
  first_id: int,
  max_positions: int,
  scale: float = 1.0,
) -> tuple[EncoderConfig, PyTree]:
  """Returns fields and parameters of the encoder with one layer.

  Args:
    e: of the encoder without layers.
    params: its parameters.
    first_id: the token that every input begins with.
    max_positions: of the longest input.
    scale: multiplies the embeddings.

  Raises:
    ValueError: names the fields that cannot be written this way.
  """
  _check(e)
  rows = np.asarray(params["token_embedding"]["embedding"], np.float64)
  vocab_size, dim = rows.shape
  if not 0 <= first_id < vocab_size:
    raise ValueError(
      f"The first token of every input is {first_id}, but the encoder has"
      f" embeddings of ids 0 to {vocab_size - 1}. Give the begin token of its"
      " tokenizer."
    )
  project, shift = np.eye(dim), np.zeros(dim)
  if e.projection_dim:
    project = np.asarray(params["projection"]["kernel"], np.float64)
    shift = np.asarray(params["projection"]["bias"], np.float64)
  r = project.shape[1]
  width = max(2 * dim + 2, 2 * r)
  half = dim + 1  # columns of x, then of the filling

  norms = np.sum(rows**2, axis=1)
  longest = max(norms.max(), 1e-6)
  filling = np.sqrt(np.maximum(longest - norms, 0.0))
  table = np.zeros((vocab_size, width))
  table[:, :dim], table[:, dim:half] = rows, filling[:, None]
  table[:, half : half + dim] = -rows
  table[:, half + dim : 2 * half] = -filling[:, None]
  table = table.astype(np.float32)

  size = np.sqrt(np.mean(np.sum((rows @ project + shift) ** 2, axis=1)))
  gain = _GAIN * np.sqrt(longest) / max(size, 1e-6)
  gain = 2.0 ** np.round(np.log2(gain))  # exact in every product
  query, bias, value_bias = np.zeros((3, width))
  key, value, out = np.zeros((3, width, width))
  query[0] = np.sqrt(width)  # by which attention divides
  if e.pooling == "learned":
    # Its bias is the same for all tokens, which softmax does not see.
    key[:dim, 0] = np.asarray(params["pooling"]["kernel"], np.float64)[:, 0]
  value[:dim, :r] = gain * project
  value_bias[:r] = gain * shift
  out[range(r), range(r)] = 1.0
  out[range(r), range(width // 2, width // 2 + r)] = -1.0
  # The mean of [x, -x, ...] is 0 and its variance 2 C^2 / W.
  stretch = np.sqrt(2 * longest / width + _EPS)
  bias -= table[first_id]

  take_out = np.zeros((width, r))
  # Both norms leave |[v, -v]|^2 = W.
  unit = scale / np.sqrt(width / 2)
  take_out[range(r), range(r)] = unit / 2
  take_out[range(width // 2, width // 2 + r), range(r)] = -unit / 2

  fields = dataclasses.replace(
    e,
    num_layers=1,
    embed_dim=width,
    num_heads=1,
    mlp_dim=1,
    activation="relu",
    norm_eps=_EPS,
    **BERT_LAYERS,
    head_dim=0,
    num_token_types=0,
    max_positions=max_positions,
    vocab_size=vocab_size,
    pooler=False,
    pooling="cls",
    normalize=False,
    projection_dim=r,
    score_scale=1.0,
    learn_score_scale=False,
  )
  one = {"scale": np.ones(width), "bias": np.zeros(width)}
  heads = (width, 1, width)
  tree: dict[str, Any] = {
    "token_embedding": {"embedding": table},
    "position_embedding": {"embedding": np.zeros((max_positions, width))},
    "embedding_norm": {
      "scale": np.full(width, stretch),
      "bias": np.zeros(width),
    },
    "layer_0": {
      "self_attention": {
        "query": {"kernel": np.zeros(heads), "bias": query.reshape(1, width)},
        "key": {"kernel": key.reshape(heads), "bias": np.zeros((1, width))},
        "value": {
          "kernel": value.reshape(heads),
          "bias": value_bias.reshape(1, width),
        },
        "out": {"kernel": out.reshape(1, width, width), "bias": bias},
      },
      "self_attention_norm": one,
      "mlp": {
        "up": {"kernel": np.zeros((width, 1)), "bias": np.zeros(1)},
        "down": {"kernel": np.zeros((1, width)), "bias": np.zeros(width)},
      },
      "mlp_norm": one,
    },
    "projection": {"kernel": take_out, "bias": np.zeros(r)},
  }
  return fields, _float32(tree)


def _float32(tree: PyTree) -> PyTree:
  if isinstance(tree, dict):
    return {name: _float32(part) for name, part in tree.items()}
  return np.asarray(tree, np.float32)


def _check(e: EncoderConfig) -> None:
  wrong = []
  if e.num_layers:
    wrong.append(f"encoder.num_layers={e.num_layers}, expected 0")
  if e.pooling not in ("learned", "mean"):
    wrong.append(f"encoder.pooling={e.pooling!r}, expected 'learned' or 'mean'")
  if not e.normalize:
    wrong.append(
      "encoder.normalize=False, expected True: BERT's last norm divides by the"
      " length of every embedding"
    )
  if wrong:
    raise ValueError(
      "DPR cannot compute this encoder without layers:"
      f" {'; '.join(wrong)}. Train one with these fields, or with layers."
    )
