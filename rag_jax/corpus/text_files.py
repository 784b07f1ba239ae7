"""Reads text files and records; errors name the file and the line.

In: the path of a UTF-8 file, gzip-compressed if its name ends in .gz. Out: its
text, its lines, or the JSON object on each line, with line numbers. The memory
that a file can make us use is limited, even if it was written to fill memory.
"""

import codecs
from collections.abc import Callable, Iterator, Mapping
import difflib
import functools
import gzip
import os
import stat
from typing import Any, BinaryIO, cast
import zlib

from etils import epath

from rag_jax.artifacts import is_local
from rag_jax.corpus.encodings import bom_encoding
from rag_jax.corpus.encodings import likely_encoding
from rag_jax.corpus.report import BadRecords
from rag_jax.disk import instead_of
from rag_jax.json_input import parse_json

# The Python types of JSON values, and their names in messages.
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

MAX_LINE_BYTES = 1 << 26  # 64 MiB: of a line, and so of a record
MAX_FILE_BYTES = 1 << 30  # 1 GiB: of a file that is read whole, decompressed
# gzip makes text 3 to 20 times smaller, a file of one repeated line a few
# hundred times, and zeros 1,030 times.
MAX_GZIP_RATIO = 250
_GZIP_FREE_BYTES = 1 << 26  # the ratio is not checked up to this size
_BLOCK_BYTES = 1 << 22

# Reading from these would wait or run forever.
_SPECIAL = {
  stat.S_IFIFO: "a FIFO (named pipe)",
  stat.S_IFSOCK: "a socket",
  stat.S_IFCHR: "a device",
  stat.S_IFBLK: "a device",
}

FieldTypes = Mapping[str, type | tuple[type, ...]]


def shorten(value: object, width: int = 60) -> str:
  """Returns `repr(value)`, cut to `width` characters."""
  # A string is cut first, since it may be a whole book.
  shown = repr(value[:width] if isinstance(value, str) else value)
  return shown if len(shown) <= width else shown[: width - 3] + "..."


def special_file(path: epath.PathLike) -> str:
  """Returns the kind of special file at `path`, or "" if it is none."""
  if not is_local(path):
    return ""
  try:
    mode = os.stat(path).st_mode
  except OSError:  # missing, or a broken link: opening it will raise
    return ""
  return _SPECIAL.get(stat.S_IFMT(mode), "")


def find_file(path: epath.PathLike, expected: str) -> epath.Path:
  """Returns `path` if it is a plain file.

  Args:
    path: where the file should be; `~` is the home folder.
    expected: which files can be read, for the message.

  Raises:
    FileNotFoundError: there is no such file; names similar ones.
    ValueError: it is a folder, a FIFO, a socket or a device.
  """
  found = epath.Path(path).expanduser()
  if special := special_file(found):
    raise ValueError(
      f"{path} is {special}, not a file. Expected {expected}. Write its output"
      " to a file, and give the path of that file."
    )
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
        f" Expected {expected}. {instead_of(found)} Correct the path."
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
  """Returns a character in a JSON value that no tokenizer accepts, or ""."""
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


def check_text(text: str, what: str) -> None:
  """Raises `ValueError` if no tokenizer accepts `text`.

  Args:
    text: for instance a question. Python reads bytes of a command line that
      are not UTF-8 as halves of surrogate pairs.
    what: what the text is, for the message.
  """
  if bad := bad_character(text):
    raise ValueError(
      f"{what} holds {bad}, in {shorten(text)}. Expected text in UTF-8 without"
      " NUL characters. Remove the character, or convert the file or set the"
      " terminal to UTF-8."
    )


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
  """Returns advice on how to convert a file that holds `raw` to UTF-8."""
  if name := likely_encoding(raw):
    return (
      f"It looks like {name}. Convert the file, for instance with"
      f" `iconv -f {name} -t UTF-8`."
    )
  return (
    "Convert the file, for instance with `iconv -f LATIN1 -t UTF-8` if it is in"
    " a Western European language."
  )


