"""Opens the parts of an experiment from its config, and checks that they fit.

In: a config, and the tokenizer of the run if there is one. Out: passages,
tokenizer, model and the objects that connect them, for training, evaluation and
serving.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
from typing import Any

from absl import logging
from etils import epath
import jax
from jaxtyping import Array, Key, PyTree
import numpy as np

from rag_jax.config import Config
from rag_jax.config_rules import validate
from rag_jax.corpus.passage_reader import load_passages
from rag_jax.corpus.passages import Passages
from rag_jax.corpus.store import PassageStore
from rag_jax.corpus.token_store import keep_tokens
from rag_jax.corpus.tokenized import PLAIN
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenized import Wording
from rag_jax.corpus.tokenizer import Tokenizer
from rag_jax.corpus.tokenizer import load_tokenizer
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.data.context import ContextBuilder
from rag_jax.data.questions import load_questions
from rag_jax.models.batch import MAX_ACCEPTED
from rag_jax.models.batch import RagBatch
from rag_jax.models.lora import with_adapters
from rag_jax.models.partitioning import check_devices
from rag_jax.models.partitioning import make_mesh
from rag_jax.models.rag import RagModel
from rag_jax.models.rag import build_model
from rag_jax.processes import first_alone
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.bm25 import Bm25Settings
from rag_jax.retrieval.retriever import Embedder
from rag_jax.retrieval.retriever import IndexBuilder
from rag_jax.weights.generation_settings import target_start
from rag_jax.weights.init_from import Initial

# Passages to train a tokenizer on. More would take hours and much memory, and
# find the same frequent pieces.
_TOKENIZER_PASSAGES = 1 << 20
_TOKENIZER_BLOCK = 1024  # passages in memory at once


@dataclasses.dataclass(frozen=True, slots=True)
class Experiment:
  """The opened parts of the experiment that a config describes."""

  config: Config
  passages: Passages
  tokenizer: Tokenizer  # the generator's
  tokenized: TokenizedPassages  # with the generator's
  retriever_tokenizer: Tokenizer  # often the same
  context: ContextBuilder
  model: RagModel
  mesh: jax.sharding.Mesh
  embedder: Embedder
  index_builder: IndexBuilder
  initial: Initial  # parameters of checkpoints; all others start at random
  bm25: Bm25Index | None = None  # of the passages' words, with index.hybrid

  @property
  def token_ids(self) -> str:
    """Identifies what the token ids mean to retriever and generator."""
    kinds = [self.tokenizer.fingerprint]
    if self.retriever_tokenizer is not self.tokenizer:
      kinds.append(self.retriever_tokenizer.fingerprint)
    return "+".join(kinds)

  @property
  def identity(self) -> dict[str, str]:
    """Fingerprints, by name, of inputs that must not change during a run."""
    identity = {
      "passages": self.passages.fingerprint,
      "tokenizer": self.token_ids,
    }
    if self.bm25 is not None:
      settings = self.bm25.settings
      # Runs that began with rule 1 do not name it.
      rule = f", rule {settings.word_rule}" if settings.word_rule > 1 else ""
      identity["BM25 settings"] = f"{settings!r}{rule}"
    return identity

  @property
  def closed_book(self) -> bool:
    """Whether the generator answers without documents."""
    return self.config.data.n_docs == 0

  def init(self, key: Key[Array, ""]) -> PyTree:
    """Returns fresh parameters, boxed with their logical axes."""
    return init_model(self.config, self.model, key)


def init_model(config: Config, model: RagModel, key: Key[Array, ""]) -> PyTree:
  """Returns fresh parameters of a model, boxed, with adapters if there are."""
  batch = jax.tree.map(jax.numpy.asarray, example_batch(config))
  fixed = () if config.encoder.train_passage_encoder else ("passage_encoder",)
  params = model.init(key, batch)["params"]
  return with_adapters(params, config.lora, key, left_out=fixed)


def example_batch(config: Config) -> RagBatch:
  """Returns a batch of one question, from which shapes are derived."""
  data = config.data
  k = max(data.n_docs, 1)

  def tokens(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(shape, np.int32), np.ones(shape, bool)

  context, context_mask = tokens(
    1, config.contexts_per_question, data.context_length
  )
  target, target_mask = tokens(1, data.target_length)
  # With the retriever's arrays even for a closed-book model: it has untrained
  # retriever parameters, so that its generator starts from the same values.
  question, question_mask = tokens(1, data.question_length)
  doc, doc_mask = tokens(1, k, data.passage_length)
  return RagBatch(
    context_tokens=context,
    context_mask=context_mask,
    target_tokens=target,
    target_mask=target_mask,
    question_tokens=question,
    question_mask=question_mask,
    doc_tokens=doc,
    doc_mask=doc_mask,
    bm25_scores=np.zeros((1, k), np.float32) if config.index.hybrid else None,
    accepted_tokens=(
      np.zeros((1, MAX_ACCEPTED, data.target_length), np.int32)
      if config.rewards_answers
      else None
    ),
  )


def open_experiment(
  config: Config,
  *,
  tokenizer_path: epath.PathLike = "",
  tokens_path: epath.PathLike = "",
  passages: Passages | None = None,
  devices: Sequence[Any] | None = None,
  initial: Initial | None = None,
  reads_tokens: bool = True,
) -> Experiment:
  """Opens what `config` names and builds what it describes.

  Args:
    config: of the run; from `load_initial`, if it starts from checkpoints.
    tokenizer_path: where the run keeps its tokenizer. If there is none yet, it
      is trained or loaded as the config says, and saved there. "" keeps it in
      memory.
    tokens_path: where the tokens of a passage store are kept, unless
      data.token_cache is set. Without either, and for passages that are not in
      a store, the tokens are computed now and kept in memory.
    passages: used instead of those that the config names.
    devices: of the mesh; by default all.
    initial: checkpoints to start from.
    reads_tokens: False tokenizes no passage. Possible if there is an index
      already, and data.context_style is "rag" or "prompt", which read the
      passages as strings.

  Raises:
    ValueError: settings, devices, passages and tokenizer do not fit together.
    FileNotFoundError: a file or directory that the config names is missing.
  """
  validate(config)
  devices = jax.devices() if devices is None else devices
  mesh_config = check_devices(config, len(devices))
  if passages is None:
    passages = load_passages(config.data.passages)
  check_n_docs(config.data.n_docs, passages)
  if config.data.num_passages not in (0, len(passages)):
    raise ValueError(
      f"{passages.origin} has {len(passages)} passages, but data.num_passages="
      f"{config.data.num_passages}. Correct data.passages, or set"
      " data.num_passages=0 to take any number."
    )
  initial = initial or Initial()
  opened = passages, tokenizer_path, initial
  # One process first: it may write the tokenizers that the others then open.
  tokenizer, retriever_tokenizer = first_alone(
    "open the tokenizers", lambda: _open_tokenizers(config, *opened)
  )
  _check_tables(config, tokenizer, retriever_tokenizer)
  length = config.data.passage_length
  kept = config.data.token_cache or tokens_path
  tokenize = functools.partial(_tokenize, passages, length=length, kept=kept)
  if not reads_tokens:
    tokenize = functools.partial(_without_rows, passages)
  tokenized = tokenize(tokenizer)
  retriever_tokenized, wording = tokenized, Wording.of(config.encoder)
  if (
    retriever_tokenizer is not tokenizer
    or wording.of_passages != PLAIN.of_passages
  ):
    retriever_tokenized = tokenize(retriever_tokenizer, wording=wording)
  if retriever_tokenized.num_cut:
    logging.info(
      "%d of %d passages are longer than data.passage_length=%d tokens and"
      " were cut.",
      retriever_tokenized.num_cut,
      len(passages),
      length,
    )
  context = ContextBuilder(
    tokenizer,
    tokenized,
    config.data,
    retriever_tokenized,
    target_start=target_start(config),
    wording=wording,
    prompt=config.prompt,
    dialogue=config.dialogue,
    joined="concatenate" in (config.loss, config.decoding.mode),
    ends=config.generator.kind != "causal",
  )
  model = build_model(
    config,
    vocab_size=tokenizer.vocab_size,
    retriever_vocab_size=retriever_tokenizer.vocab_size,
    decoder_start_id=tokenizer.eos_id,  # as in BART
  )
  embedder = Embedder(model, config.index.embed_batch_size)
  return Experiment(
    config=config,
    passages=passages,
    tokenizer=tokenizer,
    tokenized=tokenized,
    retriever_tokenizer=retriever_tokenizer,
    context=context,
    model=model,
    mesh=make_mesh(mesh_config, devices),
    embedder=embedder,
    index_builder=IndexBuilder(
      embedder,
      context.passages,
      len(passages),
      passages.fingerprint,
      config.index,
      config.data.n_docs,
    ),
    initial=initial,
    bm25=_open_bm25(config, passages) if config.index.hybrid else None,
  )


def _open_bm25(config: Config, passages: Passages) -> Bm25Index:
  """Returns the BM25 index that the config names, or builds it.

  It is not saved with the run, since it can be rebuilt from the passages.
  """
  if config.index.bm25_path:
    return Bm25Index.load(
      config.index.bm25_path, passages_fingerprint=passages.fingerprint
    )
  logging.info("Indexing the words of %d passages.", len(passages))
  return Bm25Index.build(
    passages,
    passages_fingerprint=passages.fingerprint,
    settings=Bm25Settings(word_rule=config.index.word_rule),
  )


def check_n_docs(n_docs: int, passages: Passages) -> None:
  """Raises `ValueError` if there are fewer passages than documents to read."""
  if n_docs > len(passages):
    raise ValueError(
      f"n_docs={n_docs}, but {passages.origin} has only {len(passages)}"
      " passages. Lower n_docs (data.n_docs in a config), or bring more"
      " passages."
    )


def _tokenize(
  passages: Passages,
  tokenizer: Tokenizer,
  length: int,
  kept: epath.PathLike,
  wording: Wording = PLAIN,
) -> TokenizedPassages:
  """Returns the tokens of `passages`: on disk if the passages are on disk."""
  if kept and isinstance(passages, PassageStore):
    return keep_tokens(kept, passages, tokenizer, length, wording)
  return TokenizedPassages(passages, tokenizer, length, wording)


def _without_rows(
  passages: Passages, tokenizer: Tokenizer, wording: Wording = PLAIN
) -> TokenizedPassages:
  """Returns passages of which only the texts are read, in any wording."""
  return TokenizedPassages.without_rows(passages, tokenizer)


def _texts(passages: Passages) -> Iterator[str]:
  """Yields the texts that a tokenizer is trained on."""
  step = -(-len(passages) // _TOKENIZER_PASSAGES)
  if step > 1:
    logging.info(
      "The tokenizer is trained on every %dth of %d passages.",
      *(step, len(passages)),
    )
  block = step * _TOKENIZER_BLOCK
  for start in range(0, len(passages), block):
    for passage in passages[start : start + block : step]:
      yield f"{passage.title} {passage.text}"


def _check_tables(
  config: Config, tokenizer: Tokenizer, retriever_tokenizer: Tokenizer
) -> None:
  """Raises `ValueError` if a tokenizer does not fit the embeddings or loss."""
  for name, table, ids in (
    ("encoder", config.encoder.vocab_size, retriever_tokenizer.vocab_size),
    ("generator", config.generator.vocab_size, tokenizer.vocab_size),
  ):
    if 0 < table < ids:
      raise ValueError(
        f"{name}.vocab_size={table} is below the {ids} ids of its tokenizer."
        " Use the tokenizer that the checkpoint was trained with"
        " (tokenizer.path=''), or a larger table."
      )
  if config.hf_loss and tokenizer.pad_id == tokenizer.eos_id:
    raise ValueError(
      "hf_loss=True recognises padding by its id, but the generator's tokenizer"
      f" pads with its end token ({tokenizer.eos_id}), which targets end with."
      " Expected a pad_token of its own in tokenizer_config.json. Set"
      " hf_loss=False."
    )


def _check_fresh(config: Config, path: epath.PathLike) -> None:
  """Raises `FileNotFoundError` if weights are loaded without a tokenizer.

  A tokenizer that is trained now would not fit them.
  """
  for part in ("encoder", "generator"):
    where = getattr(config, part).init_from
    if where:
      raise FileNotFoundError(
        f"There is no tokenizer in {path or 'tokenizer.path'}, but"
        f" {part}.init_from={where!r} gave weights that were trained with one."
        " Expected that tokenizer, as training saved it in the workdir; the ids"
        " of a new tokenizer would mean other text. Put its files back."
      )


def _warn_of_others(path: str, found: Sequence[str]) -> None:
  """Warns if tokenizer.path is another tokenizer than a checkpoint's."""
  given = load_tokenizer(path).fingerprint
  for name in found:
    try:
      same = load_tokenizer(name).fingerprint == given
    except (FileNotFoundError, ValueError):
      continue  # this may be why tokenizer.path is set
    if not same:
      logging.warning(
        "tokenizer.path=%s is not the tokenizer of the checkpoint %s: its ids"
        " mean other rows of the embeddings, unless it was derived from it.",
        *(path, name),
      )


