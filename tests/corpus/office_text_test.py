"""Files of the extra `documents` are read as a person reads them."""

import importlib
import io
import json
import random
import re
import time
import zipfile

from corpora import read
import docx
import pytest

from rag_jax.corpus import office_text

RST = """
The tool
========

See :class:`~foo.Bar`, :ref:`the text <target>`, ``code`` and *words*.

.. toctree::
   nothing

.. note:: Be careful.

.. py:function:: spam(x)

   Does spam.

.. code-block:: python

   def f():
       return 1

.. include:: /etc/hostname

.. raw:: html

   <b>no</b>

Below
-----

=====  =====
A      B
=====  =====
1      2
=====  =====
"""
CELLS = [
  {"cell_type": "markdown", "source": ["# Book\n", "a *b*"]},
  {
    "cell_type": "code",
    "source": "def f():\n  return '<b>'",
    "outputs": [
      {"output_type": "stream", "name": "stdout", "text": ["out\n"]},
      {
        "output_type": "display_data",
        "metadata": {},
        "data": {"image/png": "iVBOR" * 20, "text/plain": "<Figure>"},
      },
    ],
    "execution_count": 1,
  },
]
NOTEBOOK = json.dumps(
  {
    "nbformat": 4,
    "nbformat_minor": 5,
    "metadata": {},
    "cells": [
      cell | {"metadata": {}, "id": f"c{i}"} for i, cell in enumerate(CELLS)
    ],
  }
)


def pdf(*lines):
  """A PDF of one page with these lines."""
  shown = b" ".join(b"(%s) Tj T*" % line.encode() for line in lines)
  stream = b"BT /F1 12 Tf 14 TL 50 700 Td " + shown + b" ET"
  objects = [
    b"<</Type/Catalog/Pages 2 0 R>>",
    b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
    b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Contents 4 0 R"
    b"/Resources<</Font<</F1 5 0 R>>>>>>",
    b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream),
    b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    b"<</Title(A paper)>>",
  ]
  data, places = b"%PDF-1.4\n", []
  for number, body in enumerate(objects, start=1):
    places.append(len(data))
    data += b"%d 0 obj%s endobj\n" % (number, body)
  table = b"".join(b"%010d 00000 n \n" % place for place in places)
  return data + (
    b"xref\n0 7\n0000000000 65535 f \n%strailer<</Size 7/Root 1 0 R/Info"
    b" 6 0 R>>\nstartxref\n%d\n%%%%EOF" % (table, len(data))
  )


