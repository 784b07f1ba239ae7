"""The index in use, and the next version that a thread builds beside it.

In: copies of the retriever's parameters, now and then. Out: the index to search
at each step.

When a version is swapped in depends on the step alone, never on how fast the
thread was, so a run gives the same numbers on a busy machine and a resumed run
the same as an uninterrupted one.
"""

from concurrent import futures

from absl import logging
from etils import epath
from jaxtyping import PyTree

from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.retriever import IndexBuilder


class IndexVersions:
  """The current index and, while one is being built, the next.

  A version is named by the step whose parameters embedded it.
  """

  def __init__(
    self,
    builder: IndexBuilder,
    directory: epath.PathLike,
    *,
    refresh_steps: int,
    swap_steps: int,
    writes: bool = True,
  ):
    """Opens nothing yet; call `start` or `restore`.

    Args:
      builder: embeds and builds.
      directory: where versions are saved with a checkpoint.
      refresh_steps: steps between the start of two builds; 0: the first
        version is the only one.
      swap_steps: steps from the start of a build to its first use. A thread
        has that long to finish it for nothing.
      writes: whether this process saves and deletes; of several, one does.
    """
    self._builder = builder
    self._directory = epath.Path(directory)
    self._refresh_steps = refresh_steps
    self._swap_steps = swap_steps
    self._writes = writes
    self._adopted = False
    self._thread = futures.ThreadPoolExecutor(1, "index")
    self._next: futures.Future[Index] | None = None
    self._next_version = 0
    self._saved: set[int] = set()  # of this run, in the directory
    self.version = 0
    self.index: Index | None = None

  def start(self, retriever_params: PyTree) -> None:
    """Builds version 0 and waits for it."""
    self.index = self._builder.build(retriever_params)

  def adopt(self, index: Index) -> None:
    """Uses `index`, which was built elsewhere and is not saved again.

    Raises:
      ValueError: it finds less than index.min_recall.
    """
    self._builder.check(index)
    self.index, self._adopted = index, True

  def is_due(self, step: int) -> bool:
    """Whether a new version is to be built from the parameters of `step`."""
    refresh = self._refresh_steps
    return bool(refresh) and step > 0 and step % refresh == 0

  def refresh(self, step: int, retriever_params: PyTree) -> None:
    """Starts to build the version of `step`."""
    assert self._next is None, "the last version has not been swapped in"
    self._next_version = step
    self._next = self._thread.submit(self._builder.build, retriever_params)

  def swap_if_due(self, step: int) -> None:
    """Puts the next version in use, if `step` is the first to see it."""
    if self._next is None or step < self._next_version + self._swap_steps:
      return
    self.index, self.version = self._next.result(), self._next_version
    self._next = None

  def save(self) -> list[int]:
    """Saves the versions that a resumed run needs; returns their names."""
    assert self.index is not None, "call start, adopt or restore first"
    if self._adopted:
      return []
    versions = {self.version: self.index}
    if self._next is not None:
      versions[self._next_version] = self._next.result()
    for version, index in versions.items():
      # Not whether its directory exists: a run that went on from an earlier
      # checkpoint, with other settings, finds one of other weights.
      if version not in self._saved and self._writes:
        index.save(self._path(version))
        self._saved.add(version)
    return sorted(versions)

  def restore(self, versions: list[int], passages_fingerprint: str) -> None:
    """Opens what `save` returned the names of."""
    indexes = [
      load_index(self._path(v), passages_fingerprint=passages_fingerprint)
      for v in versions
    ]
    self.index, self.version = indexes[0], versions[0]
    self._saved = set(versions)
    if len(versions) > 1:
      self._next_version = versions[1]
      self._next = futures.Future()
      self._next.set_result(indexes[1])

  def remove_except(self, versions: set[int]) -> None:
    """Deletes the saved versions that no kept checkpoint needs."""
    self._saved &= versions
    if not self._writes or not self._directory.exists():
      return
    for path in self._directory.iterdir():
      if path.name.isdigit() and int(path.name) not in versions:
        path.rmtree()
        logging.debug("Removed index version %s.", path.name)

  def close(self) -> None:
    """Ends the thread."""
    self._thread.shutdown(wait=True, cancel_futures=True)

  def _path(self, version: int) -> epath.Path:
    return self._directory / str(version)
