"""AdamW or Adafactor, with learning rates of their own for both models.

The two weights of a hybrid retriever's scores have a third one.
"""

from collections.abc import Hashable, Sequence

import flax.traverse_util
import jax
from jaxtyping import PyTree
import optax

from rag_jax.config import OptimizerConfig
from rag_jax.models import hybrid
from rag_jax.models.lora import adapted_parts
from rag_jax.models.lora import by_path
from rag_jax.models.lora import trains_in_adapter


def schedule(
  config: OptimizerConfig, peak_lr: float, num_steps: int
) -> optax.Schedule:
  """Returns the learning rate at each step: a linear rise, then the decay."""
  warmup = min(config.warmup_steps, max(num_steps - 1, 0))
  end = peak_lr * config.end_lr_ratio
  rest = max(num_steps - warmup, 1)
  decay = {
    "constant": optax.constant_schedule(peak_lr),
    "linear": optax.linear_schedule(peak_lr, end, rest),
    "cosine": optax.cosine_decay_schedule(
      peak_lr, rest, alpha=config.end_lr_ratio
    ),
  }[config.schedule]
  rise = optax.linear_schedule(0.0, peak_lr, warmup + 1)
  # `rise` reaches the peak one step after the warm-up, where `decay` starts:
  # the first step moves too.
  return optax.join_schedules([lambda step: rise(step + 1), decay], [warmup])


def parameter_labels(params: PyTree, freeze: Sequence[str]) -> PyTree:
  """Returns "generator", "retriever", "hybrid" or "frozen" for each parameter.

  Where there are adapters, the rest of that generator or tower is frozen.

  Raises:
    ValueError: a prefix in `freeze` names no parameter.
  """
  flat = by_path(params)
  for prefix in freeze:
    if not any(_below(path, prefix) for path in flat):
      raise ValueError(
        f"optimizer.freeze names {prefix!r}, but no parameter has that path."
        f" Top-level names are {sorted({p.split('/')[0] for p in flat})}; a"
        " full path looks like"
        f" {next(iter(flat))!r}."
      )

  adapted = adapted_parts(flat)

  def label(path: str) -> str:
    part = path.split("/")[0]
    if part in adapted and not trains_in_adapter(path):
      return "frozen"
    if any(_below(path, prefix) for prefix in freeze):
      return "frozen"
    return part if part in ("generator", hybrid.PARAMS) else "retriever"

  return flax.traverse_util.unflatten_dict(
    {path: label(path) for path in flat}, sep="/"
  )


def _decays(params: PyTree) -> PyTree:
  """Returns whether weight decay applies to each parameter."""
  # By name as well: the biases of attention are two-dimensional, [N, H].
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x.ndim > 1 and "bias" not in path[-1].key, params
  )


def _below(path: str, prefix: str) -> bool:
  return path == prefix or path.startswith(prefix.rstrip("/") + "/")


def make_optimizer(
  config: OptimizerConfig,
  params: PyTree,
  num_steps: int,
  freeze: Sequence[str] = (),
) -> optax.GradientTransformation:
  """Returns the optimizer of `params` over `num_steps` steps.

  The gradient is clipped by its global norm over the trained parameters. Weight
  decay applies only to matrices, never to biases, norms and scales.

  Args:
    config: kind, learning rates, schedule and AdamW's numbers.
    params: the parameters, or their shapes.
    num_steps: of the whole stage.
    freeze: path prefixes of parameters that do not train.
  """
  labels = parameter_labels(params, freeze)
  frozen = jax.tree.map(lambda label: label == "frozen", labels)

  def part(peak_lr: float) -> optax.GradientTransformation:
    if config.kind == "adafactor":
      # Without its own scale by the size of a parameter, so that a learning
      # rate means what it means with AdamW: updates of about that size.
      return optax.chain(
        # The kernels of attention end in the size of a head, often 64.
        optax.scale_by_factored_rms(min_dim_size_to_factor=64),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay, _decays),
        optax.scale_by_learning_rate(schedule(config, peak_lr, num_steps)),
      )
    return optax.adamw(
      schedule(config, peak_lr, num_steps),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=_decays,
      mu_dtype=config.momentum_dtype,
    )

  parts: dict[Hashable, optax.GradientTransformation] = {
    "generator": part(config.peak_lr),
    "retriever": part(config.retriever_lr),
    "frozen": optax.set_to_zero(),
  }
  # Only if it is needed, since every part is saved in the checkpoints.
  if hybrid.PARAMS in jax.tree.leaves(labels):
    parts[hybrid.PARAMS] = part(config.hybrid_lr)
  clip = (
    optax.clip_by_global_norm(config.clip_norm)
    if config.clip_norm
    else optax.identity()
  )
  return optax.chain(
    optax.masked(optax.set_to_zero(), frozen),
    clip,
    optax.partition(parts, labels),
  )
