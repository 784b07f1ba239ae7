"""Builds a search directory from a corpus and an encoder.

In: a folder or file of text, and the checkpoint of an encoder. Out: the
directory that directory.py opens. An interrupted build keeps what it finished,
and the next build continues from there.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import functools
import json
from typing import Any

from absl import logging
from etils import epath
import jax

from rag_jax import artifacts
from rag_jax import disk
from rag_jax.config import IndexConfig
from rag_jax.corpus.document import DEFAULT_FIELDS
from rag_jax.corpus.document import FieldNames
from rag_jax.corpus.documents import read_documents
from rag_jax.corpus.passage_reader import read_passages
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.report import CorpusReport
from rag_jax.corpus.report import Coverage
from rag_jax.corpus.splitting import SplitConfig
from rag_jax.corpus.store import PassageStore
from rag_jax.corpus.store import write_store
from rag_jax.corpus.token_store import open_tokens
from rag_jax.corpus.token_store import write_tokens
from rag_jax.corpus.tokenized import PLAIN
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenized import Wording
from rag_jax.corpus.tokenizer import Tokenizer
from rag_jax.corpus.twins import TwinsWriter
from rag_jax.directory_lock import building
from rag_jax.processes import wait_for_all
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.bm25 import Bm25Settings
from rag_jax.retrieval.bm25 import check_settings
from rag_jax.retrieval.certified_index import CertificateSettings
from rag_jax.retrieval.certified_index import build_certified_index
from rag_jax.retrieval.certified_index import check_tuning
from rag_jax.retrieval.embedding_job import EmbeddingJob
from rag_jax.retrieval.embedding_job import embed_corpus
from rag_jax.retrieval.embedding_job import remove_job_files
from rag_jax.retrieval.embeddings import check_storage
from rag_jax.retrieval.retriever import Embedder
from rag_jax.search import versions
from rag_jax.search.directory import ENCODER
from rag_jax.search.directory import KIND
from rag_jax.search.directory import OpenedDirectory
from rag_jax.search.directory import write_content
from rag_jax.search.text_encoder import TextEncoder
from rag_jax.search.text_encoder import chosen_fields
from rag_jax.search.text_encoder import open_checkpoint
from rag_jax.search.text_encoder import save_encoder
from rag_jax.search.versions import BM25
from rag_jax.search.versions import INDEX
from rag_jax.search.versions import PASSAGES
from rag_jax.search.versions import TWINS

# Needed only during the build. The name is that of an unfinished file, so it is
# in no manifest.
_TOKENS = ".tokens.tmp"
_PARTS = (PASSAGES, TWINS, ENCODER, INDEX, BM25, versions.UPDATES, _TOKENS)


def _is_own(name: str) -> bool:
  """Returns whether building or compacting writes a file of this name."""
  patterns = (versions.BASE, versions.UNFINISHED)
  return name in _PARTS or any(p.fullmatch(name) for p in patterns)


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class BuildConfig:
  """How documents are split, embedded and indexed."""

  # By default a passage is as long as the encoder reads.
  split: SplitConfig = dataclasses.field(
    default_factory=lambda: SplitConfig(
      method="fit", unit="tokens", size=0, drop_encoded=True
    )
  )
  fields: FieldNames = DEFAULT_FIELDS  # of JSON records
  on_bad_record: str = "fail"  # or "skip": bad records are counted, left out
  # False: every document keeps a passage of its own, as BEIR's judged ids need.
  drop_duplicate_texts: bool = True
  passage_length: int = 0  # tokens that are embedded; 0: as the encoder says
  embed_batch_size: int = 32  # passages
  passages_per_embedding_shard: int = 1024  # most that an interruption loses
  # Of the encoder, as in `EncoderConfig`; None: as the checkpoint says.
  question_prompt: str | None = None
  passage_prompt: str | None = None
  title_sep: str | None = None
  truncate_dim: int | None = None
  storage: str = "float32"  # of embeddings; or "bfloat16", "int8"
  index: IndexConfig = dataclasses.field(default_factory=IndexConfig)
  # The index_recall@10 that the ScaNN index is tuned to; 0: no tuning.
  target_recall: float = 0.0
  bm25: bool = True  # index the words too
  words: Bm25Settings = dataclasses.field(default_factory=Bm25Settings)
  speed_secs: float = 1.0  # time to measure each batch size, for certificates


def build_search_directory(
  corpus: str,
  encoder: str,
  output: epath.PathLike,
  config: BuildConfig,
  *,
  question_encoder: str = "",
  questions: Sequence[str] = (),
  wait: bool = False,
) -> OpenedDirectory:
  """Builds the directory, or what is missing of it, and opens it.

  Arguments and errors as in `rag_jax.SearchDirectory.build`.
  """
  check_storage(config.storage)
  check_settings(config.words)
  check_tuning(config.index, config.target_recall, len(questions))
  output = epath.Path(output).expanduser()
  first = jax.process_index() == 0
  # A missing input is reported before a directory is made.
  inputs = _open_inputs(corpus, encoder, question_encoder, config)
  if not (output / PASSAGES / artifacts.MANIFEST).exists():
    read_documents(corpus, fields=config.fields, bad_records=BadRecords())
  lock = building(output, kind=KIND, own=_is_own, wait=wait)
  with lock if first else contextlib.nullcontext():
    if (output / artifacts.MANIFEST).exists():
      return _reopen(output, inputs.plan)
    if first:
      _write_passages(output / PASSAGES, corpus, config, inputs)
      where = question_encoder or encoder
      save_encoder(inputs.question_encoder, output / ENCODER, where)
      _tokenize(output / _TOKENS, corpus, inputs, output / PASSAGES)
    wait_for_all("building: the passages are there")
    store = PassageStore(output / PASSAGES)
    tokenized = open_tokens(output / _TOKENS, *inputs.tokens_of(store))
    _embed(output / INDEX, config, inputs, store, tokenized)
    if first:
      coverage = _report(store, tokenized).coverage
      _build_index(output / INDEX, config, inputs, store, questions, coverage)
      if config.bm25:
        logging.info("Indexing the words of %d passages.", len(store))
        Bm25Index.write(
          output / BM25,
          store,
          passages_fingerprint=store.fingerprint,
          settings=config.words,
        )
      versions.start_updates(output)
      content = {
        "plan": inputs.plan,
        "updates": "marked",  # updates/CURRENT exists from the build on
        "num_passages": len(store),
        "num_cut": tokenized.num_cut,  # passages longer than what is embedded
        "coverage": dataclasses.asdict(coverage) if coverage else None,
        "passages_fingerprint": store.fingerprint,
        "passage_encoder_fingerprint": inputs.passage_encoder.fingerprint,
      }
      write_content(output, content)
      _clean(output, output)
    wait_for_all("building: the directory is complete")
  return OpenedDirectory(output)


@dataclasses.dataclass(frozen=True, slots=True)
class _Inputs:
  """The opened inputs of a build.

  Attributes:
    length: tokens of a passage that are embedded.
    plan: everything that the result depends on, as JSON holds it.
  """

  passage_encoder: TextEncoder
  question_encoder: TextEncoder  # often the same
  length: int
  plan: dict[str, Any]

  def tokens_of(
    self, store: PassageStore
  ) -> tuple[PassageStore, Tokenizer, int, Wording]:
    """Returns what decides the tokens to embed."""
    encoder = self.passage_encoder
    return store, encoder.tokenizer, self.length, encoder.wording


def _open_inputs(
  corpus: str, encoder: str, question_encoder: str, config: BuildConfig
) -> _Inputs:
  chosen = chosen_fields(dataclasses.asdict(config))
  passages = open_checkpoint(encoder, "passage", chosen)
  questions = passages
  if question_encoder:
    questions = open_checkpoint(question_encoder, "question", chosen)
  elif passages.kind == "dpr_context":
    raise ValueError(
      f"{encoder} is DPR's encoder of passages; expected also the encoder of"
      " questions, which searching needs. Give it as --question_encoder."
    )
  length = config.passage_length or passages.max_tokens
  longest = passages.fields.get("max_positions", 0) or length
  if not 8 <= length <= longest:
    raise ValueError(
      f"passage_length={length} tokens of a passage are to be embedded;"
      f" expected 8 to {longest}, the positions of {encoder}. Change it, or"
      " leave it at 0."
    )
  split = config.split
  if split.method == "fit" and split.unit == "tokens" and not split.size:
    prompt = passages.tokenizer.encode([passages.wording.passage_prompt])[0]
    split = dataclasses.replace(split, size=max(length - len(prompt), 1))
  plan = {
    "corpus": corpus,
    "sources": _sources(corpus),
    "passage_length": length,
    "passage_encoder": passages.fingerprint,
    "passage_tokenizer": passages.tokenizer.fingerprint,
    "question_encoder": questions.fingerprint,
    "question_tokenizer": questions.tokenizer.fingerprint,
    "wording": [
      questions.wording.question_prompt,
      *passages.wording.of_passages,
    ],
    **dataclasses.asdict(config),
    "split": dataclasses.asdict(split),
  }
  return _Inputs(passages, questions, length, _plain(plan))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
  """Returns `values` as JSON holds them: tuples become lists."""
  return json.loads(json.dumps(values))


def _sources(corpus: str) -> str:
  """Identifies the files of a corpus by name, size and time of change.

  "" for a corpus that is not on this machine: its name alone identifies it.
  """
  path = epath.Path(corpus).expanduser()
  if not artifacts.is_local(path) or not path.exists():
    return ""
  return artifacts.fingerprint_lines(disk.file_states(path))


def _reopen(output: epath.Path, plan: dict[str, Any]) -> OpenedDirectory:
  """Returns the complete directory, if it was built from the same inputs."""
  directory = OpenedDirectory(output)
  _clean(output, directory.root)  # the build may have been interrupted here
  _check_same(output, dict(directory.content.get("plan", {})), plan)
  logging.info("%s is complete already.", output)
  return directory


def _clean(output: epath.Path, root: epath.Path) -> None:
  """Removes the files that are needed only during the build."""
  remove_job_files(root / INDEX)
  if (output / _TOKENS).exists():
    (output / _TOKENS).rmtree()


def _check_same(
  path: epath.Path, found: dict[str, Any], plan: dict[str, Any]
) -> None:
  """Raises `ValueError` if something was built from other inputs.

  A setting that did not exist at that time counts as its default.
  """
  plain = {"wording": list(dataclasses.astuple(PLAIN))}
  found = _plain(dataclasses.asdict(BuildConfig())) | plain | found
  if isinstance(found.get("split"), dict):
    found["split"] = dataclasses.asdict(SplitConfig(**found["split"]))
  other = [
    f"{name} is {found.get(name)!r} there and {value!r} here"
    for name, value in plan.items()
    if found.get(name) != value
  ]
  if other:
    raise ValueError(
      f"{path} was made of other inputs: {'; '.join(other)}. Expected the"
      " inputs of this call. Give the same ones to continue, choose another"
      " output, or remove it."
    )


def _write_passages(
  path: epath.Path, corpus: str, config: BuildConfig, inputs: _Inputs
) -> None:
  """Writes the passages of the corpus, unless they exist already."""
  named = (
    "corpus", "sources", "split", "fields", "on_bad_record",
    "drop_duplicate_texts",
  )  # fmt: skip
  made = {name: inputs.plan[name] for name in named}
  twins_path = path.parent / TWINS
  if (path / artifacts.MANIFEST).exists():
    store = PassageStore(path)
    _check_same(path, dict(store.config), made)
    if twins_path.exists() or not config.drop_duplicate_texts:
      logging.info("%s holds the %d passages already.", path, len(store))
      return
    path.rmtree()  # an older rag_jax wrote it, which kept no twins
  bad_records = BadRecords(config.on_bad_record)
  split = SplitConfig(**inputs.plan["split"])
  tokenizer = (
    inputs.passage_encoder.tokenizer if split.unit == "tokens" else None
  )

  twins = TwinsWriter()

  def passages() -> Iterator[Passage]:
    for passage in read_passages(
      corpus,
      split,
      fields=config.fields,
      bad_records=bad_records,
      tokenizer=tokenizer,
      drop_duplicate_texts=config.drop_duplicate_texts,
      on_twin=twins.add,
    ):
      yield passage
      logging.log_every_n_seconds(
        logging.INFO, "Read %d passages.", 10, bad_records.report.passages
      )
    # The report is complete only now. The store writes its manifest, with
    # `made` in it, after the last passage.
    if config.drop_duplicate_texts:
      twins.write(twins_path)
    made["report"] = bad_records.report.content()

  with contextlib.closing(twins):
    write_store(path, passages(), config=made)


def _tokenize(
  path: epath.Path, corpus: str, inputs: _Inputs, passages: epath.Path
) -> None:
  """Writes the tokens to embed, and logs how much of the corpus they hold."""
  store = PassageStore(passages)
  arguments = path, *inputs.tokens_of(store)
  tokenized = write_tokens(*arguments)
  if tokenized.num_lost is None:  # an older rag_jax did not count them
    path.rmtree()
    tokenized = write_tokens(*arguments)
  report = _report(store, tokenized)
  logging.info("%d passages of %s:\n%s", len(store), corpus, report)
  if report.coverage and report.coverage.lost:
    logging.warning(
      "%d of %d passages are longer than %d tokens; the rest of each is not"
      " embedded. Leave --split at 'fit' to embed all of it.",
      *(tokenized.num_cut, len(store), inputs.length),
    )


def _report(store: PassageStore, tokenized: TokenizedPassages) -> CorpusReport:
  """Returns what was read of a corpus, left out, and embedded."""
  report = CorpusReport.from_content(store.config.get("report", {}))
  if tokenized.num_tokens is not None and tokenized.num_lost is not None:
    report.coverage = Coverage(
      tokens=tokenized.num_tokens,
      lost=tokenized.num_lost,
      left_out_chars=report.left_out_chars,
    )
  return report


def _embed(
  path: epath.Path,
  config: BuildConfig,
  inputs: _Inputs,
  store: PassageStore,
  tokenized: TokenizedPassages,
) -> None:
  """Embeds all passages, unless the index over them exists already."""
  if (path / artifacts.MANIFEST).exists():
    return
  encoder = inputs.passage_encoder
  embedder = encoder.passage_embedder(config.embed_batch_size)
  job = EmbeddingJob(
    num_passages=len(store),
    embedding_dim=embedder.embedding_dim(encoder.params),
    passage_length=inputs.length,
    storage=config.storage,
    passages_per_shard=config.passages_per_embedding_shard,
    embed_batch_size=embedder.batch_size,
    encoder_fingerprint=encoder.fingerprint,
    passages_fingerprint=store.fingerprint,
  )
  rows = functools.partial(encoder.passage_rows, tokenized)
  embed_corpus(path, job, embedder, encoder.params, rows)


def _build_index(
  path: epath.Path,
  config: BuildConfig,
  inputs: _Inputs,
  store: PassageStore,
  questions: Sequence[str],
  coverage: Coverage | None,
) -> None:
  """Builds and certifies the index, unless it exists already."""
  sample = None
  if questions:
    embedder = Embedder(inputs.question_encoder.model, 1)
    sample = inputs.question_encoder.embed_questions(embedder, questions)
  build_certified_index(
    path,
    config.index,
    CertificateSettings(
      sample=sample,
      target_recall=config.target_recall,
      speed_secs=config.speed_secs,
      coverage=coverage,
    ),
    encoder_fingerprint=inputs.passage_encoder.fingerprint,
    passages_fingerprint=store.fingerprint,
  )
