"""The fuzzers of tools/fuzz.py, for some seconds: the tool has no limit."""

import json
import os
import pathlib
import random
import subprocess
import sys

import fuzz_targets

ROOT = pathlib.Path(__file__).parents[2]


def test_damaged_files_end_in_documented_errors():
  # A process of its own: in this one, each argument's type is checked too.
  done = subprocess.run(
    [sys.executable, ROOT / "tools" / "fuzz.py", "--seed=0", "--cases=30"],
    env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert "180 cases, 0 failures" in done.stdout


def target(read):
  def make(folder):
    (folder / "x.json").write_text('{"a": [1, 2]}')

  def damage(rng, folder):
    file = folder / "x.json"
    changed = fuzz_targets.damage_json(rng, json.loads(file.read_text()))
    file.write_text(json.dumps(changed))
    return file.read_text()[:100]

  return fuzz_targets.Target(make, damage, read)


def run(monkeypatch, tmp_path, read, cases=range(3)):
  monkeypatch.setitem(fuzz_targets.TARGETS, "mine", target(read))
  return list(fuzz_targets.fuzz("mine", 7, cases, tmp_path / str(cases)))


def test_what_is_not_documented_too_slow_or_too_large_is_a_failure(
  monkeypatch, tmp_path
):
  def broken(folder):
    raise KeyError(folder.name)

  def endless(folder):
    while True:
      pass

  monkeypatch.setattr(fuzz_targets, "MAX_CPU_SECS", 0.05)
  for read, problem in ((broken, "KeyError"), (endless, "It took too long")):
    failures = run(monkeypatch, tmp_path / problem, read)
    assert all(f is not None and problem in f.problem for f in failures)
    assert failures[2].case == "--target=mine --seed=7 --first=2 --cases=1"


def test_a_case_can_be_repeated_alone(monkeypatch, tmp_path):
  seen = []

  def read(folder):
    seen.append((folder / "x.json").read_text())

  run(monkeypatch, tmp_path, read, range(20))
  several, seen[:] = list(seen), []
  run(monkeypatch, tmp_path, read, range(13, 14))
  assert seen == several[13:14]
  assert len(set(several)) > 10


def test_bytes_and_values_change_in_many_ways():
  rng = random.Random(0)
  data = b'{"a": [1, {"b": "text"}]}'
  changed = {fuzz_targets.damage_bytes(rng, data) for _ in range(200)}
  assert len(changed) > 150
  assert any(len(c) < len(data) for c in changed)
  assert any(len(c) > 1000 for c in changed)
  values = {
    json.dumps(fuzz_targets.damage_json(rng, json.loads(data)))
    for _ in range(200)
  }
  assert len(values) > 100
  assert pathlib.Path(fuzz_targets.__file__).name == "fuzz_targets.py"
