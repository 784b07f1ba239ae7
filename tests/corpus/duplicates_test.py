"""What was met before is found again, in bounded memory."""

import json
import random
import subprocess
import sys

import pytest

from rag_jax.corpus.duplicates import Seen


@pytest.fixture
def seen():
  store = Seen()
  yield store
  store.close()


def test_a_string_is_new_once_and_then_its_first_place_is_known(seen):
  assert seen.add("a.jsonl:1", "x") == ""
  assert seen.add("a.jsonl:2", "y") == ""
  assert seen.add("b.jsonl:1", "x") == "a.jsonl:1"
  assert seen.add("b.jsonl:2", "x") == "a.jsonl:1"
  assert seen.add("b.jsonl:3", "z") == ""
  assert seen.add("c:d[1].e[2]", "w") == ""
  assert seen.add("b.jsonl:4", "w") == "c:d[1].e[2]"
  assert seen.add("b.jsonl:4", "z") == "b.jsonl:3"


def test_strings_of_one_key_count_with_their_borders(seen):
  keys = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc")]
  assert all(seen.add("f:1", *key) == "" for key in keys)
  assert all(seen.add("f:2", *key) == "f:1" for key in keys)


@pytest.mark.parametrize("seed", range(3))
def test_it_answers_as_a_dictionary_does(seed):
  rng = random.Random(seed)
  seen, oracle = Seen(cache_bytes=1 << 16), {}
  for i in range(5_000):
    key, where = str(rng.randrange(3_000)), f"file{i // 1_000}:{i}"
    assert seen.add(where, key) == oracle.get(key, "")
    oracle.setdefault(key, where)
  seen.close()


def test_a_full_disk_is_reported_with_what_to_do(seen):
  seen._db.execute("PRAGMA max_page_count = 20")

  def fill():
    for i in range(100_000):
      seen.add(f"f:{i}", str(i))

  with pytest.raises(OSError, match="full") as info:
    fill()
  assert "Expected about 60 bytes for each passage" in str(info.value)
  assert "SQLITE_TMPDIR" in str(info.value)


# The peak is that of a process, so each way has one of its own. (Linux; the
# ru_maxrss of `resource` begins with that of the process that started it.)
_MEASURE = """
import sys
from rag_jax.corpus.duplicates import Seen
def peak():
  with open("/proc/self/status") as f:
    line = next(line for line in f if line.startswith("VmHWM"))
  return int(line.split()[1]) * 1024
seen, kept, start = Seen(cache_bytes=1 << 20), {}, peak()
for i in range(int(sys.argv[1])):
  if sys.argv[2] == "disk":
    seen.add(f"file:{i}", str(i))
  else:
    kept[str(i).encode().rjust(16)] = i
print(peak() - start)
"""


def test_memory_does_not_grow_with_what_was_met():
  def growth(kind):
    command = [sys.executable, "-c", _MEASURE, "150000", kind]
    return json.loads(
      subprocess.run(command, capture_output=True, check=True).stdout
    )

  assert growth("disk") < 6e6
  assert growth("memory") > 12e6  # so a Seen that keeps them would be found
