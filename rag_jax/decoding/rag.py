"""Decoding with documents: RAG-Token, RAG-Sequence, FiD, or one document.

In: parameters, doc_scores [B, K] and contexts [B, K, C]. Out: `Generated`: for
each question R sequences, log p(y|x), and the log-probability of each token
given each document. Contexts are encoded once, and used for every candidate.

Sources: RAG-Token and RAG-Sequence, Lewis et al. 2020,
https://arxiv.org/abs/2005.11401, section 2.5; FiD, Izacard and Grave 2020,
https://arxiv.org/abs/2007.01282, section 3.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from rag_jax.decoding import compiled
from rag_jax.decoding.candidates import build_tree
from rag_jax.decoding.compiled import Plan
from rag_jax.decoding.compiled import Ranking
from rag_jax.decoding.logits import PrefixTrie
from rag_jax.decoding.memory import Memory
from rag_jax.decoding.ranking import Generated
from rag_jax.decoding.ranking import HfParity
from rag_jax.decoding.settings import GenerationSettings
from rag_jax.models.causal import CausalGenerator
from rag_jax.models.rag import AnyGenerator
from rag_jax.processes import to_host

# "rag_token": each token may come from another document.
# "rag_sequence": thorough; the candidates of each document's beams are scored
#   under all documents.
# "rag_sequence_fast": a document contributes only to the sequences that its own
#   beams wrote.
# "fid": the decoder attends to all documents at once, each encoded alone.
# "concatenate": the generator reads all documents in one context.
# "single": only the document with the highest score is read.
MODES = (
  "rag_token", "rag_sequence", "rag_sequence_fast", "fid", "concatenate",
  "single",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A batch of questions, encoded."""

  params: PyTree  # of the generator
  doc_scores: Float[Array, "B K"]
  memory: Memory


