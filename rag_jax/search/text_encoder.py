"""The encoder and the tokenizer of a checkpoint, which embed texts.

In: the checkpoint of an encoder, and passages or questions. Out: their tokens
as the encoder reads them, and their embeddings.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import types
from typing import Any, Literal

from etils import epath
import jax
from jaxtyping import Bool, Float, Int, PyTree
import numpy as np

from rag_jax.config import MeshConfig
from rag_jax.config_models import EncoderConfig
from rag_jax.config_rules import replace_fields
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenized import Wording
from rag_jax.corpus.tokenizer import Tokenizer
from rag_jax.corpus.tokenizer import load_tokenizer
from rag_jax.models.encoders import OneTower
from rag_jax.models.partitioning import make_mesh
from rag_jax.models.rag import build_encoder
from rag_jax.models.rag import compute_dtype
from rag_jax.retrieval import retriever
from rag_jax.retrieval.retriever import Embedder
from rag_jax.retrieval.retriever import padded_length
from rag_jax.weights.load import load_encoder
from rag_jax.weights.model_files import load_model
from rag_jax.weights.model_files import save_model

_TOKENIZER = "tokenizer"  # folder in a saved encoder
_LONGEST = 256  # tokens, if a checkpoint does not name its longest input
# Fields that a user may choose for a checkpoint.
CHOSEN = ("question_prompt", "passage_prompt", "title_sep", "truncate_dim")
_BATCH = 64  # most questions that are embedded at a time
_REMEDY = "Build the directory again: rag-jax build-index."


@dataclasses.dataclass(frozen=True, slots=True)
class TextEncoder:
  """An encoder of questions or passages, with its tokenizer.

  Attributes:
    kind: of the checkpoint, as in `LoadedEncoder`.
    fields: of `EncoderConfig`.
    params: {"question_encoder": ...}, also for an encoder of passages.
    max_tokens: of an input; longer inputs are cut.
  """

  kind: str
  fields: dict[str, Any]
  params: PyTree
  tokenizer: Tokenizer
  max_tokens: int
  model: OneTower

  @property
  def fingerprint(self) -> str:
    """Identifies the weights."""
    return retriever.fingerprint(self.params)

  @property
  def wording(self) -> Wording:
    """How it reads questions and passages."""
    return Wording.of(self.model.question_encoder.config)

  def passage_embedder(self, batch_size: int) -> Embedder:
    """Returns an embedder of passages on all local devices.

    `batch_size` is rounded up to a multiple of the number of devices.
    """
    devices = jax.local_devices()
    batch_size = -(-batch_size // len(devices)) * len(devices)
    mesh = make_mesh(MeshConfig(data=len(devices)), devices)
    return Embedder(self.model, batch_size, mesh)

  def passage_rows(
    self, tokenized: TokenizedPassages, rows: Int[np.ndarray, "N"]
  ) -> tuple[Int[np.ndarray, "N L"], Bool[np.ndarray, "N L"]]:
    """Returns the tokens of passages as the encoder reads them, and the mask.

    <s> title </s> text </s>, as in DPR, or <s> text </s> without a title. Its
    `wording`, which may change that, is in the tokens already. A tokenizer
    without a start token leaves out <s>.
    """
    first = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
    body = np.asarray(tokenized.tokens[rows], np.int32)
    start = np.broadcast_to(np.array(first, np.int32), (len(body), len(first)))
    tokens = np.concatenate([start, body], axis=1)
    lengths = np.asarray(tokenized.lengths[rows])[:, None] + len(first)
    return tokens, np.arange(tokens.shape[1]) < lengths

  def _question_rows(
    self, questions: Sequence[str]
  ) -> tuple[Int[np.ndarray, "B Q"], Bool[np.ndarray, "B Q"]]:
    """Returns tokens and mask: <s> question </s>, cut before </s>.

    Q is the length of the longest question, rounded up.
    """
    tokenizer = self.tokenizer
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    texts = self.wording.questions(questions)
    rows = [[*start, *ids] for ids in tokenizer.encode(texts)]
    length = padded_length(max(map(len, rows)) + 1, self.max_tokens)
    tokens = np.full((len(rows), length), tokenizer.pad_id, np.int32)
    lengths = np.zeros(len(rows), np.int32)
    for i, row in enumerate(rows):
      row = [*row[: length - 1], tokenizer.eos_id]
      tokens[i, : len(row)], lengths[i] = row, len(row)
    return tokens, np.arange(length) < lengths[:, None]

  def embed_questions(
    self, embedder: Embedder, questions: Sequence[str]
  ) -> Float[np.ndarray, "B R"]:
    """Returns the embeddings of any number of questions."""
    blocks = [np.zeros((0, embedder.embedding_dim(self.params)), np.float32)]
    for start in range(0, len(questions), _BATCH):
      tokens, mask = self._question_rows(questions[start : start + _BATCH])
      # Repeating the last row to a power of 2 compiles for few shapes.
      size = 1 << (len(tokens) - 1).bit_length()
      rows = np.minimum(np.arange(size), len(tokens) - 1)
      block = embedder.questions(self.params, tokens[rows], mask[rows])
      blocks.append(block[: len(tokens)])
    return np.concatenate(blocks)


def chosen_fields(plan: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what the settings of a build say of `CHOSEN`, if anything."""
  return {k: plan[k] for k in CHOSEN if plan.get(k) is not None}


