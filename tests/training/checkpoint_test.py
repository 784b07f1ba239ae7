"""Checkpoints come back bit for bit, and into the arrays they belong to."""

import logging
import os
import threading

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from rag_jax import artifacts
from rag_jax.training import checkpoint as checkpoint_lib
from rag_jax.training.checkpoint import Checkpointer

EXTRA = {"position": 7, "pending": ["d3", "d1"], "config": {"seed": 0}}


@flax.struct.dataclass
class State:
  """As the trainer's."""

  step: jax.Array
  params: dict
  opt_state: tuple


def make_state(seed=0, width=64):
  rng = np.random.default_rng(seed)
  params = {
    "encoder": {
      "kernel": jnp.asarray(rng.normal(size=(64, width)), jnp.float32),
      "scale": jnp.asarray(rng.normal(size=(5,)), jnp.bfloat16),
    },
    "ids": jnp.asarray(rng.integers(2**31, size=(3,)), jnp.int32),
  }
  # Nested NamedTuples, masked leaves and empty states.
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.partition(
      {"train": optax.adamw(1e-3), "frozen": optax.set_to_zero()},
      {"encoder": "train", "ids": "frozen"},
    ),
  )
  opt_state = jax.tree.map(lambda x: x + seed, optimizer.init(params))
  return State(jnp.int32(seed), params, opt_state)


def abstract(state, sharding=None):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding or x.sharding
    ),
    state,
  )


def assert_bit_equal(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def directory(tmp_path):
  return tmp_path / "checkpoints"


@pytest.fixture
def three(directory):
  """Steps 10, 20 and 30, whose states differ."""
  checkpointer = Checkpointer(directory, keep_last=3)
  for step in (10, 20, 30):
    checkpointer.save(step, make_state(step), EXTRA | {"position": step})
  checkpointer.close()
  return Checkpointer(directory, keep_last=3)


def test_state_and_extra_come_back_bit_for_bit(directory):
  state = make_state()
  checkpointer = Checkpointer(directory, keep_last=1)
  checkpointer.save(3, state, EXTRA, metric=0.5)
  checkpointer.close()
  got, extra = Checkpointer(directory, keep_last=1).restore(abstract(state))
  assert_bit_equal(got, state)
  assert extra == EXTRA
  assert Checkpointer(directory, keep_last=1).read_extra(3) == EXTRA


def test_floats_that_are_no_numbers_come_back_too(directory):
  bits = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1], np.uint32)
  state = {"x": jax.device_put(bits.view(np.float32))}
  checkpointer = Checkpointer(directory, keep_last=1)
  checkpointer.save(0, state, {})
  got, _ = checkpointer.restore(abstract(state))
  np.testing.assert_array_equal(np.asarray(got["x"]).view(np.uint32), bits)


