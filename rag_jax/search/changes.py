"""What an update changes: which passages go, which come, and what is reported.

In: the passages that are there, documents to put among them, ids to take out.
Out: rows that go, passages that come, and the counts that a person reads.
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

REBUILD_SHARE = 0.1  # of the passages that were built, when more changed
REBUILD_DRIFT = 0.01  # of index_recall, when more was lost
_DRIFT_K = 10
_SHOWN = 5  # ids in a line
_PART = re.compile(r"(.+)#\d+", re.DOTALL)  # a passage of a longer document


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
  """What an update did.

  Attributes:
    version: in use afterwards; "" = what was built.
    added: ids of documents that were not there.
    changed: ids of documents of which a passage changed, came or went.
    deleted: ids that were taken out.
    unchanged: how many documents were there already as they are.
    passages_added: that were stored; of these, as many as `embedded` were
      embedded, and the others have a title and text that were there before.
    embedded: passages.
    passages_removed: that are not found any more.
    twins: passages that have the text of another and are found with it, if
      there are others than before; else None.
    changed_share: passages that came or went since the build, by those built.
    before: the certificate of what was built.
    now: that of what is searched now.
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
    """Index recall now less that of what was built, at 10 passages."""
    return self.now.recall(_DRIFT_K).mean - self.before.recall(_DRIFT_K).mean

  @property
  def rebuild(self) -> bool:
    """Whether the directory had better be built anew.

    Never after an update that changed nothing. A recall that fell counts where
    it is not one of the values that the few questions leave possible.
    """
    if not (self.passages_added or self.passages_removed):
      return False
    before, now = (c.recall(_DRIFT_K) for c in (self.before, self.now))
    lost = self.drift < -REBUILD_DRIFT and now.high < before.mean
    return lost or self.changed_share > REBUILD_SHARE

  def text(self) -> str:
    """Returns what a person reads."""
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
        f"{self.passages_added:,} passages came ({self.embedded:,} embedded),"
        f" {self.passages_removed:,} went: version {self.version}"
      )
    else:
      lines.append("Nothing changed; no version was made.")
    if self.twins is not None:
      lines.append(
        f"{self.twins:,} passages have the text of another, and are found as"
        " long as one of them is there"
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
        " of all documents with tools/build_index.py."
      )
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
  """What has to be written.

  Attributes:
    gone: rows of the passages as they are now, rising.
    added: passages that come.
    same_text: for each of these, a row of now with its title and text, or -1.
    twins: those that there will be: numbers of twins of now, then passages.
    twin_rows: for each, the row that the passage with its text will have.
    twins_changed: whether they are other twins than now.
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
    """Whether there is anything to write."""
    return bool(self.gone or self.added or self.twins_changed)

  def report(
    self, version: str, changed_share: float, before: Certificate,
    now: Certificate,
  ) -> UpdateReport:  # fmt: skip
    """Returns what is said of the version that was made of them."""
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

  The passages of a document are the one with its id, or, if there is none,
  those named "id#0", "id#1" and so on.

  Args:
    now: the passages that are there.
    upserts: passages of documents that replace what is there of them.
    deletes: ids of documents or of single passages.
    drop_duplicate_texts: keep passages whose title and text another has as its
      twins: they are found when it goes.
    report: where these are counted, and the passages of upserts.
    twins: of the passages that are there.

  Raises:
    ValueError: an id is not there, or both in upserts and deletes; or nothing
      would be left.
  """
  if twins is None:
    twins = Twins(np.zeros(0, np.int64))
  # Twins are numbered behind the passages.
  num = len(now)
  # Dicts, not sets: they keep the order of the documents.
  documents: dict[str, str] = {}  # id: where
  kept: set[int] = set()
  new: list[tuple[str, Passage]] = []
  replaced: set[int] = set()
  with_row: set[str] = set()  # documents
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
      " documents to be put in; expected one of both. Leave them out of one."
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
      " correct or leave out these."
    )
  deleted = {row for id in deletes for row in rows_of[id]}
  of_documents = {row for id in documents for row in rows_of.get(id, ())}
  gone = (of_documents - kept) | replaced | deleted
  made = _Writing(now, twins, gone)
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
      f"All {num} passages would be deleted; expected one to be left to"
      " search. Nothing was changed; remove the directory instead."
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

  Twins are among the first, numbered behind the passages.
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


class _Writing:
  """What comes, and which passage each twin will belong to.

  Attributes:
    added: passages that come.
  """

  def __init__(self, now: Passages, twins: Twins, gone: set[int]):
    """Takes what is there, and the rows that go, of twins behind passages."""
    self._now, self._twins, self._gone = now, twins, gone
    self.added: list[Passage] = []
    self._same_text: list[int] = []
    self._met: dict[str, int] = {}  # text: place in `added`
    # For each twin of now, and for each that comes, the row of now that has its
    # text, or, below 0, -1 - the place in `added`.
    self._owners = np.array(twins.rows, np.int64)
    self._stays = np.ones(len(twins), bool)
    self._stays[[row - len(now) for row in gone if row >= len(now)]] = False
    self._new: list[tuple[Passage, int]] = []

  def add(
    self, passage: Passage, text: str, rows: list[int], drop: bool
  ) -> str:
    """Takes a passage that comes; returns the id of what it is a twin of."""
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
    # What was embedded has the title in it, also one that is a file's name.
    same = (row for row in rows if self._now[row].title == passage.title)
    self._same_text.append(next(same, -1))
    return ""

  def promote_twins(self) -> None:
    """Gives the twins of passages that go to others with their text.

    If no passage that comes has it, the first of them becomes a passage.
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
    """Returns all of it."""
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
  return fingerprint_lines([own_title(passage), passage.text])


def _some(ids: Sequence[str]) -> str:
  if not ids:
    return ""
  more = ", ..." if len(ids) > _SHOWN else ""
  return f": {', '.join(map(one_line, ids[:_SHOWN]))}{more}"
