"""Rotary position embeddings (RoPE), and how they are scaled.

Su et al. 2021, https://arxiv.org/abs/2104.09864: each pair of numbers of a
query or key is rotated by an angle proportional to the position, so that their
product depends on the distance. In: positions. Out: rotated queries and keys.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from rag_jax.config_models import CausalConfig

Rotation = Float[Array, "2 B T half"]  # cosines and sines; half of H


def frequencies(c: CausalConfig, *, local: bool) -> Float[np.ndarray, "half"]:
  """Returns the angle per position of each pair, in radians, float32.

  The scalings are those of transformers: "linear" (position interpolation,
  arXiv:2306.15595), "llama3" (the same for long waves only, arXiv:2407.21783)
  and "yarn" (arXiv:2309.00071).

  Args:
    c: of the generator.
    local: whether it is for sliding layers.
  """
  theta = c.rope_theta
  scaling = c.rope_scaling
  if local and c.rope_local_theta:
    theta, scaling = c.rope_local_theta, "none"
  # In float32 like PyTorch: at positions of many thousands it can be seen.
  exponents = np.arange(0, c.head_size, 2, dtype=np.float32)
  exponents /= np.float32(c.head_size)
  waves = np.float32(theta) ** exponents
  plain = np.float32(1) / waves
  interpolated = plain / np.float32(c.rope_factor)
  if scaling == "linear":
    return interpolated
  if scaling == "llama3":
    turns = c.rope_original_positions * plain / (2 * np.pi)
    low, high = c.rope_low_freq_factor, c.rope_high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    mixed = (1 - kept) * interpolated + kept * plain
    return mixed.astype(np.float32)
  if scaling == "yarn":
    first, last = _yarn_range(c)
    ramp = np.arange(len(plain)) - first
    ramp = np.clip(ramp / ((last - first) or 0.001), 0, 1)
    mixed = interpolated * ramp + plain * (1 - ramp)
    return mixed.astype(np.float32)
  return plain


def _yarn_range(c: CausalConfig) -> tuple[float, float]:
  """Returns the pairs between which YaRN goes from none to full scaling."""

  def pair_of(turns: float) -> float:  # within the original positions
    wave = c.rope_original_positions / (turns * 2 * math.pi)
    return c.head_size * math.log(wave) / (2 * math.log(c.rope_theta))

  first, last = pair_of(c.rope_beta_fast), pair_of(c.rope_beta_slow)
  if c.rope_truncate:
    first, last = math.floor(first), math.ceil(last)
  return float(max(first, 0)), float(min(last, c.head_size - 1))


def rotation(
  c: CausalConfig, positions: Int[Array, "B T"], *, local: bool
) -> Rotation:
  """Returns the cosines and sines of the angles at `positions`, in float32."""
  angles = positions[..., None].astype(jnp.float32) * frequencies(
    c, local=local
  )
  scaled = not (local and c.rope_local_theta)
  factor = c.rope_attention_factor if scaled else 1.0
  return jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * factor


def rotate(
  x: Float[Array, "B T N H"], rotation: Rotation
) -> Float[Array, "B T N H"]:
  """Returns `x` rotated in float32; pairs are number i and i + H/2."""
  cos, sin = rotation[0][:, :, None], rotation[1][:, :, None]  # B T 1 half
  one, other = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [one * cos - other * sin, other * cos + one * sin], axis=-1
  )
  return rotated.astype(x.dtype)
