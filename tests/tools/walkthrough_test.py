"""tools/walkthrough.py as a person runs it, from the first cell to the last."""

import re
import shutil

from processes import run_tool


def test_one_sitting_ends_with_an_explained_answer_that_follows_an_edit():
  done = run_tool("walkthrough.py", timeout=1500)  # on a busy machine
  assert done.returncode == 0, done.stderr[-3000:]
  run = re.search(r"^The run is in (.*)\.$", done.stdout, re.M)
  assert run, done.stdout
  shutil.rmtree(run[1])
  before, after = done.stdout.split("After the edit: ")
  assert "\nWhat is the capital of France?\nParis   (p = " in before
  assert after.startswith("What is the capital of France?\nMarseille   (p = ")
  for answer in (before, after):
    assert "p(z|x)  p(z|x,y)  passage\n" in answer
    # Of the passage that holds the answer: prior and posterior.
    best = re.search(r"^ *([\d.]+) +([\d.]+)  France \[country/FR/capital\]",
                     answer, re.M)  # fmt: skip
    assert best, answer
    assert float(best[1]) > 0.5
    assert float(best[2]) > 0.9
