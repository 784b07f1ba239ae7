"""An update that searches inside the compiled step and refreshes the index.

In: questions; the index in the memory of the devices, with the passages as
tokens. Out: the new state, whose parameters have embedded some passages again.
This is one program: no passage, embedding or score goes through the host.
"""

import dataclasses
import functools
import typing
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, PyTree
import numpy as np

from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.data.experiment import Experiment
from rag_jax.data.step_batches import QuestionBatch
from rag_jax.data.step_batches import add_start
from rag_jax.data.step_batches import join_contexts
from rag_jax.models.batch import RagBatch
from rag_jax.models.partitioning import constrain
from rag_jax.models.rag import RagModel
from rag_jax.retrieval import device
from rag_jax.retrieval import device_index
from rag_jax.retrieval import device_refresh
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.retriever import padded_length
from rag_jax.training.objectives import Metrics
from rag_jax.training.state import TrainState
from rag_jax.training.step import update

DOC_IDS = "doc_ids"  # among the metrics of an update; it is no number


# Unchecked, because JAX makes it of shapes and shardings too.
@typing.no_type_check
@flax.struct.dataclass
class StepIndex:
  """The index that a step searches, with the passages as tokens.

  The retriever's tokens are in `arrays`. The generator's are None if they are
  the same, or in a checkpoint, which leaves out all tokens, and norms.
  """

  arrays: device.DeviceArrays
  context_tokens: Int[Any, "N L"] | None = None
  context_lengths: Int[Any, "N"] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class InStep:
  """The search inside a step, and the refresh of its index."""

  model: RagModel
  n_docs: int
  refresh_rows: int  # passages embedded again in each step
  bos_id: int | None  # of the retriever

  def update(
    self,
    state: TrainState,
    batch: QuestionBatch,
    key: Key[Array, ""],
    *,
    stage: str,
    **how: Any,
  ) -> tuple[TrainState, Metrics]:
    """Applies one gradient update, as `step.update`, after its own search.

    The search uses the parameters before the update. The passages whose turn it
    is are embedded with the parameters after it, since the next search embeds
    its questions with these.
    """
    index = state.index
    assert index is not None
    documents, ids, num_cut = self.documents(state.params, index, batch)
    state, metrics = update(state, documents, key, stage=stage, **how)
    arrays = self.refresh(index.arrays, state)
    mean, most = device_refresh.staleness(arrays, state.step)
    metrics |= {
      f"{stage}/index_staleness_steps": mean,
      f"{stage}/index_staleness_max_steps": most,
      f"{stage}/distinct_docs": _share_of_distinct(ids),
      f"{stage}/contexts_cut": num_cut / ids.size,
      DOC_IDS: ids,
    }
    return dataclasses.replace(
      state, index=dataclasses.replace(index, arrays=arrays)
    ), metrics

  def documents(
    self, params: PyTree, index: StepIndex, batch: QuestionBatch
  ) -> tuple[RagBatch, Int[Array, "B K"], Int[Array, ""]]:
    """Returns the batch with its documents, their ids, and the contexts cut.

    No gradient flows through the search, and its scores are not used.
    """
    embeddings: Any = self.model.apply(
      {"params": jax.lax.stop_gradient(params)},
      batch.question_tokens,
      batch.question_mask,
      method="embed_questions",
    )
    ids, _ = device.search_device(index.arrays, embeddings, self.n_docs)
    tokens, mask = _split(device.gather_passages(index.arrays, ids))
    doc_tokens, doc_mask = add_start(tokens, mask, self.bos_id)
    if index.context_tokens is not None:
      generator = dataclasses.replace(
        index.arrays,
        tokens=index.context_tokens,
        lengths=index.context_lengths,
      )
      tokens, mask = _split(device.gather_passages(generator, ids))
    context_tokens, context_mask, num_cut = join_contexts(
      batch.head_tokens, batch.head_mask, tokens, mask
    )
    found = RagBatch(
      context_tokens=context_tokens,
      context_mask=context_mask,
      target_tokens=batch.target_tokens,
      target_mask=batch.target_mask,
      question_tokens=batch.question_tokens,
      question_mask=batch.question_mask,
      doc_tokens=doc_tokens,
      doc_mask=doc_mask,
      accepted_tokens=batch.accepted_tokens,
    )
    return found, ids, num_cut

  def refresh(
    self, arrays: device.DeviceArrays, state: TrainState
  ) -> device.DeviceArrays:
    """Returns `arrays`, with the rows due at this step embedded by `state`."""
    rows = device_refresh.due_rows(arrays, state.step, self.refresh_rows)
    tokens, mask = device_refresh.own_passages(arrays, rows)
    embeddings: Any = self.model.apply(
      {"params": jax.lax.stop_gradient(state.params)},
      *add_start(tokens, mask, self.bos_id),
      method="embed_passages",
    )
    return device_refresh.refresh_rows(arrays, rows, embeddings, state.step)

  def embed_all(
    self,
    arrays: device.DeviceArrays,
    params: PyTree,
    lengths: Int[np.ndarray, "P"],
    num_rows: int,
  ) -> device.DeviceArrays:
    """Returns `arrays` with every passage embedded by `params`, as of step 0.

    Each device embeds its own rows, in its own memory: no process ever holds
    the embeddings of others, or any in float32 on the host.

    Args:
      arrays: with the tokens of the passages; they are donated.
      params: of the training state, sharded as there.
      lengths: tokens of each passage.
      num_rows: passages per batch and device.

    Raises:
      ValueError: an embedding is NaN, infinite or huge.
    """
    start = 0 if self.bos_id is None else 1

    @functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
    def embed(
      arrays: device.DeviceArrays, params: PyTree, rows: jax.Array, width: int
    ) -> tuple[device.DeviceArrays, jax.Array]:
      tokens, mask = device_refresh.own_passages(arrays, rows)
      embeddings: Any = self.model.apply(
        {"params": params},
        *add_start(tokens[:, :width], mask[:, :width], self.bos_id),
        method="embed_passages",
      )
      bad = device_refresh.count_bad(arrays, rows, embeddings)
      now = jnp.zeros((), jnp.int32)
      return device_refresh.refresh_rows(arrays, rows, embeddings, now), bad

    longest, bad = device.placed_tokens(arrays)[0].shape[1], []
    for rows, length in device_refresh.all_rows(arrays, lengths, num_rows):
      width = padded_length(length + start, longest + start) - start
      arrays, some = embed(arrays, params, rows, width)
      bad.append(some)
    if num_bad := sum(int(some) for some in bad):
      raise ValueError(
        f"The embeddings of {num_bad} of {arrays.num_passages} passages hold"
        " NaN, infinity or huge numbers. Expected finite numbers. Check the"
        " passage encoder: its training may have diverged; go back to an"
        " earlier checkpoint."
      )
    return arrays