class RagDecoder:
  """One way to decode, compiled once for each shape of its inputs.

  Its `log_probs` are log p(y|x) with the end token. Settings that change the
  scores of the search do not change them. They are exact in mode
  "rag_sequence", and a lower bound in "rag_sequence_fast".
  """

  def __init__(
    self,
    generator: AnyGenerator,
    settings: GenerationSettings,
    mode: str = "rag_token",
    *,
    trie: PrefixTrie | None = None,
    hf_parity: HfParity | None = None,
  ):
    """Prepares a decoder.

    Args:
      generator: its parameters are passed to each call.
      settings: how to search. `decoder_start_token_id` defaults to the
        generator's; in the modes of RAG-Sequence `num_return_sequences` counts
        the ranked candidates, of which there are K * num_beams at most.
      mode: one of `MODES`.
      trie: the sequences that may be written; None allows any.
      hf_parity: reproduces Hugging Face's ranking of RAG-Sequence, and the end
        tokens that it writes after the end of a beam if padding is token 0.

    Raises:
      ValueError: unknown mode, or settings that cannot work.
    """
    if mode not in MODES:
      raise ValueError(
        f"mode={mode!r} is not a decoding mode, expected one of {list(MODES)}."
        " Choose one."
      )
    causal = isinstance(generator, CausalGenerator)
    if causal and mode == "fid":
      raise ValueError(
        "mode='fid' joins the states of an encoder for each document, but this"
        " generator is a decoder alone, which reads one text. Expected a mode"
        " that gives it one: 'rag_token', 'rag_sequence', 'rag_sequence_fast',"
        " 'single', or 'concatenate', which puts all documents into one prompt."
      )
    if causal and hf_parity is not None:
      raise ValueError(
        "hf_parity reproduces transformers' RAG, which has no decoder-only"
        " generators. Omit it."
      )
    if settings.decoder_start_token_id is None and not causal:
      start = generator.start_id
      settings = dataclasses.replace(settings, decoder_start_token_id=start)
    self.mode = mode
    self.trie = trie
    self._parity = hf_parity
    self._by_sequence = mode in ("rag_sequence", "rag_sequence_fast")
    searched = dataclasses.replace(settings, seed=0)
    if self._by_sequence:  # every beam is a candidate
      searched = dataclasses.replace(
        searched, num_return_sequences=settings.num_beams
      )
    sizes = generator.config
    learned = sizes.positions == "learned"
    searched.validate(
      vocab_size=sizes.vocab_size,
      max_positions=sizes.max_positions if learned else 0,
    )
    if causal:  # after `validate`: it is no token
      start = {"decoder_start_token_id": generator.start_id}
      settings = dataclasses.replace(settings, **start)
      searched = dataclasses.replace(searched, **start)
    self.settings = settings
    self.plan = Plan(
      generator, searched, mode == "rag_token", hf_parity is not None
    )
    # Only what ranking depends on, so that many searches share one program.
    ranked = GenerationSettings(
      num_return_sequences=settings.num_return_sequences,
      do_deduplication=settings.do_deduplication,
      pad_token_id=settings.pad_id,
      bos_token_id=settings.bos_token_id,
    )
    self._ranking = Ranking(generator, ranked, hf_parity)

  def __call__(
    self,
    params: PyTree,
    doc_scores: Float[Array | np.ndarray, "B K"],
    context_tokens: Int[Array | np.ndarray, "B k C"],
    context_mask: Bool[Array | np.ndarray, "B k C"],
    *,
    num_shared: int = 0,
    seed: int | None = None,
  ) -> Generated:
    """Returns the sequences written for each question.

    Args:
      params: of the whole model; those of the generator are "generator".
      doc_scores: inner products of question and document, best first:
        `settings.n_docs` reads only the first documents.
      context_tokens: document and question as the generator reads them; k is
        K, or in mode "concatenate" 1.
      context_mask: True on real tokens.
      num_shared: the number of tokens that all contexts begin with, if that is
        known; a decoder-only generator reads these once.
      seed: of sampling; None takes that of the settings.

    Raises:
      ValueError: `settings.n_docs` is above K, num_return_sequences above the
        number of candidates, or in mode "concatenate" K is not 1.
    """
    inputs = doc_scores, context_tokens, context_mask
    key = self.key(seed)
    if self.mode == "rag_sequence":
      return self._thorough(params, inputs, num_shared, key)
    batch = self.prepare(params, *inputs, num_shared)
    if self.mode == "rag_sequence_fast":
      found = compiled.find_candidates(
        self.plan, batch.params, self.trie, batch.memory, key
      )
      ranked = self._ranking.settings
      return compiled.rank_without_pass(ranked, batch.doc_scores, found)
    return compiled.decode(
      self.plan, batch.params, self.trie, batch.doc_scores, batch.memory, key
    )

  def score(
    self,
    params: PyTree,
    doc_scores: Float[Array | np.ndarray, "B K"],
    context_tokens: Int[Array | np.ndarray, "B k C"],
    context_mask: Bool[Array | np.ndarray, "B k C"],
    answers: Sequence[Sequence[int]],
    *,
    num_shared: int = 0,
  ) -> Generated:
    """Returns given sequences by their log p(y|x), the most likely first.

    Args:
      params: as for a call; and so are contexts and `num_shared`.
      doc_scores: as for a call.
      context_tokens: as for a call.
      context_mask: as for a call.
      answers: R sequences, each with its end token. They are the same for all
        questions; what they begin with in common is computed once.
      num_shared: as for a call.
    """
    inputs = doc_scores, context_tokens, context_mask
    batch = self.prepare(params, *inputs, num_shared)
    lengths = np.array([[len(answer) for answer in answers]], np.int32)
    tokens = np.full((1, len(answers), lengths.max()), self.settings.pad_id)
    for row, answer in enumerate(answers):
      tokens[0, row, : len(answer)] = answer
    # One tree, for all questions.
    tree = build_tree(tokens.astype(np.int32), lengths, self.settings.start_id)
    same = functools.partial(jnp.repeat, repeats=len(context_tokens), axis=0)
    return compiled.score_given(
      self.plan.generator,
      self.mode == "rag_token",
      batch.params,
      batch.doc_scores,
      batch.memory,
      *map(same, (tokens.astype(np.int32), lengths)),
      jax.tree.map(same, tree),
    )

  def key(self, seed: int | None = None) -> Array:
    """Returns the key of the random numbers of a call."""
    return jax.random.key(self.settings.seed if seed is None else seed)

  def prepare(
    self,
    params: PyTree,
    doc_scores: Float[Array | np.ndarray, "B K"],
    context_tokens: Int[Array | np.ndarray, "B k C"],
    context_mask: Bool[Array | np.ndarray, "B k C"],
    num_shared: int = 0,
  ) -> Prepared:
    """Returns the documents that the mode reads, encoded."""
    params = params["generator"]
    if self.mode == "concatenate":
      if context_tokens.shape[1] != 1:
        raise ValueError(
          f"{context_tokens.shape[1]} contexts per question were given, but"
          " mode='concatenate' reads one, which holds all documents. Expected"
          " context_tokens [B, 1, C]. Join them, or choose another mode."
        )
      doc_scores = jnp.zeros((len(context_tokens), 1))
    num_docs = self._check_docs(context_tokens.shape[1])
    scores, tokens, mask = (
      _first(x, num_docs) for x in (doc_scores, context_tokens, context_mask)
    )
    if self.mode == "single":
      scores, tokens, mask = compiled.best_doc(scores, tokens, mask)
    memory = compiled.encode(
      self.plan.generator, params, tokens, mask, num_shared
    )
    if self.mode == "fid":
      memory, scores = memory.joined(), jnp.zeros((len(tokens), 1))
    return Prepared(params, jnp.asarray(scores), memory)

  def _check_docs(self, num_retrieved: int) -> int:
    """Returns how many of the retrieved documents are read."""
    self.plan.settings.validate(num_retrieved=num_retrieved)
    num_docs = self.settings.n_docs or num_retrieved
    most = num_docs * self.settings.num_beams
    if self._by_sequence and self.settings.num_return_sequences > most:
      raise ValueError(
        f"num_return_sequences={self.settings.num_return_sequences} is above"
        f" the {most} candidates of {num_docs} documents with num_beams="
        f"{self.settings.num_beams}. Raise num_beams, or ask for fewer."
      )
    if self._parity and (self._parity.n_docs or 0) > num_retrieved:
      raise ValueError(
        f"HfParity(n_docs={self._parity.n_docs}) ranks with more documents than"
        f" the {num_retrieved} that were retrieved. Retrieve as many."
      )
    return num_docs

  def _thorough(
    self, params: PyTree, inputs: tuple, num_shared: int, key: Array
  ) -> Generated:
    """Searches, builds the tree of prefixes on the host, and ranks."""
    params, parity = params["generator"], self._parity
    generator = self.plan.generator
    num_docs = self._check_docs(inputs[1].shape[1])
    ranked = (parity and parity.n_docs) or num_docs
    scores, tokens, mask = (_first(x, max(num_docs, ranked)) for x in inputs)
    memory = compiled.encode(generator, params, tokens, mask, num_shared)
    searched = memory
    if parity:
      everything = jnp.ones_like(mask)
      searched = compiled.encode(generator, params, tokens, everything)
    searched = searched.change(lambda x: _first(x, num_docs))
    found = compiled.find_candidates(
      self.plan, params, self.trie, searched, key
    )
    written, lengths = to_host(found.tokens), to_host(found.lengths)
    if parity:  # Hugging Face may count tokens after the end
      longest = lengths.max(axis=1, keepdims=True)
      lengths = np.broadcast_to(longest, lengths.shape)
    return compiled.score_and_rank(
      self._ranking,
      params,
      _first(scores, ranked),
      memory.change(lambda x: _first(x, ranked)),
      found,
      build_tree(written, lengths, self.settings.start_id),
    )


def _first(x: Array | np.ndarray, num: int) -> Array | np.ndarray:
  """Returns the first `num` documents, without a copy if these are all."""
  return x if x.shape[1] == num else x[:, :num]
