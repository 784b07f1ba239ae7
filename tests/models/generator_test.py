"""The generator against its parts, and one token at a time against all."""

import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.config_models import GeneratorConfig
from rag_jax.config_models import TransformerConfig
from rag_jax.models import layers
from rag_jax.models.generator import Generator
from rag_jax.models.stack import sinusoid_init

V, D, C, T, START = 13, 8, 5, 4, 2
CONTEXT = np.array(
  [[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [5, 3, 5, 8, 0]], np.int32
)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], bool)
TARGET = np.array([[7, 9, 3, 2], [4, 4, 2, 0], [12, 1, 11, 10]], np.int32)

BART = {"num_layers": 2}  # the defaults: post-norm, embedding norm, no scale
OTHER = {
  "num_layers": 1,
  "norm": "pre",
  "embedding_norm": False,
  "scale_embedding": True,
  "position_offset": 0,
  "relative_buckets": 8,
  "activation": "relu",
}
T5 = {
  "num_layers": 1,
  "num_decoder_layers": 2,
  "head_dim": 3,
  "norm": "pre",
  "norm_kind": "rms",
  "use_bias": False,
  "embedding_norm": False,
  "positions": "none",
  "relative_buckets": 8,
  "relative_shared": True,
  "scale_attention": False,
  "scale_output": True,
  "logits_bias": False,
}
POINTER = {"pointer": True}
VARIANTS = pytest.mark.parametrize(
  "fields",
  [BART, OTHER, T5, BART | POINTER],
  ids=["bart", "pre", "t5", "pointer"],
)
BY_HAND = pytest.mark.parametrize("fields", [BART, OTHER], ids=["bart", "pre"])


def make_generator(**fields):
  dtype = fields.pop("dtype", jnp.float32)
  sizes = {
    "vocab_size": V,
    "embed_dim": D,
    "num_heads": 2,
    "mlp_dim": 12,
    "max_positions": 6,
    "decoder_start_id": START,
  }
  return Generator(GeneratorConfig(**(sizes | fields)), dtype=dtype)


def shapes(generator):
  variables = jax.eval_shape(
    generator.init, jax.random.key(0), CONTEXT, MASK, TARGET
  )
  return nn.meta.unbox(variables)["params"]


class Compiled:
  """A generator, its programs, and parameters none of which is 0 or 1."""

  def __init__(self, **fields):
    self.generator = make_generator(**fields)
    rng = np.random.default_rng(0)
    self.params = jax.tree.map(
      lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32),
      shapes(self.generator),
    )
    self._call = jax.jit(self.generator.apply)
    self._decode = jax.jit(self._steps)

  def logits(self, context=CONTEXT, mask=MASK, target=TARGET):
    """Returns target_logits [N, T, V], all positions at once."""
    return np.asarray(
      self._call({"params": self.params}, context, mask, target)
    )

  def _steps(self, params, context, mask, inputs):
    variables = {"params": params}
    memory = self.generator.apply(variables, context, mask, method="encode")
    cache = self.generator.apply(
      variables,
      memory[:, None],
      mask[:, None],
      context[:, None],
      num_beams=1,
      num_steps=inputs.shape[1] + 1,
      method="init_cache",
    )

    def step(cache, position):
      logits, cache = self.generator.apply(
        variables, inputs[:, position, None], position, cache, method="step"
      )
      return cache, logits[:, 0, 0]

    _, logits = jax.lax.scan(step, cache, jnp.arange(inputs.shape[1]))
    return jnp.swapaxes(logits, 0, 1)  # N T V

  def logits_by_step(self):
    """Returns target_logits [N, T, V], decoded with a cache."""
    start = np.full((len(TARGET), 1), START, np.int32)
    inputs = np.concatenate([start, TARGET[:, :-1]], axis=1)
    return np.asarray(self._decode(self.params, CONTEXT, MASK, inputs))


@functools.cache
def compiled(fields):
  return Compiled(**dict(fields))


@pytest.fixture
def model(fields):
  return compiled(tuple(fields.items()))


