"""Tokens as they are decoded.

In: a `RagDecoder` and a batch. Out: an iterator over the same tokens that the
decoder returns when it is called, step by step.
"""

from collections.abc import Generator

from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from rag_jax.decoding import compiled
from rag_jax.decoding.rag import RagDecoder
from rag_jax.decoding.ranking import Generated

# Modes that write with all documents.
_MODES = ("rag_token", "fid", "concatenate", "single")


def can_stream(decoder: RagDecoder) -> bool:
  """Returns whether `stream` takes a decoder."""
  return decoder.settings.num_beams == 1 and decoder.mode in _MODES


def stream(
  decoder: RagDecoder,
  params: PyTree,
  doc_scores: Float[Array | np.ndarray, "B K"],
  context_tokens: Int[Array | np.ndarray, "B k C"],
  context_mask: Bool[Array | np.ndarray, "B k C"],
  *,
  num_shared: int = 0,
  seed: int | None = None,
  chunk_steps: int = 1,
) -> Generator[Int[np.ndarray, "B R"], None, Generated]:
  """Returns an iterator over the next token of every sequence.

  A sequence that has ended gives padding; after the last has ended, the
  iterator ends. Its StopIteration carries what the decoder would have returned.

  Args:
    decoder: does greedy search or sampling, in a mode that writes one sequence
      with all documents.
    params: of the whole model.
    doc_scores: as for the decoder.
    context_tokens: as for the decoder.
    context_mask: as for the decoder.
    num_shared: as for the decoder.
    seed: of sampling; None takes that of the settings.
    chunk_steps: tokens decoded before the host reads them. Larger chunks are
      faster, and the tokens arrive in larger groups.

  Raises:
    ValueError: the decoder cannot know a token before the sequence has ended.
  """
  settings = decoder.settings
  if settings.num_beams > 1:
    raise ValueError(
      f"num_beams={settings.num_beams} cannot be streamed: which beam is the"
      " best is known only at the end. Expected num_beams=1, greedy or"
      " do_sample=True; or call the decoder."
    )
  if decoder.mode not in _MODES:
    raise ValueError(
      f"mode={decoder.mode!r} cannot be streamed: candidates are ranked when"
      f" they are complete. Expected one of {list(_MODES)}; or call the"
      " decoder."
    )
  if chunk_steps < 1:
    raise ValueError(
      f"chunk_steps={chunk_steps} decodes nothing, expected at least 1."
      " Omit it for one token at a time."
    )
  batch = decoder.prepare(
    params, doc_scores, context_tokens, context_mask, num_shared
  )
  state = compiled.begin(
    decoder.plan,
    batch.params,
    batch.memory,
    decoder.key(seed),
    decoder.trie,
  )

  def steps() -> Generator[Int[np.ndarray, "B R"], None, Generated]:
    nonlocal state
    position, active = 0, True
    while position < settings.num_steps and active:
      state = compiled.advance(
        decoder.plan,
        batch.params,
        decoder.trie,
        batch.doc_scores,
        state,
        position + chunk_steps,
      )
      # Copied: the next call overwrites the state.
      written = np.array(state.running.written)
      active = bool(np.any(state.active))
      before, position = position, int(state.position)
      for t in range(before + 1, position + 1):
        yield written[:, :, t]
    return compiled.end(decoder.plan, batch.doc_scores, state)

  return steps()
