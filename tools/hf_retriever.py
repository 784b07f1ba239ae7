"""transformers' `RagRetriever` over arrays in memory, and tokenizers for it.

In: passages, their embeddings and texts. Out: a retriever that needs neither
`datasets` nor an index on a disk, and folders of tokenizers made of the texts.
"""

import collections
from collections.abc import Sequence
import json
import os
import pathlib
import re
from typing import Any

from jaxtyping import Float, Int
import numpy as np
import tokenizers
import transformers

from rag_jax.corpus.passages import Passage

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # BART's order


def save_bert(folder: pathlib.Path, texts: Sequence[str], size: int) -> None:
  """Writes a BERT tokenizer: characters, and the most frequent words."""
  lower = [text.lower() for text in texts]
  words = collections.Counter(re.findall(r"[a-z]+", " ".join(lower)))
  characters = sorted({c for c in "".join(lower) if not c.isspace()})
  pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
  pieces += [f"##{c}" for c in characters if c.isalnum()]
  pieces += [word for word, _ in words.most_common() if len(word) > 1]
  folder.mkdir()
  (folder / "vocab.txt").write_text("\n".join(pieces[:size]) + "\n")
  settings = {"do_lower_case": True, "model_max_length": 512}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_bart(folder: pathlib.Path, texts: Sequence[str], size: int) -> None:
  """Writes a BART tokenizer, trained on `texts`."""
  model = tokenizers.ByteLevelBPETokenizer()
  model.train_from_iterator(
    texts, vocab_size=size, special_tokens=[*_SPECIAL], show_progress=False
  )
  folder.mkdir()
  model.save_model(os.fspath(folder))
  (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')


class MemoryIndex:
  """What `RagRetriever` asks of an index: exact search of arrays in memory."""

  def __init__(
    self, passages: Sequence[Passage], embeddings: Float[np.ndarray, "P R"]
  ):
    self._passages, self._embeddings = passages, embeddings

  def init_index(self) -> None:
    """Does nothing: all is in memory."""

  def get_top_docs(
    self, question_hidden_states: Float[np.ndarray, "B R"], n_docs: int
  ) -> tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B K R"]]:
    """Returns numbers and embeddings of the best passages."""
    scores = question_hidden_states @ self._embeddings.T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :n_docs]
    return ids, self._embeddings[ids]

  def get_doc_dicts(
    self, doc_ids: Int[np.ndarray, "B K"]
  ) -> list[dict[str, list[str]]]:
    """Returns the texts of passages, for each question."""
    found = [[self._passages[i] for i in row] for row in doc_ids.tolist()]
    return [
      {"title": [p.title for p in docs], "text": [p.text for p in docs]}
      for docs in found
    ]


class Retriever(transformers.RagRetriever):
  """`RagRetriever`; its constructor wants `datasets`, to open other indexes."""

  def __init__(
    self,
    config: transformers.RagConfig,
    question_encoder_tokenizer: Any,
    generator_tokenizer: Any,
    index: MemoryIndex,
  ):
    self.config = config
    self.question_encoder_tokenizer = question_encoder_tokenizer
    self.generator_tokenizer = generator_tokenizer
    self.index = index
    self.n_docs = config.n_docs
    self.batch_size = config.retrieval_batch_size
    self.ctx_encoder_tokenizer = None
    self.return_tokenized_docs = False