def norm_by_hand(params, x):
  x = x - x.mean(axis=-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
  return x * params["scale"] + params["bias"]


def stack_by_hand(params, x, mask, fields, *memory):
  offset = fields.get("position_offset", 2)
  table = params["position_embedding"]["embedding"]
  x = x + table[offset : offset + x.shape[1]]
  if fields.get("embedding_norm", True):
    x = norm_by_hand(params["embedding_norm"], x)
  config = TransformerConfig(
    embed_dim=D,
    num_heads=2,
    mlp_dim=12,
    relative_buckets=0 if memory else fields.get("relative_buckets", 0),
    activation=fields.get("activation", "gelu"),
    norm=fields.get("norm", "post"),
  )
  layer = layers.TransformerLayer(config, cross=bool(memory), dtype=jnp.float32)
  run = jax.jit(layer.apply)
  for i in range(fields["num_layers"]):
    x = np.asarray(run({"params": params[f"layer_{i}"]}, x, mask, *memory))
  if fields.get("norm") == "pre":
    x = norm_by_hand(params["final_norm"], x)
  return x


@BY_HAND
def test_it_is_the_architecture_of_bart(model, fields):
  params = model.params
  table = params["token_embedding"]["embedding"]
  scale = math.sqrt(D) if fields.get("scale_embedding") else 1.0
  mask = MASK[:, None]
  memory = stack_by_hand(
    params["encoder"], scale * table[CONTEXT], mask, fields
  )
  inputs = np.concatenate(
    [np.full((3, 1), START, np.int32), TARGET[:, :-1]], axis=1
  )
  causal = np.arange(T)[:, None] >= np.arange(T)
  x = stack_by_hand(
    params["decoder"],
    scale * table[inputs],
    np.tile(causal, (3, 1, 1)),
    fields,
    memory,
    mask,
  )
  expected = x @ table.T + params["final_logits_bias"]
  np.testing.assert_allclose(model.logits(), expected, atol=2e-5)


@VARIANTS
def test_one_token_at_a_time_gives_the_logits_of_all_at_once(model):
  np.testing.assert_allclose(model.logits_by_step(), model.logits(), atol=2e-5)


@VARIANTS
@pytest.mark.parametrize("position", range(T))
def test_logits_have_not_seen_the_token_that_they_predict(model, position):
  before = model.logits()
  target = TARGET.copy()
  target[:, position] = (target[:, position] + 1) % V
  after = model.logits(target=target)
  np.testing.assert_array_equal(
    after[:, : position + 1], before[:, : position + 1]
  )
  changed = np.any(after != before, axis=-1)  # N T
  assert np.all(changed[:, position + 1 :])


@VARIANTS
def test_the_token_ids_of_context_padding_do_not_matter(model):
  other = np.where(MASK, CONTEXT, 7)
  assert np.any(other != CONTEXT)
  np.testing.assert_array_equal(model.logits(context=other), model.logits())


@pytest.mark.parametrize("fields", [BART], ids=["bart"])
def test_the_amount_of_context_padding_does_not_matter(model):
  longer = np.pad(CONTEXT, ((0, 0), (0, 1)), constant_values=7)
  mask = np.pad(MASK, ((0, 0), (0, 1)))
  np.testing.assert_allclose(
    model.logits(longer, mask), model.logits(), atol=2e-5
  )


@VARIANTS
def test_a_context_token_that_is_real_does_matter(model):
  other = CONTEXT.copy()
  other[:, 2] += 1
  assert np.all(np.any(model.logits(context=other) != model.logits(), axis=2))


def test_one_table_embeds_all_tokens_and_writes_them():
  params = shapes(make_generator(**BART))
  tables = [x for x in jax.tree.leaves(params) if x.shape == (V, D)]
  assert len(tables) == 1
  assert params["token_embedding"]["embedding"] is tables[0]


def test_post_norm_has_no_final_norm_and_no_norm_of_embeddings_unless_asked():
  bart, other = shapes(make_generator(**BART)), shapes(make_generator(**OTHER))
  for stack in ("encoder", "decoder"):
    assert "embedding_norm" in bart[stack]
    assert "embedding_norm" not in other[stack]
    assert "final_norm" not in bart[stack]
    assert "final_norm" in other[stack]
    assert bart[stack]["position_embedding"]["embedding"].shape == (6 + 2, D)
    assert other[stack]["position_embedding"]["embedding"].shape == (6, D)


def test_a_generator_of_the_size_of_bart_base_has_its_parameters():
  """139,420,416 of facebook/bart-base, and the bias that BART holds at 0."""
  d, f, v = 768, 3072, 50_265
  generator = make_generator(
    vocab_size=v,
    num_layers=6,
    embed_dim=d,
    num_heads=12,
    mlp_dim=f,
    max_positions=1024,
  )
  norm, attention = 2 * d, 4 * (d * d + d)
  mlp = d * f + f + f * d + d
  positions_and_norm = (1024 + 2) * d + norm
  encoder = positions_and_norm + 6 * (attention + mlp + 2 * norm)
  decoder = positions_and_norm + 6 * (2 * attention + mlp + 3 * norm)
  assert v * d + encoder + decoder == 139_420_416
  params = shapes(generator)
  sizes = {
    name: sum(x.size for x in jax.tree.leaves(part))
    for name, part in params.items()
  }
  assert sizes == {
    "token_embedding": v * d,
    "encoder": encoder,
    "decoder": decoder,
    "final_logits_bias": v,
  }


def test_sinusoids_are_those_of_the_paper_with_rows_of_unit_norm():
  table = np.asarray(sinusoid_init(jax.random.key(0), (5, 6)))
  for position in range(5):
    for i in range(3):
      angle = position / 10_000 ** (2 * i / 6)
      scaled = table[position] * math.sqrt(3)
      np.testing.assert_allclose(scaled[i], math.sin(angle), atol=1e-6)
      np.testing.assert_allclose(scaled[3 + i], math.cos(angle), atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(table, axis=1), 1.0, rtol=1e-6)


def test_a_copying_generator_starts_by_quoting_its_context():
  """After each token of the context it writes the one that followed there."""
  size, length = 50, 12
  generator = make_generator(
    vocab_size=size,
    num_layers=1,
    embed_dim=128,
    num_heads=4,
    mlp_dim=32,
    max_positions=16,
    norm="pre",
    embedding_norm=False,
    relative_buckets=8,
    init="copy",
  )
  rng = np.random.default_rng(3)
  context = np.stack([rng.permutation(size)[:length] for _ in range(8)])

  @jax.jit
  def quote(key, context):
    logits, _ = generator.init_with_output(
      key, context, jnp.ones(context.shape, bool), context[:, 3:9]
    )
    return jnp.argmax(logits, axis=-1)

  # Having read the first tokens of a quotation, it goes on with the next.
  predicted = quote(jax.random.key(0), context.astype(np.int32))
  np.testing.assert_array_equal(predicted[:, 1:], context[:, 4:9])


def test_logits_of_bfloat16_are_float32_and_close():
  exact = compiled(tuple(OTHER.items()))
  low = make_generator(**OTHER, dtype=jnp.bfloat16)
  logits = jax.jit(low.apply)({"params": exact.params}, CONTEXT, MASK, TARGET)
  assert logits.dtype == jnp.float32
  assert np.any(logits != exact.logits())
  np.testing.assert_allclose(logits, exact.logits(), atol=0.2)


@pytest.mark.parametrize(
  ("context", "target", "message"),
  [
    (7, T, r"Contexts of 7 tokens per row .* 6 learned positions.*Cut them"),
    (C, 7, r"Targets of 7 tokens per row .* 6 learned positions.*Cut them"),
  ],
)
def test_rows_longer_than_the_positions_are_refused(context, target, message):
  tokens, mask = np.ones((1, context), np.int32), np.ones((1, context), bool)
  args = tokens, mask, np.ones((1, target), np.int32)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(make_generator(**BART).init, jax.random.key(0), *args)
  jax.eval_shape(make_generator(**T5).init, jax.random.key(0), *args)
