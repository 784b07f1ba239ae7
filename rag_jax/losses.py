"""Marginal log-likelihood of a target over the documents retrieved for it.

    p(y|x) = sum_z p(z|x) p(y|x,z)

In: doc_scores [B, K], whose softmax is the prior p(z|x), and target_logits
[B, K, T, V], whose softmax is p(y_t | x, z, y_<t). Out: -log p(y|x) [B], in
nats. Everything is computed in float32.

If [B, K, T, V] does not fit into memory, `models/vocabulary.py` computes the
log-probabilities [B, K, T] of the target, and `marginal_token_nll` and
`marginal_sequence_nll` start from these.

These are the losses of the paper. Hugging Face's differ in corner cases and in
label smoothing: see losses_hf.py.

Source: Lewis et al. 2020, https://arxiv.org/abs/2005.11401, section 2.1.
Other ways for the retriever to learn are in `RetrieverLoss`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_log_probs(
  target_logits: Float[Array, "B K T V"],
  target_tokens: Int[Array, "B T"],
) -> Float[Array, "B K T"]:
  """Returns log p(y_t | x, z, y_<t) for every document and position."""
  target_logits = target_logits.astype(jnp.float32)
  indices = target_tokens[:, None, :, None]
  chosen = jnp.take_along_axis(target_logits, indices, axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(target_logits, axis=-1)


def mean_log_probs(
  target_logits: Float[Array, "B K T V"],
) -> Float[Array, "B K T"]:
  """Returns the mean of log p(v | x, z, y_<t) over all tokens v."""
  target_logits = target_logits.astype(jnp.float32)
  mean = jnp.mean(target_logits, axis=-1)
  return mean - jax.nn.logsumexp(target_logits, axis=-1)


def doc_log_prior(doc_scores: Float[Array, "B K"]) -> Float[Array, "B K"]:
  """Returns log p(z|x), normalised over the K retrieved documents."""
  return jax.nn.log_softmax(doc_scores.astype(jnp.float32), axis=-1)


def marginalize(
  doc_scores: Float[Array, "B K"],
  target_logits: Float[Array, "B K T V"],
) -> Float[Array, "B T V"]:
  """Returns log p(v | x, y_<t) of every token: RAG-Token's mixture.

  log sum_z p(z|x) p(v | x, z, y_<t)
  """
  log_probs = jax.nn.log_softmax(target_logits.astype(jnp.float32), axis=-1)
  prior = doc_log_prior(doc_scores)[:, :, None, None]
  return jax.nn.logsumexp(prior + log_probs, axis=1)


def _smoothing(
  posterior: Float[Array, "B K #T"],
  log_probs: Float[Array, "B K T"],
  mean: Float[Array, "B K T"],
  target_mask: Bool[Array, "B T"],
) -> Float[Array, "B"]:
  """Returns what label smoothing of 1 adds to the nll.

  The posterior is a constant weight. Without the stop_gradient, the retriever
  would learn to prefer documents that make the generator unsure.
  """
  added = jax.lax.stop_gradient(posterior) * (log_probs - mean)
  return jnp.sum(added, axis=(1, 2), where=target_mask[:, None, :])


def marginal_token_nll(
  doc_scores: Float[Array, "B K"],
  log_probs: Float[Array, "B K T"],
  target_mask: Bool[Array, "B T"],
  label_smoothing: float = 0.0,
  mean: Float[Array, "B K T"] | None = None,
) -> Float[Array, "B"]:
  """Returns `rag_token_nll`, computed from log-probabilities.

  Args:
    doc_scores: as in `rag_token_nll`.
    log_probs: log p(y_t | x, z, y_<t), from `token_log_probs`.
    target_mask: as in `rag_token_nll`.
    label_smoothing: as in `rag_token_nll`.
    mean: from `mean_log_probs`; needed only for label smoothing.
  """
  joint = doc_log_prior(doc_scores)[:, :, None] + log_probs  # B K T
  marginal = jax.nn.logsumexp(joint, axis=1)  # B T
  nll = -jnp.sum(marginal, axis=-1, where=target_mask)
  if label_smoothing:
    assert mean is not None
    posterior = jax.nn.softmax(joint, axis=1)
    nll += label_smoothing * _smoothing(posterior, log_probs, mean, target_mask)
  return nll


def marginal_sequence_nll(
  doc_scores: Float[Array, "B K"],
  log_probs: Float[Array, "B K T"],
  target_mask: Bool[Array, "B T"],
  label_smoothing: float = 0.0,
  mean: Float[Array, "B K T"] | None = None,
) -> Float[Array, "B"]:
  """Returns `rag_sequence_nll`, computed from log-probabilities.

  Arguments as in `marginal_token_nll`.
  """
  joint = doc_log_prior(doc_scores) + jnp.sum(
    log_probs, axis=-1, where=target_mask[:, None, :]
  )  # B K
  nll = -jax.nn.logsumexp(joint, axis=-1)
  if label_smoothing:
    assert mean is not None
    posterior = jax.nn.softmax(joint, axis=-1)[:, :, None]
    nll += label_smoothing * _smoothing(posterior, log_probs, mean, target_mask)
  return nll


def rag_token_nll(
  doc_scores: Float[Array, "B K"],
  target_logits: Float[Array, "B K T V"],
  target_tokens: Int[Array, "B T"],
  target_mask: Bool[Array, "B T"],
  label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
  """Negative log-likelihood when each token may come from another document.

  RAG-Token: p(y|x) = prod_t sum_z p(z|x) p(y_t | x, z, y_<t)

  Label smoothing e replaces the target of the generator by a distribution that
  gives 1 - e to the token and e to all V tokens together (Szegedy et al. 2015,
  https://arxiv.org/abs/1512.00567, section 7). The loss of each document is
  weighted by its responsibility for the token, p(z | x, y_t), which is that of
  the unsmoothed likelihood: the gradient of doc_scores remains posterior minus
  prior. With one document this is the standard smoothed cross-entropy.

  It needs only three numbers per position: the token's logit, the mean logit
  and the logsumexp. Hugging Face smooths the mixture instead, which needs the
  log-probabilities of all tokens under all documents, [B, K, T, V].

  Args:
    doc_scores: inner products of question and document; any real number.
    target_logits: unnormalised next-token scores, one set per document.
    target_tokens: the tokens to predict; ids of padding are ignored.
    target_mask: True on real tokens, False on padding.
    label_smoothing: e; 0 gives the likelihood.

  Returns:
    One value per question, in nats, summed (not averaged) over real tokens.
  """
  log_probs = token_log_probs(target_logits, target_tokens)
  mean = mean_log_probs(target_logits) if label_smoothing else None
  return marginal_token_nll(
    doc_scores, log_probs, target_mask, label_smoothing, mean
  )


def rag_sequence_nll(
  doc_scores: Float[Array, "B K"],
  target_logits: Float[Array, "B K T V"],
  target_tokens: Int[Array, "B T"],
  target_mask: Bool[Array, "B T"],
  label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
  """Negative log-likelihood when one document explains the whole target.

  RAG-Sequence: p(y|x) = sum_z p(z|x) prod_t p(y_t | x, z, y_<t)

  The prior is added once per sequence, whatever its length. Arguments, units
  and smoothing as in `rag_token_nll`, but a document is responsible for the
  whole target.
  """
  log_probs = token_log_probs(target_logits, target_tokens)
  mean = mean_log_probs(target_logits) if label_smoothing else None
  return marginal_sequence_nll(
    doc_scores, log_probs, target_mask, label_smoothing, mean
  )


NLL_FNS = {"rag_token": rag_token_nll, "rag_sequence": rag_sequence_nll}

# The same from the log-probabilities [B, K, T] of the target tokens.
MARGINAL_NLL_FNS = {
  "rag_token": marginal_token_nll,
  "rag_sequence": marginal_sequence_nll,
}


def doc_posterior(
  doc_scores: Float[Array, "B K"],
  log_probs: Float[Array, "B K T"],
  target_mask: Bool[Array, "B T"],
) -> tuple[Float[Array, "B K"], Float[Array, "B K T"]]:
  """Returns the posterior given the whole target, and given each token.

  By Bayes' rule with the prior p(z|x). In p(z|x,y) one document explains all
  tokens (RAG-Sequence); in p(z|x,y_t) the likelihood is that of the token alone
  (RAG-Token). Both sum to 1 over the documents.

  Args:
    doc_scores: inner products of question and document.
    log_probs: log p(y_t | x, z, y_<t), from `token_log_probs`.
    target_mask: True on real tokens.
  """
  prior = doc_log_prior(doc_scores)
  total = jnp.sum(log_probs, axis=-1, where=target_mask[:, None, :])
  return (
    jax.nn.softmax(prior + total, axis=-1),
    jax.nn.softmax(prior[:, :, None] + log_probs, axis=1),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrieverLoss:
  """How the retriever learns from p(y|x,z) of a generator held constant.

  No gradient reaches the generator, nor its p(y|x,z). The loss is a function of
  the prior p(z|x) = softmax(doc_scores / temperature).

  Attributes:
    kind: "emdr2", minus log sum_z p(z|x) p(y|x,z) (Sachan et al. 2021,
      https://arxiv.org/abs/2106.05346); "emdr2_token", the same marginal for
      each token, as Atlas computes it. Or the divergence of the prior from the
      softmax of target scores: "pdist", KL(target || prior) with the mean
      log-likelihood per token, and "loop", the same with the mean loss without
      the document (Izacard et al. 2022, https://arxiv.org/abs/2208.03299);
      "replug", KL(prior || target) with the log-likelihood of the whole target
      (Shi et al. 2023, https://arxiv.org/abs/2301.12652). Or KL(target ||
      prior), where the target scores are how much a generator that reads all
      documents at once attends to each: "adist", the attention times the norm
      of the values (Izacard et al. 2022); "dkrr", the logits of the attention
      for the first token (Izacard and Grave 2021,
      https://arxiv.org/abs/2012.04584). Or 1 - sum_z p(z|x) R_z, where R_z is
      the reward of the answer given z, from 0 to 1: "reward" with the sum over
      all K documents; "reward_sampled" estimates its gradient from one document
      that is drawn from p(z|x): -R_z log p(z|x) (REINFORCE, Williams 1992,
      https://doi.org/10.1007/BF00992696).
    temperature: of doc_scores.
    target_temperature: of the target scores.
    weight: of the loss beside that of the generator.
    reward: "f1" or "em", of `answer_rewards`; of the two "reward" losses.
    end_ids: tokens that end an answer; of these too.
    ignored_ids: tokens that are no part of an answer; of these too.
  """

  kind: str
  temperature: float = 1.0
  target_temperature: float = 1.0
  weight: float = 1.0
  reward: str = "f1"
  end_ids: tuple[int, ...] = ()
  ignored_ids: tuple[int, ...] = ()

  @property
  def is_likelihood(self) -> bool:
    """Whether it is minus log p(y|x), which grows with the target's length.

    The others are one number per question.
    """
    return self.kind in ("emdr2", "emdr2_token")

  def __call__(
    self,
    doc_scores: Float[Array, "B K"],
    log_probs: Float[Array, "B #K T"],
    target_mask: Bool[Array, "B T"],
    values: Float[Array, "B K"] | None = None,
  ) -> Float[Array, "B"]:
    """Returns the loss of each question, in nats, without the weight.

    Args:
      doc_scores: inner products of question and document.
      log_probs: log p(y_t | x, z, y_<t); for "loop", of a generator that reads
        all documents but z.
      target_mask: True on real tokens.
      values: of each document, for losses that do not look at `log_probs`:
        "adist" and "dkrr", how much the generator attends to it; "reward", its
        reward; "reward_sampled", the reward of the document that was drawn, and
        0 for the others.
    """
    log_probs = jax.lax.stop_gradient(log_probs)
    scores = doc_scores.astype(jnp.float32) / self.temperature
    if self.kind == "emdr2_token":
      return marginal_token_nll(scores, log_probs, target_mask)
    if self.kind == "emdr2":
      return marginal_sequence_nll(scores, log_probs, target_mask)
    prior = doc_log_prior(scores)
    if values is not None:
      values = jax.lax.stop_gradient(values)
    if self.kind in REWARD_LOSSES:
      assert values is not None
      if self.kind == "reward_sampled":
        return -jnp.sum(values * prior, axis=-1)
      return 1 - jnp.sum(values * jnp.exp(prior), axis=-1)
    if self.kind in ATTENTION_LOSSES:
      assert values is not None
      target = values
    else:
      target = jnp.sum(log_probs, axis=-1, where=target_mask[:, None, :])  # B K
    if self.kind in ("pdist", "loop"):
      num_tokens = jnp.sum(target_mask, axis=-1, keepdims=True)
      target /= jnp.maximum(num_tokens, 1)
    if self.kind == "loop":  # what is missed most explains most
      target = -target
    wanted = jax.nn.log_softmax(target / self.target_temperature, axis=-1)
    if self.kind == "replug":
      wanted, prior = prior, wanted
    return jnp.sum(jnp.exp(wanted) * (wanted - prior), axis=-1)


ATTENTION_LOSSES = ("adist", "dkrr")
REWARD_LOSSES = ("reward", "reward_sampled")
RETRIEVER_LOSSES = (
  "emdr2", "emdr2_token", "pdist", "loop", "replug", *ATTENTION_LOSSES,
  *REWARD_LOSSES,
)  # fmt: skip


def _joined(
  tokens: Int[Array, "B N T"], ignored_ids: tuple[int, ...], fill: int
) -> tuple[Int[Array, "B N T"], Int[Array, "B N"]]:
  """Returns the tokens that are not ignored first, and how many there are."""
  real = ~jnp.isin(tokens, jnp.array(ignored_ids, jnp.int32))
  order = jnp.argsort(~real, axis=-1, stable=True)
  count = jnp.sum(real, axis=-1)
  tokens = jnp.take_along_axis(tokens, order, axis=-1)
  there = jnp.arange(tokens.shape[-1]) < count[..., None]
  return jnp.where(there, tokens, fill), count


def answer_rewards(
  answers: Int[Array, "B K T"],
  accepted: Int[Array, "B A T"],
  ignored_ids: tuple[int, ...],
  kind: str,
) -> Float[Array, "B K"]:
  """Returns how right answers are, from 0 to 1, compared token by token.

  The best over the accepted answers, as in SQuAD's evaluation (Rajpurkar et al.
  2016, https://arxiv.org/abs/1606.05250, section 5). Tokens take the place of
  its normalised words, so that no text is needed on the devices.

  Args:
    answers: of the generator, given each document.
    accepted: answers that count as right; a row that holds no token is none.
    ignored_ids: special tokens, which are no part of an answer.
    kind: "em", whether all tokens are the same; "f1", the harmonic mean of the
      shares of tokens that the two have in common.
  """
  ours, num_ours = _joined(answers, ignored_ids, -1)
  theirs, num_theirs = _joined(accepted, ignored_ids, -2)
  same = ours[:, :, None, :, None] == theirs[:, None, :, None]  # B K A T T
  # The second "the" of an answer needs a second "the" in the other one.
  again = ours[..., :, None] == ours[..., None, :]
  rank = jnp.sum(jnp.tril(again, -1), axis=-1)  # B K T
  shared = jnp.sum(rank[:, :, None] < jnp.sum(same, axis=-1), axis=-1)
  lengths = num_ours[:, :, None] + num_theirs[:, None]  # B K A
  found = 2 * shared / jnp.maximum(lengths, 1)
  if kind == "em":
    places = jnp.arange(ours.shape[-1])
    inside = places < num_theirs[..., None]
    equal = jnp.diagonal(same, axis1=-2, axis2=-1) | ~inside[:, None]
    equal = jnp.all(equal, axis=-1)
    found = equal & (num_ours[:, :, None] == num_theirs[:, None])
  found = jnp.where(num_theirs[:, None] > 0, found, 0.0)
  return jnp.max(found.astype(jnp.float32), axis=-1)


def in_batch_contrastive_nll(
  question_embeddings: Float[Array, "B R"],
  passage_embeddings: Float[Array, "B R"],
) -> Float[Array, "B"]:
  """Returns -log p(own passage | question) among the passages of the batch.

  Question i belongs to passage i; the other passages are its negatives.
  Source: Karpukhin et al. 2020, https://arxiv.org/abs/2004.04906, section 3.2;
  with cloze questions, Lee et al. 2019, https://arxiv.org/abs/1906.00300.
  """
  own = jnp.arange(len(question_embeddings))
  everything = jnp.ones((len(own), len(own)), bool)
  return contrastive_nll(
    question_embeddings, passage_embeddings, own, everything
  )[0]


def contrastive_nll(
  question_embeddings: Float[Array, "B R"],
  passage_embeddings: Float[Array, "P R"],
  own: Int[Array, "B"],
  counts: Bool[Array, "B P"],
  temperature: float = 1.0,
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
  """Returns -log p(own passage | question), and whether it scores highest.

  p is the softmax of the inner products, divided by the temperature, over the
  passages that count: the question's own, and its negatives. With all passages
  of a batch, the hard negatives of the other questions among them, this is the
  loss of DPR (Karpukhin et al. 2020, https://arxiv.org/abs/2004.04906, section
  3.2); with a temperature, that of SimCLR (Chen et al. 2020,
  https://arxiv.org/abs/2002.05709, equation 1). Computed in float32.

  Args:
    question_embeddings: of B questions.
    passage_embeddings: of the P passages of the whole batch.
    own: number of the passage that belongs to each question.
    counts: which passages a question is compared with; its own always is.
    temperature: above 0.
  """
  scores = jnp.einsum(
    "BR,PR->BP",
    question_embeddings.astype(jnp.float32),
    passage_embeddings.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  is_own = jnp.arange(counts.shape[1]) == own[:, None]  # B P
  # Not -inf, whose gradient would be NaN where nothing else counts.
  least = jnp.finfo(jnp.float32).min
  scores = jnp.where(counts | is_own, scores / temperature, least)
  nll = -jnp.sum(jax.nn.log_softmax(scores, axis=-1), axis=-1, where=is_own)
  others = jnp.max(scores, axis=-1, where=~is_own, initial=least)
  return nll, jnp.sum(scores, axis=-1, where=is_own) > others
