"""What a run leaves when it has ended, and of which of its steps."""

import copy
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest

from rag_jax.evaluation.evaluate import Evaluator
from rag_jax.evaluation.report import read_results
from rag_jax.evaluation.report import table
from rag_jax.evaluation.results import finish
from rag_jax.retrieval.certificate import Certificate
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.retriever import fingerprint
from rag_jax.serving.pipeline import RagPipeline
from rag_jax.training.loop import Clock
from rag_jax.training.workdir import Workdir
from rag_jax.weights.model_files import load_model

TIMES = (
  "train/seconds", "train/questions_per_second", "train/peak_memory_bytes",
  "test/questions_per_second", "cut", "index/certificate",
)  # fmt: skip


def params_of(state):
  return {k: v for k, v in state.items() if k.startswith("params/")}


def model_of(run, tiny_run):
  params, content = load_model(run.path / "model")
  return tiny_run.flat({"params": params}), content


def finish_again(tiny, run, path, validation=()):
  """Ends the run in `path` as if nothing but its checkpoints were there."""
  experiment, answerer, _ = tiny.open(run.config)
  with tiny.compiling():
    return finish(
      experiment,
      Workdir(path),
      tiny.split("test"),
      Evaluator(experiment, answerer),
      Clock(train_secs=3.0, question_secs=2.0),
      validation,
    )


@pytest.mark.parametrize("times", [4, 6])
def test_the_model_keeps_how_well_the_validation_questions_fit(
  tiny, uninterrupted, tmp_path, times
):
  shutil.copytree(uninterrupted.path, tmp_path / "run")
  questions = tiny.split("validation")
  finish_again(tiny, uninterrupted, tmp_path / "run", questions * times)
  pipeline = RagPipeline.load(tmp_path / "run")
  if times * len(questions) < 50:
    assert pipeline.least_score == -math.inf
    return
  answers = pipeline.answer([q.question for q in questions])
  scores = sorted(answer.docs[0].score for answer in answers)
  # Half a percent of sixty lies between the first and the second, of one.
  assert scores[0] < scores[1]
  np.testing.assert_allclose(pipeline.least_score, scores[0], rtol=1e-5)


def test_the_results_say_how_good_how_fast_and_how_large(uninterrupted):
  results = read_results(uninterrupted.path)
  assert results == json.loads(json.dumps(uninterrupted.results))
  assert {
    "test/exact_match",
    "test/token_f1",
    "test/answer_recall_at_5",
    "test/index_recall_at_5",
    "test/exact_match/capital",
    "test/exact_match/river",
    "train/seconds",
    "train/questions_per_second",
    "train/peak_memory_bytes",
    "seed",
    "step",
  } <= set(results)
  assert results["test/num_questions"] == 10
  assert results["test/index_recall_at_5"] == 1.0  # of an exact index
  assert (results["seed"], results["num_passages"], results["n_docs"]) == (
    0, 40, 2,
  )  # fmt: skip
  first = uninterrupted.first_state().values()
  assert results["num_parameters"] == sum(x.size for x in first)
  assert 0 < results["train/seconds"] < 600
  assert results["train/peak_memory_bytes"] > 2**26
  assert "index recall@5    1.000" in table(results)


def test_ending_a_run_twice_gives_the_same(
  tiny, uninterrupted, tiny_run, tmp_path
):
  # Killed while it measured: what was written before is written again.
  shutil.copytree(uninterrupted.path, tmp_path / "run")
  (tmp_path / "run" / "results.json").unlink()
  (tmp_path / "run" / "model" / "params.safetensors").write_bytes(b"half")
  again = finish_again(tiny, uninterrupted, tmp_path / "run")
  before = read_results(uninterrupted.path)
  for name in TIMES:
    again.pop(name)
    before.pop(name)
  assert again == before
  params, _ = load_model(tmp_path / "run" / "model")
  tiny_run.assert_bit_equal(
    tiny_run.flat({"params": params}), model_of(uninterrupted, tiny_run)[0]
  )