def test_restore_puts_arrays_where_the_abstract_state_says(directory):
  state = make_state()
  checkpointer = Checkpointer(directory, keep_last=1)
  checkpointer.save(3, state, EXTRA)
  mesh = jax.make_mesh(
    (1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
  )
  replicated = NamedSharding(mesh, PartitionSpec())
  target = abstract(state, replicated)
  rows = NamedSharding(mesh, PartitionSpec("fsdp"))
  target.params["encoder"]["kernel"] = jax.ShapeDtypeStruct(
    (64, 64), jnp.float32, sharding=rows
  )
  got, _ = checkpointer.restore(target)
  assert_bit_equal(got, state)
  assert got.params["encoder"]["kernel"].sharding == rows
  assert got.step.sharding == replicated


def test_latest_is_restored_unless_a_step_is_named(three):
  target = abstract(make_state())
  assert three.restore(target)[1]["position"] == 30
  state, extra = three.restore(target, step=10)
  assert extra["position"] == 10
  assert_bit_equal(state, make_state(10))


def test_a_directory_that_does_not_exist_has_no_steps(directory):
  checkpointer = Checkpointer(directory, keep_last=1)
  assert checkpointer.steps() == []
  assert checkpointer.latest_step() is None
  assert checkpointer.best_step() is None
  with pytest.raises(
    FileNotFoundError, match=r"no complete checkpoint in .*path"
  ):
    checkpointer.restore(abstract(make_state()))
  assert not directory.exists()  # reading makes nothing


def test_a_relative_directory_works(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  checkpointer = Checkpointer("run/checkpoints", keep_last=1)
  checkpointer.save(1, {"x": jnp.ones(2)}, {})
  assert checkpointer.latest_step() == 1


def test_a_step_that_is_not_there_is_refused_with_those_that_are(three):
  with pytest.raises(FileNotFoundError, match=r"step 15 .*\[10, 20, 30\]"):
    three.restore(abstract(make_state()), step=15)
  with pytest.raises(FileNotFoundError, match=r"step 15 .*\[10, 20, 30\]"):
    three.read_extra(15)


def test_the_last_few_and_the_best_are_kept(directory):
  checkpointer = Checkpointer(directory, keep_last=2)
  state = {"x": jnp.ones(3)}
  for step, metric in enumerate([0.1, 0.9, 0.3, None, 0.2, 0.4]):
    checkpointer.save(step, state, {}, metric)
  assert checkpointer.steps() == [1, 4, 5]
  assert checkpointer.best_step() == 1
  assert sorted(os.listdir(directory)) == ["1", "4", "5"]
  checkpointer.save(6, state, {}, 0.95)  # a new best: the old one goes
  assert checkpointer.steps() == [5, 6]


def test_of_equal_metrics_the_later_step_is_best(directory):
  checkpointer = Checkpointer(directory, keep_last=3)
  for step, metric in [(1, 0.5), (2, 0.5), (3, 0.1)]:
    checkpointer.save(step, {"x": jnp.ones(3)}, {}, metric)
  assert checkpointer.best_step() == 2


def test_a_metric_that_is_not_a_number_never_is_best(directory, caplog):
  checkpointer = Checkpointer(directory, keep_last=3)
  checkpointer.save(1, {"x": jnp.ones(3)}, {}, 0.1)
  checkpointer.save(2, {"x": jnp.ones(3)}, {}, float("nan"))
  assert checkpointer.best_step() == 1
  assert "metric nan never counts as best" in caplog.text


def test_a_save_before_later_steps_is_kept(three):
  state = make_state()
  saver = Checkpointer(three._directory, keep_last=2)
  saver.save(15, state, EXTRA)  # resumed from step 10
  assert saver.steps() == [15, 20, 30]


@pytest.mark.parametrize("keep_last", [0, -1])
def test_keeping_no_checkpoint_is_refused(directory, keep_last):
  with pytest.raises(ValueError, match=r"train\.keep_checkpoints to 1 or more"):
    Checkpointer(directory, keep_last=keep_last)


def test_saving_a_complete_step_again_is_refused(three, directory):
  with pytest.raises(ValueError, match=f"of step 20 .*Delete {directory}/20"):
    three.save(20, make_state(), EXTRA)
  state, _ = three.restore(abstract(make_state()), step=20)
  assert_bit_equal(state, make_state(20))


def test_negative_steps_are_refused(directory):
  with pytest.raises(ValueError, match="step=-1 must be at least 0"):
    Checkpointer(directory, keep_last=1).save(-1, make_state(), {})


def test_another_shape_is_refused(three):
  with pytest.raises(
    ValueError,
    match=r"params/encoder/kernel: saved as float32\[64,64\], expected"
    r" float32\[64,32\]",
  ) as error:
    three.restore(abstract(make_state(width=32)))
  assert "Use the config that it was trained with" in str(error.value)
  assert "mu/encoder/kernel" in str(error.value)  # Adam's moments as well


def test_another_dtype_is_refused_not_cast(three):
  state = make_state()
  state.params["encoder"]["scale"] = jnp.ones(5, jnp.float32)
  with pytest.raises(
    ValueError,
    match=r"scale: saved as bfloat16\[5\], expected float32\[5\]",
  ):
    three.restore(abstract(state))


def test_arrays_that_only_one_side_knows_are_listed(three):
  state = make_state()
  state.params["decoder"] = {"bias": jnp.ones(2)}
  del state.params["ids"]
  with pytest.raises(ValueError, match="other arrays than the model") as error:
    three.restore(abstract(state))
  assert "saved, but not expected: params/ids\n" in str(error.value)
  assert "expected, but not saved: params/decoder/bias\n" in str(error.value)


def test_another_optimizer_is_refused(three):
  state = make_state()
  other = optax.sgd(0.1, momentum=0.9).init(state.params)
  with pytest.raises(ValueError, match="saved, but not expected: opt_state/"):
    three.restore(abstract(state.replace(opt_state=other)))


def test_long_lists_of_arrays_are_cut(directory):
  checkpointer = Checkpointer(directory, keep_last=1)
  checkpointer.save(0, {f"w{i}": jnp.ones(1) for i in range(25)}, {})
  with pytest.raises(ValueError, match="w16, w17, and 15 more"):
    checkpointer.restore(abstract({"x": jnp.ones(1)}))


def test_a_leaf_without_sharding_is_refused(three):
  target = jax.eval_shape(lambda: make_state())
  with pytest.raises(ValueError, match="no sharding for step, params/encoder"):
    three.restore(target)


def test_a_leaf_that_is_no_array_is_refused(directory):
  checkpointer = Checkpointer(directory, keep_last=1)
  with pytest.raises(
    TypeError, match=r"leaves that are no jax.Array: a/n: .*int"
  ):
    checkpointer.save(0, {"a": {"n": 3, "x": jnp.ones(2)}}, {})
  assert checkpointer.steps() == []


@pytest.mark.parametrize("value", [np.int32(3), {1, 2}, float("nan")])
def test_an_extra_that_json_cannot_hold_is_refused(directory, value):
  checkpointer = Checkpointer(directory, keep_last=1)
  with pytest.raises(TypeError, match=r"extra\['position'\] cannot be saved"):
    checkpointer.save(0, make_state(), {"seed": 1, "position": value})
  assert not directory.exists()


def test_orbax_logs_warnings_but_no_info(directory, caplog):
  absl = logging.getLogger("absl")
  with caplog.at_level(logging.INFO, logger="absl"):
    checkpointer = Checkpointer(directory, keep_last=1)
    checkpointer.save(0, make_state(), EXTRA)
    checkpointer.restore(abstract(make_state()))
    assert caplog.records == []
    orbax_file = checkpoint_lib.ocp.__file__
    for level in (logging.INFO, logging.WARNING):
      absl.handle(
        absl.makeRecord("absl", level, orbax_file, 1, "from orbax", (), None)
      )
    absl.info("from here")
  assert [(r.levelname, r.message) for r in caplog.records] == [
    ("WARNING", "from orbax"),
    ("INFO", "from here"),
  ]


def test_a_state_can_be_donated_while_it_is_saved(directory):
  update = jax.jit(
    lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0
  )
  state = {"x": jnp.arange(1 << 20, dtype=jnp.float32), "step": jnp.int32(0)}
  checkpointer = Checkpointer(directory, keep_last=9)
  for step in range(3):
    checkpointer.save(step, state, {})
    target = abstract(state)
    state = jax.block_until_ready(update(update(state)))
  for step in range(3):
    got, _ = checkpointer.restore(target, step)
    expected = np.arange(1 << 20, dtype=np.float32) + 2 * step
    np.testing.assert_array_equal(np.asarray(got["x"]), expected)
    assert int(got["step"]) == 2 * step


def test_a_save_returns_before_its_digests_are_made(directory, monkeypatch):
  may_go_on = threading.Event()
  write_manifest = artifacts.write_manifest

  def slow(*args, **kwargs):
    may_go_on.wait(60)
    write_manifest(*args, **kwargs)

  monkeypatch.setattr(artifacts, "write_manifest", slow)
  checkpointer = Checkpointer(directory, keep_last=1)
  checkpointer.save(0, {"x": jnp.ones(2)}, {})
  assert not (directory / "0" / "manifest.json").exists()
  may_go_on.set()
  checkpointer.wait()
  assert (directory / "0" / "manifest.json").exists()
  checkpointer.close()
  assert Checkpointer(directory, keep_last=1).latest_step() == 0
