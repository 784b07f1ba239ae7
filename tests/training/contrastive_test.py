"""The contrastive stage: its loss in parts, what it moves, and a whole run."""

import functools
import json
import logging
import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.config import Config
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.losses import contrastive_nll
from rag_jax.models.batch import ContrastiveBatch
from rag_jax.models.rag import build_model
from rag_jax.training.contrastive import contrastive_loss
from rag_jax.training.stages import CONTRASTIVE
from rag_jax.training.stages import TRAIN
from rag_jax.training.stages import WARMUP
from rag_jax.training.stages import make_stages
from rag_jax.training.stages import stage_optimizer
from rag_jax.training.stages import trained

B, M, Q, L, V = 8, 2, 5, 7, 23
KEY = jax.random.key(3)
# Whole, in halves, and each question alone.
CHUNKS = [0, 4, 1]


@functools.cache
def make(dropout=0.0, tied=True):
  """Returns a model and its parameters."""
  config = Config()
  config.data.question_length, config.data.passage_length = Q, L
  config.encoder = EncoderConfig(
    num_layers=1, embed_dim=8, num_heads=2, mlp_dim=16, dropout=dropout,
    tied=tied, score_scale=3.0, learn_score_scale=True,
  )  # fmt: skip
  config.generator = GeneratorConfig(num_layers=1, embed_dim=8, num_heads=2,
                                     mlp_dim=8, max_positions=8)  # fmt: skip
  model = build_model(config, vocab_size=V, decoder_start_id=2)
  batch = make_batch()
  shapes = {}
  for name, tokens, mask in (
    ("embed_passages", batch.doc_tokens[:, 0], batch.doc_mask[:, 0]),
    ("embed_questions", batch.question_tokens, batch.question_mask),
  ):
    init = functools.partial(model.init, method=name)
    shapes |= jax.eval_shape(init, KEY, tokens, mask)["params"]
  rng = np.random.default_rng(0)
  return model, jax.tree.map(
    lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), jnp.float32),
    nn.meta.unbox(shapes),
  )


def make_batch():
  rng = np.random.default_rng(1)

  def tokens(*shape):
    mask = np.arange(shape[-1]) < rng.integers(2, shape[-1], (*shape[:-1], 1))
    return jnp.asarray(rng.integers(V, size=shape, dtype=np.int32)), (
      jnp.asarray(mask)
    )

  counts = rng.random((B, B * M)) < 0.8
  counts[np.arange(B), np.arange(B) * M] = True
  return ContrastiveBatch(*tokens(B, Q), *tokens(B, M, L), jnp.asarray(counts))


@functools.cache
def loss_and_grads(dropout=0.0, chunk=0, temperature=0.5):
  model, params = make(dropout)
  loss = functools.partial(
    contrastive_loss, model=model, chunk=chunk, temperature=temperature
  )
  return jax.jit(jax.value_and_grad(loss, has_aux=True))(
    params, make_batch(), KEY
  )


def assert_near(grads, expected):
  # A sum in another order is rounded by a share of the largest part.
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * largest),
    grads,
    expected,
  )


def test_the_loss_is_that_of_the_embeddings():
  model, params = make()
  batch = make_batch()
  apply = jax.jit(model.apply, static_argnames="method")
  embed = functools.partial(apply, {"params": params})
  questions = embed(
    batch.question_tokens, batch.question_mask, method="embed_questions"
  )
  docs = embed(
    batch.doc_tokens.reshape(-1, L), batch.doc_mask.reshape(-1, L),
    method="embed_passages",
  )  # fmt: skip
  nll, first = contrastive_nll(
    questions, docs, jnp.arange(B) * M, batch.counts, 0.5
  )
  (loss, metrics), _ = loss_and_grads()
  np.testing.assert_allclose(loss, np.mean(nll), rtol=1e-5)
  assert metrics["contrastive/loss"] == loss
  assert metrics["contrastive/accuracy"] == np.mean(first)
  others = np.asarray(batch.counts).sum() / B - 1
  assert metrics["contrastive/negatives"] == pytest.approx(others)


@pytest.mark.parametrize("chunk", CHUNKS[1:])
def test_in_parts_loss_and_gradient_are_those_of_the_whole(chunk):
  (loss, _), whole = loss_and_grads()
  (same, _), grads = loss_and_grads(chunk=chunk)
  np.testing.assert_allclose(same, loss, rtol=1e-6)
  assert_near(grads, whole)
  assert np.abs(whole["log_score_scale"]) > 1e-3  # it learns too


