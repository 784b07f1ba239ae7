"""Two hosts save, find and restore checkpoints in a bucket.

Run as a program, by each of two processes, this file saves checkpoints, and
prints what it finds. A client that remembers what a folder held would not see
what the other process has written since.
"""

import json
import sys

from buckets import served_bucket
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
from processes import join_hosts
from processes import run_on_hosts

from rag_jax.retrieval.shared_embedding import embed_shared
from rag_jax.training.checkpoint import Checkpointer


def main(address):
  host = join_hosts()
  path = epath.Path(address) / "run"
  checkpoints = Checkpointer(
    path / "checkpoints", keep_last=1, process_index=host
  )
  found = {"at first": checkpoints.steps()}
  mesh = jax.make_mesh((2,), ("data",))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  abstract = {"x": jax.ShapeDtypeStruct((4,), np.float32, sharding=rows)}
  for step, metric in ((1, 0.5), (2, 0.7), (3, 0.6), (4, 0.1)):
    array = jax.make_array_from_callback(
      (4,), rows, lambda i, step=step: np.arange(4, dtype=np.float32)[i] + step
    )
    checkpoints.save(step, {"x": array}, {"host": host}, metric)
    checkpoints.wait()
    multihost_utils.sync_global_devices("saved")
    found[step] = checkpoints.steps()
  found["newest"] = checkpoints.newest_whole()
  state, _ = checkpoints.restore(abstract)
  found["restored"] = multihost_utils.process_allgather(
    state["x"], tiled=True
  ).tolist()
  found["best"] = checkpoints.best_whole()
  checkpoints.set_aside_after(found["best"])
  found["left"] = checkpoints.steps()
  found["embedded"] = embed_shared(
    lambda ids: np.float32(ids)[:, None] + 0.5,
    np.split(np.arange(12), 4),
    path / "indexes" / ".embedding-1",
  )[:, 0].tolist()
  checkpoints.close()
  sys.stdout.write(f"\n{json.dumps(found)}\n")


def test_each_host_sees_what_the_other_has_written(tmp_path):
  with served_bucket(tmp_path) as address:
    printed = run_on_hosts(
      __file__, address, count=2, num_devices=2, cache=tmp_path / "compiled",
      timeout=120,
    )  # fmt: skip
  for text in printed:
    found = json.loads(text.splitlines()[-1])
    assert found == {
      "at first": [],
      "1": [1],
      "2": [2],
      "3": [2, 3],  # the newest, and the best
      "4": [2, 4],
      "newest": 4,
      "restored": [4.0, 5.0, 6.0, 7.0],
      "best": 2,
      "left": [2],
      "embedded": [i + 0.5 for i in range(12)],
    }


if __name__ == "__main__":
  main(*sys.argv[1:])
