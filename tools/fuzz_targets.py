"""What tools/fuzz.py feeds with damaged files, and what counts as a failure.

In: a seed. Out: for each case, damaged files of a kind and what reading them
ended in. Each case is a function of (target, seed, number) alone. A failure is
anything but a result or one of the documented errors, and every case that takes
too long or too much memory.
"""

from collections.abc import Callable, Iterator
import contextlib
import copy
import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import struct
import traceback
from typing import Any
import zipfile

import numpy as np

from rag_jax import artifacts
from rag_jax.config import Config
from rag_jax.config_json import from_json
from rag_jax.config_json import to_json
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.corpus.documents import read_documents
from rag_jax.corpus.html_text import read_html
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.store import PassageStore
from rag_jax.corpus.store import write_store
from rag_jax.corpus.tokenizer import load_tokenizer
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.data.questions import read_questions
from rag_jax.evaluation.judged_questions import read_judged_questions
from rag_jax.evaluation.report import read_results
from rag_jax.evaluation.report import write_results
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.certify import certify
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.index import load_index
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.encoder_tensors import plain_encoder
from rag_jax.weights.export import TokenizerFiles
from rag_jax.weights.export import export_encoder
from rag_jax.weights.export import export_generator
from rag_jax.weights.generator_configs import generator_type
from rag_jax.weights.generator_tensors import generator_architecture
from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_generator
from rag_jax.weights.model_files import load_model
from rag_jax.weights.model_files import save_model

# What a user can get wrong; see each function's docstring.
DOCUMENTED = (ValueError, FileNotFoundError)

MAX_CPU_SECS = 10.0  # for one case
MAX_SECS = 120.0  # likewise, waiting included: other programs may be running
MAX_BYTES = 500_000_000  # more memory than before, for one case


