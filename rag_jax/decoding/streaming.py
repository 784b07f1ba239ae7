"""Tokens as they are decoded.

In: a `RagDecoder` and a batch. Out: an iterator over the same tokens that the
decoder returns when it is called, a step at a time.
"""

from collections.abc import Iterator

from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from rag_jax.decoding import plan as compiled
from rag_jax.decoding.rag import RagDecoder


def stream(
  decoder: RagDecoder,
  params: PyTree,
  doc_scores: Float[Array | np.ndarray, "B K"],
  context_tokens: Int[Array | np.ndarray, "B K C"],
  context_mask: Bool[Array | np.ndarray, "B K C"],
  *,
  seed: int | None = None,
  chunk_steps: int = 1,
) -> Iterator[Int[np.ndarray, "B R"]]:
  """Returns an iterator over the next token of every sequence.

  A sequence that has ended gives padding; after the last has ended, the
  iterator ends.

  Args:
    decoder: of greedy search or sampling, in a mode that writes one sequence
      with all documents.
    params: of the whole model.
    doc_scores: as for the decoder.
    context_tokens: as for the decoder.
    context_mask: as for the decoder.
    seed: of sampling; None: that of the settings.
    chunk_steps: tokens that are decoded between two looks at them. More are
      faster and come less smoothly.

  Raises:
    ValueError: the decoder cannot know a token before the sequence has ended.
  """
  settings = decoder.settings
  if settings.num_beams > 1:
    raise ValueError(
      f"num_beams={settings.num_beams} cannot be streamed: which beam is the"
      " best is known at the end alone. Expected num_beams=1, greedy or"
      " do_sample=True; or call the decoder."
    )
  if decoder.mode not in ("rag_token", "fid", "single"):
    raise ValueError(
      f"mode={decoder.mode!r} cannot be streamed: candidates are ranked when"
      " they are complete. Expected 'rag_token', 'fid' or 'single'; or call the"
      " decoder."
    )
  if chunk_steps < 1:
    raise ValueError(
      f"chunk_steps={chunk_steps} decodes nothing, expected at least 1."
      " Leave it out for a token at a time."
    )
  batch = decoder.prepare(params, doc_scores, context_tokens, context_mask)
  state = compiled.begin(
    decoder.plan,
    batch.params,
    batch.memory,
    decoder.key(seed),
    decoder.trie,
  )

  def steps() -> Iterator[Int[np.ndarray, "B R"]]:
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

  return steps()
