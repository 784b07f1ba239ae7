"""Finds ids and texts that occur twice in a corpus of any size.

In: strings, one after the other. Out: where each occurred first. They are kept
as hashes in a temporary database on the disk, so memory stays bounded.
"""

import hashlib
import sqlite3

_HASH_BYTES = 16  # 21 million of them collide with a chance of 1e-24
_CACHE_BYTES = 64 << 20  # of the database, in memory


class Seen:
  """Strings that were added, and where; about 30 bytes of disk per string.

  The file is in the folder that the environment variable SQLITE_TMPDIR or
  TMPDIR names, else in /var/tmp. SQLite removes it however the process ends.
  """

  def __init__(self, cache_bytes: int = _CACHE_BYTES):
    """Opens the database, which needs about `cache_bytes` of memory."""
    # "" opens a new temporary file. Nothing is ever rolled back.
    self._db = sqlite3.connect("", isolation_level=None)
    for setting in (
      "temp_store = FILE",
      "journal_mode = OFF",
      "synchronous = OFF",
      f"cache_size = -{max(cache_bytes >> 10, 64)}",
    ):
      self._db.execute(f"PRAGMA {setting}")
    self._db.execute(
      "CREATE TABLE seen (hash BLOB PRIMARY KEY, file INTEGER, place,"
      " number INTEGER) WITHOUT ROWID"
    )
    self._db.execute("CREATE TABLE files (name TEXT)")
    self._file = ("", 0)  # name and row of the last one

  def add(self, where: str, *key: str, number: int = 0) -> str:
    """Returns where the strings of `key` were added before, or "".

    Args:
      where: file and place, such as "corpus.jsonl:7".
      *key: one or more strings, compared as one tuple.
      number: what `number_of` will return for them, if they are new.

    Raises:
      OSError: the disk is full.
    """
    try:
      return self._add(self._hash(key), where, number)
    except sqlite3.OperationalError as error:
      raise OSError(
        "The ids and texts that were read cannot be kept on the disk"
        f" ({error}). Expected about 60 bytes for each passage in the folder"
        " for temporary files. Make room there, or set SQLITE_TMPDIR to a"
        " folder on another disk."
      ) from error

  def number_of(self, *key: str) -> int:
    """Returns the `number` that `key` was first added with."""
    (number,) = self._db.execute(
      "SELECT number FROM seen WHERE hash = ?", (self._hash(key),)
    ).fetchone()
    return number

  def _hash(self, key: tuple[str, ...]) -> bytes:
    hashed = hashlib.blake2b(digest_size=_HASH_BYTES)
    for part in key:
      data = part.encode("utf-8", "surrogatepass")
      # With their lengths, since ("ab", "c") is not ("a", "bc").
      hashed.update(len(data).to_bytes(8, "little"))
      hashed.update(data)
    return hashed.digest()

  def _add(self, digest: bytes, where: str, number: int) -> str:
    name, _, place = where.rpartition(":")
    if name != self._file[0] or not self._file[1]:
      row = self._db.execute("INSERT INTO files VALUES (?)", (name,)).lastrowid
      self._file = (name, row or 0)
    line = int(place) if place.isdecimal() else place
    row = (digest, self._file[1], line, number)
    if self._db.execute(
      "INSERT OR IGNORE INTO seen VALUES (?, ?, ?, ?)", row
    ).rowcount:
      return ""
    first, place = self._db.execute(
      "SELECT name, place FROM seen JOIN files ON files.rowid = file"
      " WHERE hash = ?",
      (digest,),
    ).fetchone()
    return f"{first}:{place}"

  def close(self) -> None:
    """Removes the database."""
    self._db.close()