class _TooSlowError(BaseException):
  """Not an `Exception`: nothing that is fuzzed may catch it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
  """Something that reads files.

  Attributes:
    make: writes whole files into a folder, once.
    damage: changes some of a copy; returns what it did.
    read: reads them.
  """

  make: Callable[[pathlib.Path], None]
  damage: Callable[[random.Random, pathlib.Path], str]
  read: Callable[[pathlib.Path], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
  """A case that ended as it should not."""

  case: str  # target, seed and number
  damage: str
  problem: str

  def __str__(self) -> str:
    """Returns what a person reads."""
    return f"{self.case}: {self.damage}\n{self.problem}"


# --- How files are damaged.

_VALUES: list[Any] = [
  None, True, False, 0, -1, 1, 2**31, 2**31 - 1, 2**63, 10**400, 1.5, -0.0,
  1e308, float("inf"), float("nan"), "", "x", "\0", "\ud800", "\x1b[2J",
  "a" * 5000, "../x", "/etc/passwd", [], [None], [[]], {}, {"a": 1}, [1, "x"],
]  # fmt: skip
_PIECES = [
  b'"', b"'", b"\\", b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\n", b"\r",
  b"\t", b",", b";", b"[", b"]", b"{", b"}", b"[" * 3000, b'{"a":' * 3000,
  b"9" * 5000, b"-", b"1e999", b"NaN", b"null", b"true", b'"\\ud800"',
  b"<", b">", b"</", b"<!--", b"<![CDATA[", b"]]>", b"<![CD[x]]>",
  b"&#0;", b"<script>", b"<title>", b"<p>" * 2000, b"\x1f\x8b", b"&#x110000;",
  b"a" * 140_000,
]  # fmt: skip


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
  """Returns `data` with one to four places changed."""
  for _ in range(rng.randint(1, 4)):
    at, to = sorted(rng.choices(range(len(data) + 1), k=2))
    kind = rng.randrange(7)
    if kind == 0 and data:  # a bit
      place = rng.randrange(len(data))
      flipped = data[place] ^ (1 << rng.randrange(8))
      data = data[:place] + bytes([flipped]) + data[place + 1 :]
    elif kind == 1:  # cut off
      data = data[:at]
    elif kind == 2:  # a part is missing
      data = data[:at] + data[min(to, at + 20) :]
    elif kind == 3:  # or there twice
      data = data[:to] + data[at:]
    elif kind == 4:
      data = data[:at] + bytes(rng.choices(range(256), k=8)) + data[at:]
    else:
      data = data[:at] + rng.choice(_PIECES) + data[at:]
  return data


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
  """Yields (container, key) of every value inside a JSON value."""
  stack = [tree]
  while stack:
    node = stack.pop()
    if isinstance(node, dict | list):
      keys = list(node) if isinstance(node, dict) else range(len(node))
      for key in keys:
        yield node, key
        stack.append(node[key])


def damage_json(rng: random.Random, tree: Any) -> Any:
  """Returns a JSON value with one to three values or names changed."""
  for _ in range(rng.randint(1, 3)):
    places = list(_places(tree))
    if not places:
      return copy.deepcopy(rng.choice(_VALUES))
    node, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
      del node[key]
    elif kind == 1 and isinstance(node, dict):
      node[rng.choice(["", "x", f"{key}x", "\0"])] = node.pop(key)
    elif kind == 2:
      node[key] = [node[key]]
    elif kind == 3 and type(node[key]) in (int, float):
      node[key] = rng.choice([node[key] + 1, -node[key], node[key] * 10**9, 0])
    else:
      # Not itself: it may be damaged next.
      node[key] = copy.deepcopy(rng.choice(_VALUES))
  return tree


def _damage_text(rng: random.Random, data: bytes) -> bytes:
  """Returns damaged JSON, or other text: as a value, or as bytes."""
  if rng.random() < 0.6:
    try:
      tree = damage_json(rng, json.loads(data))
      return json.dumps(tree).encode("utf-8", "surrogatepass")
    except ValueError:
      lines = data.split(b"\n")
      place = rng.randrange(len(lines))
      with contextlib.suppress(ValueError):
        changed = damage_json(rng, json.loads(lines[place]))
        lines[place] = json.dumps(changed).encode("utf-8", "surrogatepass")
        return b"\n".join(lines)
  return damage_bytes(rng, data)


def _one_file(rng: random.Random, folder: pathlib.Path) -> str:
  """Damages one file of a folder, and removes the others."""
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  chosen = rng.choice(files)
  for path in files:
    if path != chosen:
      path.unlink()
  data = chosen.read_bytes()
  if chosen.suffix == ".gz" and rng.random() < 0.7:
    data = gzip.compress(_damage_text(rng, gzip.decompress(data)))
  else:
    data = _damage_text(rng, data)
  chosen.write_bytes(data)
  return f"{chosen.name}: {data[:300]!r}"


# --- Readers of corpora and questions.

_ROWS: list[dict[str, Any]] = [
  {"id": "a", "title": "Aaron", "text": "Aaron is a prophet.", "year": 1999},
  {"id": 7, "title": "", "text": 'Ahärôn "said"\nso.', "metadata": {"x": "y"}},
  {"_id": "b", "contents": '"Heroes"\nA song.', "tags": ["a", {"b": None}]},
  {"id": 8, "wikipedia_title": "A", "text": ["A\n", "A letter.\n"]},
]
_ASKED: list[dict[str, Any]] = [
  {"question": "Who?", "answers": ["Ann", 3], "id": 1, "gold": ["a"]},
  {"question": "When?", "golden_answers": ["1999"], "gold": {"7": 2}},
  {"input": "Where?", "output": [{"answer": "Here"}, {"provenance": []}]},
  {"question": "W?", "answers": ["b", "a"], "target": "a",
   "positive_ctxs": [{"passage_id": "7"}, {"psg_id": 8}]},
]  # fmt: skip
_SQUAD = {
  "data": [
    {
      "title": "T_1",
      "paragraphs": [
        {
          "context": "Ann was here.",
          "qas": [
            {"id": "1", "question": "Who?", "answers": [{"text": "Ann"}]},
            {"id": 2, "question": "Why?", "is_impossible": True},
          ],
        }
      ],
    }
  ]
}
_PAGE = """<!DOCTYPE html><html><head><title>A page</title>
<meta charset="utf-8"><style>p {}</style></head><body><h1>Head</h1>
<p>Some <b>bold</b> text<br>and more &amp; x<sup>2</sup>.<ul><li>one<li>two</ul>
<table><tr><td>1<td>2</table><svg><title>no</title></svg><!-- a comment -->
<pre>code
  lines</pre></body></html>"""


def _lines(rows: list[dict[str, Any]]) -> str:
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _make_corpora(folder: pathlib.Path) -> None:
  files = {
    "c.jsonl": _lines(_ROWS),
    "c.json": json.dumps(_ROWS),
    "squad.json": json.dumps(_SQUAD),
    "c.tsv": 'id\ttext\ttitle\n1\tone\tA\n2\t"two ""2"""\tB\n3\tthree\tC\n',
    "marco.tsv": '0\tThe "first".\n1\t"Second\n2\tThird.\n',
    "c.csv": 'id,title,text\n1,A,"one, and\nmore"\n2,B,two\n',
    "c.txt": "Plain text.\n\nWith é and more.\n",
    "c.md": "---\ntitle: T\n---\n# Head\n\n```\ncode\n```\nText\n====\n|a|b|\n",
    "c.html": _PAGE,
    "q.jsonl": _lines(_ASKED),
    "q.json": json.dumps(_ASKED),
    "q.csv": 'who is ann?\t[\'Ann\', "Ann\'s"]\nwhen?\t["1999"]\n',
  }
  for name, text in files.items():
    (folder / name).write_text(text)
    (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))


