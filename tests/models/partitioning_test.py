"""Every parameter's dimensions have names, and every name has a rule.

Flax replicates a dimension whose name it does not know, without a word: a
misspelt name costs memory on every device and fails nowhere else.
"""

import typing

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec
import pytest

from rag_jax.config import Config
from rag_jax.config import MeshConfig
from rag_jax.models import partitioning
from rag_jax.models.batch import RagBatch
from rag_jax.models.rag import build_model

RULES = dict(partitioning.AXIS_RULES)


@pytest.fixture(scope="module")
def mesh():
  return partitioning.make_mesh(MeshConfig(data=1))


def is_box(node):
  return isinstance(node, nn.meta.AxisMetadata)


@pytest.fixture(scope="module", params=["normal", "copy"])
def boxed(request):
  """Boxed shapes of a model that has every kind of parameter."""
  config = Config()
  config.encoder.num_layers = 1
  config.encoder.tied = False
  config.encoder.pooling = "learned"
  config.encoder.projection_dim = 48
  config.encoder.learn_score_scale = True
  config.generator.num_layers = 1
  config.generator.norm = "pre"
  config.generator.relative_buckets = 8
  config.generator.init = request.param
  model = build_model(config, vocab_size=600, decoder_start_id=2)
  tokens = jnp.zeros((1, 2, 4), jnp.int32)  # as contexts and as documents
  question = tokens[:, 0]
  batch = RagBatch(
    context_tokens=tokens,
    context_mask=tokens == 0,
    target_tokens=question,
    target_mask=question == 0,
    question_tokens=question,
    question_mask=question == 0,
    doc_tokens=tokens,
    doc_mask=tokens == 0,
  )
  return jax.eval_shape(
    lambda key: model.init(key, batch)["params"], jax.random.key(0)
  )


def named_leaves(tree):
  """Yields (path, box or unnamed shape)."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box):
    yield "/".join(key.key for key in path), leaf


def test_every_kernel_and_table_has_a_name_for_each_dimension(boxed):
  kernels = 0
  for path, leaf in named_leaves(boxed):
    if path.endswith(("/kernel", "/embedding")):
      kernels += 1
      assert is_box(leaf), f"{path} {leaf.shape} has no names"
      assert len(leaf.names) == leaf.unbox().ndim, path
      assert None not in leaf.names, path
  # Twice embeddings 2, attention 4, MLP 2, pooling, projection; 3 embeddings,
  # 3 attentions and 2 MLPs of the generator.
  assert kernels == 2 * 10 + 3 + 12 + 4


def test_what_has_no_names_is_a_bias_or_belongs_to_a_norm(boxed):
  for path, leaf in named_leaves(boxed):
    if not is_box(leaf):
      assert path.endswith(("/bias", "norm/scale")), f"{path} has no names"


def test_every_name_in_the_model_has_a_rule(boxed):
  used = set()
  for path, leaf in named_leaves(boxed):
    names = set(leaf.names) if is_box(leaf) else set()
    assert names <= set(RULES), f"{path} {leaf.names}"
    used |= names
  # Those of activations, and of adapters, which this model does not have.
  assert used == set(RULES) - {"batch", "docs", "length", "rank"}


def test_every_logical_axis_has_one_rule_and_every_rule_a_logical_axis():
  names = [name for name, _ in partitioning.AXIS_RULES]
  assert sorted(names) == sorted(typing.get_args(partitioning.LogicalAxis))


def test_rules_name_axes_of_the_mesh_that_linen_can_use(mesh):
  assert mesh.axis_names == ("data", "fsdp", "tensor")
  assert mesh.axis_types == (AxisType.Auto,) * 3
  for axes in RULES.values():
    assert set((axes,) if isinstance(axes, str) else axes or ()) <= set(
      mesh.axis_names
    )


def test_an_unknown_name_would_be_replicated_without_a_word(mesh):
  """If this fails, Flax has learnt to complain: good, and note it above."""
  with_names = [
    nn.LogicallyPartitioned(jax.ShapeDtypeStruct((8, 8), jnp.float32), names)
    for names in (("embed", "mlp"), ("embde", "mpl"))
  ]
  right, wrong = partitioning.shardings(with_names, mesh)
  assert right.spec == PartitionSpec("fsdp", "tensor")
  assert wrong.spec == PartitionSpec(None, None)


def test_matrices_are_split_over_fsdp_and_tensor(boxed, mesh):
  layout = partitioning.shardings(boxed, mesh)
  specs = {
    "/".join(key.key for key in path): sharding.spec
    for path, sharding in jax.tree_util.tree_leaves_with_path(layout)
  }
  layer = "generator/decoder/layer_0/"
  expected = {
    "generator/token_embedding/embedding": ("tensor", "fsdp"),
    "generator/decoder/position_embedding/embedding": (None, "fsdp"),
    "generator/final_logits_bias": ("tensor",),
    layer + "self_attention/query/kernel": ("fsdp", "tensor", None),
    layer + "cross_attention/key/kernel": ("fsdp", "tensor", None),
    layer + "cross_attention/value/kernel": ("fsdp", "tensor", None),
    layer + "cross_attention/out/kernel": ("tensor", None, "fsdp"),
    "generator/encoder/layer_0/self_attention/relative_bias": (None, "tensor"),
    layer + "mlp/up/kernel": ("fsdp", "tensor"),
    layer + "mlp/down/kernel": ("tensor", "fsdp"),
    layer + "mlp/up/bias": (),
    layer + "mlp_norm/scale": (),
    "question_encoder/token_embedding/embedding": ("tensor", "fsdp"),
    "passage_encoder/projection/kernel": ("fsdp", None),
    "log_score_scale": (),
  }
  for path, spec in expected.items():
    assert specs[path] == PartitionSpec(*spec), path


def test_batches_are_split_over_data_and_fsdp(mesh):
  sharding = partitioning.batch_sharding(mesh)
  assert sharding.spec == PartitionSpec(RULES["batch"])
  assert partitioning.replicated(mesh).spec == PartitionSpec()


def test_initializers_have_the_standard_deviation_of_bert():
  init = partitioning.dense_init("embed", "mlp")
  box = init(jax.random.key(0), (100, 200), jnp.float32)
  assert box.names == ("embed", "mlp")
  assert 0.0195 < float(jnp.std(box.unbox())) < 0.0205
