"""Tokenizers of the checkpoints that are brought in: BERT's, BART's, T5's."""

import json

import pytest
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import processors
import transformers

from rag_jax.corpus.passages import Passage
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenizer import load_tokenizer

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def bert_files(folder):
  """Writes an old BERT tokenizer's files, as facebook/rag-token-nq has them."""
  pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "paris", "is", "big"]
  vocab = "".join(f"{p}\n" for p in [*pieces, "##gest", "?"])
  (folder / "vocab.txt").write_text(vocab)
  config = {"do_lower_case": True, "model_max_length": 512}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def bart_files(folder):
  """Writes an old BART tokenizer's files."""
  characters = sorted(pre_tokenizers.ByteLevel.alphabet())
  pieces = [*SPECIAL, *characters, "Ġp", "Ġpa", "is", "<mask>"]
  vocab = {piece: i for i, piece in enumerate(pieces)}
  (folder / "vocab.json").write_text(json.dumps(vocab))
  (folder / "merges.txt").write_text("#version: 0.2\nĠ p\nĠp a\ni s\n")
  return folder


def t5_files(folder):
  """Saves a tokenizer in T5's layout, without a start token."""
  scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
  scores += [(piece, -3.0) for piece in ("▁Paris", "▁is", "▁big", "gest", "▁?")]
  scores += [(character, -6.0) for character in "Parisbgetq</>"]
  model = tokenizers.Tokenizer(models.Unigram(scores, unk_id=2))
  model.pre_tokenizer = pre_tokenizers.Metaspace()
  model.decoder = decoders.Metaspace()
  model.post_processor = processors.TemplateProcessing(
    single=["$A", "</s>"],
    pair=["$A", "</s>", "$B", "</s>"],
    special_tokens=[("</s>", 1)],
  )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=model,
    pad_token="<pad>",
    eos_token="</s>",
    unk_token="<unk>",
  ).save_pretrained(folder)
  return folder


def test_a_vocab_txt_is_berts_which_lowers_the_case(tmp_path):
  tokenizer = load_tokenizer(bert_files(tmp_path))
  ids = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
  assert ids == (0, 2, 3)
  assert tokenizer.mask_id == 4
  assert tokenizer.encode(["Is PARIS biggest?"]) == [[6, 5, 7, 8, 9]]


def test_a_vocab_json_with_merges_is_barts(tmp_path):
  tokenizer = load_tokenizer(bart_files(tmp_path))
  ids = (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id)
  assert ids == (0, 1, 2)
  (row,) = tokenizer.encode([" paris </s>"])
  assert tokenizer.tokens(row)[:3] == [" pa", "r", "is"]
  assert tokenizer.eos_id not in row
  assert tokenizer.decode(row) == "paris </s>"


@pytest.mark.parametrize("name", ["vocab.txt", "vocab.json", "merges.txt"])
@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_file_is_refused(name, content, tmp_path):
  (bert_files if name == "vocab.txt" else bart_files)(tmp_path)
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=rf"{name} is empty, so that every"):
    load_tokenizer(tmp_path)


def test_t5_has_no_start_token(tmp_path):
  tokenizer = load_tokenizer(t5_files(tmp_path))
  assert tokenizer.bos_id is None
  assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
  (row,) = tokenizer.encode(["Paris is biggest"])
  assert tokenizer.tokens(row) == ["Paris", "is", "big", "gest"]


def test_passages_of_t5_have_no_place_for_a_start_token(tmp_path):
  tokenizer = load_tokenizer(t5_files(tmp_path))
  passage = Passage("a", "Paris", "Paris is biggest")
  tokenized = TokenizedPassages([passage], tokenizer, 7)
  assert tokenized.tokens.tolist() == [[4, 1, 4, 5, 6, 7, 1]]
  assert tokenized.num_cut == 0
  assert TokenizedPassages([passage], tokenizer, 6).num_cut == 1


@pytest.mark.parametrize(
  ("files", "start"), [(bert_files, [2]), (bart_files, [0]), (t5_files, [])]
)
def test_inputs_have_the_special_tokens_of_their_tokenizer(
  files, start, tmp_path
):
  tokenizer = load_tokenizer(files(tmp_path))
  texts = ["Paris is biggest", "Paris", ""]
  rows = tokenizer.encode(texts)
  whole = [[*start, *row, tokenizer.eos_id] for row in rows]
  assert tokenizer.encode_inputs(texts, 100) == (whole, 0)
  length = len(whole[0])
  assert tokenizer.encode_inputs(texts, length) == (whole, 0)
  # One less: the text gives way, on the right, and not its special tokens.
  cut = [*start, *rows[0][:-1], tokenizer.eos_id]
  assert tokenizer.encode_inputs(texts, length - 1) == ([cut, *whole[1:]], 1)
  assert tokenizer.encode_inputs([], 100) == ([], 0)


def test_special_tokens_in_a_text_stay_text_in_inputs(tmp_path):
  tokenizer = load_tokenizer(bart_files(tmp_path))
  ((row,), _) = tokenizer.encode_inputs(["</s> paris <s>"], 100)
  assert (row[0], row[-1]) == (0, 2)
  assert not {0, 2} & set(row[1:-1])
  assert tokenizer.decode(row) == "</s> paris <s>"


def test_hugging_face_cleans_spaces_up_if_the_files_say_so(tmp_path):
  file = t5_files(tmp_path) / "tokenizer_config.json"
  ids = load_tokenizer(tmp_path).encode(["Paris is big ?"])[0]
  for clean, text in ((False, "Paris is big ?"), (True, "Paris is big?")):
    config = json.loads(file.read_text())
    config["clean_up_tokenization_spaces"] = clean
    file.write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).decode_hf(ids) == text


def test_outer_spaces_stay_as_hugging_face_leaves_them(tmp_path):
  tokenizer = load_tokenizer(bart_files(tmp_path))
  (row,) = tokenizer.encode([" paris "])
  assert tokenizer.decode_hf([0, *row, 2, 1]) == " paris "
  assert tokenizer.decode([0, *row, 2, 1]) == "paris"


@pytest.mark.parametrize("name", ["spiece.model", "sentencepiece.bpe.model"])
def test_a_sentencepiece_model_alone_is_refused_with_a_way_out(name, tmp_path):
  (tmp_path / name).write_bytes(b"model")
  with pytest.raises(
    FileNotFoundError,
    match=rf"{tmp_path} has a {name}, but no tokenizer.json, .* Where"
    " sentencepiece is installed, write it:",
  ):
    load_tokenizer(tmp_path)