def test_the_index_belongs_to_the_model_and_the_passages(uninterrupted):
  params, content = load_model(uninterrupted.path / "model")
  index = load_index(
    uninterrupted.path / "index",
    encoder_fingerprint=fingerprint(params),
    passages_fingerprint=uninterrupted.experiment.passages.fingerprint,
  )
  assert index.num_passages == 40
  tokenizer = uninterrupted.experiment.tokenizer
  assert content["step"] == uninterrupted.results["step"]
  assert content["tokenizer"] == tokenizer.fingerprint


def test_the_certificate_of_the_index_is_saved_and_reported(uninterrupted):
  results = read_results(uninterrupted.path)
  certificate = Certificate.from_content(results["index/certificate"])
  assert (certificate.sample, certificate.num_questions) == ("questions", 10)
  assert [(r.k, r.mean) for r in certificate.recalls] == [
    (1, 1.0), (10, 1.0), (40, 1.0),
  ]  # fmt: skip
  assert sorted(certificate.queries_per_second) == [1, 256]
  assert load_index(uninterrupted.path / "index").certificate == certificate
  assert "certified on 10 questions" in table(results)


def test_a_run_whose_index_finds_too_little_is_refused_before_its_test(
  tiny, uninterrupted, tmp_path
):
  shutil.copytree(uninterrupted.path, tmp_path / "run")
  (tmp_path / "run" / "results.json").unlink()
  path = tmp_path / "run" / "index"
  index = load_index(path)
  # Whoever built it measured that it finds little.
  low = dataclasses.replace(index.certificate.recall(10), mean=0.25)
  index.certificate = dataclasses.replace(index.certificate, recalls=(low,))
  index.save(path)
  experiment, answerer, _ = tiny.open(uninterrupted.config)
  config = copy.deepcopy(uninterrupted.config)
  config.index.path = str(path)
  config.index.min_recall = 0.9
  with (
    tiny.compiling(),
    pytest.raises(
      ValueError, match=r"recall_at_10 is 0\.2500 .*index\.min_recall=0\.9"
    ),
  ):
    finish(
      dataclasses.replace(experiment, config=config),
      Workdir(tmp_path / "run"),
      tiny.split("test"),
      Evaluator(experiment, answerer),
      Clock(train_secs=3.0, question_secs=2.0),
    )
  assert not (tmp_path / "run" / "results.json").exists()


def test_the_learning_curves_are_a_picture(uninterrupted):
  png = (uninterrupted.path / "learning_curves.png").read_bytes()
  assert png.startswith(b"\x89PNG\r\n\x1a\n")
  assert len(png) > 20_000


@pytest.fixture(scope="module")
def peaked(tiny):
  """A run that validates best in the middle, and was measured."""
  found = iter([0.0, 0.1, 0.7, 0.4, 0.2])  # the first before step 1

  def validate(params, index):
    return {"validation/exact_match": next(found)}

  path = tiny.root / "peaked"
  run = tiny.train(path, tiny.config(), validate=validate)
  run.results = finish_again(tiny, run, path)
  return run


def test_the_best_checkpoint_is_kept_beside_the_last_ones(peaked):
  # Validated after the steps 3, 6, 9 and 12, with 4 of the warm-up before.
  assert peaked.steps == [10, 13, 16]


def test_what_is_measured_and_saved_is_the_best_not_the_last(
  peaked, uninterrupted, tiny_run
):
  assert peaked.results["step"] == 10
  model, content = model_of(peaked, tiny_run)
  assert content["step"] == 10
  tiny_run.assert_bit_equal(model, params_of(uninterrupted.state(10)))
  last = uninterrupted.state(16)
  assert any(np.any(x != last[name]) for name, x in model.items())


