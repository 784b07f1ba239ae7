"""RAG-Sequence's candidates, scored under every document in one pass.

In: candidate sequences from the beams of all documents. Out: log-probabilities
of their tokens under each document. Candidates with a common prefix share its
computation: the decoder reads each prefix once, as a node of a tree that
attends to its ancestors.
"""

import typing

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from rag_jax.decoding.memory import Memory
from rag_jax.decoding.scorers import log_norm
from rag_jax.models.pointer import Copy
from rag_jax.models.pointer import mix_targets
from rag_jax.models.rag import AnyGenerator
from rag_jax.models.vocabulary import capped

_VOCAB_CHUNK = 8192  # tokens whose logits are in memory at one time


# Unchecked, because JAX makes it of shapes and of numpy's arrays too.
@typing.no_type_check
@flax.struct.dataclass
class CandidateTree:
  """The different prefixes of a question's candidates, M nodes.

  Node 0 is the start token. Padding nodes attend to node 0 alone.
  """

  tokens: Int[Array, "B M"]  # the last token of the prefix
  depths: Int[Array, "B M"]  # its position
  seen: Bool[Array, "B M M"]  # ancestors and itself
  parents: Int[Array, "B C T"]  # node of candidate c's prefix before token t


def bucket(size: int, most: int) -> int:
  """Returns `size` rounded up to one of a few sizes, `most` at most.

  The sizes are 16, 24, 32, 48, 64, 96 and so on. Few of them, because a program
  is compiled per size.
  """
  power = 16
  while power < size:
    if power * 3 // 2 >= size:
      return min(power * 3 // 2, most)
    power *= 2
  return min(power, most)


def build_tree(
  tokens: Int[np.ndarray, "B C T"],
  lengths: Int[np.ndarray, "B C"],
  start_id: int,
) -> CandidateTree:
  """Returns the tree of the first `lengths` tokens of each candidate."""
  b, c, t = tokens.shape
  parents = np.zeros((b, c, t), np.int32)
  trees = []
  for row in range(b):
    children: dict[tuple[int, int], int] = {}
    nodes = [(start_id, 0, 0)]  # token, depth, parent
    for i in range(c):
      node = 0
      length = int(lengths[row, i])
      for depth, token in enumerate(tokens[row, i, :length].tolist()):
        parents[row, i, depth] = node
        if depth + 1 == length:
          break  # nothing follows the last token
        child = children.get((node, token))
        if child is None:
          child = children[node, token] = len(nodes)
          nodes.append((token, depth + 1, node))
        node = child
    trees.append(nodes)
  size = bucket(max(len(nodes) for nodes in trees), 1 + c * (t - 1))
  filled = np.array(
    [nodes + [(start_id, 0, 0)] * (size - len(nodes)) for nodes in trees],
    np.int32,
  )  # B M 3
  seen = np.zeros((b, size, size), bool)
  for node in range(size):  # parents come before their children
    seen[:, node] = seen[np.arange(b), filled[:, node, 2]]
    seen[:, node, node] = True
  return CandidateTree(
    *map(jnp.asarray, (filled[..., 0], filled[..., 1], seen, parents))
  )


def score_tree(
  generator: AnyGenerator,
  tree: CandidateTree,
  targets: Int[Array, "B C T"],
  memory: Memory,
) -> tuple[Float[Array, "B C T K"], Float[Array, "B C T K"]]:
  """Returns log p(y_t | x, z, y_<t) and the sum of it over the vocabulary.

  A method for `generator.apply`. Values after the end of a candidate are
  meaningless. Hugging Face's label smoothing needs the sum over the vocabulary;
  it is wrong if logits have a soft cap, which no model of RAG there has.
  """
  states, copy = generator.tree_states(
    tree.tokens, tree.depths, tree.seen, *memory.arrays, **memory.also
  )
  states = states.reshape(*memory.tokens.shape[:2], *states.shape[1:])
  states = generator.output_states(states)  # B K M D
  table, bias = generator.output_table(), generator.output_bias()
  v = len(table)
  bias = jnp.zeros(v) if bias is None else bias.astype(jnp.float32)
  cap = generator.logits_soft_cap
  norm = _chunked_norm(states, table, bias, cap)  # B K M

  b, c, t = targets.shape
  flat = tree.parents.reshape(b, 1, c * t)
  known = jnp.take_along_axis(states, flat[..., None], axis=2)
  known = known.reshape(b, -1, c, t, states.shape[-1])
  norm = jnp.take_along_axis(norm, flat, axis=2).reshape(b, -1, c, t)
  rows = table[targets].astype(states.dtype)
  chosen = jnp.einsum(
    "BKCTD,BCTD->BCTK", known, rows, preferred_element_type=jnp.float32
  )
  norm = jnp.moveaxis(norm, 1, -1)  # B C T K
  log_probs = capped(chosen + bias[targets][..., None], cap) - norm
  if copy is not None:
    log_probs = _with_copies(copy, log_probs, targets, tree.parents)
  total = jnp.einsum(
    "BKCTD,D->BCTK",
    known,
    jnp.sum(table.astype(states.dtype), axis=0, dtype=jnp.float32),
    preferred_element_type=jnp.float32,
  )
  return log_probs, total + jnp.sum(bias) - v * norm


def _with_copies(
  copy: Copy,
  log_probs: Float[Array, "B C T K"],
  targets: Int[Array, "B C T"],
  parents: Int[Array, "B C T"],
) -> Float[Array, "B C T K"]:
  """Returns the log-probabilities of targets that may be copied too."""
  b, c, t, k = log_probs.shape
  nodes = jnp.repeat(parents.reshape(b, c * t), k, axis=0)  # B*K C*T
  copy = Copy(
    tokens=copy.tokens,
    log_places=jnp.take_along_axis(copy.log_places, nodes[..., None], axis=1),
    gate_logits=jnp.take_along_axis(copy.gate_logits, nodes, axis=1),
  )
  mixed = mix_targets(
    copy,
    jnp.moveaxis(log_probs, -1, 1).reshape(b * k, c * t),
    jnp.repeat(targets.reshape(b, c * t), k, axis=0),
  )
  return jnp.moveaxis(mixed.reshape(b, k, c, t), 1, -1)


def _chunked_norm(
  states: Float[Array, "B K M D"],
  table: Float[Array, "V D"],
  bias: Float[Array, "V"],
  soft_cap: float,
) -> Float[Array, "B K M"]:
  """Returns the logsumexp over the vocabulary, computed chunk by chunk."""
  norms = []
  for start in range(0, len(table), _VOCAB_CHUNK):
    part = table[start : start + _VOCAB_CHUNK].astype(states.dtype)
    logits = jnp.einsum(
      "BKMD,VD->BKMV", states, part, preferred_element_type=jnp.float32
    )
    logits += bias[start : start + _VOCAB_CHUNK]
    norms.append(log_norm(capped(logits, soft_cap)))
    # One after the other: together they would need the memory of all.
    states, norms[-1] = jax.lax.optimization_barrier((states, norms[-1]))
  return jax.nn.logsumexp(jnp.stack(norms), axis=0)