def word():
  document, data = docx.Document(), io.BytesIO()
  document.add_heading("Contract", 1)
  document.add_paragraph("It ends <soon>.")
  table = document.add_table(2, 2)
  for i, text in enumerate("ab12"):
    table.cell(i // 2, i % 2).text = text
  document.save(data)
  return data.getvalue()


@pytest.mark.parametrize(
  ("name", "data", "title", "text"),
  [
    (
      "x.rst",
      RST.encode(),
      "The tool",
      "The tool\nSee foo.Bar, the text, code and words.\nNote\nBe careful.\n"
      "spam(x)\nDoes spam.\ndef f():\n    return 1\nBelow\nA\tB\n1\t2",
    ),
    (
      "x.ipynb",
      NOTEBOOK.encode(),
      "Book",
      "Book\na b\ndef f():\n  return '<b>'\nout\n<Figure>",
    ),
    ("x.pdf", pdf("An exam-", "ple."), "A paper", "An example."),
    ("x.docx", word(), "Contract", "Contract\nIt ends <soon>.\na\tb\n1\t2"),
  ],
)
def test_a_file_gives_its_title_its_text_and_its_headings(
  tmp_path, name, data, title, text
):
  (tmp_path / name).write_bytes(data)
  (document,), report = read(tmp_path / name)
  assert (document.title, document.text) == (title, text)
  assert all(text[h.start : h.end] == h.title for h in document.headings)
  assert bool(document.headings) == (name != "x.pdf")
  assert report.left_out_chars == (100 if name == "x.ipynb" else 0)


@pytest.mark.parametrize(
  ("name", "data", "message"),
  [
    ("x.pdf", b"%PDF-1.4 junk", "no PDF that can be read"),
    ("x.pdf", pdf("a")[:300], "no PDF that can be read|holds text"),
    ("x.pdf", pdf(), "none of its 1 pages holds text: they are pictures"),
    ("x.docx", b"PK junk", "no Word document that can be read"),
    ("x.docx", word()[:2_000], "no Word document that can be read"),
    ("x.ipynb", b"{}", "no notebook that can be read"),
    ("x.ipynb", b"[1", "no notebook that can be read"),
    ("x.rst", b"caf\xe9", "is not UTF-8"),
  ],
)
def test_a_damaged_file_is_named_or_skipped(tmp_path, name, data, message):
  (tmp_path / "a.txt").write_text("one")
  (tmp_path / name).write_bytes(data)
  with pytest.raises(ValueError, match=message) as info:
    read(tmp_path)
  assert str(info.value).startswith(f"{tmp_path / name}:1: ")
  documents, report = read(tmp_path, "skip")
  assert [d.id for d in documents] == ["a.txt"]
  assert report.dropped["undecodable"] == 1


def test_a_word_document_that_would_fill_the_memory_is_refused(tmp_path):
  data = io.BytesIO(word())
  with zipfile.ZipFile(data, "a", zipfile.ZIP_DEFLATED) as parts:
    parts.writestr("word/much.xml", b"<a>" * 6_000_000)
    # Beside it, what would make the ratio of the whole file small.
    parts.writestr("word/picture.png", random.Random(0).randbytes(300_000))
  (tmp_path / "x.docx").write_bytes(data.getvalue())
  start = time.monotonic()
  message = r"x\.docx:1: its .* unpack to 18,.* Do not use it"
  with pytest.raises(ValueError, match=message):
    read(tmp_path)
  assert time.monotonic() - start < 5


def test_a_word_document_of_too_much_text_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(office_text, "_MOST_TEXT", 1_000_000)
  (tmp_path / "x.docx").write_bytes(word())
  read(tmp_path)
  text = " ".join(map(str, range(100_000)))
  large = word_with(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>")
  (tmp_path / "x.docx").write_bytes(large)
  with pytest.raises(ValueError, match=r"XML have .*Expected 1,000,000 at"):
    read(tmp_path)


def word_with(body):
  """Returns a Word document with an XML body."""
  whole, data = zipfile.ZipFile(io.BytesIO(word())), io.BytesIO()
  space = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
  text = f'<w:document xmlns:w="{space}"><w:body>{body}</w:body></w:document>'
  with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as parts:
    for name in whole.namelist():
      main = name == "word/document.xml"
      parts.writestr(name, text if main else whole.read(name))
  return data.getvalue()


def cell(text, merge="", span=1):
  return (
    f'<w:tc><w:tcPr><w:gridSpan w:val="{span}"/>{merge}</w:tcPr>'
    f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:tc>"
  )


@pytest.mark.parametrize("columns", [2, 2**31 - 1])
def test_cells_that_are_merged_are_read_once(columns, tmp_path):
  start, more = '<w:vMerge w:val="restart"/>', "<w:vMerge/>"
  rows = [cell("a", start) + cell("b"), *[cell("", more) + cell("c")] * 2_000]
  body = "".join(f"<w:tr>{r}</w:tr>" for r in [cell("top", "", columns), *rows])
  (tmp_path / "x.docx").write_bytes(word_with(f"<w:tbl>{body}</w:tbl>"))
  (document,), _ = read(tmp_path / "x.docx")
  assert document.text.split() == ["top", "a", "b", *["c"] * 2_000]


def test_many_short_paragraphs_of_many_styles_are_read_fast(tmp_path):
  words = [str(i) for i in range(4_000)]
  body = "".join(
    f'<w:p><w:pPr><w:pStyle w:val="s{w}"/></w:pPr><w:r><w:t>{w}</w:t></w:r>'
    "</w:p>"
    for w in words
  )
  (tmp_path / "x.docx").write_bytes(word_with(body))
  start = time.process_time()
  (document,), _ = read(tmp_path / "x.docx")
  assert time.process_time() - start < 3  # 0.3; python-docx's search takes 6
  assert document.text.split() == words


@pytest.mark.parametrize("end", ["rst", "ipynb", "pdf", "docx"])
def test_a_missing_extra_is_named_with_its_command(tmp_path, end, monkeypatch):
  def missing(name):
    raise ModuleNotFoundError(name)

  monkeypatch.setattr(importlib, "import_module", missing)
  (tmp_path / f"x.{end}").write_bytes(b"a")
  command = re.escape("pip install 'rag_jax[documents]'")
  with pytest.raises(ImportError, match=rf"\.{end} files are .* {command}"):
    read(tmp_path / f"x.{end}", "skip")