def test_the_speed_is_that_of_the_main_stage(peaked):
  # 12 steps of 8 questions, in 2 of the 3 seconds that both stages took.
  assert peaked.results["train/questions_per_second"] == 12 * 8 / 2.0
  assert peaked.results["train/seconds"] == 3.0


def test_the_next_best_stands_in_for_a_damaged_checkpoint(
  tiny, peaked, tmp_path, caplog
):
  shutil.copytree(peaked.path, tmp_path / "run")
  manifest = tmp_path / "run" / "checkpoints" / "10" / "manifest.json"
  name = max(json.loads(manifest.read_text())["files"], key=len)
  file = manifest.parent / name
  file.write_bytes(file.read_bytes()[:-1] + b"?")
  finish_again(tiny, peaked, tmp_path / "run")
  assert "The checkpoint of step 10 cannot be used: " in caplog.text
  assert f"{name} in {manifest.parent} was damaged" in caplog.text
  assert "The best checkpoint is the one of step 10." not in caplog.text


@pytest.fixture(scope="module")
def closed_book(tiny):
  """The same without documents, stopped and resumed on the way."""
  config = tiny.config(data__n_docs=0, warmup__num_steps=1, train__num_steps=3)
  path = tiny.root / "closed_book"
  stopped = tiny.train(path, config, stop_at=("train", 1))
  assert stopped.stopped is not None
  return tiny.train(path, config, measure=True)


def test_closed_book_has_no_retrieval_to_report(closed_book):
  results = read_results(closed_book.path)
  assert not [name for name in results if "recall" in name]
  assert results["n_docs"] == 0
  assert results["test/num_questions"] == 10
  assert "answer recall@5   -" in table(results)
  for record in closed_book.metrics:
    assert not {
      name
      for name in record
      if "docs" in name or "entropy" in name or "staleness" in name
    }
  names = {path.name for path in closed_book.path.iterdir()}
  assert {"model", "results.json", "learning_curves.png"} <= names
  assert not {"index", "indexes"} & names


def test_closed_book_has_a_generator_of_the_same_size(
  closed_book, uninterrupted, tiny_run
):
  def generator(run):
    model, _ = model_of(run, tiny_run)
    return {
      name: x.shape
      for name, x in model.items()
      if name.startswith("params/generator/")
    }

  assert generator(closed_book)
  assert generator(closed_book) == generator(uninterrupted)


def test_closed_book_trains_the_generator(closed_book, tiny_run):
  first, (last, _) = closed_book.first_state(), model_of(closed_book, tiny_run)
  for name, x in first.items():
    if name.startswith("params/generator/") and x.ndim > 1:
      assert not np.array_equal(x, last[name]), name


@pytest.mark.parametrize("warmup", [0, 4])
def test_a_run_without_steps_measures_what_it_started_with(
  tiny, uninterrupted, tiny_run, tmp_path, warmup
):
  config = tiny.config(
    train__num_steps=0,
    train__batch_size=64,  # more than there are questions
    train__checkpoint_steps=2,
    warmup__num_steps=warmup,
  )
  path = tmp_path / "run"
  run = tiny.train(path, config, measure=True)
  params, content = model_of(run, tiny_run)
  expected = uninterrupted.first_state()
  if warmup:
    expected = params_of(run.state(4))
    assert any(
      not np.array_equal(x, expected[name])
      for name, x in uninterrupted.first_state().items()
    )
  tiny_run.assert_bit_equal(params, expected)
  assert content["step"] == warmup
  assert run.results["test/num_questions"] == 10
  assert run.results["train/questions_per_second"] == 0.0
  assert "validation/exact_match" in run.metrics[-1]
  assert "exact match" in table(run.results)
  assert (path / "learning_curves.png").exists()
  again = tiny.train(path, config, measure=True)
  names = [name for name in run.results if name not in TIMES]
  assert [again.results[n] for n in names] == [run.results[n] for n in names]
