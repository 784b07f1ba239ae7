"""A tokenizer's ids need rows of the embedding table; files are copied."""

import json
import shutil

import pytest

from rag_jax.corpus.tokenizer import load_tokenizer
from rag_jax.weights.convert import import_checkpoint
from rag_jax.weights.export import TokenizerFiles
from rag_jax.weights.export import export_encoder
from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_generator
from rag_jax.weights.load import load_rag
from rag_jax.weights.tokenizer_files import copy_tokenizer


def test_a_tokenizer_beyond_the_table_is_refused(checkpoints):
  path = checkpoints.dpr()
  (path / "manifest.json").unlink()
  checkpoints.write_tokenizer(path, checkpoints.vocab_size + 1)
  with pytest.raises(
    ValueError,
    match=r"The tokenizer in .*/dpr \(tokenizer\.json\) has token ids up to 23,"
    r" but the encoder has embeddings only for ids up to 22\..*Copy the tokeni",
  ):
    load_encoder(path)


@pytest.mark.parametrize(
  ("name", "changed"),
  [
    ("tokenizer.json", {"model": {"vocab": 0.5}}),
    ("tokenizer.json", {"model": {"vocab": True}}),
    ("tokenizer.json", {"added_tokens": 1.5}),
    ("tokenizer.json", {"added_tokens": {"id": 99}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"²": {}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {}}}),
  ],
)
def test_what_is_no_list_of_ids_has_none(checkpoints, name, changed):
  path = checkpoints.dpr()
  (path / "manifest.json").unlink()
  file = path / name
  content = json.loads(file.read_text()) if file.exists() else {}
  file.write_text(json.dumps(content | changed))
  # That it cannot be used is said by what opens it.
  assert load_encoder(path).tokenizer == str(path)
  with pytest.raises(ValueError, match=r"The tokenizer in .* cannot be read"):
    load_tokenizer(path)


def test_a_table_that_is_padded_is_fine(checkpoints):
  path = checkpoints.dpr()
  (path / "manifest.json").unlink()
  checkpoints.write_tokenizer(path, checkpoints.vocab_size - 5)
  assert load_encoder(path).tokenizer == str(path)


@pytest.mark.parametrize(
  ("files", "named"),
  [
    ({"vocab.txt": "a\n" * 24}, "vocab.txt"),
    ({"vocab.txt": "a\n" * 23 + "b"}, "vocab.txt"),
    ({"vocab.json": {"a": 0, "b": 23}}, "vocab.json"),
    (
      {"vocab.txt": "a\nb\n", "added_tokens.json": {"<new>": 40}},
      "added_tokens.json",
    ),
    (
      {
        "spiece.model": "binary",
        "tokenizer_config.json": {"added_tokens_decoder": {"30": {}}},
      },
      "tokenizer_config.json",
    ),
    (
      {"tokenizer.json": {"model": {"vocab": [["a", -1.0]] * 24}}},
      "tokenizer.json",
    ),
    (
      {
        "tokenizer.json": {
          "model": {"vocab": {"a": 0}},
          "added_tokens": [{"id": 23}],
        }
      },
      "tokenizer.json",
    ),
  ],
)
def test_ids_are_found_in_the_files_of_every_kind(checkpoints, files, named):
  path = checkpoints.generator(checkpoints.t5)
  (path / "manifest.json").unlink()
  (path / "tokenizer.json").unlink()
  for name, content in files.items():
    text = content if isinstance(content, str) else json.dumps(content)
    (path / name).write_text(text)
  with pytest.raises(ValueError, match=rf"\({named}\) has token ids up to"):
    load_generator(path)


def test_the_last_line_of_a_vocabulary_is_its_last_id(checkpoints):
  path = checkpoints.dpr()
  (path / "manifest.json").unlink()
  (path / "tokenizer.json").unlink()
  (path / "vocab.txt").write_text("a\n" * checkpoints.vocab_size)
  load_encoder(path)


def test_a_tokenizer_that_tells_no_ids_is_noted(checkpoints):
  path = checkpoints.generator(checkpoints.t5)
  (path / "manifest.json").unlink()
  (path / "tokenizer.json").unlink()
  (path / "spiece.model").write_bytes(b"sentencepiece")
  loaded = load_generator(path)
  assert loaded.tokenizer == str(path)
  assert "were not compared with the embedding table" in str(loaded.report)