def open_in_step(experiment: Experiment) -> InStep | None:
  """Returns the search inside the step, or None if the config has none."""
  config = experiment.config
  if not config.index.refresh_rows:
    return None
  return InStep(
    model=experiment.model,
    n_docs=config.data.n_docs,
    refresh_rows=config.index.refresh_rows,
    bos_id=experiment.retriever_tokenizer.bos_id,
  )


def place_index(
  experiment: Experiment,
  state: TrainState,
  layout: TrainState,
  in_step: InStep,
) -> tuple[TrainState, TrainState]:
  """Returns the state with an index to search, and the sharding of each array.

  Args:
    experiment: of the run.
    state: with the index of a checkpoint, or without one; then every passage is
      embedded.
    layout: sharding of each array, without the index.
    in_step: embeds them.

  Raises:
    ValueError: an embedding is no number, or the recall of the index is below
      index.min_recall.
  """
  index, built = state.index, state.index is None
  if index is None:
    abstract = abstract_index(experiment, state.params)
    assert abstract is not None
    index = StepIndex(device_refresh.empty_arrays(abstract.arrays))
  index = dataclasses.replace(
    index, arrays=device_refresh.with_norms(index.arrays)
  )
  index = _with_tokens(experiment, index)
  if built:
    passages = experiment.context.retriever_passages
    arrays = in_step.embed_all(
      index.arrays,
      state.params,
      np.asarray(passages.lengths),
      experiment.config.index.embed_batch_size,
    )
    index = dataclasses.replace(index, arrays=arrays)
  shardings = jax.tree.map(lambda x: x.sharding, index)
  state = dataclasses.replace(state, index=index)
  found = searched(experiment, state, None)
  if built and found is not None:
    experiment.index_builder.check(found)
  return state, dataclasses.replace(layout, index=shardings)


def _with_tokens(experiment: Experiment, index: StepIndex) -> StepIndex:
  """Returns `index` with the passages as tokens of retriever and generator."""

  def place(passages: TokenizedPassages) -> device.DeviceArrays:
    return device.place_tokens(index.arrays, passages.tokens, passages.lengths)

  context = experiment.context
  index = dataclasses.replace(index, arrays=place(context.retriever_passages))
  if context.retriever_passages is experiment.tokenized:
    return index
  generator = place(experiment.tokenized)
  return dataclasses.replace(
    index, context_tokens=generator.tokens, context_lengths=generator.lengths
  )


def without_tokens(state: TrainState) -> TrainState:
  """Returns the state without tokens and norms, which can be made again."""
  if state.index is None:
    return state
  arrays = dataclasses.replace(
    state.index.arrays, tokens=None, lengths=None, norms=None
  )
  return dataclasses.replace(state, index=StepIndex(arrays))


def abstract_index(experiment: Experiment, params: PyTree) -> StepIndex | None:
  """Returns the index of a main-stage checkpoint, or None if it has none.

  As `jax.ShapeDtypeStruct`s, for `Checkpointer.restore`.
  """
  config = experiment.config.index
  if not config.refresh_rows:
    return None
  arrays = device.abstract_arrays(
    len(experiment.passages),
    experiment.embedder.embedding_dim(params),
    experiment.mesh,
    **device_index.settings_of(config),
  )
  return StepIndex(dataclasses.replace(arrays, norms=None))


def searched(
  experiment: Experiment, state: TrainState, index: Index | None
) -> Index | None:
  """Returns the index to search between two steps: the state's, or `index`."""
  if state.index is None:
    return index
  return device_index.RefreshedIndex(
    state.index.arrays,
    device_index.settings_of(experiment.config.index),
    passages_fingerprint=experiment.passages.fingerprint,
  )


def _split(
  tokens: tuple[Int[Array, "B K L"], Bool[Array, "B K L"]],
) -> tuple[Int[Array, "B K L"], Bool[Array, "B K L"]]:
  """Returns replicated tokens and their mask, sharded like a batch."""
  ids, mask = tokens
  axes = ("batch", "docs", "length")
  return constrain(ids, *axes), constrain(mask, *axes)


def _share_of_distinct(ids: Int[Array, "B K"]) -> jax.Array:
  """Returns the number of distinct documents over that of all, from 0 to 1."""
  ids = jnp.sort(ids.reshape(-1))
  return (1 + jnp.sum(ids[1:] != ids[:-1])) / ids.size
