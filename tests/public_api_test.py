"""What `import rag_jax` gives: lazily, documented, and checked."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

from processes import ROOT
import pytest
from small_cross_encoder import write_cross_encoder
from small_encoder import write_encoder

import rag_jax
from rag_jax.weights import directory as weights_directory

DOCUMENTS = {
  "contract.txt": "The contract ends in March. Either side can leave it.\n",
  "house.md": "# House\nThe house has four rooms.\n",
  "bread.html": "<title>Bread</title><p>Bake it for 40 minutes.</p>",
}
# Of the tiny experiment: less to compile, and what DPR can compute.
SHORT = """
  c.encoder.normalize = True
  c.warmup.num_steps = 0
  c.train.num_steps = 2
  return c
"""
NAMES = sorted(rag_jax._HOMES)


def run_python(code):
  """Returns what a fresh process prints."""
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)],
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=200,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_documented(name):
  value = getattr(rag_jax, name)
  assert name in dir(rag_jax)
  assert value.__name__ == name
  assert value.__doc__
  members = [(name, value)]
  if inspect.isclass(value):
    members = inspect.getmembers(value, inspect.isroutine)
  for member, function in members:
    if not member.startswith("_"):
      assert inspect.getdoc(function), f"{name}.{member}"


def test_type_checkers_see_the_names_that_there_are():
  source = (ROOT / "rag_jax/__init__.py").read_text()
  imported = re.findall(r"^  from (\S+) import (\w+) as \2$", source, re.M)
  assert {name: home for home, name in imported} == rag_jax._HOMES


def test_a_name_that_is_not_there_is_an_attribute_error():
  with pytest.raises(AttributeError, match="'rag_jax' has no attribute 'Rag'"):
    rag_jax.Rag  # noqa: B018


def test_importing_is_quick_and_loads_no_library():
  printed = run_python("""
    import json, sys, time
    start = time.process_time()
    import rag_jax
    secs = time.process_time() - start
    rag_jax.__version__, dir(rag_jax)
    libraries = {"jax", "flax", "transformers", "numpy", "absl", "torch"}
    print(json.dumps([secs, sorted(libraries & set(sys.modules))]))
    rag_jax.Config()
    print(json.dumps(sorted({"jax", "flax", "torch"} & set(sys.modules))))
  """)
  (secs, loaded), with_config = map(json.loads, printed.splitlines())
  assert secs < 0.3
  assert loaded == []
  assert with_config == []


def snippets():
  """Returns the code in the docstring of the package."""
  lines = inspect.getdoc(rag_jax).splitlines()
  code = [line for line in lines if line.startswith("  ") or not line]
  return textwrap.dedent("\n".join(code))


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
  """Where the snippets find what they name, in small."""
  for name, text in DOCUMENTS.items():
    (tmp_path / "documents").mkdir(exist_ok=True)
    (tmp_path / "documents" / name).write_text(text)
  encoder = write_encoder(tmp_path / "encoder", [*DOCUMENTS.values()] * 4)
  cross = write_cross_encoder(tmp_path / "cross", [*DOCUMENTS.values()] * 4)

  def download(name):
    return str(cross if "cross-encoder" in name else encoder)

  monkeypatch.setattr(weights_directory, "download", download)
  (tmp_path / "configs").mkdir()
  text = tiny.config_file.read_text().replace("  return c\n", SHORT)
  (tmp_path / "configs" / "quickstart.py").write_text(text)
  shutil.copyfile(tiny.questions / "test.jsonl", tmp_path / "questions.jsonl")
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_the_snippets_of_the_docstring_run_as_they_stand(folder, tiny, capsys):
  code = snippets()
  for name in NAMES:
    if name not in ("Question", "Config", "import_checkpoint"):
      assert f"rag_jax.{name}" in code, name
  # As a person would do before: the documents change after the build.
  built = code.index("report = ")
  scope = {}
  with tiny.compiling():
    exec(compile(code[:built], "docstring", "exec"), scope)
    assert len(scope["directory"]) == 3
    (folder / "documents" / "house.md").unlink()
    exec(compile(code[built:], "docstring", "exec"), scope)
  printed = capsys.readouterr().out
  assert "1 documents deleted: house.md" in printed
  assert len(scope["directory"]) == 2
  assert {hit.passage.id for hit in scope["hits"]} == {
    "contract.txt", "bread.html",
  }  # fmt: skip
  written = json.loads((folder / "runs/quickstart/results.json").read_text())
  results = scope["results"]
  assert written["test/exact_match"] == results["test/exact_match"]
  assert results["seed"] == 1
  assert scope["pipeline"].answerer is not None
  assert (folder / "exports/quickstart/model.safetensors").exists()


def test_a_run_is_evaluated_as_it_was_at_its_end(uninterrupted, tiny):
  questions = [
    rag_jax.Question(
      question=q.question, answers=q.answers, relation=q.relation
    )
    for q in tiny.split("test")
  ]
  path = uninterrupted.path
  results = uninterrupted.results
  pipeline = rag_jax.RagPipeline.load(path)
  for model, given in (
    (path, ""),
    (pipeline, questions),
    (pipeline, tiny.questions / "test.jsonl"),
    (pipeline, tiny.questions),
  ):
    metrics = rag_jax.evaluate(model, given)
    del metrics["test/questions_per_second"]
    assert metrics == {name: results[name] for name in metrics}
  found = rag_jax.evaluate(pipeline, split="validation")
  assert found["validation/num_questions"] == 10


def test_a_run_is_measured_with_a_cross_encoder(uninterrupted, tiny, tmp_path):
  """Of all passages it reads the two with the best logits, whatever the run."""
  path, asked = uninterrupted.path, tiny.split("test")[:4]
  texts = [q.question for q in asked]
  cross = write_cross_encoder(tmp_path / "cross", texts * 4)
  pipeline = rag_jax.RagPipeline.load(
    path, rerank={"init_from": cross.as_posix(), "candidates": 40}
  )
  assert pipeline.least_score == float("-inf")
  passages = list(pipeline.experiment.passages)
  read = [f"{p.title} {p.text}" for p in passages]
  reranker = rag_jax.Reranker.open(cross)
  for answer in pipeline.answer(texts):
    (logits,) = reranker.score([answer.question], [read])
    best = {passages[i].id for i in (-logits).argsort()[:2]}
    assert {doc.id for doc in answer.docs} == best
  metrics = rag_jax.evaluate(pipeline, asked)
  assert metrics["test/num_questions"] == 4
  plain = rag_jax.RagPipeline.load(path, rerank="")
  assert plain.answerer.reranker is None
  # Before anything is opened that takes long.
  with pytest.raises(FileNotFoundError, match="There is no directory"):
    rag_jax.RagPipeline.load(path, rerank=tmp_path / "missing")
  with pytest.raises(ValueError, match=r"rerank.candidates=1 passages are few"):
    rag_jax.RagPipeline.load(
      path, rerank={"init_from": str(cross), "candidates": 1}
    )


def test_a_config_is_read_from_an_experiment_and_from_a_run(
  uninterrupted, tiny
):
  assert rag_jax.load_config(tiny.config_file) == tiny.config()
  path = uninterrupted.path
  assert rag_jax.load_config(path) == uninterrupted.config
  assert rag_jax.load_config(path / "config.json") == uninterrupted.config


def test_words_are_searched_by_other_settings(folder):
  directory = rag_jax.SearchDirectory.build(
    folder / "documents", folder / "encoder", folder / "index"
  )
  assert directory.search("minute", mode="bm25") == [[]]
  directory.set_words(stemmer="english")
  (hits,) = directory.search("minute", mode="bm25")
  assert [hit.passage.title for hit in hits] == ["Bread"]
  with pytest.raises(TypeError, match="stemer"):
    directory.set_words(stemer="english")
  report = directory.update(delete="bread.html")
  assert report.deleted == ("bread.html",)
  assert directory.compact() == 2
  assert directory.search(["minute"], 9)[0][0].passage.id != "bread.html"
  assert "index_recall@1" in directory.certificate.table()


# In a process of its own: here, the type of each argument is checked before.
_WRONG = {
  "rag_jax.load_config('configs/quikstart.py')": (
    "FileNotFoundError: There is no config configs/quikstart.py. Expected a"
    " Python file with a function get_config"
  ),
  "rag_jax.load_config(3)": "TypeError: path=3 is of type int; expected a Pyth",
  "rag_jax.load_config('')": "ValueError: path is empty; expected a Python",
  "rag_jax.load_config('empty.py')": (
    "ValueError: empty.py has no function get_config."
  ),
  "rag_jax.load_config('cut.py')": (
    "ValueError: cut.py:2: the config cannot be read (SyntaxError: "
  ),
  "rag_jax.load_config('misspelt.py')": (
    "ValueError: misspelt.py:4: the config cannot be read (AttributeError: 'Tra"
  ),
  "rag_jax.load_config('wrong.py')": (
    "TypeError: Expected a rag_jax.config.Config, got dict."
  ),
  "rag_jax.train({'loss': 'rag_token'}, 'runs/a')": (
    "TypeError: Expected a rag_jax.config.Config, got dict."
  ),
  "rag_jax.train(rag_jax.Config(), '')": (
    "ValueError: workdir is empty; expected a folder for what the run writes"
  ),
  "rag_jax.train(rag_jax.Config(), None)": (
    "TypeError: workdir=None is of type NoneType; expected a folder"
  ),
  "rag_jax.train(rag_jax.Config(), 'a', resume_from=True)": (
    "TypeError: resume_from=True is of type bool; expected the step of"
  ),
  "rag_jax.evaluate('runs/a', split='dev')": (
    "ValueError: split='dev'; expected one of ['train', 'validation', 'test']."
  ),
  "rag_jax.evaluate('runs/a')": "FileNotFoundError: No config.json in runs/a;",
  "rag_jax.evaluate(3)": "TypeError: model=3 is of type int; expected a RagPip",
  "rag_jax.load_checkpoint('missing')": (
    "FileNotFoundError: There is no directory missing. Expected a checkpoint"
  ),
  "rag_jax.load_checkpoint(['a'])": "TypeError: where=['a'] is of type list;",
  "rag_jax.export('a', 'b', max_shard_bytes=0)": (
    "ValueError: max_shard_bytes=0; expected 1 or more."
  ),
  "rag_jax.export('full', 'full')": (
    "ValueError: Input and output are the same directory, full;"
  ),
  "rag_jax.import_checkpoint('a', 'full')": (
    "ValueError: The output full is not empty; expected a new directory."
  ),
  "rag_jax.SearchDirectory.open('missing')": (
    "FileNotFoundError: There is no manifest.json, since there is no directory"
  ),
  "rag_jax.SearchDirectory.open(None)": (
    "TypeError: path=None is of type NoneType; expected a directory that"
  ),
  "rag_jax.SearchDirectory.build('full', 'missing', 'runs/d', {'bm25': 0})": (
    "TypeError: config={'bm25': 0} is of type dict; expected a rag_jax.Build"
  ),
  "rag_jax.SearchDirectory.build('full', '', 'runs/d')": (
    "ValueError: encoder is empty; expected an encoder: a directory, or a name"
  ),
}


def test_arguments_that_cannot_be_used_are_named(tmp_path):
  (tmp_path / "empty.py").write_text("")
  (tmp_path / "cut.py").write_text("x = 1\ndef get_config(:\n")
  (tmp_path / "misspelt.py").write_text(
    "from rag_jax.config import Config\ndef get_config():\n"
    "  c = Config()\n  c.train.num_stps = 3\n  return c\n"
  )
  (tmp_path / "wrong.py").write_text("def get_config():\n  return {}\n")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "a.txt").write_text("a")
  printed = run_python(f"""
    import json, os, rag_jax
    os.chdir({str(tmp_path)!r})
    for call in {list(_WRONG)!r}:
      try:
        eval(call)
        print(json.dumps("nothing"))
      except Exception as error:
        print(json.dumps(f"{{type(error).__name__}}: {{error}}"))
  """)
  messages = map(json.loads, printed.splitlines())
  for (call, expected), message in zip(_WRONG.items(), messages, strict=True):
    assert message.startswith(expected), (call, message)
  assert not (tmp_path / "runs").exists()
