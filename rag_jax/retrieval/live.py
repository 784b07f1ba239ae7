"""An index that is updated while it is searched: upsert, delete, rebuild.

In: new embeddings, and numbers of passages that are gone. Out: a directory of
versions, and a file that names the one to read. A new version lies beside the
old one until that file is replaced, so a search sees one or the other, and a
writer that is killed leaves the old one.

"""

from collections.abc import Callable, Iterator
import contextlib
import threading
from typing import Any

from absl import logging
from etils import epath
from jaxtyping import Float, Int
import numpy as np

from rag_jax.retrieval import exact
from rag_jax.retrieval import live_files
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.live_version import LiveVersion

_NO_IDS = np.zeros(0, np.int32)


class LiveIndex:
  """A directory of versions, and the one of them that is searched here.

  Several processes may read it; of those that write, one does at a time.
  """

  def __init__(self, path: epath.PathLike, *, rebuild_share: float = 0.1):
    """Opens the version that `CURRENT` names.

    Args:
      path: of a directory that `create` made, or where it was moved to.
      rebuild_share: when more of the base's rows than this share changed, a
        line in the log recommends a rebuild.

    Raises:
      FileNotFoundError: there is no live index.
      ValueError: in a bucket; or files are missing, cut off or changed.
    """
    self._path = live_files.check_local(path)
    self._rebuild_share = rebuild_share
    self._base: tuple[str, Index] | None = None  # of the version, by its name
    self._switching = threading.Lock()
    # Searches read this reference once: replacing it is the whole switch.
    self.version = self._open_current()

  @classmethod
  def create(
    cls, path: epath.PathLike, index: Index, *, rebuild_share: float = 0.1
  ) -> "LiveIndex":
    """Makes directory `path` with `index` as its first version.

    Raises:
      ValueError: in a bucket, or there is a live index already.
    """
    folder = live_files.check_local(path)
    folder.mkdir(parents=True, exist_ok=True)
    with live_files.lock(folder):
      if (folder / live_files.CURRENT).exists():
        raise ValueError(
          f"There is a live index in {folder} already; expected a new"
          " directory. Open it with LiveIndex(path), or choose another."
        )
      # One that was created and nothing else may be of a call that was killed.
      left = live_files.names(folder)
      if left not in ([], ["v000001"]):
        raise ValueError(
          f"{folder} holds the versions {', '.join(left)} of a live index, but"
          f" no {live_files.CURRENT}: it was removed. Expected a new directory."
          f" Restore {live_files.CURRENT} from a copy, or choose another."
        )
      live_files.publish(
        folder,
        base=live_files.add_base(folder, index.save),
        base_deleted=0,
        delta_ids=_NO_IDS,
        delta=_no_rows(index),
        deleted=_NO_IDS,
        passages_fingerprint=index.passages_fingerprint,
      )
    return cls(path, rebuild_share=rebuild_share)

  def search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B K"]]:
    """Searches the version that is open, as `LiveVersion.search`.

    Take `version` first where ids and `embeddings` have to be of one version.
    """
    return self.version.search(question_embeddings, n_docs)

  def reload(self) -> bool:
    """Switches to the version that `CURRENT` names; returns if it is another.

    Raises:
      FileNotFoundError: the version is gone.
      ValueError: its files are missing, cut off or changed. The version that
        was open stays open.
    """
    with self._switching:  # else a slower thread could switch back
      if live_files.read_current(self._path).name == self.version.name:
        return False
      self.version = self._open_current()
    return True

  def upsert(
    self,
    embeddings: Float[np.ndarray, "N R"],
    ids: Int[np.ndarray, "_"] | None = None,
    *,
    encoder_fingerprint: str = "",
    passages_fingerprint: str = "",
  ) -> Int[np.ndarray, "N"]:
    """Adds passages or replaces them, in a new version that is then in use.

    Args:
      embeddings: [N, R].
      ids: which passages they replace, deleted ones too, or the numbers that
        follow the last; None: they are all new.
      encoder_fingerprint: of the weights that made them; "" = not known.
      passages_fingerprint: of all passages afterwards; "" = as before.

    Returns:
      Their ids, of new passages the numbers after the last.

    Raises:
      ValueError: other weights or another size, NaN or infinity, an id twice,
        or ids that leave a gap after the last passage.
    """
    with self._writing() as now:
      end = now.num_passages + len(embeddings)
      given = np.arange(now.num_passages, end) if ids is None else ids
      rows = _check_rows(now, given, embeddings, encoder_fingerprint)
      given = given.astype(np.int32)
      kept = ~np.isin(now.delta_ids, given)
      delta_ids = np.concatenate([now.delta_ids[kept], given])
      order = np.argsort(delta_ids)
      self._update(
        delta_ids[order],
        np.concatenate([now.delta[kept], rows])[order],
        np.setdiff1d(now.deleted, given),
        passages_fingerprint=passages_fingerprint,
      )
    return given

  def delete(
    self, ids: Int[np.ndarray, "N"], *, passages_fingerprint: str = ""
  ) -> None:
    """Lets passages be found no more, in a new version that is then in use.

    Args:
      ids: of passages; a deleted one may be deleted again.
      passages_fingerprint: of all passages afterwards; "" = as before.

    Raises:
      ValueError: there is no such passage, or none would be left.
    """
    with self._writing() as now:
      wrong = ids[(ids < 0) | (ids >= now.num_passages)]
      if len(wrong):
        raise ValueError(
          f"Passages {exact.name_rows(wrong)} are to be deleted; expected ids"
          f" from 0 to {now.num_passages - 1}. Nothing was deleted; check the"
          " ids."
        )
      deleted = np.union1d(now.deleted, ids).astype(np.int32)
      if len(deleted) == now.num_passages:
        raise ValueError(
          f"All {now.num_passages} passages would be deleted; expected one to"
          " be left to search. Nothing was deleted; remove the directory"
          " instead."
        )
      self._update(
        now.delta_ids,
        now.delta,
        deleted,
        passages_fingerprint=passages_fingerprint,
      )

  def rebuild(self, build: Callable[[Any, epath.Path], None]) -> None:
    """Makes a new base of all rows as they are now; deleted ones stay deleted.

    Args:
      build: takes the embeddings [P, R], an array or `JoinedRows`, and writes
        an index of them into a directory: `index.build_index_directory`.

    Raises:
      ValueError: it wrote an index of more or fewer passages.
    """
    with self._writing() as now:

      def save(path: epath.Path) -> None:
        build(now.embeddings, path)
        built = load_index(path).num_passages
        if built != now.num_passages:
          raise ValueError(
            f"The new base of {self._path} holds {built} passages; expected"
            f" {now.num_passages}, a row for each id. The old version stays;"
            " build it of all the rows that are passed."
          )

      base = live_files.add_base(self._path, save)
      self._update(_NO_IDS, _no_rows(now), now.deleted, base=base)

  def prune(self, keep: int = 2) -> None:
    """Removes all but the last `keep` versions, and bases that none needs.

    Whoever has opened one of them goes on reading it.

    Raises:
      ValueError: `keep` is below 1.
    """
    if keep < 1:
      raise ValueError(
        f"keep={keep} versions; expected at least 1, the one in use. Remove"
        " the directory to remove them all."
      )
    with self._writing() as now:
      live_files.prune(self._path, now.name, keep)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[LiveVersion]:
    """Yields the last version of all; no other writer can change it now."""
    with live_files.lock(self._path):
      live_files.remove_unfinished(self._path)
      self.reload()
      yield self.version

  def _update(
    self,
    delta_ids: np.ndarray,
    delta: np.ndarray,
    deleted: np.ndarray,
    *,
    passages_fingerprint: str = "",
    base: str = "",  # a new one
  ) -> None:
    """Writes the next version and switches to it."""
    now = self.version
    assert self._base is not None, "a version is open"
    live_files.publish(
      self._path,
      base=base or self._base[0],
      base_deleted=len(deleted) if base else now.base_deleted,
      delta_ids=delta_ids,
      delta=delta,
      deleted=deleted,
      passages_fingerprint=passages_fingerprint or now.passages_fingerprint,
    )
    self.reload()
    share = self.version.changed_share
    if share > self._rebuild_share:
      logging.warning(
        "%.1f%% of the rows of %s changed since its base was built, more than"
        " rebuild_share=%g: searches get slower and may find less. Measure"
        " index_recall, and call rebuild.",
        100 * share,
        self._path,
        self._rebuild_share,
      )

  def _open_current(self) -> LiveVersion:
    """Returns the version in use; its base is read only if it is another."""
    while True:
      current = live_files.read_current(self._path)
      try:
        live_files.check_current(self._path, current)
        content, arrays = live_files.read_version(self._path, current.name)
        if self._base is None or self._base[0] != content["base"]:
          self._base = content["base"], load_index(self._path / content["base"])
        return LiveVersion(
          current.name,
          self._base[1],
          **arrays,
          passages_fingerprint=content["passages_fingerprint"],
          base_deleted=content["base_deleted"],
        )
      except (FileNotFoundError, ValueError):
        # It may have been pruned just now, because newer ones are there.
        if live_files.read_current(self._path) == current:
          raise


