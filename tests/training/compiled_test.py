"""Compiled programs come out of a directory that this user alone can write."""

import os
import stat

import jax
import pytest

from rag_jax.training.workdir import keep_compiled


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """Where programs are kept, and what JAX is told."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  old = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  yield tmp_path / "rag_jax" / "compiled"
  jax.config.update("jax_compilation_cache_dir", old)


def test_programs_are_kept_in_the_users_cache_directory(cache):
  keep_compiled()
  assert jax.config.jax_compilation_cache_dir == str(cache)
  assert stat.S_IMODE(os.stat(cache).st_mode) & 0o022 == 0


def test_a_directory_that_is_named_is_used(cache, tmp_path):
  keep_compiled(tmp_path / "other")
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "other")
  assert not cache.exists()


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_what_others_can_write_is_not_used(cache, caplog, mode):
  cache.mkdir(parents=True)
  cache.chmod(mode)
  keep_compiled()
  assert jax.config.jax_compilation_cache_dir is None
  assert "only this user can write to" in caplog.text


def test_what_belongs_to_others_is_not_used(cache, monkeypatch, caplog):
  cache.mkdir(parents=True, mode=0o700)
  monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
  keep_compiled()
  assert jax.config.jax_compilation_cache_dir is None
  assert "only this user can write to" in caplog.text


def test_a_link_in_its_place_is_not_used(cache, tmp_path):
  (tmp_path / "theirs").mkdir()
  cache.parent.mkdir(parents=True)
  cache.symlink_to(tmp_path / "theirs")
  keep_compiled()
  assert jax.config.jax_compilation_cache_dir is None


def test_without_a_place_nothing_is_kept(cache, tmp_path):
  (tmp_path / "rag_jax").write_text("a file")
  keep_compiled()
  assert jax.config.jax_compilation_cache_dir is None