def _read_corpus(folder: pathlib.Path) -> None:
  (path,) = (path for path in folder.iterdir() if path.is_file())
  for action in BadRecords.ACTIONS:
    bad = BadRecords(action)
    with _documented(str(path)):
      for document in read_documents(path, bad_records=bad):
        f"{document.id}{document.title}{document.text}".encode()
    bad.report.table()
  for read in (read_questions, read_judged_questions):
    with _documented(str(path)):
      read(path)


@contextlib.contextmanager
def _documented(place: str = "") -> Iterator[None]:
  """Lets the documented errors pass that say where something is wrong."""
  try:
    yield
  except DOCUMENTED as error:
    if place not in str(error):
      raise AssertionError(f"The message does not name {place}.") from error


# --- Pages alone, which are read from bytes of many encodings.


def _make_pages(folder: pathlib.Path) -> None:
  for encoding in ("utf-8", "latin-1", "utf-16"):
    (folder / f"{encoding}.html").write_bytes(_PAGE.encode(encoding))


def _read_page(folder: pathlib.Path) -> None:
  (path,) = folder.iterdir()
  page = read_html(path.read_bytes().decode("utf-8", "replace"))
  f"{page.title}{page.text}".encode()
  for action in BadRecords.ACTIONS:
    with _documented(str(path)):
      list(read_documents(path, bad_records=BadRecords(action)))


# --- Word documents and PDF, damaged or made to fill the memory.

_SPACE = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_PARAGRAPH = "<w:p><w:r><w:t>some text</w:t></w:r></w:p>"


def _make_office(folder: pathlib.Path) -> None:
  with contextlib.suppress(ImportError):
    import docx

    document = docx.Document()
    document.add_heading("Head", 1)
    document.add_paragraph("Some text.")
    document.add_table(2, 2).cell(0, 0).text = "one"
    document.save(os.fspath(folder / "x.docx"))
  with contextlib.suppress(ImportError):
    import pypdf

    writer = pypdf.PdfWriter()
    writer.add_blank_page(72, 72)
    writer.add_metadata({"/Title": "T"})
    writer.write(os.fspath(folder / "x.pdf"))
  cell = {"cell_type": "markdown", "metadata": {}, "source": ["# T"]}
  notebook = {"cells": [cell], "metadata": {}}
  notebook |= {"nbformat": 4, "nbformat_minor": 5}
  (folder / "x.ipynb").write_text(json.dumps(notebook))