_RETRIEVER = "retriever"  # folder of the second tokenizer, if there are two


def _open_tokenizers(
  config: Config, passages: Passages, path: epath.PathLike, initial: Initial
) -> tuple[Tokenizer, Tokenizer]:
  """Returns the generator's tokenizer and the retriever's, often the same."""
  saved = epath.Path(path) if path else None
  if saved is not None and (saved / "tokenizer.json").exists():
    tokenizer = load_tokenizer(saved, ours=True)
    if (saved / _RETRIEVER).exists():
      return tokenizer, load_tokenizer(saved / _RETRIEVER, ours=True)
    return tokenizer, tokenizer
  found = [initial.tokenizer, initial.retriever_tokenizer]
  if config.tokenizer.path:
    _warn_of_others(config.tokenizer.path, [name for name in found if name])
    found = [config.tokenizer.path]
  kinds = [load_tokenizer(name) for name in found if name]
  if not kinds:
    _check_fresh(config, path)
    train = load_questions(config.data.questions, "train")
    for uncased in (False, True)[: 1 + (config.tokenizer.retriever != "same")]:
      texts = itertools.chain(_texts(passages), (q.question for q in train))
      kinds.append(
        train_tokenizer(texts, config.tokenizer.vocab_size, uncased=uncased)
      )
  if kinds[0].fingerprint == kinds[-1].fingerprint:
    kinds = kinds[:1]
  if saved is not None:
    if len(kinds) > 1:
      kinds[1].save(saved / _RETRIEVER)
    kinds[0].save(saved)
  return kinds[0], kinds[-1]