def test_a_checkpoint_without_a_tokenizer_says_so(checkpoints):
  path = checkpoints.dpr()
  (path / "manifest.json").unlink()
  (path / "tokenizer.json").unlink()
  assert load_encoder(path).tokenizer == ""


@pytest.mark.parametrize(
  ("folder", "owner"),
  [
    ("question_encoder_tokenizer", "encoder"),
    ("generator_tokenizer", "generator"),
  ],
)
def test_each_tokenizer_of_a_rag_is_compared_with_its_table(
  checkpoints, folder, owner
):
  path = checkpoints.rag()
  (path / "manifest.json").unlink()
  checkpoints.write_tokenizer(path / folder, checkpoints.vocab_size + 9)
  with pytest.raises(ValueError, match=f"{folder} .*, but the {owner} has emb"):
    load_rag(path)


def test_an_export_checks_and_copies_the_tokenizer(checkpoints, tmp_path):
  source = tmp_path / "words"
  large = checkpoints.write_tokenizer(source, checkpoints.vocab_size + 1)
  (source / "tokenizer_config.json").write_text("{}")
  (source / "secrets.txt").write_text("not of a tokenizer")
  params = checkpoints.encoder_params()
  path = tmp_path / "out"

  def export(tokenizer):
    export_encoder(
      path,
      checkpoints.encoder,
      params,
      kind="dpr_context",
      tokenizer=tokenizer,
    )

  with pytest.raises(ValueError, match="has token ids up to 23, but the enco"):
    export(large)
  assert not (path / "config.json").exists()
  export(checkpoints.write_tokenizer(source, checkpoints.vocab_size))
  assert sorted(p.name for p in path.iterdir()) == [
    "config.json", "manifest.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
  ]  # fmt: skip


def test_a_directory_without_a_tokenizer_is_named(checkpoints, tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(
    FileNotFoundError, match=r"There is no tokenizer in .*/empty; expected one"
  ):
    export_encoder(
      tmp_path / "out",
      checkpoints.encoder,
      checkpoints.encoder_params(),
      kind="dpr_question",
      tokenizer=TokenizerFiles(str(tmp_path / "empty")),
    )


@pytest.mark.parametrize(
  "name", ["merges.txt", "vocab.json", "tokenizer_config.json", "x.jinja"]
)
@pytest.mark.parametrize("folder", ["", "generator_tokenizer"])
def test_what_a_link_leads_to_becomes_no_part_of_a_model(
  checkpoints, tmp_path, name, folder
):
  secret = tmp_path / "secret"
  secret.write_text("{}")
  path = checkpoints.rag() if folder else checkpoints.dpr()
  (path / "manifest.json").unlink()
  (path / folder / name).unlink(missing_ok=True)
  (path / folder / name).symlink_to(secret)
  with pytest.raises(ValueError, match=rf"{name} in .* is a link to .*secret"):
    import_checkpoint(path, tmp_path / "out")
  assert not (tmp_path / "out").exists()
  with pytest.raises(ValueError, match=rf"{name} in .* is a link to .*secret"):
    load_tokenizer(path / folder)
  with pytest.raises(ValueError, match=rf"{name} in .* is a link to .*secret"):
    copy_tokenizer(path / folder, tmp_path / "copy")
  assert not (tmp_path / "copy").exists()


def test_a_tokenizer_in_the_hubs_cache_may_be_links_to_its_blobs(
  checkpoints, tmp_path
):
  path = checkpoints.rag()
  (path / "manifest.json").unlink()
  home = tmp_path / "models--org--name"
  shutil.copytree(path, home / "snapshots" / "0123")
  (home / "blobs").mkdir()
  file = home / "snapshots/0123/generator_tokenizer/tokenizer.json"
  file.rename(home / "blobs/4567")
  file.symlink_to("../../../blobs/4567")
  import_checkpoint(home / "snapshots/0123", tmp_path / "out")
  copied = tmp_path / "out/generator_tokenizer/tokenizer.json"
  assert copied.read_bytes() == (home / "blobs/4567").read_bytes()
  assert not copied.is_symlink()
