r"""Makes a folder or file of text searchable.

  rag-jax build-index --corpus=documents/ \
      --encoder=hf:sentence-transformers/all-MiniLM-L6-v2 --output=runs/index
  rag-jax search --index=runs/index "what does the contract say?"

--corpus is a folder of .txt, .md and .html files (and .rst, .ipynb, .pdf and
.docx, with `pip install 'rag-jax[documents]'`), a .jsonl, .json, .tsv or
.csv file (also BEIR's, SQuAD's, DPR's), or a name such as tfds:beir/nfcorpus.
--encoder is a directory or a name of the hub: DPR, BERT, RoBERTa, DistilBERT,
MPNet, T5 or sentence-transformers.
A passage is as much of a section as the encoder reads; --split changes that.

The same command again continues an interrupted build. At the end it prints the
certificate: what the index was measured to find.

With --distributed on every host of a pod, whose hosts all see --output, all
chips embed the passages. --config is a file such as configs/wiki_embed.py: its
encoders, data.passages, data.passage_length and index.* take the place of flags
that are not given. Its settings are flags too: --config.index.kind=exact.
"""

import dataclasses

from absl import flags
from absl import logging
from etils import epath
from ml_collections import config_flags

from rag_jax.api.search_directory import SearchDirectory
from rag_jax.commands import command
from rag_jax.commands.config_flag import check_config
from rag_jax.config import IndexConfig
from rag_jax.config_rules import validate
from rag_jax.corpus.document import FieldNames
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.splitting import SplitConfig
from rag_jax.corpus.text_files import read_texts
from rag_jax.processes import is_first
from rag_jax.processes import wait_for_all
from rag_jax.retrieval.embeddings import STORAGE
from rag_jax.search.build import BuildConfig
from rag_jax.search.directory import word_settings
from rag_jax.search.text_encoder import CHOSEN
from rag_jax.training.workdir import keep_compiled

_SPLIT, _FIELDS, _BUILD = SplitConfig(), FieldNames(), BuildConfig()

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "An experiment, for what other flags do not say."
)
_CORPUS = flags.DEFINE_string("corpus", None, "Documents to search in.")
_ENCODER = flags.DEFINE_string(
  "encoder", None, "Embeds passages and questions."
)
_QUESTION_ENCODER = flags.DEFINE_string(
  "question_encoder", "", "Embeds questions, for DPR; '': --encoder."
)
_OUTPUT = flags.DEFINE_string("output", None, "The directory to write.")
_QUESTIONS = flags.DEFINE_string(
  "questions", "", "File with one question per line, to certify the index with."
)
_METHOD = flags.DEFINE_enum(
  "split", "fit", ["fit", "words", "sentences", "none"],
  "How documents become passages: fit: as many sections, sentences and lines as"
  " the encoder reads; words: a number of words; sentences: whole sentences;"
  " none: no split.",
)  # fmt: skip
_SIZE = flags.DEFINE_integer(
  "split_size",
  None,
  "Size of a passage. By default what the encoder reads with"
  " --split=fit, else 100.",
)
_UNIT = flags.DEFINE_enum(
  "split_unit", None, ["words", "tokens"],
  "Unit of --split_size. By default tokens with --split=fit, else words.",
)  # fmt: skip
_OVERLAP = flags.DEFINE_integer(
  "split_overlap", _SPLIT.overlap,
  "Overlap of passages in whole sentences, with --split=fit or sentences.",
)  # fmt: skip
_DROP_ENCODED = flags.DEFINE_bool(
  "drop_encoded", None,
  "Leave out encoded data such as base64, and count it. By default with"
  " --split=fit.",
)  # fmt: skip
_ON_BAD_RECORD = flags.DEFINE_enum(
  "on_bad_record", "fail", list(BadRecords.ACTIONS),
  "Stop at a record that cannot be used, or count it and continue.",
)  # fmt: skip
_DUPLICATES = flags.DEFINE_bool(
  "drop_duplicate_texts",
  True,
  "Store equal texts once. Not for corpora whose"
  " ids are judged, such as BEIR's.",
)
_ID, _TITLE, _TEXT = (
  flags.DEFINE_string(f"{name}_field", getattr(_FIELDS, name), "Name in JSON.")
  for name in ("id", "title", "text")
)
_LENGTH = flags.DEFINE_integer(
  "passage_length", 0, "Tokens to embed per passage; 0: as the encoder says."
)
_QUESTION_PROMPT, _PASSAGE_PROMPT, _TITLE_SEP = (
  flags.DEFINE_string(name, None, f"{what}. By default as the encoder says.")
  for name, what in (
    ("question_prompt", "Text before every question, as 'query: '"),
    ("passage_prompt", "Text before every passage, as 'passage: '"),
    ("title_sep", "Text between title and text; '': the end token"),
  )
)
_TRUNCATE_DIM = flags.DEFINE_integer(
  "truncate_dim", None, "Numbers of an embedding to keep; 0: all."
)
_BATCH = flags.DEFINE_integer(
  "batch_size", _BUILD.embed_batch_size, "Passages embedded at a time."
)
_STORAGE = flags.DEFINE_enum(
  "storage", "float32", list(STORAGE), "Type of the stored embeddings."
)
_KIND = flags.DEFINE_enum(
  "kind", "auto", ["auto", "exact", "scann"], "auto: ScaNN if it is installed."
)
_PER_SHARD = flags.DEFINE_integer(
  "passages_per_shard", 0, "Most passages per searcher; 0: one searcher."
)
_TARGET_RECALL = flags.DEFINE_float(
  "target_recall",
  0.0,
  "The index_recall@10 that ScaNN is tuned to; 0: no tuning.",
)
_BM25 = flags.DEFINE_bool("bm25", True, "Index the words too.")
_FIT_HYBRID = flags.DEFINE_string("fit_hybrid", "", command.FIT_HYBRID)
_words = command.define_word_flags()
_CACHE_DIR = flags.DEFINE_string(
  "cache_dir", "", "Where compiled programs are kept; '': in ~/.cache."
)
_WAIT = flags.DEFINE_bool(
  "wait", False, "Wait for another process that writes there."
)
command.define_pod_flags()
flags.mark_flag_as_required("output")
for _name in ("corpus", "encoder"):
  flags.register_validator(
    _name,
    lambda value: value is not None or flags.FLAGS["config"].value is not None,
    f"Flag --{_name} must have a value other than None, or --config be given.",
  )


