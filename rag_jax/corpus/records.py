"""Text files, line by line, with the place of everything that is wrong.

In: the path of a UTF-8 file, gzip-compressed if its name ends in .gz. Out: its
text, its lines, or the JSON objects on them, each with its line number.
"""

import codecs
from collections.abc import Iterator, Mapping
import difflib
import gzip
import json
from typing import Any, BinaryIO, cast
import zlib

from etils import epath

from rag_jax.corpus.encodings import bom_encoding
from rag_jax.corpus.encodings import likely_encoding
from rag_jax.corpus.report import BadRecords

# What `json` makes of each kind of value, and what to call it.
_TYPE_NAMES: dict[type, str] = {
  str: "a string",
  int: "a whole number",
  float: "a number",
  bool: "true or false",
  list: "a list",
  dict: "an object",
  type(None): "null",
}

_GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)

FieldTypes = Mapping[str, type | tuple[type, ...]]


def shorten(value: object, width: int = 60) -> str:
  """Returns `repr(value)`, cut to `width` characters."""
  # A string is cut first: the repr of a whole book is another book.
  shown = repr(value[:width] if isinstance(value, str) else value)
  return shown if len(shown) <= width else shown[: width - 3] + "..."


def find_file(path: epath.PathLike, expected: str) -> epath.Path:
  """Returns `path` if it is a file.

  Args:
    path: where the file should be; `~` is the home folder.
    expected: which files are read, for the message.

  Raises:
    FileNotFoundError: there is nothing; names the nearest files there are.
    ValueError: it is a folder.
  """
  found = epath.Path(path).expanduser()
  if found.is_dir():
    inside = sorted(p.name for p in found.iterdir())
    raise ValueError(
      f"{path} is a folder, not a file. Expected {expected}. Give the path of"
      f" one file; the folder holds {shorten(inside, 200)}."
    )
  if not found.exists():
    folder = found.parent
    if not folder.is_dir():
      raise FileNotFoundError(
        f"There is no file {path}: its folder {folder} does not exist."
        f" Expected {expected}. Correct the path."
      )
    names = sorted(p.name for p in folder.iterdir() if not p.is_dir())
    near = difflib.get_close_matches(found.name, names, n=3, cutoff=0.5)
    shown = (
      f"The nearest names in {folder} are {near}"
      if near
      else (f"The files in {folder} are {shorten(names, 200)}")
    )
    raise FileNotFoundError(
      f"There is no file {path}. Expected {expected}. {shown}; correct the"
      " path."
    )
  return found


def bad_character(value: object) -> str:
  """Returns which character of a JSON value no tokenizer can take, or ""."""
  if isinstance(value, str):
    if "\0" in value:
      return "a NUL character (\\u0000)"
    if not value.isascii():
      try:
        value.encode()
      except UnicodeEncodeError as error:
        code = ord(value[error.start])
        return f"half of a surrogate pair (\\u{code:04x})"
  elif isinstance(value, list):
    return next(filter(None, map(bad_character, value)), "")
  return ""


def _decode(raw: bytes, where: str, offset: int) -> str:
  """Returns the text of a line that starts at byte `offset` of the file."""
  try:
    return raw.decode()
  except UnicodeDecodeError as error:
    if offset == 0 and raw.startswith(b"\x1f\x8b"):
      remedy = "It looks gzip-compressed: let its name end in .gz."
    else:
      remedy = conversion(raw)
    raise ValueError(
      f"{where}: byte 0x{raw[error.start]:02x} at offset"
      f" {offset + error.start} of the file is not UTF-8 ({error.reason})."
      f" Expected UTF-8 text. {remedy}"
    ) from error


def conversion(raw: bytes) -> str:
  """Returns how a file that holds `raw` is converted to UTF-8."""
  if name := likely_encoding(raw):
    return (
      f"It looks like {name}. Convert the file, for instance with"
      f" `iconv -f {name} -t UTF-8`."
    )
  return (
    "Convert the file, for instance with `iconv -f LATIN1 -t UTF-8` if it is of"
    " Western Europe."
  )


def _damaged(place: str, error: Exception) -> ValueError:
  """Returns the error for gzip data that cannot be read on from `place`."""
  return ValueError(
    f"{place}: the gzip data is damaged or cut off ({error}). Expected a"
    " complete .gz file. Download or compress it again."
  )


def read_lines(
  path: epath.PathLike, *, bad_records: BadRecords | None = None
) -> Iterator[tuple[int, str]]:
  r"""Yields (line number, line with its line end) of a UTF-8 file.

  Lines end in \n alone: text may hold U+2028 and its like. A byte order mark
  is dropped. Files whose name ends in .gz are decompressed on the way.

  Args:
    path: an existing file.
    bad_records: what to do with a line that is not UTF-8, and with the rest of
      a file where its gzip data is damaged; None raises.

  Raises:
    ValueError: names the line, and the byte, where it is no such file.
  """
  path, bad = epath.Path(path), bad_records or BadRecords("fail")
  name = str(path)  # once: it takes as long as to read a line
  line, offset = 0, 0
  with path.open("rb") as file:
    stream = cast(BinaryIO, file)
    if path.suffix == ".gz":
      stream = cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    try:
      for raw in stream:
        line, start, offset = line + 1, offset, offset + len(raw)
        try:
          text = _decode(raw, f"{name}:{line}", start)
        except ValueError as error:
          bad.refuse("undecodable", error)
          continue
        if line == 1 and raw.startswith(codecs.BOM_UTF8):
          text = text[1:]
        yield line, text
    except _GZIP_ERRORS as error:
      bad.refuse("undecodable", _damaged(f"{name}:{line + 1}", error))


