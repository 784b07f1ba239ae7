"""Parameters are born where they live, and their moments lie beside them."""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from rag_jax.config import MeshConfig
from rag_jax.config import OptimizerConfig
from rag_jax.models import partitioning
from rag_jax.training.optimizer import make_optimizer
from rag_jax.training.state import init_params
from rag_jax.training.state import make_state


def init(key):
  """Boxed parameters, as a model's `init` makes them."""
  keys = jax.random.split(key, 3)

  def kernel(i, shape, *axes):
    return partitioning.dense_init(*axes)(keys[i], shape, jnp.float32)

  return {
    "question_encoder": {
      "token_embedding": {"embedding": kernel(0, (6, 4), "vocab", "embed")}
    },
    "generator": {
      "up": {
        "kernel": kernel(1, (4, 8), "embed", "mlp"),
        "bias": jnp.zeros(8),
      },
      "query": {
        "kernel": kernel(2, (4, 2, 2), "embed", "heads", "head_dim"),
        "bias": jnp.zeros((2, 2)),
      },
    },
  }


SPECS = {
  "question_encoder/token_embedding/embedding": ("tensor", "fsdp"),
  "generator/up/kernel": ("fsdp", "tensor"),
  "generator/up/bias": (),
  "generator/query/kernel": ("fsdp", "tensor", None),
  "generator/query/bias": (),
}


@pytest.fixture(scope="module")
def mesh():
  return partitioning.make_mesh(MeshConfig(data=1))


@pytest.fixture(scope="module")
def fresh(mesh):
  return init_params(init, jax.random.key(3), mesh)


@pytest.fixture(scope="module", params=[(), ("generator/up",)], ids=str)
def made(request, fresh, mesh):
  params, layout = fresh
  optimizer = make_optimizer(OptimizerConfig(), params, 10, request.param)
  state, state_layout = make_state(params, layout, optimizer, mesh)
  return state, state_layout, request.param


def name_of(path):
  return "/".join(str(getattr(k, "key", k)) for k in path)


def test_parameters_are_the_unboxed_ones_of_the_model(fresh):
  params, _ = fresh
  expected = jax.jit(lambda key: nn.meta.unbox(init(key)))(jax.random.key(3))
  assert jax.tree.structure(params) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_parameters_live_where_their_names_say(fresh):
  params, layout = fresh
  shardings = jax.tree_util.tree_leaves_with_path(layout)
  assert {name_of(p): tuple(s.spec) for p, s in shardings} == SPECS
  assert jax.tree.map(lambda x: x.sharding, params) == layout


def test_the_layout_has_a_sharding_for_every_array_of_the_state(made):
  state, layout, _ = made
  assert jax.tree.structure(state) == jax.tree.structure(layout)
  for x, sharding in zip(
    jax.tree.leaves(state), jax.tree.leaves(layout), strict=True
  ):
    assert x.sharding == sharding


def test_moments_lie_beside_their_parameters_and_counters_everywhere(made):
  _, layout, freeze = made
  moments = []
  for path, sharding in jax.tree_util.tree_leaves_with_path(layout.opt_state):
    owners = [name for name in SPECS if name_of(path).endswith(name)]
    spec = SPECS[owners[0]] if owners else ()
    assert sharding.spec == PartitionSpec(*spec), name_of(path)
    moments += owners
  trains = [n for n in SPECS if not n.startswith(freeze or "-")]
  assert sorted(moments) == sorted(2 * trains)  # Adam's mean and square


def test_the_means_of_adafactor_are_on_every_device(fresh, mesh):
  params, layout = fresh
  optimizer = make_optimizer(OptimizerConfig(kind="adafactor"), params, 10)
  state, state_layout = make_state(params, layout, optimizer, mesh)
  assert jax.tree.structure(state) == jax.tree.structure(state_layout)
  for path, sharding in jax.tree_util.tree_leaves_with_path(
    state_layout.opt_state
  ):
    if "v_row" in name_of(path) or "v_col" in name_of(path):
      assert sharding == partitioning.replicated(mesh), name_of(path)


def test_a_new_state_has_made_no_update(made, fresh):
  state, _, _ = made
  assert state.step == 0
  assert state.step.dtype == jnp.int32
  jax.tree.map(np.testing.assert_array_equal, state.params, fresh[0])
  for x in jax.tree.leaves(state.opt_state):
    assert not np.any(x)
