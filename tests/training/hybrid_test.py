"""A run that searches words too, from the first step to an answer."""

import dataclasses
import json

import numpy as np
import pytest

from rag_jax.data.experiment import open_experiment
from rag_jax.data.questions import load_questions
from rag_jax.decoding.answerer import Answerer
from rag_jax.evaluation.evaluate import Evaluator
from rag_jax.models.hybrid import learned_weights
from rag_jax.retrieval.retriever import fingerprint
from rag_jax.serving.pipeline import RagPipeline
from rag_jax.training.loop import train
from rag_jax.training.metrics import read_metrics
from rag_jax.training.workdir import open_workdir
from rag_jax.weights.convert import export_model


@pytest.fixture(scope="module")
def config(tiny):
  # So that the weights move visibly in a dozen steps.
  return tiny.config(index__hybrid=True, optimizer__hybrid_lr=0.05)


@pytest.fixture(scope="module")
def run(tiny, config):
  return tiny.train(tiny.root / "hybrid", config, measure=True)


@pytest.fixture(scope="module")
def pipeline(run):
  return RagPipeline.load(run.path)


def weights_of(state):
  return np.exp(
    [state[f"params/hybrid/log_{name}"] for name in ("dense", "bm25")]
  )


def test_the_weights_are_logged_at_each_step_and_in_the_results(run):
  logged = [
    (r["train/hybrid_dense"], r["train/hybrid_bm25"])
    for r in run.metrics
    if r["stage"] == "train"
  ]
  assert logged[0] == pytest.approx((1.0, 0.1))  # not by the warm-up
  assert len(set(logged)) == len(logged) == 12  # and all of them move both
  found = run.results["hybrid_dense"], run.results["hybrid_bm25"]
  assert found == pytest.approx(
    tuple(weights_of(run.state(run.results["step"])))
  )


def test_a_run_that_was_stopped_ends_with_the_same_parameters(
  tiny, config, run, tiny_run
):
  path = tiny.root / "hybrid_stopped"
  # The warm-up; where a build of the index waits; and where documents that
  # were found before the stop are read after it.
  stops = [("warmup", 2), ("train", 5), ("train", 7)]
  for stop in stops:
    stopped = tiny.train(path, config, stop_at=stop)
    assert stopped.stopped is not None
  assert np.shape(stopped.extra(4 + 7)["doc_ids"]) == (8, 2)
  resumed = tiny.train(path, config)
  assert resumed.stopped is None
  tiny_run.assert_bit_equal(resumed.state(), run.state())


def test_a_run_does_not_go_on_with_words_counted_otherwise(tiny, config, run):
  bm25 = run.experiment.bm25
  other = dataclasses.replace(bm25.settings, k1=2.0)
  identity = run.experiment.identity
  assert run.extra(16)["identity"].items() >= identity.items()
  bm25.settings, before = other, bm25.settings
  try:
    with pytest.raises(ValueError, match="made with other BM25 settings: what"):
      tiny.train(run.path, config)
  finally:
    bm25.settings = before


def test_an_answer_has_the_prior_of_both_scores(run, pipeline):
  question = run.tiny.split("test")[0].question
  (answer,) = pipeline.answer(question)
  experiment, params = pipeline.experiment, pipeline.params
  weights = learned_weights(params)
  embeddings = pipeline.answerer.embed(params, [question])
  rows = np.array([int(doc.id) for doc in answer.docs])
  dense = pipeline.index.embeddings[rows] @ embeddings[0]
  words = experiment.bm25.score([question], rows[None])[0]
  assert words.max() > 0
  scores = float(weights.dense) * dense + float(weights.bm25) * words
  np.testing.assert_allclose(
    [doc.score for doc in answer.docs], scores, rtol=1e-5
  )
  prior = np.exp(scores) / np.exp(scores).sum()
  np.testing.assert_allclose(
    [doc.prior for doc in answer.docs], prior, rtol=1e-5
  )
  # These are the best of all passages, by a loop over them.
  everything = pipeline.index.embeddings[:] @ embeddings[0]
  every = np.arange(len(everything))
  fused = (
    float(weights.dense) * everything
    + float(weights.bm25) * experiment.bm25.score([question], every[None])[0]
  )
  assert set(rows) == set(np.argsort(-fused)[:2])


