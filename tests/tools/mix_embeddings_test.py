"""tools/mix_embeddings.py as a person runs it."""

import numpy as np
from processes import run_tool
from small_encoder import DIM
from small_encoder import write_encoder


def mix(*arguments):
  """Returns the finished process."""
  return run_tool("mix_embeddings.py", *arguments)


def test_few_documents_become_many_vectors_the_same_each_time(tmp_path):
  texts = [
    "The owls live here. They hunt at night.",
    "Bees fly by day. Cows eat.",
  ]
  for number, text in enumerate(texts):
    (tmp_path / f"{number}.txt").write_text(text)
  write_encoder(tmp_path / "encoder", texts * 5)
  questions = tmp_path / "questions.jsonl"
  questions.write_text('{"question": "who hunts?", "answers": ["owls"]}\n')
  arguments = [
    f"--corpus={tmp_path / '0.txt'}",
    f"--corpus={tmp_path / '1.txt'}",
    f"--questions={questions}",
    f"--encoder={tmp_path / 'encoder'}",
    "--num=50",
  ]
  for output in ("a", "b"):
    done = mix(*arguments, f"--output={tmp_path / output}")
    assert done.returncode == 0, done.stderr
  vectors = np.load(tmp_path / "a/passages.npy")
  assert vectors.shape == (50, DIM)
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
  assert len(np.unique(vectors, axis=0)) > 40
  assert np.load(tmp_path / "a/questions.npy").shape == (1, DIM)
  for name in ("passages.npy", "questions.npy"):
    a, b = ((tmp_path / d / name).read_bytes() for d in ("a", "b"))
    assert a == b


def test_a_corpus_that_is_not_there_is_a_message(tmp_path):
  write_encoder(tmp_path / "encoder", ["the owls"] * 5)
  done = mix(
    f"--corpus={tmp_path / 'no.jsonl'}",
    f"--questions={tmp_path / 'no.jsonl'}",
    f"--encoder={tmp_path / 'encoder'}",
    f"--output={tmp_path / 'out'}",
  )
  assert done.returncode == 1
  assert "FileNotFoundError: There is no file" in done.stderr
  assert "Traceback" not in done.stderr