def open_checkpoint(
  where: epath.PathLike,
  role: Literal["question", "passage"],
  chosen: Mapping[str, Any] = types.MappingProxyType({}),
) -> TextEncoder:
  """Returns the encoder of a checkpoint: a directory or "hf:ORG/NAME".

  Args:
    where: the checkpoint.
    role: of the encoder.
    chosen: fields of `CHOSEN`, instead of what the checkpoint says.

  Raises:
    FileNotFoundError: there is no checkpoint, or no tokenizer in it.
    ValueError: it is damaged, has an unsupported architecture, or is DPR's
      encoder for the other role.
  """
  loaded = load_encoder(str(where), role)
  other = {"question": "dpr_context", "passage": "dpr_question"}[role]
  if loaded.kind == other:
    raise ValueError(
      f"{where} is a {loaded.kind} encoder, but it is to embed {role}s; DPR has"
      " an encoder for questions and another for passages. Give the other one."
    )
  if not loaded.tokenizer:
    raise FileNotFoundError(
      f"{where} has no tokenizer beside its weights; expected one, such as"
      " tokenizer.json. Copy its files there."
    )
  return _build(
    loaded.kind,
    loaded.fields | dict(chosen),
    {"question_encoder": loaded.params},
    loaded.tokenizer,
    loaded.max_tokens,
  )


def save_encoder(
  encoder: TextEncoder, path: epath.PathLike, where: epath.PathLike
) -> None:
  """Writes an encoder to directory `path`, its manifest last.

  Args:
    encoder: to save.
    path: the directory to write.
    where: the checkpoint that it was opened from, for the manifest.
  """
  encoder.tokenizer.save(epath.Path(path) / _TOKENIZER)
  content = {
    "kind": encoder.kind,
    "encoder": encoder.fields,
    "max_tokens": encoder.max_tokens,
    "from": str(where),
  }
  save_model(path, encoder.params, content)


def load_saved_encoder(path: epath.PathLike) -> TextEncoder:
  """Returns the encoder that `save_encoder` wrote.

  Raises:
    FileNotFoundError: nothing was saved there.
    ValueError: a file is missing, cut off or changed.
  """
  params, content = load_model(path, _REMEDY)
  content.check(kind=str, encoder=dict, max_tokens=int)
  return _build(
    content["kind"],
    content["encoder"],
    params,
    str(epath.Path(path) / _TOKENIZER),
    content["max_tokens"],
  )


def _build(
  kind: str,
  fields: dict[str, Any],
  params: PyTree,
  tokenizer_path: str,
  max_tokens: int,
) -> TextEncoder:
  config = replace_fields(EncoderConfig(), fields, "encoder")
  whole = config.projection_dim or config.embed_dim
  if config.truncate_dim > whole:
    raise ValueError(
      f"truncate_dim={config.truncate_dim} numbers of an embedding are to be"
      f" kept, but the encoder makes {whole}; expected at most as many. Lower"
      " it, or leave it out to keep all."
    )
  if not max_tokens:
    max_tokens = min(config.max_positions or _LONGEST, _LONGEST)
  tokenizer = load_tokenizer(tokenizer_path)
  tower = build_encoder(
    config,
    vocab_size=tokenizer.vocab_size,
    max_positions=max_tokens,
    dtype=compute_dtype("auto"),
  )
  params = jax.tree.map(jax.numpy.asarray, params)
  return TextEncoder(
    kind, fields, params, tokenizer, max_tokens, OneTower(tower)
  )