def read_bytes(path: epath.PathLike) -> bytes:
  """Returns what a file holds, decompressed if its name ends in .gz.

  Raises:
    ValueError: the gzip data is damaged.
  """
  path = epath.Path(path)
  raw = path.read_bytes()
  try:
    return gzip.decompress(raw) if path.suffix == ".gz" else raw
  except _GZIP_ERRORS as error:
    raise _damaged(f"{path}:1", error) from error


def decode_text(raw: bytes, path: epath.PathLike) -> str:
  """Returns the text of the UTF-8 file `path`, without a byte order mark.

  Raises:
    ValueError: names the line, and the byte, that is not UTF-8.
  """
  try:
    return raw.decode("utf-8-sig")
  except UnicodeDecodeError:
    pass
  if bom_encoding(raw):  # nothing in it is a line of its own
    _decode(raw, f"{path}:1", 0)
  offset = 0
  for line, part in enumerate(raw.split(b"\n"), start=1):
    try:
      part.decode()
    except UnicodeDecodeError:
      _decode(
        part + b"\n" + raw[offset + len(part) + 1 :], f"{path}:{line}", offset
      )
    offset += len(part) + 1
  # A byte of a longer character is never a line end.
  raise AssertionError(f"{path} is UTF-8 line by line, but not as a whole.")


def _refuse_constant(name: str) -> None:
  raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def parse_json(text: str) -> Any:
  """Returns the JSON value that `text` is.

  Raises:
    json.JSONDecodeError: it is none; a `ValueError`, as is that of a number
      that is not finite or has too many digits.
    RecursionError: it is nested too deeply.
  """
  return _DECODER.decode(text)


def _parse(text: str, where: str) -> dict[str, Any]:
  """Returns the object that one line holds."""
  remedy = (
    "Expected one complete JSON object a line. Correct or remove the line; if"
    " it is the last one, the file may be cut off: copy it again."
  )
  try:
    record = parse_json(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{where}: not valid JSON ({error}): {shorten(text)}. {remedy}"
    ) from error
  if not isinstance(record, dict):
    raise ValueError(
      f"{where}: {shorten(record)} is {_TYPE_NAMES[type(record)]}, not an"
      f" object. {remedy}"
    )
  return record


def _describe(types: type | tuple[type, ...]) -> str:
  types = types if isinstance(types, tuple) else (types,)
  return " or ".join(_TYPE_NAMES[t] for t in types)


def _check_field(
  record: Mapping[str, Any],
  name: str,
  types: type | tuple[type, ...],
  where: str,
) -> None:
  """Raises `ValueError` if the field's value cannot be used."""
  value = record[name]
  allowed = types if isinstance(types, tuple) else (types,)
  # Not isinstance: true is an int to it.
  if type(value) not in allowed:
    hint = "Correct the record."
    if list in allowed and isinstance(value, str):
      hint = f'Put it into a list: "{name}": ["..."].'
    raise ValueError(
      f"{where}: field {name!r} is {shorten(value)},"
      f" {_TYPE_NAMES[type(value)]}. Expected {_describe(types)}. {hint}"
    )
  if bad := bad_character(value):
    raise ValueError(
      f"{where}: field {name!r} holds {bad}, in {shorten(value)}. Expected"
      " text that can be written as UTF-8. Remove the character."
    )


def check_fields(
  record: Mapping[str, Any],
  where: str,
  *,
  required: FieldTypes,
  optional: FieldTypes | None = None,
) -> None:
  """Raises `ValueError` unless the fields of a JSON object can be used.

  Args:
    record: the object.
    where: its file and line, for the message.
    required: fields that it has, with their type or types.
    optional: fields that have this type if they are there.
  """
  for name, types in required.items():
    if name not in record:
      raise ValueError(
        f"{where}: no field {name!r}; the record has {sorted(record)}."
        f" Expected {name!r} to be {_describe(types)}. Add or rename the"
        " field."
      )
    _check_field(record, name, types, where)
  for name, types in (optional or {}).items():
    if name in record:
      _check_field(record, name, types, where)


def read_texts(path: epath.PathLike) -> list[str]:
  """Returns the lines of a file that are not empty, trimmed; questions or ids.

  Raises:
    FileNotFoundError: there is no such file; names the nearest ones.
    ValueError: as `read_lines`.
  """
  file = find_file(path, "a file of one text a line")
  lines = (line.strip() for _, line in read_lines(file))
  return [line for line in lines if line]


def read_records(
  path: epath.PathLike,
  *,
  required: FieldTypes,
  optional: FieldTypes | None = None,
  bad_records: BadRecords | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line number, JSON object) of a .jsonl or .jsonl.gz file.

  Blank lines are skipped; fields that are not named are left alone.

  Args:
    path: an existing file.
    required: fields that every record has, with their type or types.
    optional: fields that have this type if they are there.
    bad_records: what to do with a record that is not like that; None raises.

  Raises:
    ValueError: a record is not like that; says `path:line`, what is wrong,
      what was expected and what to do.
  """
  bad, name = bad_records or BadRecords("fail"), str(path)
  for line, text in read_lines(path, bad_records=bad):
    text = text.strip()
    if not text:
      continue
    where = f"{name}:{line}"
    try:
      record = _parse(text, where)
      check_fields(record, where, required=required, optional=optional)
    except ValueError as error:
      bad.refuse("bad_record", error)
      continue
    yield line, record
