"""A workdir in a bucket: it is opened, resumed and refused as on a disk."""

from buckets import bucket
import pytest

from rag_jax.config import Config
from rag_jax.config_json import read_config
from rag_jax.training.workdir import open_workdir


def test_a_run_goes_on_in_a_bucket_and_another_one_is_refused(caplog):
  config = Config()
  config.seed = 5
  with bucket() as address, caplog.at_level("INFO", logger="absl"):
    with open_workdir(f"{address}/runs/one", config) as workdir:
      assert read_config(workdir.config_path) == config
      (workdir.checkpoints / "3").mkdir(parents=True)
      (workdir.checkpoints / "3" / "manifest.json").write_text("{}")
    config.train.log_steps = 7  # may differ
    with open_workdir(f"{address}/runs/one", config) as workdir:
      assert read_config(workdir.config_path).train.log_steps == 7
    config.seed = 6
    with pytest.raises(ValueError, match="seed: 5 -> 6"):
      open_workdir(f"{address}/runs/one", config)
  assert "make sure that no other run writes there" in caplog.text
