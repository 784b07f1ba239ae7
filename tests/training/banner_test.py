"""The beginning of a run's log."""

import jax

from rag_jax.training.banner import banner


def test_a_run_begins_with_what_it_is_in_a_few_lines(tiny):
  config = tiny.config()
  experiment, _, _ = tiny.open(config)
  text = banner(experiment, "runs/x", {"train": tiny.split("train")})
  lines = text.splitlines()
  assert lines[0] == "runs/x (config.json has every setting)"
  params = jax.eval_shape(experiment.init, jax.random.key(0))
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert f"{total / 1000:.3g} k: " in lines[1]
  assert all(part in lines[1] for part in params)
  assert f"{len(tiny.split('train')):,} train" in text
  assert (
    f"{config.train.num_steps:,} steps of {config.train.batch_size}" in text
  )
  assert "cpu" in text
  # What was set, and nothing that is as by default.
  assert f"    data.passages={config.data.passages!r}" in lines
  assert "optimizer.b1=" not in text
  assert len(lines) < 60
