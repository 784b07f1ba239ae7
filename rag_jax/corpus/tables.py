r"""Reads the rows of .tsv and .csv files.

In: a file whose first line names its columns (DPR's psgs_w100.tsv, any .csv),
or MS MARCO's collection.tsv, which is id<TAB>passage without column names. Out:
(where, object) pairs, as from a .jsonl file. `Rows` also reads tables without
column names, such as DPR's questions.
"""

from collections import deque
from collections.abc import Iterator, Mapping
import csv
import itertools
from typing import Any

from etils import epath

from rag_jax.corpus.document import FieldNames
from rag_jax.corpus.document import field_name
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.text_files import read_lines
from rag_jax.corpus.text_files import shorten

ENDS = (".tsv", ".csv")

_DELIMITERS = "\t,;"
# What people write above MS MARCO's two columns.
_PAIR_NAMES = (
  {"id", "pid", "docid", "doc_id", "passage_id"},
  {"passage", "text", "contents", "body"},
)


class Rows:
  """The rows of a table, with the lines that each was read from.

  A row whose double quote is never closed swallows the lines after it. `again`
  returns them: the next row then begins at the next line.
  """

  def __init__(
    self,
    path: epath.PathLike,
    delimiter: str,
    *,
    strict: bool = False,
    bad_records: BadRecords,
  ):
    """Opens a table.

    Args:
      path: an existing file, perhaps a .gz.
      delimiter: the character between columns.
      strict: whether nothing may follow a closing quote, as in a .csv. It is
        off for DPR's files, which have titles like `"Heroes" (song)`.
      bad_records: what to do with rows that cannot be read.
    """
    self._name, self._bad = str(path), bad_records
    self._lines = read_lines(path, bad_records=bad_records)
    self._returned = deque[tuple[int, str]]()
    self._taken: list[tuple[int, str]] = []  # lines of the last row
    self._dialect: dict[str, Any] = {"delimiter": delimiter, "strict": strict}
    self._reader = csv.reader(self._take(), **self._dialect)

  def _take(self) -> Iterator[str]:
    while True:
      if self._returned:
        line = self._returned.popleft()
      else:
        line = next(self._lines, None)
      if line is None:
        return
      self._taken.append(line)
      yield line[1]

  @property
  def where(self) -> str:
    """File and line at which the last row begins."""
    return f"{self._name}:{self._taken[0][0]}"

  @property
  def last_line(self) -> int:
    """The line at which the last row ends."""
    return self._taken[-1][0]

  def __iter__(self) -> Iterator[list[str]]:
    """Yields the rows; those that cannot be read are refused."""
    while True:
      self._taken.clear()
      try:
        row = next(self._reader, None)
      except csv.Error as error:
        remedy = (
          f"Expected columns of at most {csv.field_size_limit()} characters,"
          " with every double quote closed and those inside doubled. Correct"
          " the line, or convert longer texts to .jsonl."
        )
        if "\r" in self._taken[0][1].rstrip("\r\n"):
          remedy = (
            "There is a carriage return (CR) in this line. Expected lines that"
            " end in LF or CRLF. If all lines of the file end in CR, as those"
            f" of old programs, convert it: tr '\\r' '\\n' < {self._name} >"
            " new_file."
          )
        problem = ValueError(
          f"{self.where}: the row that starts here cannot be read ({error})."
          f" {remedy}"
        )
        problem.__cause__ = error
        self._bad.refuse("bad_record", problem)
        self.again()
        continue
      if row is None:
        return
      if row:
        yield row

  def again(self) -> None:
    """Goes back to the line after the one at which the last row began."""
    self._returned.extendleft(reversed(self._taken[1:]))
    self._reader = csv.reader(self._take(), **self._dialect)


def _check_row(
  row: list[str], names: list[str], rows: Rows, delimiter: str
) -> None:
  """Raises `ValueError` unless a row has one value for each column."""
  # After a quote that is not closed, csv reads up to the next quote and makes
  # one row out of several. With tabs we notice that by a tab and a line end in
  # one column, or by a line end in the last column. With commas we cannot,
  # since texts have both; there csv is strict about what follows a quote.
  tabs = delimiter == "\t"
  if tabs and (any("\n" in c and "\t" in c for c in row) or "\n" in row[-1]):
    raise ValueError(
      f"{rows.where}: a column starts with a double quote and goes on to line"
      f" {rows.last_line}: {shorten(next(c for c in row if chr(10) in c))}."
      " Expected the quote to be closed before the next tab. Close it, and"
      " double the quotes inside the text."
    )
  if len(row) != len(names):
    raise ValueError(
      f"{rows.where}: {len(row)} columns, {shorten(row, 120)}. Expected"
      f" {len(names)}, separated by {delimiter!r}: {shorten(names, 200)}."
      " Correct the line; if it is the last one, the file may be cut off: copy"
      " it again."
    )


