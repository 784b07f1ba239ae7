"""The FLOPs of a step against what XLA counts in the compiled program."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import pytest

from rag_jax.config import Config
from rag_jax.config import MeshConfig
from rag_jax.config_models import LoraConfig
from rag_jax.data.experiment import init_model
from rag_jax.models import flops as flops_lib
from rag_jax.models.batch import MAX_ACCEPTED
from rag_jax.models.batch import RagBatch
from rag_jax.models.partitioning import make_mesh
from rag_jax.models.rag import build_model
from rag_jax.retrieval import device
from rag_jax.training.stages import TRAIN
from rag_jax.training.stages import SpecialIds
from rag_jax.training.stages import main_loss
from rag_jax.training.stages import stage_optimizer
from rag_jax.training.stages import trained
from rag_jax.training.state import TrainState
from rag_jax.training.step import update

VOCAB, P = 2048, 1000
SPECIAL = SpecialIds(None, (1,), (0, 1))
# XLA counts norms, softmaxes, activations and gradients' sums too: here less
# than this share, as layers are 512 wide. What is wrong in a formula is more.
SHARE = 0.04


def make_config(**changes):
  config = Config()
  config.data.n_docs, config.data.question_length = 3, 16
  config.data.passage_length, config.data.context_length = 24, 40
  config.data.target_length, config.train.batch_size = 8, 2
  e, g = config.encoder, config.generator
  e.num_layers, e.embed_dim, e.num_heads, e.mlp_dim = 2, 512, 2, 1024
  g.num_layers, g.embed_dim, g.num_heads, g.mlp_dim = 1, 512, 2, 1536
  for name, value in changes.items():
    section, _, field = name.rpartition("__")
    setattr(getattr(config, section) if section else config, field, value)
  return config


def make_batch(config):
  s = flops_lib.step_shapes(config, P)
  b, k = s.num_questions, max(s.n_docs, 1)

  def tokens(name, *shape):
    return {
      f"{name}_tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
      f"{name}_mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
    }

  fields = tokens("context", b, k, s.context_length)
  fields |= tokens("target", b, s.target_length)
  if s.n_docs:
    fields |= tokens("question", b, s.question_length)
    if config.encoder.train_passage_encoder:
      fields |= tokens("doc", b, k, s.passage_length)
    else:
      dim = config.encoder.projection_dim or config.encoder.embed_dim
      fields["doc_embeddings"] = jax.ShapeDtypeStruct((b, k, dim), jnp.float32)
  if config.rewards_answers:
    shape = b, MAX_ACCEPTED, s.target_length
    fields["accepted_tokens"] = jax.ShapeDtypeStruct(shape, jnp.int32)
  return RagBatch(**fields)


def counted(function, *args):
  """Returns what XLA counts in the compiled program, which is never run."""
  program = jax.jit(function).lower(*args).compile()
  return program.cost_analysis()["flops"]


T5 = {
  "generator__gated": True,
  "generator__norm": "pre",
  "generator__norm_kind": "rms",
  "generator__positions": "none",
  "generator__embedding_norm": False,
  "generator__use_bias": False,
  "generator__relative_buckets": 8,
  "generator__relative_shared": True,
  "generator__head_dim": 384,
  "generator__tied_output": False,
}
CASES = {
  "bart": {},
  "t5": T5,
  "another decoder": {
    "generator__num_decoder_layers": 2,
    "generator__num_decoder_heads": 4,
    "generator__decoder_mlp_dim": 2560,
  },
  "two towers": {
    "encoder__tied": False,
    "encoder__projection_dim": 256,
    "encoder__pooler": True,
    "encoder__pooling": "pooler",
  },
  "t5 encoder": {
    name.replace("generator", "encoder"): value
    for name, value in T5.items()
    if name not in ("generator__relative_shared", "generator__tied_output")
  },
  "passages of the index": {
    "encoder__tied": False,
    "encoder__train_passage_encoder": False,
  },
  "closed book": {"data__n_docs": 0},
  "fid": {"loss": "fid", "retriever_loss": "none"},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_step_costs_what_xla_counts(changes):
  config = make_config(**changes)
  model = build_model(config, vocab_size=VOCAB, decoder_start_id=2)
  batch, key = make_batch(config), jax.random.key(0)
  params = jax.eval_shape(model.init, key, batch)["params"]

  def loss(params, batch, key):
    return main_loss(config, model, SPECIAL)(params, batch, key)

  shapes = flops_lib.step_shapes(config, P)
  parts = flops_lib.step_flops(config, shapes, VOCAB)
  forward = sum(part.forward for part in parts.values())
  found = counted(loss, params, batch, key) / forward
  assert 1 <= found < 1 + SHARE
  total = flops_lib.total_flops(parts)
  found = counted(jax.grad(loss, has_aux=True), params, batch, key) / total
  assert 1 - SHARE / 2 < found < 1 + SHARE


def test_a_step_with_adapters_has_no_gradients_of_kernels():
  config = make_config(
    encoder__num_layers=6,
    generator__num_layers=6,
    lora=LoraConfig(
      rank=1, targets=("generator/attention", "generator/mlp", "encoder/value")
    ),
  )
  model = build_model(config, vocab_size=VOCAB, decoder_start_id=2)
  batch, key = make_batch(config), jax.random.key(0)

  def step_of(config):
    params = nn.meta.unbox(
      jax.eval_shape(functools.partial(init_model, config, model), key)
    )
    optimizer = stage_optimizer(config, TRAIN, params)
    state = TrainState(
      step=jax.ShapeDtypeStruct((), jnp.int32),
      params=params,
      opt_state=jax.eval_shape(optimizer.init, params),
    )
    step = functools.partial(
      update,
      loss_fn=main_loss(config, model, SPECIAL),
      optimizer=optimizer,
      stage=TRAIN,
      trained=trained(config, TRAIN, params),
    )
    parts = flops_lib.step_flops(
      config, flops_lib.step_shapes(config, P), VOCAB
    )
    return counted(step, state, batch, key), flops_lib.total_flops(parts)

  found, total = step_of(config)
  # The first layers have no gradient of what they read.
  assert 0.9 < found / total < 1 + SHARE
  config.lora = LoraConfig()
  whole, whole_total = step_of(config)
  assert 1 - SHARE / 2 < whole / whole_total < 1 + SHARE
  assert found < 0.7 * whole


@pytest.mark.parametrize("kind", ["pdist", "loop", "adist", "dkrr"])
def test_what_fids_retriever_learns_from_costs_what_xla_counts(kind):
  config = make_config(loss="fid", retriever_loss=kind)
  # More layers: XLA finds what passes have in common in the first.
  config.generator.num_decoder_layers = 3
  model = build_model(config, vocab_size=VOCAB, decoder_start_id=2)
  batch, key = make_batch(config), jax.random.key(0)
  params = jax.eval_shape(model.init, key, batch)["params"]
  parts = flops_lib.step_flops(config, flops_lib.step_shapes(config, P), VOCAB)
  assert parts["retriever_loss"].backward == 0
  forward = sum(part.forward for part in parts.values())
  found = (
    counted(main_loss(config, model, SPECIAL), params, batch, key) / forward
  )
  assert 1 - SHARE / 2 < found < 1 + SHARE


@pytest.mark.parametrize("kind", ["reward", "reward_sampled"])
def test_answers_that_are_rewarded_cost_what_xla_counts(kind):
  # One token: XLA counts the body of a loop once.
  config = make_config(retriever_loss=kind, data__target_length=1)
  model = build_model(config, vocab_size=VOCAB, decoder_start_id=2)
  batch, key = make_batch(config), jax.random.key(0)
  params = jax.eval_shape(model.init, key, batch)["params"]
  parts = flops_lib.step_flops(config, flops_lib.step_shapes(config, P), VOCAB)
  found = counted(main_loss(config, model, SPECIAL), params, batch, key)
  config.retriever_loss = "none"
  found -= counted(main_loss(config, model, SPECIAL), params, batch, key)
  expected = parts["retriever_loss"].forward
  assert expected > 0
  assert 0.9 < found / expected < 1.25  # in a smaller number, rest counts more


def test_search_inside_the_step_costs_what_xla_counts():
  config = make_config(index__refresh_rows=10)
  shapes = flops_lib.step_shapes(config, 100_000)
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  index = device.abstract_arrays(
    *(100_000, 512, mesh),
    storage="float32",
    recall_target=1.0,
    chunk_passages=0,
  )
  model = build_model(config, vocab_size=VOCAB, decoder_start_id=2)
  batch = make_batch(config)
  args = batch.question_tokens, batch.question_mask
  method = "embed_questions"
  params = jax.eval_shape(
    lambda *a: model.init(jax.random.key(0), *a, method=method), *args
  )

  def search(params, index, *args):
    embeddings = model.apply(params, *args, method=method)
    return device.search_device(index, embeddings, config.data.n_docs)

  parts = flops_lib.step_flops(config, shapes, VOCAB)
  found = counted(search, params, index, *args) / parts["search"].forward
  assert 1 <= found < 1 + SHARE
  # Ten passages are embedded again, instead of six with gradient.
  ratio = parts["refresh"].forward / parts["passage_encoder"].forward
  assert ratio == pytest.approx(10 / 6)
  assert parts["search"].backward == parts["refresh"].backward == 0


def test_what_is_computed_again_is_not_counted():
  costs = [
    flops_lib.step_flops(config, flops_lib.step_shapes(config, P), VOCAB)
    for config in (make_config(), make_config(train__vocab_chunk=128))
  ]
  assert costs[0] == costs[1]


def test_tokens_of_a_step_are_those_that_models_read():
  shapes = flops_lib.step_shapes(make_config(), P)
  # Two questions of 16; six documents with 24, 40 and 8 tokens.
  assert flops_lib.step_tokens(shapes) == 2 * 16 + 6 * (24 + 40 + 8)
  closed = flops_lib.step_shapes(make_config(data__n_docs=0), P)
  assert flops_lib.step_tokens(closed) == 2 * (40 + 8)
