"""What an update changes in the passages of a search directory.

In: the passages of the version in use, documents to add or replace, and ids to
delete. Out: the rows to delete, the passages to add, and a report.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import itertools
import re
from typing import Any

from jaxtyping import Int
import numpy as np

from rag_jax.artifacts import fingerprint_lines
from rag_jax.corpus.document import Document
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import Passages
from rag_jax.corpus.passages import own_title
from rag_jax.corpus.report import CorpusReport
from rag_jax.corpus.text_files import shorten
from rag_jax.corpus.twins import Twins
from rag_jax.retrieval.certificate import Certificate
from rag_jax.terminal import one_line

# A rebuild is recommended above one of these: the share of passages that
# changed, and the loss of index_recall.
REBUILD_SHARE = 0.1
REBUILD_DRIFT = 0.01
_DRIFT_K = 10
_SHOWN = 5  # ids in a line
_PART = re.compile(r"(.+)#\d+", re.DOTALL)  # a passage of a longer document


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
  """What an update did.

  Attributes:
    version: the version in use afterwards; "": what was built.
    added: ids of new documents.
    changed: ids of documents of which a passage was changed, added or deleted.
    deleted: ids of `delete`.
    unchanged: number of documents that were the same already.
    passages_added: number of passages that were stored.
    embedded: number of these that were embedded. The others have a title and
      text that were embedded before.
    passages_removed: number of passages that are not found any more.
    twins: number of passages that have the text of another and are found with
      it; None if the update changed none of them.
    changed_share: passages added or deleted since the build, as a share of the
      passages of the build.
    before: the certificate of the build.
    now: the certificate of the version in use.
  """

  version: str
  added: tuple[str, ...]
  changed: tuple[str, ...]
  deleted: tuple[str, ...]
  unchanged: int
  passages_added: int
  embedded: int
  passages_removed: int
  twins: int | None
  changed_share: float
  before: Certificate
  now: Certificate

  @property
  def drift(self) -> float:
    """Index recall at 10 now, minus the index recall of the build."""
    return self.now.recall(_DRIFT_K).mean - self.before.recall(_DRIFT_K).mean

  @property
  def rebuild(self) -> bool:
    """Whether building the directory anew is recommended.

    Never after an update that changed nothing. A loss of recall counts if the
    old recall is above the confidence interval of the new one.
    """
    if not (self.passages_added or self.passages_removed):
      return False
    before, now = (c.recall(_DRIFT_K) for c in (self.before, self.now))
    lost = self.drift < -REBUILD_DRIFT and now.high < before.mean
    return lost or self.changed_share > REBUILD_SHARE

  def text(self) -> str:
    """Returns the report as text."""
    lines = [
      f"{len(ids):,} documents {what}{_some(ids)}"
      for what, ids in (
        ("added", self.added),
        ("changed", self.changed),
        ("deleted", self.deleted),
      )
    ]
    lines.append(f"{self.unchanged:,} documents as they were")
    if self.passages_added or self.passages_removed or self.twins is not None:
      lines.append(
        f"{self.passages_added:,} passages added ({self.embedded:,} embedded),"
        f" {self.passages_removed:,} removed: version {self.version}"
      )
    else:
      lines.append("Nothing changed; no version was made.")
    if self.twins is not None:
      lines.append(
        f"{self.twins:,} passages have the text of another, and are found as"
        " long as one passage with that text is left"
      )
    before, now = (c.recall(_DRIFT_K) for c in (self.before, self.now))
    lines.append(
      f"index_recall@{now.k} {now.mean:.4f} (95% interval {now.low:.4f} to"
      f" {now.high:.4f}), {before.mean:.4f} as built: drift {self.drift:+.4f}"
    )
    lines.append(
      f"{self.changed_share:.1%} of the passages changed since it was built"
    )
    if self.rebuild:
      lines.append(
        f"That is much (more than {REBUILD_SHARE:.0%}, or {REBUILD_DRIFT} of"
        " recall): searches get slower and may find less. Build a new directory"
        " of all documents with rag-jax build-index."
      )
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
  """What an update has to write.

  Rows and numbers are those of the version in use, unless said otherwise.

  Attributes:
    gone: rows of passages to delete, in rising order.
    added: passages to add.
    same_text: for each added passage, a row with its title and text, or -1.
    twins: the twins after the update: numbers of twins that stay, and new ones.
    twin_rows: for each, the row of the passage with its text after the update.
    twins_changed: whether the update changes the twins.
  """

  gone: list[int]
  added: list[Passage]
  same_text: list[int]
  twins: tuple[list[int], list[Passage]]
  twin_rows: Int[np.ndarray, "T"]
  twins_changed: bool
  added_documents: tuple[str, ...]
  changed_documents: tuple[str, ...]
  deleted: tuple[str, ...]
  unchanged: int

  def __bool__(self) -> bool:
    """Returns whether there is anything to write."""
    return bool(self.gone or self.added or self.twins_changed)

  def report(
    self, version: str, changed_share: float, before: Certificate,
    now: Certificate,
  ) -> UpdateReport:  # fmt: skip
    """Returns the report on the version with these changes."""
    return UpdateReport(
      version=version,
      added=self.added_documents,
      changed=self.changed_documents,
      deleted=self.deleted,
      unchanged=self.unchanged,
      passages_added=len(self.added),
      embedded=self.same_text.count(-1),
      passages_removed=len(self.gone),
      twins=len(self.twin_rows) if self.twins_changed else None,
      changed_share=changed_share,
      before=before,
      now=now,
    )


def find_changes(
  now: Passages,
  upserts: Iterable[tuple[Document, Passage]],
  deletes: Sequence[str],
  *,
  drop_duplicate_texts: bool,
  report: CorpusReport,
  twins: Twins | None = None,
) -> Changes:
  """Returns what upserts and deletes change; reads all passages once.

  The passage of a document has its id. If there is no such passage, those of
  the document have the ids "id#0", "id#1" and so on.

  Args:
    now: the passages of the version in use.
    upserts: documents with their passages, which replace the old passages.
    deletes: ids of documents or of single passages.
    drop_duplicate_texts: a passage with the title and text of another becomes
      its twin, which is found when the other is deleted.
    report: counts the twins and the passages of upserts.
    twins: of the version in use.

  Raises:
    ValueError: an id to delete does not exist, or is also among the upserts; or
      no passage would be left.
  """
  if twins is None:
    twins = Twins(np.zeros(0, np.int64))
  num = len(now)  # twins get the row numbers behind the passages
  # Dicts, not sets: they keep the order of the documents.
  documents: dict[str, str] = {}  # id: where it was read
  kept: set[int] = set()
  new: list[tuple[str, Passage]] = []
  replaced: set[int] = set()
  with_row: set[str] = set()  # ids of documents with a passage in `now`
  for document, passage in upserts:
    documents[document.id] = document.where
    row = now.row_of(passage.id)
    old = () if row is None else (now[row],)
    if row is None and (twin := twins.number_of(passage.id)) is not None:
      row, old = num + twin, twins.get([twin])
    if row is not None:
      with_row.add(document.id)
      if old == (passage,):
        kept.add(row)
        continue
      replaced.add(row)
    new.append((document.id, passage))
  both = [id for id in dict.fromkeys(deletes) if id in documents]
  if both:
    raise ValueError(
      f"{shorten(both, 200)} are to be deleted, but are also among the"
      " documents to add; expected one of both. Leave them out of one."
    )
  texts = [_text(passage) for _, passage in new]
  rows_of, with_text = _scan(
    now, twins, documents.keys() | set(deletes), set(texts)
  )
  missing = [id for id in dict.fromkeys(deletes) if id not in rows_of]
  if missing:
    raise ValueError(
      f"{len(missing)} ids to delete are not there: {shorten(missing, 200)}."
      f" Expected ids of documents like {now[0].id!r}. Nothing was changed;"
      " correct these ids or leave them out."
    )
  deleted = {row for id in deletes for row in rows_of[id]}
  of_documents = {row for id in documents for row in rows_of.get(id, ())}
  gone = (of_documents - kept) | replaced | deleted
  made = _ChangesBuilder(now, twins, gone)
  came = set()
  for (document, passage), text in zip(new, texts, strict=True):
    first = made.add(
      passage, text, with_text.get(text, []), drop_duplicate_texts
    )
    if first:
      what = f"passage {passage.id!r} has the text of {first}"
      report.drop("duplicate_text", f"{documents[document]}: {what}")
    came.add(document)
  report.passages += len(made.added) + sum(row < num for row in kept)
  made.promote_twins()
  if sum(row < num for row in gone) == num and not made.added:
    raise ValueError(
      f"All {num} passages would be deleted; expected at least one to be left."
      " Nothing was changed; remove the directory instead."
    )
  there = {id for id in documents if id in rows_of} | with_row
  altered = {
    id
    for id in there
    if id in came or gone & {*rows_of.get(id, ())}
  }  # fmt: skip
  return made.changes(
    added_documents=tuple(d for d in documents if d in came - there),
    changed_documents=tuple(d for d in documents if d in altered),
    deleted=tuple(dict.fromkeys(deletes)),
    unchanged=sum(d not in altered and d not in came for d in documents),
  )


def _scan(
  now: Passages, twins: Twins, ids: set[str], texts: set[str]
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
  """Returns the rows of each document of `ids`, and of each text of `texts`.

  The rows of documents include twins, numbered behind the passages.
  """
  whole: dict[str, list[int]] = {}
  parts: dict[str, list[int]] = {}
  with_text: dict[str, list[int]] = {}
  for row, passage in enumerate(itertools.chain(now, twins)):
    if passage.id in ids:
      whole[passage.id] = [row]
    part = _PART.fullmatch(passage.id)
    if part and part[1] in ids:
      parts.setdefault(part[1], []).append(row)
    if row < len(now) and texts and (text := _text(passage)) in texts:
      with_text.setdefault(text, []).append(row)
  return parts | whole, with_text


class _ChangesBuilder:
  """Collects the passages to add, and the passage that each twin belongs to.

  Attributes:
    added: passages to add.
  """

  def __init__(self, now: Passages, twins: Twins, gone: set[int]):
    """Takes the version in use and the rows to delete, also those of twins."""
    self._now, self._twins, self._gone = now, twins, gone
    self.added: list[Passage] = []
    self._same_text: list[int] = []
    self._met: dict[str, int] = {}  # text: place in `added`
    # For each old twin, and for each new one, the row with its text; or, for a
    # passage to add, -1 - its place in `added`.
    self._owners = np.array(twins.rows, np.int64)
    self._stays = np.ones(len(twins), bool)
    self._stays[[row - len(now) for row in gone if row >= len(now)]] = False
    self._new: list[tuple[Passage, int]] = []

  def add(
    self, passage: Passage, text: str, rows: list[int], drop: bool
  ) -> str:
    """Adds a passage, or a twin; returns the id of the passage it is a twin of.

    Args:
      passage: to add.
      text: what `_text` returns for it.
      rows: of old passages with this text.
      drop: whether it may become a twin.
    """
    left = next((row for row in rows if row not in self._gone), None)
    if drop and left is not None:
      self._new.append((passage, left))
      return self._now[left].id
    if drop and text in self._met:
      place = self._met[text]
      self._new.append((passage, -1 - place))
      return self.added[place].id
    self._met[text] = len(self.added)
    self.added.append(passage)
    # Titles are embedded too, also those made from file names.
    same = (row for row in rows if self._now[row].title == passage.title)
    self._same_text.append(next(same, -1))
    return ""

  def promote_twins(self) -> None:
    """Gives the twins of deleted passages to added ones with the same text.

    If no added passage has the text, the first twin becomes a passage.
    """
    for row in np.intersect1d(self._twins.rows, sorted(self._gone)).tolist():
      numbers = [n for n in self._twins.numbers_of(row) if self._stays[n]]
      if not numbers:
        continue
      text = _text(self._now[row])
      if text not in self._met:
        first = numbers.pop(0)
        self.add(self._twins.get([first])[0], text, [row], drop=False)
        self._stays[first] = False
      self._owners[numbers] = -1 - self._met[text]

  def changes(self, **fields: Any) -> Changes:
    """Returns everything to write; `fields` are about documents."""
    gone = np.array(sorted(r for r in self._gone if r < len(self._now)), int)
    owners = np.concatenate(
      [self._owners[self._stays], np.array([o for _, o in self._new], int)]
    )
    left = len(self._now) - len(gone)
    rows = np.where(
      owners < 0, left - 1 - owners, owners - np.searchsorted(gone, owners)
    )
    return Changes(
      gone=gone.tolist(),
      added=self.added,
      same_text=self._same_text,
      twins=(
        np.flatnonzero(self._stays).tolist(),
        [passage for passage, _ in self._new],
      ),
      twin_rows=rows.astype(np.int64),
      twins_changed=bool(self._new) or not self._stays.all(),
      **fields,
    )


def _text(passage: Passage) -> str:
  """Identifies the title and the text of a passage."""
  return fingerprint_lines([own_title(passage), passage.text])


def _some(ids: Sequence[str]) -> str:
  if not ids:
    return ""
  more = ", ..." if len(ids) > _SHOWN else ""
  return f": {', '.join(map(one_line, ids[:_SHOWN]))}{more}"
