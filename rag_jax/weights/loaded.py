"""The content of a checkpoint that was read: fields, parameters, a report."""

import dataclasses
from typing import Any, Literal

import flax.traverse_util
from jaxtyping import PyTree
import numpy as np

from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.report import Report


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedEncoder:
  """A retriever encoder."""

  # What wrote it: "dpr_question", "dpr_context", "sentence_transformers", or a
  # model_type such as "bert".
  kind: str
  fields: dict[str, Any]  # for dataclasses.replace(config.encoder, **fields)
  params: PyTree  # of RetrieverEncoder, float32
  tokenizer: str  # its directory; "" if there is none
  special_ids: SpecialIds
  max_tokens: int  # of an input, as it was trained; 0: not said
  report: Report
  score_scale: float = 1.0  # multiplies the embeddings of questions


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedGenerator:
  """A generator."""

  fields: dict[str, Any]  # for dataclasses.replace(config.generator, **fields)
  params: PyTree  # of Generator, float32
  tokenizer: str  # its directory; "" if there is none
  special_ids: SpecialIds
  generation: dict[str, Any]  # of generation_config.json
  report: Report
  rag: "RagSettings | None" = None  # of the RAG that it is a part of
  context_style: str = "rag"  # what it then was trained to read


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedCausal:
  """A decoder-only generator."""

  fields: dict[str, Any]  # for CausalConfig(**fields)
  params: PyTree  # of CausalGenerator, float32
  tokenizer: str  # its directory; "" if there is none
  special_ids: SpecialIds
  generation: dict[str, Any]  # of generation_config.json
  report: Report


@dataclasses.dataclass(frozen=True, slots=True)
class RagSettings:
  """The settings in a RAG's config.json, with the defaults of transformers."""

  kind: Literal["token", "sequence"] = "token"  # how it was trained
  n_docs: int = 5
  max_combined_length: int = 300  # tokens of a context
  title_sep: str = " / "
  doc_sep: str = " // "
  prefix: str = ""  # of a context
  do_deduplication: bool = True
  exclude_bos_score: bool = False
  reduce_loss: bool = False
  label_smoothing: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedRag:
  """Question encoder, generator and, where it was saved, passage encoder."""

  question_encoder: LoadedEncoder
  passage_encoder: LoadedEncoder | None
  generator: LoadedGenerator
  settings: RagSettings

  @property
  def tied(self) -> bool:
    """Whether the two encoders are the same."""
    passage = self.passage_encoder
    if passage is None or passage.fields != self.question_encoder.fields:
      return False
    one, other = (
      flax.traverse_util.flatten_dict(encoder.params, sep="/")
      for encoder in (self.question_encoder, passage)
    )
    return all(
      np.array_equal(np.asarray(one[k]), np.asarray(other[k])) for k in one
    )

  @property
  def params(self) -> PyTree:
    """The parameters of RagModel."""
    params = {"question_encoder": self.question_encoder.params}
    if self.passage_encoder is not None and not self.tied:
      params["passage_encoder"] = self.passage_encoder.params
    return params | {"generator": self.generator.params}

  @property
  def report(self) -> Report:
    """The report of all parts."""
    report = self.question_encoder.report.below("question_encoder")
    if self.passage_encoder is not None:
      report += self.passage_encoder.report.below("passage_encoder")
    return report + self.generator.report.below("generator")