def _is_wide(raw: bytes) -> bool:
  """Returns whether a file that begins with `raw` is UTF-16 without a BOM."""
  return (
    b"\0" in raw[:512]
    and not bom_encoding(raw)
    and likely_encoding(raw).startswith("UTF-16")
  )


def _damaged(place: str, error: Exception) -> ValueError:
  """Returns the error for gzip data that cannot be read beyond `place`."""
  return ValueError(
    f"{place}: the gzip data is damaged or cut off ({error}). Expected a"
    " complete .gz file. Download or compress it again."
  )


class _GzipBombError(Exception):
  """A .gz file became larger than compressed text would."""


def _check_ratio(file: BinaryIO, num_bytes: int) -> None:
  """Raises `_GzipBombError` if a compressed file became too large.

  Args:
    file: the compressed file, read up to here.
    num_bytes: how many bytes it became so far.
  """
  if num_bytes <= _GZIP_FREE_BYTES:
    return
  compressed = max(file.tell(), 1)
  if num_bytes > MAX_GZIP_RATIO * compressed:
    raise _GzipBombError(
      f"{compressed:,} bytes of gzip data became {num_bytes:,} so far, more"
      f" than {MAX_GZIP_RATIO} times as many"
    )


def _bomb(place: str, error: Exception) -> ValueError:
  return ValueError(
    f"{place}: {error}. Expected text, which gzip makes about 3 to 20 times"
    " smaller: this file was made to fill memory or disk. Do not use it; if you"
    " made it yourself, decompress it first (gunzip)."
  )


def _decompressed(
  path: epath.Path, file: BinaryIO
) -> tuple[Any, Callable[[int], None]]:
  """Returns the content of `file`, and a check of how many bytes it became."""
  if path.suffix.lower() != ".gz":
    return file, lambda num_bytes: None
  return gzip.GzipFile(fileobj=file), functools.partial(_check_ratio, file)


def read_lines(
  path: epath.PathLike, *, bad_records: BadRecords | None = None
) -> Iterator[tuple[int, str]]:
  r"""Yields (line number, line with its line end) of a UTF-8 file.

  Only \n ends a line, since texts may hold U+2028 and similar characters. A
  byte order mark is dropped. A file whose name ends in .gz is decompressed.

  Args:
    path: an existing file.
    bad_records: what to do with a line that is not UTF-8 or longer than
      `MAX_LINE_BYTES`, and with the rest of a .gz file whose data is damaged or
      grows more than text does; None raises.

  Raises:
    ValueError: the file is not like that; names the line and the byte.
  """
  path, bad = epath.Path(path), bad_records or BadRecords("fail")
  name = str(path)  # not per line: it takes as long as reading one
  line, offset = 0, 0
  with path.open("rb") as file:
    stream, check_size = _decompressed(path, cast(BinaryIO, file))
    read = functools.partial(stream.readline, MAX_LINE_BYTES + 1)
    try:
      for raw in iter(read, b""):
        line, start, offset = line + 1, offset, offset + len(raw)
        check_size(offset)
        if len(raw) > MAX_LINE_BYTES:
          bad.refuse("undecodable", _too_long(f"{name}:{line}"))
          while raw and not raw.endswith(b"\n"):  # the rest of the line
            raw = stream.readline(_BLOCK_BYTES)
            offset += len(raw)
            check_size(offset)
          continue
        if line == 1 and _is_wide(raw):
          problem = ValueError(
            f"{name}:1: every other byte is NUL. Expected UTF-8 text."
            f" {conversion(raw)}"
          )
          bad.refuse("undecodable", problem)
          return  # no line can be read
        try:
          text = _decode(raw, f"{name}:{line}", start)
        except ValueError as error:
          bad.refuse("undecodable", error)
          continue
        if line == 1 and raw.startswith(codecs.BOM_UTF8):
          text = text[1:]
        yield line, text
    except _GzipBombError as error:
      bad.refuse("undecodable", _bomb(f"{name}:{line}", error))
    except _GZIP_ERRORS as error:
      bad.refuse("undecodable", _damaged(f"{name}:{line + 1}", error))


