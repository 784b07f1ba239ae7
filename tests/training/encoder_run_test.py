"""Whole runs whose retriever has relative positions, as MPNet and T5."""

import numpy as np
import pytest

from rag_jax.config_models import EncoderConfig
from rag_jax.weights.convert import export_model
from rag_jax.weights.init_from import load_initial
from rag_jax.weights.load import load_encoder

SIZES = {"num_layers": 2, "embed_dim": 16, "num_heads": 2, "mlp_dim": 16}
ENCODERS = {
  "mpnet": {"family": "mpnet", "pooling": "cls", "relative_buckets": 32},
  "t5_encoder": {
    "family": "t5_encoder", "pooling": "mean", "positions": "none",
    "embedding_norm": False, "norm": "pre", "norm_kind": "rms",
    "norm_eps": 1e-6, "use_bias": False, "scale_attention": False,
    "gated": True, "activation": "gelu_new", "head_dim": 4,
    "relative_buckets": 8,
    "relative_max_distance": 20, "projection_dim": 12,
    "projection_bias": False, "normalize": True, "dropout": 0.1,
  },
}  # fmt: skip


@pytest.mark.parametrize("kind", ENCODERS)
def test_it_learns_is_exported_and_starts_another(tiny, kind, tmp_path):
  encoder = EncoderConfig(**SIZES | ENCODERS[kind])
  changes = {"encoder": encoder, "train__scan_layers": kind == "t5_encoder"}
  config = tiny.config(**changes)
  run = tiny.train(tmp_path / "run", config, measure=True)
  losses = [m["train/loss"] for m in run.metrics if "train/loss" in m]
  assert losses[-1] < losses[0] - 0.5
  table = next(
    x for name, x in run.state().items()
    if name.startswith("params/") and name.endswith("encoder/relative_bias")
  )  # fmt: skip
  # It began as zeros. Passages are short: far buckets stay at zero.
  assert table.shape == (encoder.relative_buckets, 2)
  assert np.mean(np.any(table, axis=1)) > 0.5

  if kind == "mpnet":  # whose positions begin after the padding token
    with pytest.raises(ValueError, match=r"position_offset=0; expected positi"):
      export_model(run.path, tmp_path / "none", "mpnet")
    return
  with pytest.raises(ValueError, match=r"normalize=True, .*Choose kind 'sent"):
    export_model(run.path, tmp_path / "none", kind)
  export_model(run.path, tmp_path / "out", "sentence_transformers")
  found = load_encoder(tmp_path / "out")
  np.testing.assert_array_equal(found.params["relative_bias"], table)
  # A file of settings for a model from scratch: the checkpoint decides them.
  again = tiny.config(encoder__init_from=str(tmp_path / "out"))
  again, initial = load_initial(again, {"encoder.init_from": ""})
  for name, value in SIZES.items() | ENCODERS[kind].items():
    assert getattr(again.encoder, name) == value, name
  assert again.encoder.max_positions == 0
  np.testing.assert_array_equal(
    initial.params["question_encoder"]["relative_bias"], table
  )
