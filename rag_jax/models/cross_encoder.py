"""A cross-encoder: reads question and passage together, and scores the pair.

Source: Nogueira and Cho 2019, https://arxiv.org/abs/1901.04085, section 3.
"""

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rag_jax.models.encoders import RetrieverEncoder
from rag_jax.models.layers import ACTIVATIONS


class CrossEncoder(nn.Module):
  """An encoder with the head of a sequence classifier of one label.

  The head is that of BERT (its pooler and classifier), RoBERTa and its
  relatives, and DistilBERT: out(activation(dense(state of the first token))).

  Params: `encoder`, whose pooling is "cls"; `dense` kernel [D, D]; `out` kernel
  [D, 1].
  """

  encoder: RetrieverEncoder
  activation: str  # of the head

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "N L"],
    mask: Bool[Array, "N L"],  # True on real tokens
    token_types: Int[Array, "N L"],  # which of the two texts, if it has types
  ) -> Float[Array, "N"]:
    """Returns the logit of each pair, float32: higher is more relevant."""
    x = self.encoder(tokens, mask, token_types=token_types)  # N D
    x = nn.Dense(x.shape[-1], name="dense")(x)
    x = ACTIVATIONS[self.activation](x)
    return nn.Dense(1, name="out")(x)[:, 0].astype(jnp.float32)