def test_it_is_grad_cache_by_hand_with_the_same_dropout():
  """Embeddings without gradient, theirs, then each part again."""
  chunk = 4
  model, params = make(dropout=0.4)
  batch = make_batch()
  question_key, doc_key = jax.random.split(KEY)

  @functools.partial(jax.jit, static_argnames="method")
  def encode(params, method, *inputs):
    return _encode(params, method, *inputs)

  @functools.partial(jax.jit, static_argnames="method")
  def pulled_back(grad, params, method, *inputs):
    _, back = jax.vjp(lambda p: _encode(p, method, *inputs), params)
    return back(grad)[0]

  def _encode(params, method, key, tokens, mask):
    return model.apply({"params": params}, tokens, mask, deterministic=False,
                       rngs={"dropout": key}, method=method)  # fmt: skip

  parts = []
  for method, key, tokens, mask in (
    ("embed_questions", question_key, batch.question_tokens,
     batch.question_mask),
    ("embed_passages", doc_key, batch.doc_tokens.reshape(-1, L),
     batch.doc_mask.reshape(-1, L)),
  ):  # fmt: skip
    starts = range(0, len(tokens), chunk)
    keys = jax.random.split(key, len(starts))
    parts += [
      (method, k, tokens[i : i + chunk], mask[i : i + chunk])
      for k, i in zip(keys, starts, strict=True)
    ]
  cached = [encode(params, *part) for part in parts]

  @jax.jit
  def loss(embeddings):
    questions = jnp.concatenate(embeddings[: B // chunk])
    docs = jnp.concatenate(embeddings[B // chunk :])
    own = jnp.arange(B) * M
    nll, _ = contrastive_nll(questions, docs, own, batch.counts, 0.5)
    return jnp.mean(nll)

  value, wanted = jax.value_and_grad(loss)(cached)
  expected = jax.tree.map(jnp.zeros_like, params)
  for part, grad in zip(parts, wanted, strict=True):
    more = pulled_back(grad, params, *part)
    expected = jax.tree.map(jnp.add, expected, more)
  (same, _), grads = loss_and_grads(dropout=0.4, chunk=chunk)
  np.testing.assert_allclose(same, value, rtol=1e-5)
  assert_near(grads, expected)
  (other, _), _ = loss_and_grads(chunk=chunk)
  assert abs(other - value) > 1e-3  # there was dropout


# The stage, on a tiny experiment whose questions name their passages.

STEPS = 6
ALONE = {"warmup__num_steps": 0, "train__num_steps": 0}


@pytest.fixture(scope="module")
def questions(tiny):
  """The folder of questions, with gold passages and negatives."""
  folder = pathlib.Path(tiny.root) / "questions with gold"
  folder.mkdir()
  passages = map(json.loads, tiny.passages.read_text().splitlines())
  row_of = {p["title"]: int(p["id"]) for p in passages}
  for split in ("train", "validation", "test"):
    lines = []
    for text in (tiny.questions / f"{split}.jsonl").read_text().splitlines():
      record = json.loads(text)
      row = row_of[record["question"].rstrip("?").split(" of ")[1]]
      record["gold"] = [str(row)]
      record["negatives"] = [str((row + k) % 40) for k in (2, 4, 6)]
      lines.append(json.dumps(record) + "\n")
    (folder / f"{split}.jsonl").write_text("".join(lines))
  return folder


@pytest.fixture(scope="module")
def config_of(tiny, questions):
  def config(**changes):
    settings = {
      "data__questions": str(questions),
      "contrastive__num_steps": STEPS,
      "contrastive__batch_size": 8,
      "contrastive__negatives": 1,
      "contrastive__chunk": 4,
      "contrastive__retriever_lr": 1e-2,
      "contrastive__warmup_steps": 2,
      "encoder__dropout": 0.1,
      "warmup__num_steps": 2,
      "train__num_steps": 2,
      "train__keep_checkpoints": 100,
    }
    return tiny.config(**settings | changes)

  return config


def stages_of(tiny, config, split=None):
  experiment, _, _ = tiny.open(config)
  return make_stages(experiment, split or tiny.split("train"))


@pytest.fixture(scope="module")
def whole(tiny, config_of):
  """A run of all three stages, with a checkpoint of every step."""
  return tiny.train(
    tiny.root / "contrastive", config_of(train__checkpoint_steps=1)
  )


def test_the_stages_follow_one_another(whole):
  lines = [(r["stage"], r["step"]) for r in whole.metrics]
  assert lines == [
    *((WARMUP, i) for i in (1, 2)),
    *((CONTRASTIVE, i) for i in range(1, STEPS + 1)),
    *((TRAIN, i) for i in (1, 2)),
  ]
  assert whole.steps == list(range(1, 2 + STEPS + 2 + 1))


def test_metrics_of_the_stage_have_its_name(whole):
  for record in whole.metrics[2 : 2 + STEPS]:
    assert 0 < record["contrastive/loss"] < 3
    assert 0 < record["contrastive/negatives"] <= 15
    assert 0 <= record["contrastive/accuracy"] <= 1
    assert 0 < record["contrastive/padding"] < 1
    assert record["contrastive/grad_norm"] > 0
    assert not any("train/" in name for name in record)


def test_only_the_retriever_moves_and_only_it_has_moments(whole):
  before, after = whole.state(2), whole.state(2 + STEPS)
  moved = {
    name.split("/")[1]
    for name, x in before.items()
    if name.startswith("params/") and not np.array_equal(x, after[name])
  }
  assert moved == {"question_encoder"}
  sizes = [x.size for name, x in after.items() if "generator" in name
           and name.startswith("opt_state")]  # fmt: skip
  assert sum(sizes) <= 2  # counters
  assert any("mu/question_encoder" in name for name in after)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
  tiny, tiny_run, config_of, whole
):
  config = config_of(train__checkpoint_steps=4)
  path = tiny.root / "contrastive stopped"
  for stop in ((CONTRASTIVE, 3), (CONTRASTIVE, STEPS), (TRAIN, 1), None):
    run = tiny.train(path, config, stop_at=stop)
    assert (run.stopped is None) == (stop is None)
  assert run.steps == [5, 6, 8, 9, 10]
  for step in run.steps:
    tiny_run.assert_bit_equal(run.state(step), whole.state(step))
  assert [{k: v for k, v in r.items() if "loss" in k} for r in run.metrics] == [
    {k: v for k, v in r.items() if "loss" in k} for r in whole.metrics
  ]


def test_other_negatives_do_not_continue_the_run(
  tiny, config_of, tmp_path, questions, caplog
):
  config = config_of(**ALONE)
  with caplog.at_level(logging.INFO):
    tiny.train(tmp_path / "run", config, stop_at=(CONTRASTIVE, 2))
  assert (
    "  stages      contrastive, 6 steps of 8 questions with 2 passages, then 0"
    " steps of 8 questions"
  ) in caplog.text
  assert "learns from 40 of 40 training questions" in caplog.text
  assert "nats/question" in caplog.text
  train = questions / "train.jsonl"
  text = train.read_text()
  train.write_text(text.replace('"negatives": ["2", ', '"negatives": ["3", '))
  try:
    with pytest.raises(
      ValueError, match="with other positives and negatives of questions: what"
    ):
      tiny.train(tmp_path / "run", config)
  finally:
    train.write_text(text)


def test_alone_it_learns_to_find_passages(tiny, config_of, tmp_path):
  config = config_of(
    **ALONE,
    contrastive__num_steps=60,
    contrastive__retriever_lr=3e-2,
    contrastive__negatives=0,
    encoder__dropout=0.0,
    train__checkpoint_steps=20,
  )
  run = tiny.train(tmp_path / "run", config, measure=True)
  losses = [r["contrastive/loss"] for r in run.metrics[:-1]]
  assert np.mean(losses[-5:]) < np.mean(losses[:5]) / 2
  assert run.results["test/answer_recall_at_1"] > 0.6
  assert (tmp_path / "run" / "model").exists()
  assert (tmp_path / "run" / "learning_curves.png").exists()


def test_a_loss_that_is_not_finite_names_the_rate_to_lower(
  tiny, config_of, tmp_path
):
  def spoil(step, metrics):
    name = "contrastive/loss"
    return metrics | ({name: jnp.nan} if name in metrics and step == 3 else {})

  with pytest.raises(
    FloatingPointError,
    match=r"contrastive/loss is not finite at step 3 of contrastive: .* Lower"
    r" contrastive\.retriever_lr, or",
  ):
    tiny.train(tmp_path / "run", config_of(**ALONE), spoil=spoil)


# What is held, and what is refused.

PARAMS = {
  name: {"kernel": jnp.ones((2, 2))}
  for name in ("generator", "question_encoder", "passage_encoder", "hybrid")
}


@pytest.mark.parametrize(
  ("changes", "learn"),
  [
    ({}, {"question_encoder", "passage_encoder"}),
    ({"retriever_loss": "none"}, {"question_encoder", "passage_encoder"}),
    ({"optimizer__freeze": ("passage_encoder",)}, {"question_encoder"}),
    # Passages keep the embeddings of an index, once there is one.
    (
      {"encoder__train_passage_encoder": False},
      {"question_encoder", "passage_encoder"},
    ),
    (
      {"encoder__train_passage_encoder": False, "index__path": "index"},
      {"question_encoder"},
    ),
    (
      {"encoder__train_passage_encoder": False, "lora__rank": 2,
       "lora__targets": ("encoder/attention",), "encoder__num_layers": 1},
      {"question_encoder"},
    ),
  ],
)  # fmt: skip
def test_what_learns_in_the_stage(tiny, changes, learn):
  config = tiny.config(encoder__tied=False, **changes)
  found = trained(config, CONTRASTIVE, PARAMS)
  assert {name for name, part in found.items() if part["kernel"]} == learn
  config.contrastive.num_steps, config.contrastive.warmup_steps = 9, 0
  config.contrastive.retriever_lr, config.optimizer.weight_decay = 0.25, 0.0
  optimizer = stage_optimizer(config, CONTRASTIVE, PARAMS)
  moves, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
  for name, part in moves.items():
    step = 0.25 if name in learn else 0.0
    np.testing.assert_allclose(part["kernel"], -step, rtol=1e-4)


def test_a_retriever_that_is_held_is_refused(tiny, config_of):
  config = config_of(optimizer__freeze=("question_encoder",))
  with pytest.raises(
    ValueError, match=r"contrastive\.num_steps=6 trains the retriever, but all"
  ):
    stages_of(tiny, config)


def test_questions_without_passages_are_refused(tiny, config_of):
  config = config_of(data__questions=str(tiny.questions))
  with pytest.raises(ValueError, match="The contrastive stage has nothing to"):
    stages_of(tiny, config)