def test_other_passages_are_searched_by_their_own_words(run, tmp_path):
  lines = run.tiny.passages.read_text().splitlines()[:6]
  corpus = tmp_path / "some.jsonl"
  corpus.write_text("\n".join(lines) + "\n")
  title = json.loads(lines[3])["title"]
  other = RagPipeline.load(run.path, corpus=corpus)
  (answer,) = other.answer(f"Tell: What is the capital of {title}?")
  bm25 = other.experiment.bm25
  assert bm25.num_passages == 6
  assert np.argmax(bm25.score([title], np.arange(6)[None])) == 3
  assert set(answer.retrieved) <= set(range(6))


def test_the_weights_do_not_make_an_index_foreign(run, pipeline):
  params = {k: v for k, v in pipeline.params.items() if k != "generator"}
  alone = {k: v for k, v in params.items() if k != "hybrid"}
  assert fingerprint(params) == fingerprint(alone)
  assert pipeline.index.encoder_fingerprint == fingerprint(alone)


@pytest.mark.parametrize("kind", ["rag_token", "rag_sequence"])
def test_transformers_has_no_place_for_the_weights(run, kind, tmp_path):
  output = tmp_path / "out"
  name = {
    "rag_token": "RagTokenForGeneration",
    "rag_sequence": "RagSequenceForGeneration",
  }[kind]
  with pytest.raises(
    ValueError,
    match=r"scores documents by embeddings and words \(index\.hybrid=True,"
    rf" weights [\d.]+ and [\d.]+\), but {name} by embeddings alone; expected"
    r" .*index\.hybrid=False\. Train one, or export the parts: kind"
    r" 'generator' and kind 'dpr_question'\.",
  ):
    export_model(run.path, output, kind)
  assert not output.exists()


def test_the_loss_finds_out_that_words_decide(learned_run, tiny, tmp_path):
  learned_run.write_corpus(tmp_path)
  config = learned_run.make_config(tmp_path)
  config.train.num_steps = 40
  config.data.substitute_answers = 0.0
  config.encoder.tied = False  # two random towers, which stay so: noise
  config.encoder.learn_score_scale = False
  config.encoder.train_passage_encoder = False
  config.encoder.score_scale = 5.0
  config.optimizer.freeze = ("question_encoder",)
  config.optimizer.hybrid_lr = 0.03
  config.index.hybrid = True
  questions = load_questions(str(tmp_path), "validation")[:32]
  recall = "answer_recall_at_5"

  with open_workdir(tmp_path / "run", config) as workdir, tiny.compiling():
    experiment = open_experiment(config, tokenizer_path=workdir.tokenizer)
    evaluator = Evaluator(experiment, Answerer(experiment))

    def validate(params, index):
      alone = {k: v for k, v in params.items() if k != "hybrid"}
      found = evaluator.evaluate(alone, index, questions, "alone")
      return evaluator.evaluate(params, index, questions, "validation") | {
        "validation/without_words": found[f"alone/{recall}"]
      }

    train(experiment, load_questions(str(tmp_path), "train"), workdir, validate)
  records = read_metrics(tmp_path / "run" / "metrics.jsonl")
  words = [r["train/hybrid_bm25"] for r in records]
  dense = [r["train/hybrid_dense"] for r in records]
  assert words == sorted(words)
  assert words[-1] > 1.3 * config.index.hybrid_bm25
  assert dense == sorted(dense, reverse=True)
  assert dense[-1] < 0.8 * config.index.hybrid_dense
  last = records[-1]
  assert last[f"validation/{recall}"] > last["validation/without_words"] + 0.1
