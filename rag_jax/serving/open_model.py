"""Opens a RAG checkpoint to answer questions, without a training run.

In: a RAG directory of transformers, or one that rag-jax convert-hf wrote; and a
corpus: a search directory, documents, or passages. Out: the parts of a
`RagPipeline`. The settings come from the checkpoint, and contexts have the
format of `RagRetriever`.
"""

from collections.abc import Mapping
import dataclasses
import os
import re
from typing import Any

from absl import logging
from etils import epath
import jax
from jaxtyping import PyTree

from rag_jax import artifacts
from rag_jax.config import Config
from rag_jax.config import MeshConfig
from rag_jax.config import RerankConfig
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.corpus.passage_reader import is_passages
from rag_jax.corpus.passage_reader import load_passages
from rag_jax.corpus.passage_reader import read_passages
from rag_jax.corpus.passages import PassageList
from rag_jax.corpus.passages import Passages
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.splitting import SplitConfig
from rag_jax.data.experiment import Experiment
from rag_jax.data.experiment import open_experiment
from rag_jax.decoding.rag import RagDecoder
from rag_jax.decoding.ranking import HfParity
from rag_jax.decoding.settings import GenerationSettings
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.retriever import fingerprint
from rag_jax.search.directory import ENCODER
from rag_jax.search.directory import OpenedDirectory
from rag_jax.search.directory import root_of
from rag_jax.search.versions import PASSAGES
from rag_jax.weights.init_from import Initial
from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_rag
from rag_jax.weights.loaded import LoadedEncoder
from rag_jax.weights.loaded import LoadedRag
from rag_jax.weights.saved import origin_of


def is_search_directory(corpus: epath.PathLike) -> bool:
  """Returns whether `corpus` is what rag-jax build-index wrote."""
  if not str(corpus) or not artifacts.is_local(corpus):
    return False
  path = epath.Path(corpus).expanduser()
  parts = (root_of(path) / PASSAGES, path / ENCODER)
  return (path / artifacts.MANIFEST).exists() and all(p.is_dir() for p in parts)


def open_corpus(corpus: epath.PathLike) -> Passages:
  """Returns the passages of `corpus`.

  Args:
    corpus: passages, named as in the setting data.passages; a search directory,
      whose newest version is opened; or documents as
      `corpus.documents.read_documents` reads them, which are split into
      passages of 100 words.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: there are no records, or one cannot be used; the message names
      its file and line.
  """
  if is_search_directory(corpus):
    return OpenedDirectory(corpus).passages
  if is_passages(str(corpus)):
    return load_passages(str(corpus))
  bad_records = BadRecords("fail")
  passages = list(
    read_passages(str(corpus), SplitConfig(), bad_records=bad_records)
  )
  logging.info(
    "%d passages of %s:\n%s", len(passages), corpus, bad_records.report
  )
  return PassageList(passages, origin=str(corpus))


def fit_to_serving(config: Config, passages: Passages) -> None:
  """Limits n_docs to the passages there are, and the mesh to one device."""
  config.mesh = MeshConfig(data=1, fsdp=1, tensor=1)
  if len(passages) < config.data.n_docs:
    logging.warning(
      "%s has %d passages, fewer than the %d documents that the model reads;"
      " all are read for each question.",
      *(passages.origin, len(passages), config.data.n_docs),
    )
    config.data.n_docs = len(passages)


# The encoder of the passages that facebook/rag-* were trained with.
_OF_FACEBOOK = "hf:facebook/dpr-ctx_encoder-multiset-base"
_FACEBOOK = re.compile(r"hf:facebook/rag-(token|sequence)-")

_LONGEST = 512  # tokens of a question or passage, if positions have no limit
_DEFAULT_MAX_LENGTH = 20  # of RAG-Token in transformers
_BATCH = 32  # passages embedded at a time


def default_passage_encoder(model: str) -> str:
  """Returns the checkpoint that embeds passages for `model`; "": its own.

  facebook/rag-* have no passage encoder: their index was embedded with another
  checkpoint.
  """
  return _OF_FACEBOOK if _FACEBOOK.match(origin_of(model)) else ""