def _too_long(where: str) -> ValueError:
  return ValueError(
    f"{where}: the line has more than {MAX_LINE_BYTES:,} bytes. Expected one"
    " record per line. Is it another kind of file, or one without line ends?"
    " Write a line end after each record, or split longer records."
  )


def read_bytes(path: epath.PathLike) -> bytes:
  """Returns the content of a file, decompressed if its name ends in .gz.

  Raises:
    ValueError: the gzip data is damaged, or the content is larger than
      `MAX_FILE_BYTES`.
  """
  path = epath.Path(path)
  too_large = ValueError(
    f"{path}:1: the file holds more than {MAX_FILE_BYTES:,} bytes, and would be"
    " read into memory whole. Expected a smaller file. Split it, or write its"
    " records to a .jsonl file, one per line, which may have any size."
  )
  blocks, num_bytes = list[bytes](), 0
  with path.open("rb") as file:
    stream, check_size = _decompressed(path, cast(BinaryIO, file))
    if stream is file and path.stat().length > MAX_FILE_BYTES:
      raise too_large
    try:
      while block := stream.read(_BLOCK_BYTES):
        num_bytes += len(block)
        check_size(num_bytes)
        if num_bytes > MAX_FILE_BYTES:
          raise too_large
        blocks.append(block)
    except _GzipBombError as error:
      raise _bomb(f"{path}:1", error) from error
    except _GZIP_ERRORS as error:
      raise _damaged(f"{path}:1", error) from error
  return b"".join(blocks)


def decode_text(raw: bytes, path: epath.PathLike) -> str:
  """Returns the text of the UTF-8 file `path`, without a byte order mark.

  Raises:
    ValueError: the file is not UTF-8; names the line and the byte.
  """
  try:
    return raw.decode().removeprefix("\ufeff")
  except UnicodeDecodeError as error:
    place = error.start
  if bom_encoding(raw) not in ("", "utf-8"):  # it has no lines that we can find
    place = 0
  start = raw.rfind(b"\n", 0, place) + 1
  line = raw.count(b"\n", 0, place) + 1
  return _decode(raw[start:], f"{path}:{line}", start)  # raises


def _parse(text: str, where: str) -> dict[str, Any]:
  """Returns the JSON object on one line."""
  remedy = (
    "Expected one complete JSON object per line. Correct or remove the line; if"
    " it is the last one, the file may be cut off: copy it again."
  )
  try:
    record = parse_json(text)
  except ValueError as error:
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
      " text in UTF-8 without NUL characters. Remove the character."
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
    required: fields that it must have, with their type or types.
    optional: fields that it may have, with their type or types.
  """
  for name, types in (*required.items(), *(optional or {}).items()):
    if name in record:
      _check_field(record, name, types, where)
    elif name in required:
      raise ValueError(
        f"{where}: no field {name!r}; the record has {sorted(record)}."
        f" Expected {name!r} to be {_describe(types)}. Add or rename the"
        " field."
      )


def read_texts(path: epath.PathLike) -> list[str]:
  """Returns the lines of a file that are not empty, trimmed.

  Raises:
    FileNotFoundError: there is no such file; names similar ones.
    ValueError: as `read_lines`.
  """
  file = find_file(path, "a file with one text per line")
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

  Blank lines are skipped; other fields are not checked.

  Args:
    path: an existing file.
    required: fields that every record must have, with their type or types.
    optional: fields that records may have, with their type or types.
    bad_records: what to do with a record that cannot be used; None raises.

  Raises:
    ValueError: a record cannot be used; begins with `path:line`.
  """
  bad, name = bad_records or BadRecords("fail"), str(path)
  for line, text in read_lines(path, bad_records=bad):
    text = text.strip()
    if not text:
      continue
    where = f"{name}:{line}"
    with bad.refusing("bad_record"):
      record = _parse(text, where)
      check_fields(record, where, required=required, optional=optional)
      yield line, record
