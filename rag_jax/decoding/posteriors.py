"""How much of an answer each document explains.

In: the scores of documents, and log-probabilities of the answer given each.
Out: prior and posterior of the documents.
"""

import dataclasses

from jaxtyping import Float
import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Explained:
  """The probabilities of the documents of an answer."""

  prior: np.ndarray  # [B, K] p(z|x)
  posterior: np.ndarray  # [B, K] p(z | x, y)
  token_posterior: np.ndarray  # [B, K, T] p(z | x, y_t), of each token alone
  token_log_probs: np.ndarray  # [B, T] log p(y_t | x, y_<t)


def explain_docs(
  doc_scores: Float[np.ndarray, "B K"],
  given: Float[np.ndarray, "B k T"],
  mode: str,
) -> Explained:
  """Returns how much of an answer each document explains.

  Computed by numpy: JAX would compile a program per shape, for a few hundred
  numbers.

  Args:
    doc_scores: their softmax is the prior.
    given: log p(y_t | x, z, y_<t); k = 1 if the decoder read one context.
    mode: of the decoder.
  """
  log_prior = log_softmax(doc_scores, axis=1)  # B K
  num_docs = log_prior.shape[1]
  if given.shape[1] != num_docs:
    prior = np.exp(log_prior)
    posterior = prior
    if mode == "single":
      posterior = np.eye(num_docs)[np.argmax(doc_scores, axis=1)]
    shape = (*prior.shape, given.shape[2])
    by_token = np.broadcast_to(posterior[..., None], shape)
    return Explained(prior, posterior, by_token, given[:, 0])
  joint = log_prior[..., None] + given
  so_far = log_prior[..., None] + np.cumsum(given, axis=2)  # B K T
  if mode == "rag_token":
    token_log_probs = np.logaddexp.reduce(joint, axis=1)
  else:  # log p(y_t|x,y_<t): documents weighted by how well they explain y_<t
    until = np.logaddexp.reduce(so_far, axis=1)
    token_log_probs = np.diff(until, axis=1, prepend=0.0)
  return Explained(
    prior=np.exp(log_prior),
    posterior=np.exp(log_softmax(so_far[..., -1], axis=1)),
    token_posterior=np.exp(log_softmax(joint, axis=1)),
    token_log_probs=token_log_probs,
  )


def log_softmax(x: np.ndarray, axis: int) -> np.ndarray:
  """Returns the logarithm of the softmax along an axis."""
  return x - np.logaddexp.reduce(x, axis=axis, keepdims=True)