def _large_body(rng: random.Random) -> str:
  """Returns XML of a Word document: long, deep, wide, or said to be wide."""
  many = 10 ** rng.randint(1, 6)
  kind = rng.randrange(5)
  if kind == 0:
    return _PARAGRAPH * many
  if kind == 1:
    return "<w:tbl><w:tr><w:tc>" * (many % 1_000) + _PARAGRAPH
  span = f'<w:tcPr><w:gridSpan w:val="{rng.choice([-1, many, 2**31 - 1])}"/>'
  merged = "<w:vMerge/>" if kind == 2 else ""
  cell = f"<w:tc>{span}{merged}</w:tcPr>{_PARAGRAPH}</w:tc>"
  if kind == 3:  # many cells in a row
    return f"<w:tbl><w:tr>{cell * min(many, 10_000)}</w:tr></w:tbl>"
  return f"<w:tbl>{f'<w:tr>{cell}</w:tr>' * min(many, 10_000)}</w:tbl>"


def _damage_office(rng: random.Random, folder: pathlib.Path) -> str:
  files = sorted(folder.iterdir())
  chosen = rng.choice(files)
  for path in files:
    if path != chosen:
      path.unlink()
  if chosen.suffix != ".docx" or rng.random() < 0.2:
    chosen.write_bytes(damage_bytes(rng, chosen.read_bytes()))
    return f"{chosen.name}: {chosen.read_bytes()[:300]!r}"
  with zipfile.ZipFile(chosen) as archive:
    parts = {name: archive.read(name) for name in archive.namelist()}
  if rng.random() < 0.5:
    name, body = "word/document.xml", _large_body(rng)
    text = f'<w:document xmlns:w="{_SPACE}"><w:body>{body}</w:body>'
    parts[name] = f"{text}</w:document>".encode()
  else:
    name = rng.choice(sorted(parts))
    parts[name] = damage_bytes(rng, parts[name])
  if rng.random() < 0.3:  # a picture, which does not shrink
    parts["word/picture.png"] = rng.randbytes(300_000)
  with zipfile.ZipFile(chosen, "w", zipfile.ZIP_DEFLATED) as archive:
    for part, data in parts.items():
      archive.writestr(part, data)
  return f"{name}: {parts[name][:300]!r}"


def _read_office(folder: pathlib.Path) -> None:
  (path,) = folder.iterdir()
  for action in BadRecords.ACTIONS:
    # A missing extra says how to install it.
    with contextlib.suppress(ImportError), _documented(str(path)):
      for document in read_documents(path, bad_records=BadRecords(action)):
        f"{document.title}{document.text}".encode()


# --- Configs.


def _make_config(folder: pathlib.Path) -> None:
  (folder / "config.json").write_text(to_json(Config()))


def _read_config(folder: pathlib.Path) -> None:
  path = folder / "config.json"
  text = path.read_bytes().decode("utf-8", "replace")
  with contextlib.suppress(ValueError):
    to_json(from_json(text, str(path)))


# --- What the project writes, signed again after it was changed.


def _make_artifacts(folder: pathlib.Path) -> None:
  rows = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
  passages = [Passage(str(i), "T", f"text number {i}") for i in range(12)]
  write_store(folder / "store", passages, passages_per_shard=5)
  index = ExactIndex(rows, encoder_fingerprint="e", passages_fingerprint="p")
  index.certificate = certify(index, speed_secs=0.0)
  index.save(folder / "index")
  words = Bm25Index.build(passages, passages_fingerprint="p")
  words.save(folder / "bm25")
  params = {"generator": {"kernel": rows}}
  save_model(folder / "model", params, {"tokenizer": "t", "step": 3})
  write_results(folder, {"test/exact_match": 0.5, "seed": 0})


def _sign(folder: pathlib.Path) -> None:
  """Makes the digests of a manifest those of what is there."""
  path = folder / artifacts.MANIFEST
  manifest = json.loads(path.read_bytes())
  for name, entry in manifest["files"].items():
    data = (folder / name).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    entry |= {"sha256": digest, "bytes": len(data)}
  rest = {name: part for name, part in manifest.items() if name != "sha256"}
  text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
  manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
  path.write_text(json.dumps(manifest))


