"""The report on reading a corpus: counts, and where something was wrong.

In: every record that cannot be used, every document that is split or cut. Out:
counts and the first places of each kind, as a table and as JSON.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import re
from typing import Any, NoReturn

from rag_jax.config_rules import check_choice

# What is counted, and how the table describes it.
_COUNTS = {
  "documents": "documents read",
  "passages": "passages written",
  "split": "documents split into several passages",
  "broken": "passages that end inside a sentence or word that is too long",
  "cut": "passages cut off at split.max_chars characters",
  "shortened": "passages with a title that is too long, which was shortened",
  "mislabelled": "pages in another encoding than they say",
  "left_out": "pieces of base64 and other encoded data, left out",
}
_SHOWN_IF_ANY = ("cut", "shortened", "mislabelled", "left_out")
_DROPPED = {
  "empty": "without any text",
  "duplicate_id": "with an id that an earlier one has",
  "duplicate_text": "with the title and text of an earlier one",
  "undecodable": "not UTF-8, or damaged",
  "bad_record": "not as expected in another way",
}

_IN_FILE = re.compile(r"(.+?):(?=\d+:|data\[)", re.DOTALL)  # file:line:

_MAX_PLACES = 20  # kept per kind
_MAX_CHARS = 300  # kept of the description of one place


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
  """How much of a corpus is embedded.

  Attributes:
    tokens: number of tokens of all passages, with titles and end tokens.
    lost: how many of them lie beyond the length that is embedded.
    left_out_chars: characters of base64 and similar data that no passage
      holds; None if not known, as after an update.
  """

  tokens: int
  lost: int
  left_out_chars: int | None = 0

  def __str__(self) -> str:
    share = self.lost / max(self.tokens, 1)
    shown = "under 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"
    text = f"{shown} of the tokens ({self.lost:,} of {self.tokens:,})"
    if self.left_out_chars:
      text += f", and {self.left_out_chars:,} characters of encoded data"
    return text


@dataclasses.dataclass(slots=True, kw_only=True)
class CorpusReport:
  """Counts that grow while the passages are read.

  Attributes:
    documents: documents with an id and text, duplicates included.
    passages: passages written.
    split: documents that gave more than one passage.
    broken: passages that end inside a sentence or word that is longer than a
      passage may be. The next passage continues there, so nothing is lost.
    cut: passages whose end was cut off, as the settings ask.
    cut_chars: characters lost by that.
    shortened: passages without the whole title of their document.
    mislabelled: pages that name a wrong encoding, or none.
    left_out: pieces of base64 and similar data that no passage holds.
    left_out_chars: their length.
    other_files: files in a folder that no reader takes.
    coverage: how much of the passages is embedded; None if not known yet.
    dropped: number of records that were left out, by reason.
    places: for each kind above, its first places and what was found there.
  """

  documents: int = 0
  passages: int = 0
  split: int = 0
  broken: int = 0
  cut: int = 0
  cut_chars: int = 0
  shortened: int = 0
  mislabelled: int = 0
  left_out: int = 0
  left_out_chars: int = 0
  other_files: int = 0
  coverage: Coverage | None = None
  dropped: dict[str, int] = dataclasses.field(
    default_factory=lambda: dict.fromkeys(_DROPPED, 0)
  )
  places: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  def note(self, kind: str, place: str) -> None:
    """Keeps a place of `kind`, unless enough of them are kept already."""
    places = self.places.setdefault(kind, [])
    if len(places) < _MAX_PLACES:
      more = "..." if len(place) > _MAX_CHARS else ""
      places.append(place[:_MAX_CHARS] + more)

  def count(self, kind: str, place: str) -> None:
    """Adds one to the attribute `kind` and notes the place."""
    setattr(self, kind, getattr(self, kind) + 1)
    self.note(kind, place)

  def leave_out(self, num_chars: int, place: str) -> None:
    """Counts encoded data in a text that no passage will hold."""
    self.left_out_chars += num_chars
    self.count("left_out", f"{place}: {num_chars} characters")

  def drop(self, kind: str, place: str) -> None:
    """Counts a record that is left out under `kind`, a key of `dropped`."""
    self.dropped[kind] += 1
    self.note(kind, place)

  def content(self) -> dict[str, Any]:
    """Returns the report as JSON values, for instance for a manifest."""
    return dataclasses.asdict(self)

  @classmethod
  def from_content(cls, content: Mapping[str, Any]) -> "CorpusReport":
    """Returns the report that `content` was made from.

    Unknown names are ignored, missing ones keep their default: another version
    may have written it.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    kept = {k: v for k, v in content.items() if k in known}
    if kept.get("coverage") is not None:
      kept["coverage"] = Coverage(**kept["coverage"])
    report = cls(**kept)
    report.dropped = dict.fromkeys(_DROPPED, 0) | report.dropped
    return report

  def to_json(self) -> str:
    """Returns the report as JSON text."""
    return json.dumps(self.content(), indent=2, ensure_ascii=False) + "\n"

  def table(self) -> str:
    """Returns the report as text: what is not embedded, counts, places."""
    rows = [
      (count, text)
      for name, text in _COUNTS.items()
      if (count := getattr(self, name)) or name not in _SHOWN_IF_ANY
    ]
    if self.left_out:
      rows.append((self.left_out_chars, "characters of such data"))
    if self.cut:
      rows.append((self.cut_chars, "characters lost by that"))
    rows += [
      (count, f"dropped: {_DROPPED[kind]}")
      for kind, count in self.dropped.items()
    ]
    if self.other_files:
      rows.append((self.other_files, "other files in the folder, not read"))
    width = max(len(f"{count:,}") for count, _ in rows)
    lines = [f"{count:>{width},}  {text}" for count, text in rows]
    if self.coverage is not None:
      lines.insert(0, f"Not embedded: {self.coverage}")
    for kind, places in self.places.items():
      if kind == "split":  # nothing is wrong there; the JSON lists them
        continue
      total = self.dropped[kind] if kind in _DROPPED else getattr(self, kind)
      some = f"the first {len(places)} of " if total > len(places) else ""
      lines.append(f"{kind} ({some}{total:,}):")
      lines += _by_file(places)
    return "\n".join(lines)

  def __str__(self) -> str:
    return self.table()