def _no_rows(index: Any) -> np.ndarray:
  return np.zeros((0, index.embedding_dim), np.float32)


def _check_rows(
  version: LiveVersion,
  ids: np.ndarray,
  embeddings: np.ndarray,
  encoder_fingerprint: str,
) -> np.ndarray:
  """Returns the rows in float32 if they can be upserted."""
  if encoder_fingerprint not in ("", version.encoder_fingerprint):
    raise ValueError(
      "The passages were embedded by other weights, of fingerprint"
      f" {encoder_fingerprint!r}; expected {version.encoder_fingerprint!r},"
      " those of the index. Embed them with the same, or rebuild the index."
    )
  if embeddings.shape != (len(ids), version.embedding_dim):
    raise ValueError(
      f"The embeddings have shape {embeddings.shape}; expected ({len(ids)},"
      f" {version.embedding_dim}), a row for each id. Embed with the encoder"
      " that belongs to the index."
    )
  bad = exact.bad_rows(embeddings)
  if len(bad):
    raise ValueError(
      f"The embeddings of {len(bad)} of {len(ids)} passages hold NaN, infinity"
      f" or huge numbers: rows {exact.name_rows(bad)}. Expected finite numbers."
      " Nothing was changed; check the passage encoder."
    )
  new = np.sort(ids[ids >= version.num_passages])
  follows = np.arange(version.num_passages, version.num_passages + len(new))
  if ids.min(initial=0) < 0 or len(np.unique(ids)) < len(ids):
    raise ValueError(
      f"The ids {exact.name_rows(ids)} to upsert are negative or not all"
      " different; expected each passage once. Nothing was changed."
    )
  if not np.array_equal(new, follows):
    raise ValueError(
      f"The new passages have the ids {exact.name_rows(new)}; expected the"
      f" numbers that follow the last, from {version.num_passages} on. Leave"
      " out ids to get them."
    )
  return embeddings.astype(np.float32)
