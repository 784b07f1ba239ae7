"""The index in use, and the next version, which a thread builds.

In: copies of the parameters of the retriever, every so many steps. Out: the
index to search at each step.

The step at which a version is swapped in does not depend on the speed of the
thread. So a run gives the same numbers on a busy machine, and a resumed run the
same as an uninterrupted one.
"""

from concurrent import futures

from absl import logging
from etils import epath
import jax
from jaxtyping import PyTree

from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.retriever import IndexBuilder
from rag_jax.retrieval.shared_embedding import remove_shared


class IndexVersions:
  """The current index and, while one is being built, the next one.

  The name of a version is the step whose parameters embedded it.
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
    """Opens nothing yet; call `start`, `adopt` or `restore`.

    Args:
      builder: embeds the passages and builds the index.
      directory: where versions are saved with a checkpoint. All processes see
        it, and share the embedding of each version through files there.
      refresh_steps: steps between the starts of two builds; 0 to keep the first
        version.
      swap_steps: steps from the start of a build to its first use. A build that
        takes no longer does not delay training.
      writes: whether this process saves and deletes; exactly one does.
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
    self._saved: set[int] = set()  # versions of this run in the directory
    self.version = 0
    self.index: Index | None = None

  def start(self, retriever_params: PyTree) -> None:
    """Builds version 0 on all local devices, and waits for it."""
    self.index = self._builder.build(
      retriever_params,
      directory=self._directory,
      devices=jax.local_devices(),
    )

  def adopt(self, index: Index) -> None:
    """Uses `index`, which was built elsewhere and is not saved again.

    Raises:
      ValueError: its recall is below index.min_recall.
    """
    index.connect()
    self._builder.check(index)
    self.index, self._adopted = index, True

  def is_due(self, step: int) -> bool:
    """Returns whether to build a version from the parameters of `step`."""
    refresh = self._refresh_steps
    return bool(refresh) and step > 0 and step % refresh == 0

  def refresh(self, step: int, retriever_params: PyTree) -> None:
    """Starts the build of the version of `step` in the thread.

    It uses one local device, while all of them train.
    """
    assert self._next is None, "the last version has not been swapped in"
    self._next_version = step
    self._next = self._thread.submit(
      self._builder.build, retriever_params, directory=self._directory
    )

  def swap_if_due(self, step: int) -> None:
    """Switches to the next version if `step` is the first to use it."""
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
      # An existing directory is no reason to skip it: a run that continues from
      # an earlier checkpoint, with other settings, finds one of other weights.
      writes = self._writes or index.is_spread
      if version not in self._saved and writes:
        index.save(self._path(version))
        self._saved.add(version)
    return sorted(versions)

  def restore(self, versions: list[int], passages_fingerprint: str) -> None:
    """Opens the versions whose names `save` returned; `connect` comes next."""
    indexes = [
      load_index(
        self._path(v), passages_fingerprint=passages_fingerprint, spread=True
      )
      for v in versions
    ]
    self.index, self.version = indexes[0], versions[0]
    self._saved = set(versions)
    if len(versions) > 1:
      self._next_version = versions[1]
      self._next = futures.Future()
      self._next.set_result(indexes[1])

  def connect(self) -> None:
    """Connects the versions that every process has restored."""
    if self.index is not None:
      self.index.connect()
    if self._next is not None:
      self._next.result().connect()

  def remove_except(self, versions: set[int]) -> None:
    """Deletes all saved versions but these.

    All processes have called `save`, so that none is embedding.
    """
    self._saved &= versions
    if not self._writes or not self._directory.exists():
      return
    remove_shared(self._directory)
    for path in self._directory.iterdir():
      if path.name.isdigit() and int(path.name) not in versions:
        path.rmtree()
        logging.debug("Removed index version %s.", path.name)

  def close(self) -> None:
    """Ends the thread."""
    self._thread.shutdown(wait=True, cancel_futures=True)

  def _path(self, version: int) -> epath.Path:
    return self._directory / str(version)