def _first_row(path: epath.PathLike, delimiter: str) -> tuple[str, list[str]]:
  """Returns where the first row is, and its columns; ("", []) if none."""
  skipping = BadRecords("skip")
  rows = Rows(path, delimiter, bad_records=skipping)
  row = next(iter(rows), None)
  dropped = skipping.report.dropped
  if any(dropped.values()) if row else dropped["bad_record"]:
    # The column names are in an earlier line that cannot be read, or no line
    # is a row. This raises the error that names it.
    next(iter(Rows(path, delimiter, bad_records=BadRecords())))
  return (rows.where, row) if row else ("", [])


def sniff_delimiter(path: epath.PathLike) -> str:
  """Returns the column separator, by the file's name and its first line.

  DPR's .csv files have tabs, and lists with commas. Spreadsheets write
  semicolons in countries where numbers have decimal commas.
  """
  if epath.Path(path).name.lower().removesuffix(".gz").endswith(".tsv"):
    return "\t"
  _, line = next(read_lines(path, bad_records=BadRecords("skip")), (0, ""))
  if "\t" in line.strip():
    return "\t"
  return max(_DELIMITERS, key=line.count) if line.strip() else ","


def read_table(
  path: epath.PathLike, fields: FieldNames, bad_records: BadRecords
) -> Iterator[tuple[str, Mapping[str, Any]]]:
  r"""Yields (where, object) of the rows of a table; empty cells are left out.

  The first line names the columns. In a quoted column, quotes are doubled. Two
  columns without names are MS MARCO's id<TAB>passage, in which a quote has no
  special meaning.

  Args:
    path: an existing .tsv or .csv, perhaps a .gz.
    fields: which columns the table must have.
    bad_records: what to do with a row that cannot be used.

  Raises:
    ValueError: a row cannot be used; names the line. A wrong first line is
      never skipped, since all rows would then be wrong too.
  """
  delimiter = sniff_delimiter(path)
  where, names = _first_row(path, delimiter)
  if not names:
    for _ in read_lines(path, bad_records=bad_records):
      pass  # what cannot be read raises, or is counted
    return
  names = [name.strip() for name in names]
  id_, text = field_name("id", names, fields), field_name("text", names, fields)
  if id_ in names and text in names:
    twice = {name for name in names if name and names.count(name) > 1}
    if twice:
      raise ValueError(
        f"{where}: the first line names the column {min(twice)!r} more than"
        " once. Expected different names. Rename one of them."
      )
    needed = id_, text, fields.title
    yield from _named_rows(path, names, needed, delimiter, bad_records)
  elif delimiter == "\t" and len(names) == 2:
    yield from _pairs(path, fields, bad_records)
  else:
    raise ValueError(
      f"{where}: the first line is {shorten(names, 120)}. Expected the names of"
      f" the columns, {[fields.id, fields.text, fields.title]} and perhaps"
      " others, in any order, as in DPR's psgs_w100.tsv; or MS MARCO's two"
      " columns without names, an id and a passage with a tab between them. Add"
      " or correct that line."
    )


def _named_rows(
  path: epath.PathLike,
  names: list[str],
  needed: tuple[str, ...],
  delimiter: str,
  bad_records: BadRecords,
) -> Iterator[tuple[str, dict[str, str]]]:
  strict = delimiter != "\t"
  rows = Rows(path, delimiter, strict=strict, bad_records=bad_records)
  for row in itertools.islice(rows, 1, None):  # without the names
    try:
      _check_row(row, names, rows, delimiter)
    except ValueError as error:
      bad_records.refuse("bad_record", error)
      rows.again()
      continue
    cells = zip(names, row, strict=True)
    yield rows.where, {k: v for k, v in cells if v or k in needed}


def _pairs(
  path: epath.PathLike, fields: FieldNames, bad_records: BadRecords
) -> Iterator[tuple[str, dict[str, str]]]:
  name = str(path)
  for line, text in read_lines(path, bad_records=bad_records):
    cells = text.rstrip("\r\n").split("\t")
    heads = (cell.strip().lower() for cell in cells)
    if not text.strip() or (
      line == 1
      and len(cells) == 2
      and all(h in n for h, n in zip(heads, _PAIR_NAMES, strict=True))
    ):
      continue
    with bad_records.refusing("bad_record"):
      if len(cells) != 2:
        raise ValueError(
          f"{name}:{line}: {len(cells)} columns, {shorten(cells, 120)}."
          " Expected 2, an id and a passage with a tab between them, as in MS"
          " MARCO's collection.tsv. Correct the line; if it is the last one,"
          " the file may be cut off: copy it again."
        )
      yield f"{name}:{line}", {fields.id: cells[0], fields.text: cells[1]}