def _damage_artifact(rng: random.Random, folder: pathlib.Path) -> str:
  manifests = sorted(folder.rglob(artifacts.MANIFEST))
  chosen = rng.choice([*manifests, folder / "results.json"])
  if chosen.name != artifacts.MANIFEST:
    chosen.write_bytes(_damage_text(rng, chosen.read_bytes()))
    return f"{chosen.name}: {chosen.read_bytes()[:300]!r}"
  home = chosen.parent
  if rng.random() < 0.6:
    manifest = json.loads(chosen.read_bytes())
    manifest["content"] = damage_json(rng, manifest["content"])
    chosen.write_text(json.dumps(manifest))
    done = f"{home.name}: {json.dumps(manifest['content'])[:600]}"
  else:
    files = [f for f in home.rglob("*") if f.is_file() and f != chosen]
    file = rng.choice(sorted(files))
    file.write_bytes(damage_bytes(rng, file.read_bytes()))
    done = f"{home.name}/{file.name}: {file.read_bytes()[:200]!r}"
  _sign(home)
  return done


def _read_artifacts(folder: pathlib.Path) -> None:
  asked = np.ones((1, 4), np.float32)
  with _documented():
    store = PassageStore(folder / "store")
    list(store)
    store.row_of("3")
  with _documented():
    index = load_index(folder / "index")
    if index.embedding_dim == 4:
      index.search(asked, 1)
    if index.certificate is not None:
      index.certificate.table()
  with _documented():
    Bm25Index.load(folder / "bm25").search(["text number 3"], 2)
  with _documented():
    _, content = load_model(folder / "model")
    _ = content["tokenizer"]
  with _documented():
    read_results(folder)


# --- Checkpoints of Hugging Face.

_ENCODER = EncoderConfig(
  vocab_size=400, max_positions=9, num_layers=2, embed_dim=8, num_heads=2,
  mlp_dim=12, num_token_types=2, pooling="cls",
)  # fmt: skip
_BART = GeneratorConfig(
  vocab_size=400, max_positions=9, num_layers=2, num_decoder_layers=1,
  embed_dim=8, num_heads=2, mlp_dim=12,
)  # fmt: skip
_T5 = GeneratorConfig(
  vocab_size=400, num_layers=2, embed_dim=8, num_heads=2, head_dim=3,
  mlp_dim=12, norm="pre", norm_kind="rms", use_bias=False, embedding_norm=False,
  positions="none", relative_buckets=8, relative_shared=True,
  scale_attention=False, logits_bias=False, scale_output=True,
  decoder_start_id=0,
)  # fmt: skip


def _params(architecture: Any) -> Any:
  rng = np.random.default_rng(0)
  tree: dict[str, Any] = {}
  for rule in architecture.rules:
    *folders, name = rule.ours.split("/")
    node = tree
    for part in folders:
      node = node.setdefault(part, {})
    node[name] = rng.normal(size=rule.shape).astype(np.float32)
  return tree


def _make_checkpoints(folder: pathlib.Path) -> None:
  train_tokenizer(["some text, and more of it"], 400).save(folder / "tokenizer")
  ids = SpecialIds(pad=1, bos=0, eos=2)
  tokenizer = TokenizerFiles(str(folder / "tokenizer"), ids)
  params = _params(plain_encoder(_ENCODER, "bert"))
  for kind in ("bert", "sentence_transformers"):
    where = folder / kind
    export_encoder(where, _ENCODER, params, kind=kind, tokenizer=tokenizer)
  for name, fields in (("bart", _BART), ("t5", _T5)):
    architecture = generator_architecture(fields, generator_type(fields))
    where = folder / name
    export_generator(where, fields, _params(architecture), tokenizer=tokenizer)
  shutil.rmtree(folder / "tokenizer")
  for manifest in folder.rglob(artifacts.MANIFEST):
    manifest.unlink()