def _by_file(places: Sequence[str]) -> Iterator[str]:
  """Yields the places; those in the same file are listed below its name.

  The files are in the order of their first places.
  """
  groups: dict[str, list[str]] = {}
  for number, place in enumerate(places):
    found = _IN_FILE.match(place)
    # A place that names no line of a file is a group of its own.
    groups.setdefault(found[1] if found else f"{number}\0", []).append(place)
  for file, inside in groups.items():
    if len(inside) == 1:
      yield f"  {inside[0]}"
      continue
    yield f"  {file} ({len(inside)}):"
    for place in inside:
      yield f"    {place.removeprefix(file).lstrip(':')}"


class BadRecords:
  """What to do with a record that cannot be used.

  Attributes:
    action: "fail" raises at the first one; "skip" counts it and continues.
    report: where it is counted.
  """

  ACTIONS = ("fail", "skip")

  def __init__(self, action: str = "fail", report: CorpusReport | None = None):
    """Creates a report if none is given.

    Raises:
      ValueError: there is no such action.
    """
    if problem := check_choice("on_bad_record", action, self.ACTIONS):
      raise ValueError(problem)
    self.action = action
    self.report = CorpusReport() if report is None else report

  def refuse(self, kind: str, error: ValueError) -> None:
    """Raises `error`, or counts it and returns.

    Args:
      kind: a key of `CorpusReport.dropped`.
      error: names file and line first.
    """
    if self.action == "fail":
      raise error
    self.report.drop(kind, str(error))

  def refusing(self, kind: str) -> "_Refusing":
    """Refuses the record for which the `with` block raises a `ValueError`."""
    return _Refusing(self, kind)


class _Refusing:
  """A class, since it is entered for every record and must be fast."""

  def __init__(self, bad_records: BadRecords, kind: str):
    self._bad_records, self._kind = bad_records, kind

  def __enter__(self) -> None: ...

  def __exit__(self, kind: object, error: object, trace: object) -> bool:
    if isinstance(error, ValueError):
      self._bad_records.refuse(self._kind, error)
      return True
    return False


def raise_empty(source: str, report: CorpusReport) -> NoReturn:
  """Raises the error for a corpus without any passage."""
  raise ValueError(
    f"{source} holds no passages: nothing was found, or nothing is left."
    " Expected at least one document with an id and text. Is it the right"
    " file or folder, was it copied completely, and do the names of its fields"
    f" fit? What was read:\n{report.table()}"
  )