def open_model(
  model: str,
  corpus: epath.PathLike,
  *,
  passage_encoder: str = "",
  mode: str = "",
  generation: Mapping[str, Any] | None = None,
  hf_parity: bool = True,
  rerank: RerankConfig | None = None,
) -> tuple[Experiment, PyTree, Index, RagDecoder]:
  """Opens a RAG checkpoint over a corpus.

  Args:
    model: a directory or "hf:ORG/NAME", of transformers or of rag_jax.
    corpus: a search directory, whose embeddings are searched; or what
      `open_corpus` reads, which is embedded now.
    passage_encoder: the checkpoint that embeds the passages, or embedded those
      of the search directory; "": the model's own encoder.
    mode: one of `decoding.rag.MODES`; "": as the checkpoint was trained.
    generation: settings by the names of generation_config.json, which override
      those of the checkpoint.
    hf_parity: reproduce the defects of transformers in decoding and ranking;
      False: rank by the likelihood.
    rerank: the second stage of retrieval; None: there is none.

  Returns:
    The arguments of `RagPipeline`.

  Raises:
    FileNotFoundError: a file or directory named here is missing.
    ValueError: a file cannot be read, or the parts do not fit together.
  """
  model = os.fspath(model)
  rag = load_rag(model)
  _check_tokenizers(model, rag)
  mode = mode or f"rag_{rag.settings.kind}"
  settings = _generation(model, rag, mode, generation or {})
  passages_of = _passage_encoder(model, rag, passage_encoder)
  index = None
  if is_search_directory(corpus):
    passages, index = _searched(corpus, rag, passages_of)
  else:
    passages = open_corpus(corpus)
    if passages_of is None:
      raise ValueError(
        f"{model} holds no passage encoder, and {corpus} holds no embeddings;"
        " expected one of them. Name the encoder that the model was trained"
        f" with, for instance --passage_encoder={_OF_FACEBOOK}, or give a"
        " search directory (rag-jax build-index) as the corpus."
      )
  config = _config(rag, settings, passages, embeds=index is None)
  config.rerank = rerank or RerankConfig()
  params = {"question_encoder": rag.question_encoder.params}
  if index is None and passages_of is not None:
    params["passage_encoder"] = passages_of.params
  params["generator"] = rag.generator.params
  initial = Initial(
    params, rag.generator.tokenizer, rag.question_encoder.tokenizer
  )
  experiment = open_experiment(
    config,
    passages=passages,
    devices=jax.local_devices()[:1],
    initial=initial,
    reads_tokens=index is None,
  )
  params = jax.tree.map(jax.numpy.asarray, params)
  decoder = RagDecoder(
    experiment.model.generator,
    settings,
    mode,
    hf_parity=(
      HfParity(label_smoothing=rag.settings.label_smoothing)
      if hf_parity
      else None
    ),
  )
  if index is None:
    logging.info("Embedding %d passages of %s.", len(passages), corpus)
    retriever = {k: v for k, v in params.items() if k != "generator"}
    index = experiment.index_builder.build(retriever)
  return experiment, params, index, decoder


def _check_tokenizers(model: str, rag: LoadedRag) -> None:
  for part, loaded in (
    ("question_encoder_tokenizer", rag.question_encoder),
    ("generator_tokenizer", rag.generator),
  ):
    if not loaded.tokenizer:
      raise FileNotFoundError(
        f"There is no {part} in {model}; expected the folder that a RAG"
        " checkpoint has for each of its two tokenizers. Copy it from the"
        " source of the weights; transformers.RagTokenizer writes both with"
        " save_pretrained(DIR)."
      )


def _generation(
  model: str, rag: LoadedRag, mode: str, given: Mapping[str, Any]
) -> GenerationSettings:
  """Returns the checkpoint's generation settings, overridden by `given`."""
  values = dict(rag.generator.generation)
  if "max_new_tokens" in given:
    values.pop("max_length", None)
  if "max_length" in given:
    values.pop("max_new_tokens", None)
  values |= given
  if mode == "rag_token" and not any(
    values.get(name) for name in ("max_length", "max_new_tokens")
  ):
    # In RAG-Token this counts the start token, in RAG-Sequence it does not.
    values["max_length"] = _DEFAULT_MAX_LENGTH
  ids = rag.generator.special_ids
  for name, token in (
    ("pad_token_id", ids.pad),
    ("bos_token_id", ids.bos),
    ("eos_token_id", ids.eos),
    ("decoder_start_token_id", rag.generator.fields["decoder_start_id"]),
  ):
    if token >= 0 and values.get(name) is None:
      values[name] = token
  values.setdefault("do_deduplication", rag.settings.do_deduplication)
  # One answer is returned, and each call sets the number of documents.
  values |= {"num_return_sequences": 1, "n_docs": None}
  return GenerationSettings.from_dict(values, f"{model} (how it generates)")


