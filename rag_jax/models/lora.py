"""Low-rank adapters (LoRA): few parameters that train in place of a kernel.

In: parameters of a model. Out: the same with an adapter beside each kernel that
the config names; or, at the end, with every adapter multiplied into its kernel.

A dense layer computes x W + s (x A) B, where A and B have a small inner
dimension, s is alpha / rank, and W stays as it is (Hu et al. 2021,
https://arxiv.org/abs/2106.09685). B is zero at first, so that a model starts
unchanged. An adapter is a part of the parameters, not of the model: where there
is none, a layer computes what it always did.
"""

from collections.abc import Collection, Mapping
import math
import typing
from typing import Any
import zlib

from flax import linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from rag_jax.config_models import LORA_GROUPS
from rag_jax.config_models import LoraConfig

DOWN, UP, SCALE = "lora_a", "lora_b", "lora_scale"
_TOWERS = ("question_encoder", "passage_encoder")
_BLOCKS = ("self_attention", "cross_attention", "mlp")  # of a layer


# Not type-checked: Flax's fields have types that cannot be checked.
@typing.no_type_check
class DenseGeneral(nn.DenseGeneral):
  """Flax's layer, with the adapter that its parameters may have.

  Params: `kernel` [*in, *out], and `bias` [*out] as in Flax; `lora_a`
  [*in, rank], `lora_b` [rank, *out] and `lora_scale` [] if there is an adapter.
  """

  def __call__(self, inputs: Float[Array, "*B in"]) -> Float[Array, "*B out"]:
    outputs = super().__call__(inputs)
    if not self.has_variable("params", DOWN):
      return outputs
    down, up, scale = (
      self.get_variable("params", name) for name in (DOWN, UP, SCALE)
    )
    # Scaled in float32, as in `merged`: bfloat16 would round the scale.
    up = jnp.asarray(scale * up, self.dtype)
    low = jnp.tensordot(
      inputs.astype(self.dtype), jnp.asarray(down, self.dtype), down.ndim - 1
    )
    return outputs + jnp.tensordot(low, up, 1)


def by_path(tree: PyTree) -> dict[str, Any]:
  """Returns the leaves of nested dicts, by their path with slashes."""
  return flax.traverse_util.flatten_dict(tree, sep="/")


def is_adapter(path: str) -> bool:
  """Returns whether a path, such as "up/lora_a", is of an adapter."""
  return path.rpartition("/")[2] in (DOWN, UP, SCALE)


def trains_in_adapter(path: str) -> bool:
  """Returns whether a path is of the matrices of an adapter."""
  return is_adapter(path) and not path.endswith(SCALE)


def adapted_parts(paths: Collection[str]) -> set[str]:
  """Returns the top-level names whose parameters have adapters."""
  return {path.split("/")[0] for path in paths if is_adapter(path)}


def with_adapters(
  params: PyTree,
  config: LoraConfig,
  key: Key[Array, ""],
  left_out: Collection[str] = (),
) -> PyTree:
  """Returns boxed parameters with the adapters that `config` asks for.

  Args:
    params: as `RagModel.init` returns them; only the shapes are used.
    config: rank 0 adds none.
    key: of the random values.
    left_out: top-level names that get none.

  Raises:
    ValueError: a target names no kernel, or the rank is not below the sizes of
      a kernel.
  """
  if not config.rank:
    return params
  is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)  # noqa: E731
  flat = flax.traverse_util.flatten_dict(
    params, is_leaf=lambda _, x: is_box(x), sep="/"
  )
  kernels = _kernels(flat)
  left = [path for path in kernels if path.split("/")[0] not in left_out]
  added = {}
  for target in config.targets:
    chosen = [path for path in left if _matches(path, target)]
    if not chosen:
      raise ValueError(
        f"lora.targets names {target!r}, but no kernel that trains has that"
        f" name. Expected some of {', '.join(_names(left)) or 'none'}: change"
        " it, or leave it out."
      )
    for path in chosen:
      added |= _adapter(path, flat[path], config, key)
  return flax.traverse_util.unflatten_dict(flat | added, sep="/")


def _kernels(paths: Collection[str]) -> list[str]:
  """Returns the paths of the kernels that can have an adapter."""
  known = {name for names in LORA_GROUPS.values() for name in names}
  found = []
  for path in paths:
    *_, block, name, last = ("", "", *path.split("/"))
    if last == "kernel" and name in known and block in _BLOCKS:
      found.append(path)
  return found


def _part(path: str) -> str:
  top = path.split("/")[0]
  return "encoder" if top in _TOWERS else top


def _matches(path: str, target: str) -> bool:
  part, _, name = target.partition("/")
  return part == _part(path) and path.split("/")[-2] in LORA_GROUPS.get(
    name, (name,)
  )


def _names(paths: Collection[str]) -> list[str]:
  """Returns the targets that name one of these kernels each."""
  return sorted({f"{_part(path)}/{path.split('/')[-2]}" for path in paths})


def _adapter(
  path: str, box: Any, config: LoraConfig, key: Key[Array, ""]
) -> Mapping[str, Any]:
  """Returns the boxed arrays of an adapter of the kernel at `path`."""
  layer = path.removesuffix("/kernel")
  kernel = nn.meta.unbox(box)
  names = tuple(box.names)
  num_in = kernel.ndim - 1 if layer.endswith("/out") else 1
  sizes = kernel.shape[:num_in], kernel.shape[num_in:]
  smallest = min(map(math.prod, sizes))
  if config.rank >= smallest:
    raise ValueError(
      f"lora.rank={config.rank} is not below {smallest}, the smaller size of"
      f" {path}: an adapter would have as many parameters as the kernel."
      " Choose a lower rank, often 4 to 64, or leave that target out."
    )
  fan_in = math.prod(sizes[0])
  # Uniform in +-1/sqrt(fan_in), as in Hu et al.'s and Hugging Face's code.
  down = jax.random.uniform(
    jax.random.fold_in(key, zlib.crc32(path.encode())),
    (*sizes[0], config.rank),
    minval=-(fan_in**-0.5),
    maxval=fan_in**-0.5,
  )
  boxed = nn.LogicallyPartitioned
  return {
    f"{layer}/{DOWN}": boxed(down, (*names[:num_in], "rank")),
    f"{layer}/{UP}": boxed(
      jnp.zeros((config.rank, *sizes[1])), ("rank", *names[num_in:])
    ),
    f"{layer}/{SCALE}": boxed(jnp.asarray(config.alpha / config.rank), ()),
  }


def without_adapters(tree: PyTree) -> PyTree:
  """Returns a tree, such as one of shapes, without what adapters have there."""
  flat = by_path(tree)
  plain = {path: x for path, x in flat.items() if not is_adapter(path)}
  return flax.traverse_util.unflatten_dict(plain, sep="/")


def merged(params: PyTree) -> PyTree:
  """Returns parameters without adapters that compute the same.

  Args:
    params: of a model or of a part of it; those without adapters are returned
      as they are. On a mesh, call it inside a program.
  """
  flat, plain = by_path(params), by_path(without_adapters(params))
  for path, down in flat.items():
    layer, _, name = path.rpartition("/")
    if name == DOWN:
      up, scale = flat[f"{layer}/{UP}"], flat[f"{layer}/{SCALE}"]
      kernel = plain[f"{layer}/kernel"]
      # In float32 also on a TPU, which would multiply in bfloat16.
      change = jnp.tensordot(down, up, 1, precision=jax.lax.Precision.HIGHEST)
      plain[f"{layer}/kernel"] = kernel + scale * change
  return flax.traverse_util.unflatten_dict(plain, sep="/")
