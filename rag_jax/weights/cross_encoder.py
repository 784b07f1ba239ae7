"""A cross-encoder of transformers or sentence-transformers, read.

In: a directory of a BERT, RoBERTa, XLM-RoBERTa, DistilBERT or MPNet
(...ForSequenceClassification) with one label. Out: the fields and parameters of
`models.cross_encoder.CrossEncoder`, and a report.
"""

import dataclasses
import os

from jaxtyping import PyTree

from rag_jax.config_models import EncoderConfig
from rag_jax.weights.checkpoint_models import check_layers
from rag_jax.weights.config_fields import field_notes
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.config_values import shorten
from rag_jax.weights.directory import open_directory
from rag_jax.weights.encoder_configs import read_encoder_config
from rag_jax.weights.encoder_tensors import dense
from rag_jax.weights.encoder_tensors import encoder_names
from rag_jax.weights.encoder_tensors import plain_encoder
from rag_jax.weights.generation_settings import GENERATION_NAMES
from rag_jax.weights.mapping import Architecture
from rag_jax.weights.mapping import Redundant
from rag_jax.weights.mapping import View
from rag_jax.weights.mapping import check
from rag_jax.weights.mapping import problems
from rag_jax.weights.mapping import take
from rag_jax.weights.report import Report
from rag_jax.weights.tensors import TensorFiles
from rag_jax.weights.tokenizer_files import check_tokenizer
from rag_jax.weights.tokenizer_files import find_tokenizer


@dataclasses.dataclass(frozen=True, slots=True)
class _Head:
  """The head of a class: out(activation(dense(state)))."""

  architecture: str
  dense: str = "classifier.dense"
  out: str = "classifier.out_proj"
  activation: str = "tanh"


_HEADS = {
  "bert": _Head("BertForSequenceClassification", "pooler.dense", "classifier"),
  "roberta": _Head("RobertaForSequenceClassification"),
  "xlm-roberta": _Head("XLMRobertaForSequenceClassification"),
  "mpnet": _Head("MPNetForSequenceClassification"),
  "distilbert": _Head(
    *("DistilBertForSequenceClassification", "pre_classifier", "classifier"),
    activation="relu",
  ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedCrossEncoder:
  """A cross-encoder."""

  encoder: EncoderConfig  # its pooling is "cls"
  activation: str  # of the head
  params: PyTree  # of CrossEncoder, float32
  tokenizer: str  # its directory
  report: Report


def load_cross_encoder(where: str | os.PathLike[str]) -> LoadedCrossEncoder:
  """Returns the cross-encoder of a directory, or of "hf:ORG/NAME".

  Raises:
    FileNotFoundError: there is no checkpoint, or no tokenizer in it.
    ValueError: it is damaged, of an unsupported architecture, has no head or
      one of several labels.
  """
  directory = open_directory(where)
  values = ConfigValues(
    directory.json("config.json"), f"{directory.origin}/config.json"
  )
  family = values.text("model_type", "")
  if family not in _HEADS:
    raise ValueError(
      f"{values.origin} describes model_type={shorten(family)}; expected a"
      f" cross-encoder, one of {', '.join(_HEADS)}"
      " (...ForSequenceClassification) with one label. Give another checkpoint,"
      " for instance hf:cross-encoder/ms-marco-MiniLM-L6-v2."
    )
  files = TensorFiles(directory)
  view = View(files, encoder_names(files.names, family))
  head = _HEADS[family]
  _check_labels(view, head, values)
  encoder = read_encoder_config(values, has_pooler=False)
  check_layers(values.origin, len(files.names), num_layers=encoder.num_layers)
  architecture = cross_encoder(encoder, family)
  found = problems(view, architecture)
  check(directory.origin, {architecture.name: found})
  tokenizer = find_tokenizer(directory, "")
  if tokenizer is None:
    raise FileNotFoundError(
      f"{where} has no tokenizer beside its weights; expected one, such as"
      " tokenizer.json. Copy its files there."
    )
  note = check_tokenizer(tokenizer, encoder.vocab_size, "cross-encoder")
  taken = take(view, architecture)
  return LoadedCrossEncoder(
    encoder=encoder,
    activation=head.activation,
    params=taken.params,
    tokenizer=str(tokenizer.path),
    report=Report.of(
      taken, note, *field_notes(values, GENERATION_NAMES, family)
    ),
  )


def _check_labels(view: View, head: _Head, values: ConfigValues) -> None:
  """Raises `ValueError` unless there is a head, of one label."""
  weight = f"{head.out}.weight"
  remedy = "for instance hf:cross-encoder/ms-marco-MiniLM-L6-v2"
  if weight not in view:
    raise ValueError(
      f"{view.files.origin} has no {weight}, the head that scores a pair of"
      f" texts; expected the tensors of {head.architecture} with one label. It"
      " is perhaps an encoder of single texts, which searches but cannot"
      f" rerank. Give a cross-encoder, {remedy}."
    )
  shape = view.shape(weight)
  names = values.values.get("id2label")
  named = len(names) if isinstance(names, dict) and names else shape[0]
  for labels, what in ((shape[0], weight), (named, "id2label in config.json")):
    if labels != 1:
      raise ValueError(
        f"{view.files.origin} has {labels} labels ({what}); expected 1. The"
        " logits of several labels are classes, such as those of NLI, and none"
        " of them is defined to say how relevant a passage is. Give a"
        f" cross-encoder that was trained to rank, {remedy}."
      )


def cross_encoder(encoder: EncoderConfig, family: str) -> Architecture:
  """Returns the class of a sequence classifier of one label."""
  head = _HEADS[family]
  plain = plain_encoder(encoder, family)
  redundant = [r for r in plain.redundant if not r.theirs.startswith("pooler")]
  if family != "bert":
    redundant.append(Redundant(r"pooler\..*", "its head reads the first state"))
  rules = [
    dataclasses.replace(rule, ours=f"encoder/{rule.ours}")
    for rule in plain.rules
  ]
  width = (encoder.embed_dim,)
  rules += dense("dense", head.dense, width, width)
  rules += dense("out", head.out, width, (1,))
  return Architecture(head.architecture, tuple(rules), tuple(redundant))