def _passage_encoder(
  model: str, rag: LoadedRag, named: str
) -> LoadedEncoder | None:
  """Returns the passage encoder; None if there is none.

  Raises:
    ValueError: it has another architecture than the question encoder.
  """
  if not named:
    return rag.passage_encoder
  found, questions = load_encoder(named, "passage"), rag.question_encoder
  if found.kind != "dpr_context":
    raise ValueError(
      f"--passage_encoder={named} is a {found.kind} encoder; expected a DPR"
      f" passage encoder, since {model} has a DPR question encoder. Give such"
      " an encoder."
    )
  different = [
    f"{name}={value!r} and {found.fields[name]!r}"
    for name, value in questions.fields.items()
    if "dropout" not in name and found.fields[name] != value
  ]
  if different:
    raise ValueError(
      f"The question encoder of {model} and the passage encoder {named} differ"
      f" in {', '.join(different)}. Expected the same architecture; give"
      " another --passage_encoder."
    )
  return found


def _searched(
  corpus: epath.PathLike, rag: LoadedRag, passages_of: LoadedEncoder | None
) -> tuple[Passages, Index]:
  """Returns passages and index of a search directory.

  Raises:
    ValueError: the model cannot search its embeddings.
  """
  directory = OpenedDirectory(corpus)
  remedy = (
    "Build it with the passage encoder that belongs to the model:"
    " rag-jax build-index --encoder=PASSAGES --question_encoder=MODEL."
  )
  kind, width = directory.encoder.kind, directory.index.embedding_dim
  fields = rag.question_encoder.fields
  expected = fields["projection_dim"] or fields["embed_dim"]
  if kind != "dpr_question" or width != expected:
    raise ValueError(
      f"The passages in {corpus} were embedded for a {kind} encoder of {width}"
      f" numbers; expected dpr_question and {expected}, as the model has."
      f" {remedy}"
    )
  if passages_of is not None:
    ours = fingerprint({"question_encoder": passages_of.params})
    theirs = directory.content["passage_encoder_fingerprint"]
    if ours != theirs:
      raise ValueError(
        f"The passages in {corpus} were embedded with other weights"
        f" (fingerprint {theirs[:12]}) than the model's passage encoder has"
        f" ({ours[:12]}); the scores would mean nothing. {remedy}"
      )
  version = directory.version
  return version.passages, version.index


def _config(
  rag: LoadedRag,
  settings: GenerationSettings,
  passages: Passages,
  *,
  embeds: bool,
) -> Config:
  """Returns the config of a training run with this model."""
  config, encoder = Config(), rag.question_encoder
  config.loss = f"rag_{rag.settings.kind}"
  config.encoder = dataclasses.replace(
    EncoderConfig(),
    **encoder.fields,
    tied=not embeds,  # passages that are embedded already need no tower
    score_scale=encoder.score_scale,
  )
  fields = {  # JSON has lists where the config has tuples
    name: tuple(value) if isinstance(value, list) else value
    for name, value in rag.generator.fields.items()
  }
  config.generator = dataclasses.replace(GeneratorConfig(), **fields)
  data = config.data
  data.context_style = "rag"
  data.title_sep, data.doc_sep = rag.settings.title_sep, rag.settings.doc_sep
  data.context_prefix = rag.settings.prefix
  data.n_docs = rag.settings.n_docs
  positions = config.encoder.max_positions or _LONGEST
  data.question_length = data.passage_length = min(positions, _LONGEST)
  data.context_length = rag.settings.max_combined_length
  data.target_length = settings.num_steps
  if config.generator.positions == "learned":
    most = config.generator.max_positions
    data.context_length = min(data.context_length, most)
    data.target_length = min(data.target_length, most)
  small = len(passages) <= config.index.scann_tree_passages
  config.index.kind = "exact" if small else "auto"
  config.index.embed_batch_size = _BATCH
  fit_to_serving(config, passages)
  return config