def _index_config() -> IndexConfig:
  """Returns how the index is built; absent flags take the values of --config.

  Raises:
    ValueError: the config has no encoder, or an index that no directory has.
  """
  if _CONFIG.value is None:
    index = IndexConfig()
  else:
    config = validate(_CONFIG.value)
    index, data, encoder = config.index, config.data, config.encoder
    own = {} if _ENCODER.present else {
      "encoder": encoder.passage_init_from or encoder.init_from,
      "question_encoder": "" if encoder.tied else encoder.init_from,
    }  # fmt: skip
    for name, value in {
      "corpus": data.passages,
      "passage_length": data.passage_length,
      "batch_size": index.embed_batch_size,
      "kind": index.kind,
      "passages_per_shard": index.passages_per_shard,
      **own,
      **{k: getattr(encoder, k) for k in CHOSEN if encoder.is_set(k)},
    }.items():
      if not flags.FLAGS[name].present:
        setattr(flags.FLAGS, name, value)
  if not _ENCODER.value:
    raise ValueError(
      "The config names no encoder.init_from. Expected a checkpoint that embeds"
      " the passages. Set it, or give --encoder."
    )
  if _KIND.value == "device":
    raise ValueError(
      "index.kind='device' is an index in the memory of accelerators, which"
      " training builds itself. Expected exact, scann or auto, for an index in"
      " a directory. Give --kind."
    )
  return dataclasses.replace(
    index, kind=_KIND.value, passages_per_shard=_PER_SHARD.value
  )


def _split() -> SplitConfig:
  """Returns how to split documents, with the defaults that --split implies."""
  fits = _METHOD.value == "fit"
  unit = _UNIT.value or ("tokens" if fits else "words")
  size = _SIZE.value
  if size is None:
    size = 0 if fits and unit == "tokens" else _SPLIT.size
  drops = fits if _DROP_ENCODED.value is None else _DROP_ENCODED.value
  return dataclasses.replace(
    _SPLIT,
    method=_METHOD.value,
    size=size,
    unit=unit,
    overlap=_OVERLAP.value,
    drop_encoded=drops,
  )


def main(argv: list[str]) -> None:
  """Runs the command."""
  output = epath.Path(_OUTPUT.value or "").expanduser()
  keep_compiled(_CACHE_DIR.value or "")
  config = BuildConfig(
    index=_index_config(),
    split=_split(),
    fields=FieldNames(
      id=_ID.value or "", title=_TITLE.value or "", text=_TEXT.value or ""
    ),
    on_bad_record=_ON_BAD_RECORD.value,
    drop_duplicate_texts=_DUPLICATES.value,
    passage_length=_LENGTH.value,
    embed_batch_size=_BATCH.value,
    question_prompt=_QUESTION_PROMPT.value,
    passage_prompt=_PASSAGE_PROMPT.value,
    title_sep=_TITLE_SEP.value,
    truncate_dim=_TRUNCATE_DIM.value,
    storage=_STORAGE.value,
    target_recall=_TARGET_RECALL.value,
    bm25=_BM25.value,
    words=word_settings(**_words()),
  )
  directory = SearchDirectory.build(
    _CORPUS.value or "",
    _ENCODER.value or "",
    output,
    config,
    question_encoder=_QUESTION_ENCODER.value or "",
    questions=read_texts(_QUESTIONS.value) if _QUESTIONS.value else [],
    wait=_WAIT.value,
  )
  if not is_first():
    wait_for_all("the first process has certified the index")
    return
  certificate = directory.certificate
  if _FIT_HYBRID.value and not (certificate and certificate.modes):
    directory.fit_hybrid(_FIT_HYBRID.value)
  assert directory.certificate is not None
  print(directory.certificate.table())
  print(f"{len(directory.passages)} passages can be searched in {output}.")
  wait_for_all("the first process has certified the index")


def run() -> None:
  """Runs `main`."""
  logging.set_verbosity(logging.INFO)
  command.run(
    main,
    check=check_config,
    interrupted="Stopped. Run the same command again to continue.",
  )
