"""Rules between the settings of retriever, reranker and generator.

In: a `Config`. Out: its problems, for config_rules.py.
"""

from collections.abc import Iterator
import dataclasses

from rag_jax.config import Config
from rag_jax.config_models import CausalConfig
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.config_models import check_causal


def contrastive_problems(c: Config) -> Iterator[str]:
  """Yields the problems of the contrastive stage."""
  s = c.contrastive
  if not s.num_steps:
    return
  if not c.data.n_docs:
    yield (
      f"contrastive.num_steps={s.num_steps} trains a retriever, but data.n_docs"
      "=0 is a closed-book model without one. Set one of them otherwise."
    )
  if s.batch_size == 1 and not s.negatives:
    yield (
      "contrastive.batch_size=1 with contrastive.negatives=0 compares a passage"
      " with nothing. Expected 2 questions or more, or hard negatives. Raise"
      " one of them."
    )
  if s.chunk and s.batch_size % s.chunk:
    yield (
      f"contrastive.batch_size={s.batch_size} must be a multiple of"
      f" contrastive.chunk={s.chunk}, so that all parts are equal. Change one"
      " of them, or set contrastive.chunk=0."
    )
  if s.mask_answers and c.eval.answers == "regex":
    yield (
      "contrastive.mask_answers=True looks for answers as text, but"
      " eval.answers='regex' makes them regular expressions. Set"
      " contrastive.mask_answers=False."
    )


def encoder_problems(c: Config) -> Iterator[str]:
  """Yields the problems of the retriever."""
  e = c.encoder
  if e.num_heads and not e.head_dim and e.embed_dim % e.num_heads:
    yield (
      f"encoder.embed_dim={e.embed_dim} must be a multiple of"
      f" encoder.num_heads={e.num_heads}, or encoder.head_dim be given."
    )
  longest = max(c.data.question_length, c.data.passage_length)
  learned = e.num_layers and e.positions == "learned"
  if learned and 0 < e.max_positions < longest:
    yield (
      f"encoder.max_positions={e.max_positions} is below the longest input"
      f" (data.question_length={c.data.question_length},"
      f" data.passage_length={c.data.passage_length}). Lower the lengths."
    )
  yield from _relative_problems("encoder", e)
  whole = e.projection_dim or e.embed_dim
  if e.truncate_dim > whole:
    yield (
      f"encoder.truncate_dim={e.truncate_dim} is above the {whole} numbers of"
      " an embedding; set it to at most as many, or to 0 for all."
    )
  if e.pooling == "pooler" and not e.pooler:
    yield "encoder.pooling='pooler' needs encoder.pooler=True."
  if e.passage_init_from and (e.tied or not e.init_from):
    yield (
      f"encoder.passage_init_from={e.passage_init_from!r} is for a tower of its"
      f" own, but encoder.tied={e.tied}, encoder.init_from={e.init_from!r}. Set"
      " encoder.tied=False and encoder.init_from to the question encoder."
    )


def _relative_problems(
  section: str, sizes: EncoderConfig | GeneratorConfig
) -> Iterator[str]:
  """Yields the problems of T5's relative positions."""
  buckets, farthest = sizes.relative_buckets, sizes.relative_max_distance
  if 0 < buckets < 8 or buckets % 2:
    yield (
      f"{section}.relative_buckets={buckets} must be 0 (none) or an even number"
      " from 8 on: half of them lie behind, half ahead."
    )
  if buckets and farthest <= buckets // 2:
    yield (
      f"{section}.relative_max_distance={farthest} must be above half of"
      f" {section}.relative_buckets={buckets}."
    )


def _causal_problems(c: Config) -> Iterator[str]:
  """Yields the problems of a decoder-only generator."""
  sizes, data = c.causal, c.data
  try:
    # A vocabulary of 0 is that of the tokenizer.
    check_causal(dataclasses.replace(sizes, vocab_size=sizes.vocab_size or 1))
  except ValueError as error:
    yield f"causal: {error}"
  longest = data.context_length + data.target_length - 1
  if longest > sizes.max_positions:
    yield (
      f"causal.max_positions={sizes.max_positions} is below the {longest}"
      " tokens of a prompt and its answer (data.context_length="
      f"{data.context_length},"
      f" data.target_length={data.target_length}). Lower the lengths."
    )
  for name, value in (("loss", c.loss), ("decoding.mode", c.decoding.mode)):
    if value == "fid":
      yield (
        f"{name}='fid' joins the states of an encoder, but generator.kind="
        "'causal' is a decoder alone. Use 'concatenate', which puts all"
        " documents into one prompt."
      )
  for name, value, bad, why in (
    ("hf_loss", c.hf_loss, True, "is of transformers' RAG, which has none"),
    ("train.pack_contexts", c.train.pack_contexts, True, "is of encoders"),
    ("generator.pointer", c.generator.pointer, True, "is of encoder-decoders"),
    ("generator.init", c.generator.init, "copy", "is of encoder-decoders"),
  ):
    if value == bad:
      yield (
        f"{name}={bad!r} {why}, but generator.kind='causal' is a decoder alone."
        " Change one of them."
      )


def rerank_problems(c: Config) -> Iterator[str]:
  """Yields the problems of the second stage of retrieval."""
  if not c.rerank.init_from:
    return
  if not c.data.n_docs:
    yield (
      f"rerank.init_from={c.rerank.init_from!r} chooses documents, but"
      " data.n_docs=0 is closed book and reads none. Set rerank.init_from='',"
      " or data.n_docs to 1 or more."
    )
  if c.rerank.candidates < c.data.n_docs:
    yield (
      f"rerank.candidates={c.rerank.candidates} passages are fewer than the"
      f" data.n_docs={c.data.n_docs} that are read. Raise it, for instance to"
      " 100."
    )


def generator_problems(c: Config) -> Iterator[str]:
  """Yields the problems of the generator."""
  g = c.generator
  if g.kind == "causal":
    yield from _causal_problems(c)
    return
  if c.causal != CausalConfig():
    yield (
      "The section causal describes a decoder-only generator, but"
      " generator.kind='encoder_decoder' does not use it. Set"
      " generator.kind='causal', or leave the section as it is."
    )
  for name in ("num_heads", "num_decoder_heads"):
    heads = getattr(g, name)
    if heads and not g.head_dim and g.embed_dim % heads:
      yield (
        f"generator.embed_dim={g.embed_dim} must be a multiple of"
        f" generator.{name}={heads}, or generator.head_dim be given."
      )
  longest = max(c.data.context_length, c.data.target_length)
  if g.positions == "learned" and longest > g.max_positions:
    yield (
      f"generator.max_positions={g.max_positions} is below the longest input"
      f" (data.context_length={c.data.context_length},"
      f" data.target_length={c.data.target_length}). Lower the lengths."
    )
  yield from _relative_problems("generator", g)
  if g.init == "copy" and (
    g.norm != "pre" or g.embedding_norm or not g.relative_buckets
  ):
    yield (
      "generator.init='copy' copies only with generator.norm='pre',"
      " generator.embedding_norm=False and generator.relative_buckets=32."
    )
  if g.init == "copy" and g.head_dim * g.num_heads not in (0, g.embed_dim):
    yield (
      f"generator.init='copy' needs heads as wide as the model, but"
      f" generator.head_dim={g.head_dim} times generator.num_heads="
      f"{g.num_heads} is not generator.embed_dim={g.embed_dim}."
    )
  if g.scale_output and not g.tied_output:
    yield "generator.scale_output=True is for generator.tied_output=True."
