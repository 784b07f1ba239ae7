"""Updates the documents of a search directory while it is being searched.

In: a search directory, documents to add or replace, and ids to delete. Out: a
new version of the directory, in use once it is complete. A reader sees the old
version or the new one, and an interrupted update leaves the old one.

Only new and changed passages are embedded; everything else is shared with the
build. The words are indexed anew, since the weight of a word depends on all
passages.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import itertools

from absl import logging
from etils import epath
from jaxtyping import Float
import numpy as np

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
from rag_jax.search.directory import OpenedDirectory
from rag_jax.search.directory import locked
from rag_jax.search.text_encoder import TextEncoder
from rag_jax.search.text_encoder import chosen_fields
from rag_jax.search.text_encoder import open_checkpoint
from rag_jax.search.updated_index import UpdatedIndex
from rag_jax.search.updated_passages import UpdatedPassages

_BLOCK = 16_384  # passages that are tokenized and embedded at a time


def update_search_directory(
  path: epath.PathLike,
  *,
  upsert: str = "",
  delete: Sequence[str] = (),
  encoder: str = "",
  on_bad_record: str = "",
  questions: Sequence[str] = (),
  wait: bool = False,
) -> UpdateReport:
  """Makes a new version of a search directory, and returns what it changed.

  The passages that were added since the build, and their embeddings, are held
  in memory; the passages of the build are not. Arguments and errors as in
  `rag_jax.SearchDirectory.update`.
  """
  if not upsert and not delete:
    raise ValueError(
      f"Nothing is to be put into {path}, and nothing to be deleted; expected"
      " documents or ids. Give --upsert, --delete or --compact."
    )
  with locked(path, again="update again", wait=wait) as directory:
    passage_encoder = _passage_encoder(directory, encoder, bool(upsert))
    plan = directory.content["plan"]
    bad_records = BadRecords(on_bad_record or plan["on_bad_record"])
    changes = find_changes(
      directory.passages,
      _read(directory, upsert, bad_records, passage_encoder)
      if upsert and passage_encoder
      else (),
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
      _write(directory, changes, passage_encoder, questions)
      directory.reload()
    index = directory.index
    before, after = directory.built[1].certificate, index.certificate
    assert after is not None, "both ways of making a version certify it"
    if before is None or before.sample != after.sample:
      logging.info("Measuring the index of the build in the same way.")
      sample = directory.sample(questions)
      before = certify(directory.built[1], sample, speed_secs=0.0)
    share = index.changed_share if isinstance(index, UpdatedIndex) else 0.0
    return changes.report(directory.version.name, share, before, after)


def _warn_of_twins(directory: OpenedDirectory) -> None:
  """Warns that a deleted text may also have been that of other documents."""
  report = directory.built[0].config.get("report", {})
  if number := report.get("dropped", {}).get("duplicate_text", 0):
    logging.warning(
      "When %s was built, documents with the text of another document were left"
      " out and their ids forgotten, %d of them. If one of those should still"
      " be found, give it again with --upsert.",
      *(directory.path, number),
    )


def _passage_encoder(
  directory: OpenedDirectory, encoder: str, needed: bool
) -> TextEncoder | None:
  """Returns the encoder that embedded the passages of a directory.

  None if it is neither in the directory nor `needed`.
  """
  wanted = directory.content["passage_encoder_fingerprint"]
  if not encoder:
    if directory.encoder.fingerprint == wanted:
      return directory.encoder
    if not needed:
      logging.warning(
        "%s does not hold the encoder of its passages. How much of them is not"
        " embedded is no longer known after these are deleted; with --encoder"
        " it would be.",
        directory.path,
      )
      return None
    raise ValueError(
      f"{directory.path} holds the encoder of questions alone; its passages"
      f" were embedded by another one, with fingerprint {wanted!r}. Expected"
      " that encoder too. Give it as --encoder."
    )
  chosen = chosen_fields(directory.content["plan"])
  found = open_checkpoint(encoder, "passage", chosen)
  if found.fingerprint != wanted:
    raise ValueError(
      f"{encoder} is not what embedded the passages of {directory.path}: its"
      f" fingerprint is {found.fingerprint!r}, expected {wanted!r}. Give the"
      " encoder of the build, or build another directory."
    )
  return found


def _read(
  directory: OpenedDirectory,
  upsert: str,
  bad_records: BadRecords,
  encoder: TextEncoder,
) -> Iterator[tuple[Document, Passage]]:
  """Yields documents with their passages, split as in the build."""
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
  path: epath.PathLike, version: str, modes: SearchModes, *, wait: bool = False
) -> None:
  """Stores the measured search modes in the certificate of a new version.

  Args:
    path: the directory.
    version: the version that the modes were measured on.
    modes: what was measured.
    wait: for another process that writes there; False: raise.

  Raises:
    ValueError: another version is in use now, or another process writes there.
    OSError: the disk is full.
  """
  with locked(path, again="measure again", wait=wait) as directory:
    now = directory.version
    if now.name != version:
      raise ValueError(
        f"{path} was updated to {now.name!r} while the modes of search were"
        f" measured on {version!r}. Expected no update during that time."
        " Measure again."
      )

    def write(made: versions.Draft) -> None:
      if now.bm25 is not None:
        now.bm25.save(made.folder / versions.BM25)
      if now.twins is not None:
        write_twins(made.folder / versions.TWINS, now.twins, now.twins.rows)
      certificate = now.index.certificate or certify(made.index, speed_secs=0.0)
      made.index.certificate = dataclasses.replace(certificate, modes=modes)

    _add_version(directory, [], [], [], write)


def _write(
  directory: OpenedDirectory,
  changes: Changes,
  encoder: TextEncoder | None,
  questions: Sequence[str],
) -> None:
  """Writes a complete version, and only then puts it into use."""
  now = directory.version

  def write(made: versions.Draft) -> None:
    if now.bm25 is not None:
      logging.info("Indexing the words of %d passages.", len(made.passages))
      words = Bm25Index.build(
        made.passages,
        passages_fingerprint=made.passages.fingerprint,
        settings=now.bm25.settings,
      )
      words.save(made.folder / versions.BM25)
    if directory.content["plan"]["drop_duplicate_texts"]:
      numbers, added = changes.twins
      kept = now.twins.each(numbers) if now.twins else ()
      twins = itertools.chain(kept, added)
      write_twins(made.folder / versions.TWINS, twins, changes.twin_rows)
    found = certify(
      made.index,
      directory.sample(questions),
      speed_secs=directory.speed_secs,
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
  directory: OpenedDirectory,
  gone_rows: Sequence[int],
  new: Sequence[Passage],
  new_embeddings: Sequence[Float[np.ndarray, "R"]] | np.ndarray,
  write: Callable[[versions.Draft], None],
) -> None:
  """Makes a version from the one in use, and puts it into use.

  Args:
    directory: locked.
    gone_rows: deleted rows of the version in use, in rising order.
    new: passages that are added to it.
    new_embeddings: of these.
    write: writes the rest of the version into its folder, and certifies it.
  """
  now, built = directory.version, directory.built[1]
  gone, added = np.zeros(0, np.int64), []
  embeddings = np.zeros((0, built.embedding_dim), np.float32)
  rows = np.array(gone_rows, np.int64)
  if isinstance(now.passages, UpdatedPassages):
    assert isinstance(now.index, UpdatedIndex)
    rows = now.passages.gaps.rows(rows)
    gone, added = now.passages.gaps.gone, list(now.passages.added or ())
    embeddings = now.index.added
  left = np.ones(len(added), bool)
  left[rows[rows >= built.num_passages] - built.num_passages] = False
  added = [p for p, stays in zip(added, left, strict=True) if stays]
  gone = np.union1d(gone, rows[rows < built.num_passages])
  embeddings = embeddings[left]
  if len(new):
    embeddings = np.concatenate([embeddings, new_embeddings])

  def save(folder: epath.Path) -> None:
    made = versions.draft(
      folder, directory.built, gone, [*added, *new], embeddings
    )
    write(made)
    versions.finish(directory.root, made)

  versions.start_updates(directory.root)
  updates = directory.root / versions.UPDATES
  name = versions.add(updates, versions.VERSION, save)
  versions.switch(updates, name)


def _coverage(
  directory: OpenedDirectory, changes: Changes, encoder: TextEncoder | None
) -> Coverage | None:
  """Returns how many tokens are embedded after the changes; None: unknown."""
  certificate = directory.index.certificate
  if certificate is None or certificate.coverage is None or encoder is None:
    return None
  tokens, lost = certificate.coverage.tokens, certificate.coverage.lost
  length = directory.content["plan"]["passage_length"] or encoder.max_tokens
  gone = directory.passages.get(changes.gone)
  for sign, passages in ((-1, gone), (1, changes.added)):
    for start in range(0, len(passages), _BLOCK):
      some = passages[start : start + _BLOCK]
      tokenized = TokenizedPassages(
        some, encoder.tokenizer, length, encoder.wording
      )
      tokens += sign * (tokenized.num_tokens or 0)
      lost += sign * (tokenized.num_lost or 0)
  # Which documents the left-out characters came from is not known.
  return Coverage(tokens=max(tokens, 0), lost=max(lost, 0), left_out_chars=None)


def _embed(
  directory: OpenedDirectory, changes: Changes, encoder: TextEncoder | None
) -> Float[np.ndarray, "N R"]:
  """Returns the embeddings of the added passages.

  A passage whose title and text are in the directory gets the embedding there.
  """
  same = np.array(changes.same_text, np.int64)
  dim = directory.index.embedding_dim
  embeddings = np.zeros((len(same), dim), np.float32)
  if np.any(same >= 0):
    embeddings[same >= 0] = directory.index.embeddings[same[same >= 0]]
  todo = np.flatnonzero(same < 0)
  if not len(todo):
    return embeddings
  assert encoder is not None, "it is needed for what is put in"
  plan = directory.content["plan"]
  length = plan["passage_length"] or encoder.max_tokens
  embedder = encoder.passage_embedder(plan["embed_batch_size"])
  params = embedder.place(encoder.params)
  for start in range(0, len(todo), _BLOCK):
    some = todo[start : start + _BLOCK]
    tokenized = TokenizedPassages(
      [changes.added[i] for i in some],
      encoder.tokenizer,
      length,
      encoder.wording,
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
