"""How devices are arranged, and what cannot be split over them."""

import dataclasses

import pytest

from rag_jax.config import Config
from rag_jax.models.partitioning import check_devices


def make(**settings):
  """Returns the defaults with `settings`, whose "__" stands for a dot."""
  config = Config()
  for name, value in settings.items():
    *sections, last = name.split("__")
    part = config
    for section in sections:
      part = getattr(part, section)
    setattr(part, last, value)
  return config


@pytest.mark.parametrize(
  ("mesh", "expected"),
  [
    ((0, 1, 1), (8, 1, 1)),
    ((0, 2, 2), (2, 2, 2)),
    ((0, 8, 1), (1, 8, 1)),
    ((2, 4, 1), (2, 4, 1)),
    ((2, 1, 4), (2, 1, 4)),
  ],
)
def test_the_data_axis_takes_the_devices_that_are_left(mesh, expected):
  data, fsdp, tensor = mesh
  config = make(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor)
  assert dataclasses.astuple(check_devices(config, 8)) == expected
  assert dataclasses.astuple(config.mesh) == mesh


@pytest.mark.parametrize(
  ("mesh", "num_devices", "needed"),
  [((2, 2, 1), 8, 4), ((0, 3, 1), 8, 6), ((0, 4, 4), 8, 16), ((4, 1, 1), 1, 4)],
)
def test_a_mesh_of_another_number_of_devices_is_refused(
  mesh, num_devices, needed
):
  data, fsdp, tensor = mesh
  config = make(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor)
  with pytest.raises(
    ValueError,
    match=(
      f"mesh.data={data}, mesh.fsdp={fsdp} and mesh.tensor={tensor} need"
      f" {needed} devices, but there are {num_devices}. Choose values whose"
      " product is that number, or mesh.data=0 to use all remaining devices."
    ),
  ):
    check_devices(config, num_devices)


def test_batches_that_do_not_split_over_the_devices_are_named_together():
  config = make(
    mesh__fsdp=2,
    train__batch_size=12,
    eval__batch_size=64,
    index__embed_batch_size=100,
    warmup__batch_size=4,
  )
  with pytest.raises(
    ValueError,
    match=(
      "^train.batch_size=12, index.embed_batch_size=100 must be a multiple of"
      r" 8, the devices that the batch is split over \(mesh.data=4 x"
      r" mesh.fsdp=2\), so that each gets an equal share.$"
    ),
  ):
    check_devices(config, 8)
  # A tensor axis does not split the batch.
  check_devices(make(mesh__tensor=4, train__batch_size=6), 8)


def test_sizes_that_the_mesh_cannot_split_are_named_together():
  config = make(
    mesh__tensor=8,
    encoder__num_heads=4,
    generator__num_heads=4,
    generator__num_decoder_heads=12,
    generator__decoder_mlp_dim=100,
  )
  with pytest.raises(
    ValueError,
    match=(
      r"^The mesh cannot split encoder\.num_heads=4 by mesh\.tensor=8,"
      r" generator\.num_heads=4 by mesh\.tensor=8,"
      r" generator\.num_decoder_heads=12 by mesh\.tensor=8,"
      r" generator\.decoder_mlp_dim=100 by mesh\.tensor=8 evenly\. Choose sizes"
      r" that are multiples, or a smaller mesh\.tensor or mesh\.fsdp\.$"
    ),
  ):
    check_devices(config, 8)


def test_the_warmup_batch_counts_if_there_is_a_warmup():
  settings = {"warmup__batch_size": 4}
  check_devices(make(**settings), 8)
  with pytest.raises(ValueError, match=r"^warmup.batch_size=4 must be a mul"):
    check_devices(make(**settings, warmup__num_steps=1), 8)


def test_the_parts_of_a_batch_have_to_divide_too():
  settings = {"train__batch_size": 32, "train__accumulate": 4}
  check_devices(make(**settings), 8)
  settings["train__batch_size"] = 48
  with pytest.raises(
    ValueError,
    match=r"^train.batch_size=48 must be a multiple of 32: ",
  ):
    check_devices(make(**settings), 8)


def test_a_generator_that_is_not_split_is_for_one_device():
  config = make(train__dropout_prng="rbg")
  check_devices(config, 1)
  with pytest.raises(ValueError, match=r"each would make.*of all 8.*threefry"):
    check_devices(config, 8)