def _damage_header(rng: random.Random, data: bytes) -> bytes:
  """Returns a safetensors file with another header."""
  (size,) = struct.unpack("<Q", data[:8])
  header = json.loads(data[8 : 8 + size])
  changed = json.dumps(damage_json(rng, header)).encode()
  size = rng.choice([len(changed)] * 4 + [2**62, 0])
  return struct.pack("<Q", size) + changed + data[8 + len(changed) :]


def _damage_checkpoint(rng: random.Random, folder: pathlib.Path) -> str:
  homes = sorted(path for path in folder.iterdir() if path.is_dir())
  home = rng.choice(homes)
  for path in homes:
    if path != home:
      shutil.rmtree(path)
  file = rng.choice(sorted(f for f in home.rglob("*") if f.is_file()))
  data = file.read_bytes()
  if file.suffix == ".safetensors" and rng.random() < 0.6:
    file.write_bytes(_damage_header(rng, data))
  elif file.suffix == ".safetensors" and rng.random() < 0.3:
    file.unlink()
    os.mkfifo(file)
    return f"{home.name}/{file.name} is a FIFO"
  else:
    file.write_bytes(_damage_text(rng, data))
  return f"{home.name}/{file.name}: {file.read_bytes()[:600]!r}"


def _read_checkpoint(folder: pathlib.Path) -> None:
  (home,) = folder.iterdir()
  load = load_generator if home.name in ("bart", "t5") else load_encoder
  with _documented():
    loaded = load(home)
    str(loaded.report)
    if loaded.tokenizer:
      load_tokenizer(loaded.tokenizer).encode(["some other text"])


TARGETS = {
  "readers": Target(_make_corpora, _one_file, _read_corpus),
  "configs": Target(_make_config, _one_file, _read_config),
  "manifests": Target(_make_artifacts, _damage_artifact, _read_artifacts),
  "hf": Target(_make_checkpoints, _damage_checkpoint, _read_checkpoint),
  "html": Target(_make_pages, _one_file, _read_page),
  "office": Target(_make_office, _damage_office, _read_office),
}


def _peak_bytes() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _run(target: Target, folder: pathlib.Path) -> str:
  """Returns what is wrong with how a case ended, or ""."""

  def stop(*_: object) -> None:
    raise _TooSlowError

  before = _peak_bytes()
  timers = (
    (signal.SIGALRM, signal.ITIMER_REAL, MAX_SECS),
    (signal.SIGPROF, signal.ITIMER_PROF, MAX_CPU_SECS),
  )
  old = [signal.signal(number, stop) for number, _, _ in timers]
  for _, timer, secs in timers:
    signal.setitimer(timer, secs)
  try:
    target.read(folder)
  except _TooSlowError:
    return f"It took too long.\n{traceback.format_exc()}"
  except BaseException as error:
    if isinstance(error, KeyboardInterrupt | SystemExit):
      raise
    return traceback.format_exc()
  finally:
    for (number, timer, _), handler in zip(timers, old, strict=True):
      signal.setitimer(timer, 0)
      signal.signal(number, handler)
  more = _peak_bytes() - before
  return f"It took {more:,} bytes more memory." if more > MAX_BYTES else ""


def fuzz(
  name: str, seed: int, cases: range, work: pathlib.Path
) -> Iterator[Failure | None]:
  """Yields what became of each case; None where all is well.

  Args:
    name: of `TARGETS`.
    seed: of all cases.
    cases: their numbers; a number alone gives the same case again.
    work: an empty folder, for the files.
  """
  target = TARGETS[name]
  whole, damaged = work / "whole", work / "damaged"
  whole.mkdir(parents=True)
  target.make(whole)
  for number in cases:
    rng = random.Random(f"{name} {seed} {number}")
    shutil.copytree(whole, damaged)
    damage = target.damage(rng, damaged)
    problem = _run(target, damaged)
    shutil.rmtree(damaged)
    case = f"--target={name} --seed={seed} --first={number} --cases=1"
    yield Failure(case, damage, problem) if problem else None
