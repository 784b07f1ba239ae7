"""What the lines of a run say about its speed and its retrieval."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.losses import MARGINAL_NLL_FNS
from rag_jax.models import flops
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.retriever import Embedder
from rag_jax.training import health
from rag_jax.training.collapse import CollapseWarning
from rag_jax.training.health import answers_in_docs
from rag_jax.training.health import compile_utility
from rag_jax.training.ledger import KINDS
from rag_jax.training.objectives import marginal_loss
from rag_jax.training.stages import make_stages
from rag_jax.training.state import init_params


def of_train(run):
  """The lines of the main stage."""
  return [r for r in run.metrics if r["stage"] == "train"]


@pytest.fixture(scope="module")
def profiled(tiny):
  config = tiny.config(train__peak_tflops=1e-3, train__profile_steps=(2, 3))
  return tiny.train(tiny.root / "profiled", config)


def test_mfu_is_that_of_the_speed_in_the_same_line(profiled):
  config, experiment = profiled.config, profiled.experiment
  shapes = flops.step_shapes(config, len(experiment.passages))
  vocab_size = experiment.model.generator.config.vocab_size
  step = flops.total_flops(flops.step_flops(config, shapes, vocab_size))
  devices = experiment.mesh.devices.size
  for record in of_train(profiled):
    steps_per_sec = record["train/questions_per_second"] / 8
    expected = step * steps_per_sec / (devices * 1e9)
    assert record["train/mfu"] == pytest.approx(expected)


def test_the_profile_is_in_the_workdir(profiled):
  assert list((profiled.path / "profile").rglob("*.xplane.pb"))


def test_the_ledger_grows_like_the_time(uninterrupted):
  totals, times = [], []
  for record in uninterrupted.metrics:
    assert all(record[f"ledger/{kind}_secs"] >= 0 for kind in KINDS)
    totals.append(sum(record[f"ledger/{kind}_secs"] for kind in KINDS))
    times.append(record["time_secs"])
  # It is opened a little before the clock of the metrics.
  ahead = np.array(totals) - times
  assert np.ptp(ahead) < 1
  assert np.all(ahead > -0.01)
  last = uninterrupted.metrics[-1]
  for kind in ("step", "validation", "checkpoint", "compile"):
    assert last[f"ledger/{kind}_secs"] > 0


def test_padding_is_a_share_of_the_batch(uninterrupted):
  # Nearly all inputs of the tiny run are shorter than its lengths.
  shares = [record["train/padding"] for record in of_train(uninterrupted)]
  assert all(0.2 < share < 0.9 for share in shares)


def test_retrieval_is_measured_beside_the_loss(uninterrupted):
  lines = of_train(uninterrupted)
  assert all(0 <= r["train/answer_in_docs"] <= 1 for r in lines)
  # 40 passages of an untrained retriever: some answers are found, not all.
  assert 0 < np.mean([r["train/answer_in_docs"] for r in lines]) < 1
  # The first refresh is in use after step 6.
  shifts = [r.get("train/rank_shift") for r in lines]
  assert shifts[:6] == [None] * 6
  assert shifts[6:10] == [shifts[6]] * 4
  assert all(0 <= shift <= 1 for shift in shifts[6:])
  validated = [r["step"] for r in lines if "train/doc_utility" in r]
  assert validated == [3, 6, 9, 12]


def test_rank_shift_is_the_share_of_documents_that_were_replaced(
  tiny, uninterrupted, monkeypatch
):
  run, asked = uninterrupted, []
  found = {0: [[0, 1]] * 8, 1: [[1, 0]] * 4 + [[5, 1]] * 4}

  def find_docs(index, bm25, params, embeddings, questions, n_docs):
    asked.append(questions)
    return np.array(found[len(asked) - 1], np.int32)

  monkeypatch.setattr(health, "find_docs", find_docs)
  batches = make_stages(run.experiment, tiny.split("train"))[-1].batches
  watched = health.RetrievalHealth(run.experiment, tiny.split("train"), batches)
  before, after = (load_index(run.path / "indexes" / v) for v in ("4", "8"))
  params = {k: v for k, v in run._first_params()[0].items() if k != "generator"}
  with tiny.compiling():
    watched.refreshed(before, after, params)
    # The order of documents does not count; 4 of 16 are other ones.
    assert watched.newest_rank_shift() == 4 / 16
  watched.close()
  assert asked == [[q.question for q in tiny.split("train")[:8]]] * 2


def test_utility_is_the_loss_that_documents_take_away(tiny):
  config = tiny.config()
  experiment = tiny.open(config)[0]
  params, _ = init_params(experiment.init, jax.random.key(0), experiment.mesh)
  batches = make_stages(experiment, tiny.split("train"))[-1].batches
  doc_ids = np.arange(16, dtype=np.int32).reshape(8, 2)
  with tiny.compiling():
    pair = [
      jax.tree.map(jnp.asarray, batch)
      for batch in batches.compared(3, doc_ids, None)
    ]
    losses = [
      marginal_loss(
        params,
        batch,
        jax.random.key(0),
        model=experiment.model,
        nll_fn=MARGINAL_NLL_FNS[config.loss],
      )[0]
      for batch in pair
    ]
    found = compile_utility(experiment)(params, *pair)
  np.testing.assert_allclose(found, losses[1] - losses[0], atol=1e-5)
  # Half of the answers are substituted in training, none here.
  answers = [tiny.split("train")[row].answers[0] for row in batches.rows(3)]
  tokenizer = experiment.tokenizer
  targets = map(np.asarray, (pair[0].target_tokens, pair[0].target_mask))
  for tokens, mask, answer in zip(*targets, answers, strict=True):
    ids = tokens[mask][:-1].tolist()  # without the end token
    assert tokenizer.decode(ids).strip() == answer


def test_answers_are_found_word_for_word(tiny):
  passages = tiny.open(tiny.config())[0].passages
  text = passages[3].text
  last = text.rstrip(".").split()[-1]  # "The river is NAME."
  docs = np.array([[1, 3], [1, 3], [1, 2], [3, 1]], np.int32)
  answers = [[last.upper()], [last[:-1]], [last], ["no such", last]]
  assert answers_in_docs(passages, docs, answers) == 2 / 4


def test_a_healthy_run_is_not_reported(uninterrupted, caplog):
  detector = CollapseWarning(batch_size=8, n_docs=2, num_passages=40)
  for record in of_train(uninterrupted) * 3:
    values = {k: v for k, v in record.items() if k.startswith("train/")}
    detector.look(record["step"], values)
  assert not caplog.records


def test_a_run_whose_questions_become_alike_warns_once(
  tiny, caplog, monkeypatch
):
  embed, num_calls = Embedder.questions, []

  def alike(self, *args):
    """From the fifth call on, all questions have one embedding."""
    embeddings = embed(self, *args)
    num_calls.append(1)
    if len(num_calls) < 5:
      return embeddings
    return np.broadcast_to(embeddings.mean(axis=0), embeddings.shape).copy()

  monkeypatch.setattr(Embedder, "questions", alike)
  run = tiny.train(tiny.root / "collapsed", tiny.config())
  found = [r for r in caplog.records if "has collapsed" in r.getMessage()]
  assert len(found) == 1
  assert "different questions get the same documents" in found[0].getMessage()
  assert of_train(run)[-1]["train/distinct_docs"] == 2 / 16
