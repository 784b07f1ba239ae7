"""Documents that changed, into a search directory that goes on being read.

In: a search directory, documents to put into it and ids of those to take out.
Out: a new version of it, in use when it is complete: whoever reads sees the one
before or the new one, and an update that is killed leaves the one before.

What is new or changed is embedded; all else is shared with what was built. Of
the words a new index is made: how rare one is depends on all passages.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import itertools

from absl import logging
from etils import epath
from jaxtyping import Float
import numpy as np

from rag_jax.building import lock
from rag_jax.corpus.document import Document
from rag_jax.corpus.document import FieldNames
from rag_jax.corpus.passage_reader import read_document_passages
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.report import Coverage
from rag_jax.corpus.report import raise_empty
from rag_jax.corpus.splitting import SplitConfig
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.twins import write_twins
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.certificate import SearchModes
from rag_jax.retrieval.certify import certify
from rag_jax.retrieval.index_core import bad_rows
from rag_jax.search import versions
from rag_jax.search.changes import Changes
from rag_jax.search.changes import UpdateReport
from rag_jax.search.changes import find_changes
from rag_jax.search.directory import KIND
from rag_jax.search.directory import SearchDirectory
from rag_jax.search.directory import read_content
from rag_jax.search.directory import root_of
from rag_jax.search.text_encoder import TextEncoder
from rag_jax.search.text_encoder import open_checkpoint
from rag_jax.search.updated_index import UpdatedIndex
from rag_jax.search.updated_passages import UpdatedPassages
from rag_jax.search.versions import BM25
from rag_jax.search.versions import TWINS
from rag_jax.search.versions import UPDATES

_BLOCK = 16_384  # passages that are tokenised and embedded at a time


def update_search_directory(
  path: epath.PathLike,
  *,
  upsert: str = "",
  delete: Sequence[str] = (),
  encoder: str = "",
  on_bad_record: str = "",
  questions: Sequence[str] = (),
  speed_secs: float = 1.0,
  wait: bool = False,
) -> UpdateReport:
  """Makes a new version of a search directory, and returns what it changed.

  The new passages and their embeddings are in memory, and no others.

  Args:
    path: the directory.
    upsert: what `corpus.documents.read_documents` reads. A document replaces
      the one of its id, with all of its passages; other documents stay.
    delete: ids of documents, or of single passages.
    encoder: the checkpoint that embedded the passages, if it is not the one of
      questions, which the directory holds: DPR's.
    on_bad_record: "fail" or "skip"; "": as it was built.
    questions: that the certificate is measured with; none: passages.
    speed_secs: that each batch size is timed for the certificate.
    wait: for another process that updates it.

  Raises:
    FileNotFoundError: the directory, the documents or the encoder is not there.
    ValueError: there is nothing to do, no such id, an id is to be replaced and
      deleted, nothing would be left, other weights, a document cannot be read,
      or somebody else writes there.
    UnwritableError: the disk is full, or nothing may be written there.
  """
  path = epath.Path(path).expanduser()
  if not upsert and not delete:
    raise ValueError(
      f"Nothing is to be put into {path}, and nothing to be deleted; expected"
      " documents or ids. Give --upsert or --delete."
    )
  # Before the lock, whose file would be made in any directory.
  read_content(path)
  with lock(
    path,
    kind=KIND,
    wait=wait,
    remedy="What was there before is still in use: update again.",
  ):
    versions.remove_unused(root_of(path))
    directory = SearchDirectory(path)
    passage_encoder = _passage_encoder(directory, encoder)
    plan = directory.content["plan"]
    bad_records = BadRecords(on_bad_record or plan["on_bad_record"])
    changes = find_changes(
      directory.passages,
      _read(directory, upsert, bad_records, passage_encoder) if upsert else (),
      delete,
      drop_duplicate_texts=plan["drop_duplicate_texts"],
      report=bad_records.report,
      twins=directory.version.twins,
    )
    if delete and directory.version.twins is None:
      _warn_of_twins(directory)
    if upsert:
      if not bad_records.report.documents:
        raise_empty(upsert, bad_records.report)
      logging.info("%s:\n%s", upsert, bad_records.report)
    if changes:
      _write(directory, changes, passage_encoder, questions, speed_secs)
      directory.reload()
      versions.remove_unused(root_of(path))
    index = directory.index
    sample = _sample(directory, questions)
    before, after = directory.built[1].certificate, index.certificate
    assert after is not None, "both ways of making a version certify it"
    if before is None or before.sample != after.sample:
      logging.info("Measuring what was built, in the same way.")
      before = certify(directory.built[1], sample, speed_secs=0.0)
    share = index.changed_share if isinstance(index, UpdatedIndex) else 0.0
    return changes.report(directory.version.name, share, before, after)


def _warn_of_twins(directory: SearchDirectory) -> None:
  """Says that texts may have gone that other documents have."""
  report = directory.built[0].config.get("report", {})
  if number := report.get("dropped", {}).get("duplicate_text", 0):
    logging.warning(
      "%s was built when documents with the text of another were left out and"
      " their ids forgotten, %d of them: if one of those is to be found, give"
      " it again with --upsert.",
      *(directory.path, number),
    )


def _passage_encoder(directory: SearchDirectory, encoder: str) -> TextEncoder:
  """Returns what embedded the passages of a directory."""
  wanted = directory.content["passage_encoder_fingerprint"]
  if not encoder:
    if directory.encoder.fingerprint == wanted:
      return directory.encoder
    raise ValueError(
      f"{directory.path} holds the encoder of questions alone; its passages"
      f" were embedded by another, of fingerprint {wanted!r}. Expected that one"
      " too. Give it as --encoder."
    )
  found = open_checkpoint(encoder, "passage")
  if found.fingerprint != wanted:
    raise ValueError(
      f"{encoder} is not what embedded the passages of {directory.path}: its"
      f" fingerprint is {found.fingerprint!r}, expected {wanted!r}. Give the"
      " same encoder as when the directory was built, or build another."
    )
  return found


def _read(
  directory: SearchDirectory,
  upsert: str,
  bad_records: BadRecords,
  encoder: TextEncoder,
) -> Iterator[tuple[Document, Passage]]:
  """Yields documents with their passages, split as the directory was."""
  plan = directory.content["plan"]
  split = SplitConfig(**plan["split"])
  return read_document_passages(
    upsert,
    split,
    fields=FieldNames(**plan["fields"]),
    bad_records=bad_records,
    tokenizer=encoder.tokenizer if split.unit == "tokens" else None,
  )


def keep_modes(
  path: epath.Path, version: str, modes: SearchModes, *, wait: bool = False
) -> None:
  """Keeps what the modes of search were measured to find, as a new version.

  Args:
    path: the directory.
    version: that they were measured on.
    modes: what was measured.
    wait: for another process that writes there.

  Raises:
    ValueError: another version is in use by now, or somebody else writes there.
    OSError: the disk is full.
  """
  with lock(
    path,
    kind=KIND,
    wait=wait,
    remedy="What was there before is still in use: measure again.",
  ):
    versions.remove_unused(root_of(path))
    directory = SearchDirectory(path)
    now = directory.version
    if now.name != version:
      raise ValueError(
        f"{path} was updated to {now.name!r} while the modes of search were"
        f" measured on {version!r}. Expected one of both at a time. Measure"
        " again."
      )

    def write(made: versions.Draft) -> None:
      if now.bm25 is not None:
        now.bm25.save(made.folder / BM25)
      if now.twins is not None:
        write_twins(made.folder / TWINS, now.twins, now.twins.rows)
      certificate = now.index.certificate or certify(made.index, speed_secs=0.0)
      made.index.certificate = dataclasses.replace(certificate, modes=modes)

    _add_version(directory, [], [], [], write)
    versions.remove_unused(root_of(path))


def _write(
  directory: SearchDirectory,
  changes: Changes,
  encoder: TextEncoder,
  questions: Sequence[str],
  speed_secs: float,
) -> None:
  """Writes a version, complete, and only then puts it into use."""
  now = directory.version

  def write(made: versions.Draft) -> None:
    if now.bm25 is not None:
      logging.info("Indexing the words of %d passages.", len(made.passages))
      words = Bm25Index.build(
        made.passages,
        passages_fingerprint=made.passages.fingerprint,
        settings=now.bm25.settings,
      )
      words.save(made.folder / BM25)
    if directory.content["plan"]["drop_duplicate_texts"]:
      numbers, came = changes.twins
      there = now.twins.each(numbers) if now.twins else ()
      twins = itertools.chain(there, came)
      write_twins(made.folder / TWINS, twins, changes.twin_rows)
    found = certify(
      made.index, _sample(directory, questions), speed_secs=speed_secs
    )
    before = now.index.certificate
    made.index.certificate = dataclasses.replace(
      found,
      coverage=_coverage(directory, changes, encoder),
      modes=before.modes if before else None,
    )

  embeddings = _embed(directory, changes, encoder)
  _add_version(directory, changes.gone, changes.added, embeddings, write)


def _add_version(
  directory: SearchDirectory,
  gone_rows: Sequence[int],
  came: Sequence[Passage],
  came_embeddings: Sequence[Float[np.ndarray, "R"]] | np.ndarray,
  write: Callable[[versions.Draft], None],
) -> None:
  """Makes a version of the one in use, and puts it into use.

  Args:
    directory: locked.
    gone_rows: of the passages as they are now, rising.
    came: passages behind them.
    came_embeddings: of these.
    write: what else belongs to the version, into its folder; certifies it.
  """
  now, old = directory.version, directory.built[1]
  gone, added = np.zeros(0, np.int64), []
  embeddings = np.zeros((0, old.embedding_dim), np.float32)
  rows = np.array(gone_rows, np.int64)
  if isinstance(now.passages, UpdatedPassages):
    assert isinstance(now.index, UpdatedIndex)
    rows = now.passages.gaps.rows(rows)
    gone, added = now.passages.gaps.gone, list(now.passages.added or ())
    embeddings = now.index.added
  left = np.ones(len(added), bool)
  left[rows[rows >= old.num_passages] - old.num_passages] = False
  added = [p for p, stays in zip(added, left, strict=True) if stays]
  gone = np.union1d(gone, rows[rows < old.num_passages])
  embeddings = embeddings[left]
  if len(came):
    embeddings = np.concatenate([embeddings, came_embeddings])

  def save(folder: epath.Path) -> None:
    made = versions.draft(
      folder, directory.built, gone, [*added, *came], embeddings
    )
    write(made)
    versions.finish(directory.root, made)

  versions.start_updates(directory.root)
  updates = directory.root / UPDATES
  name = versions.add(updates, versions.VERSION, save)
  versions.switch(updates, name)


def _coverage(
  directory: SearchDirectory, changes: Changes, encoder: TextEncoder
) -> Coverage | None:
  """Returns how much is embedded when changes are made; None: not known."""
  certificate = directory.index.certificate
  if certificate is None or certificate.coverage is None:
    return None
  tokens, lost = certificate.coverage.tokens, certificate.coverage.lost
  plan = directory.content["plan"]
  length = plan["passage_length"] or encoder.max_tokens
  gone = directory.passages.get(changes.gone)
  for sign, passages in ((-1, gone), (1, changes.added)):
    for start in range(0, len(passages), _BLOCK):
      some = passages[start : start + _BLOCK]
      tokenized = TokenizedPassages(some, encoder.tokenizer, length)
      tokens += sign * (tokenized.num_tokens or 0)
      lost += sign * (tokenized.num_lost or 0)
  # Of what was left out nobody knows which documents held it.
  return Coverage(tokens=max(tokens, 0), lost=max(lost, 0), left_out_chars=None)


def _sample(
  directory: SearchDirectory, questions: Sequence[str]
) -> Float[np.ndarray, "B R"] | None:
  return directory.embed_questions(questions) if questions else None


def _embed(
  directory: SearchDirectory, changes: Changes, encoder: TextEncoder
) -> Float[np.ndarray, "N R"]:
  """Returns the embeddings of what comes; of texts that were there, theirs."""
  same = np.array(changes.same_text, np.int64)
  dim = directory.index.embedding_dim
  embeddings = np.zeros((len(same), dim), np.float32)
  if np.any(same >= 0):
    embeddings[same >= 0] = directory.index.embeddings[same[same >= 0]]
  todo = np.flatnonzero(same < 0)
  plan = directory.content["plan"]
  length = plan["passage_length"] or encoder.max_tokens
  embedder = encoder.passage_embedder(plan["embed_batch_size"])
  params = embedder.place(encoder.params)
  for start in range(0, len(todo), _BLOCK):
    some = todo[start : start + _BLOCK]
    tokenized = TokenizedPassages(
      [changes.added[i] for i in some], encoder.tokenizer, length
    )
    embeddings[some] = embedder.rows(
      params,
      functools.partial(encoder.passage_rows, tokenized),
      np.arange(len(some)),
    )
    logging.info("Embedded %d of %d passages.", start + len(some), len(todo))
  bad = bad_rows(embeddings)
  if len(bad):
    ids = [changes.added[row].id for row in bad[:5]]
    raise ValueError(
      f"The embeddings of {len(bad)} of {len(same)} passages hold NaN, infinity"
      f" or huge numbers: {ids}. Expected finite numbers. Nothing was changed;"
      " check the encoder's weights."
    )
  return embeddings
