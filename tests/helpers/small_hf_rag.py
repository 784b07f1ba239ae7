"""A small random RAG in the layout of facebook/rag-*, with real tokenizers.

That is config.json, pytorch_model.bin, and two folders with the files of a BERT
and of a BART tokenizer; and DPR's encoder of passages beside it.
"""

import collections
import functools
import json
import os
import pathlib
import re

import numpy as np
import tokenizers
import torch
import transformers

from rag_jax.corpus.passage_reader import load_passages

PASSAGES = tuple(load_passages("world_facts")[:1200:50])
QUESTIONS = (
  "What is the capital of France?",
  "which currency is used in Austria",
  "Where does Kabul lie, and how many people live there?",
  "Who wrote it?",
  "What is the calling code of Angola ?",
)
WIDTH, CONTEXT, N_DOCS = 16, 64, 3
VOCABULARY = 600  # of BERT


def texts():
  """Returns what the tokenizers learn from."""
  return [f"{p.title} {p.text}" for p in load_passages("world_facts")[:600]]


@functools.cache
def bert_vocabulary():
  """Returns the special tokens, characters, and most frequent words.

  It is not trained: that would give other pieces each time, and two encoders
  need the same.
  """
  words = collections.Counter(re.findall(r"[a-z]+", " ".join(texts()).lower()))
  characters = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
  pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
  pieces += [f"##{x}" for x in characters if x.isalnum()]
  frequent = sorted((w for w in words if len(w) > 1), key=lambda w: -words[w])
  return [*pieces, *frequent][:VOCABULARY]


def save_bert(folder):
  """Writes the files of a BERT tokenizer, as they were in 2020."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "vocab.txt").write_text("\n".join(bert_vocabulary()) + "\n")
  write_json(
    folder / "tokenizer_config.json", do_lower_case=True, model_max_length=512
  )
  names = ("unk", "sep", "pad", "cls", "mask")
  specials = {f"{name}_token": f"[{name.upper()}]" for name in names}
  write_json(folder / "special_tokens_map.json", **specials)


def save_bart(folder):
  """Writes the files of a BART tokenizer, as they were in 2020."""
  model = tokenizers.ByteLevelBPETokenizer()
  model.train_from_iterator(
    texts(),
    vocab_size=700,
    special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    show_progress=False,
  )
  folder.mkdir(parents=True, exist_ok=True)
  model.save_model(os.fspath(folder))
  write_json(folder / "tokenizer_config.json", model_max_length=1024)
  write_json(
    folder / "special_tokens_map.json",
    bos_token="<s>",
    eos_token="</s>",
    unk_token="<unk>",
    sep_token="</s>",
    pad_token="<pad>",
    cls_token="<s>",
    mask_token="<mask>",
  )


def write_json(path, **content):
  """Writes keyword arguments."""
  path.write_text(json.dumps(content))


def dpr_config():
  """Returns that of both encoders."""
  return transformers.DPRConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=96,
  )


def bart_config():
  """Returns that of the generator."""
  return transformers.BartConfig(
    vocab_size=700,
    d_model=WIDTH,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=CONTEXT,
  )


def randomize(model, seed):
  """Gives a model weights that make answers of several lengths."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for path, x in model.named_parameters():
      if "norm" in path.lower():
        continue
      # As in generation_test.py: or each token would follow itself.
      scale = 1.0
      if "question_encoder" in path or "ctx_encoder" in path:
        # Documents differ by the question: what the first token reads is a mean
        # of all, not the same constant.
        if path.endswith("bias"):
          scale = 0.0
        elif "query" in path or "key" in path:
          scale = 0.1
      elif "shared" in path or "embed_tokens" in path:
        scale = 0.6
      elif "embed_positions" in path or ("decoder" in path and "fc2" in path):
        scale = 2.0
      x.copy_(scale * torch.randn(x.shape, generator=generator))
    if hasattr(model, "generator"):  # so that answers end
      model.generator.final_logits_bias[0, 2] = 6.0
  return model.eval()


def save_rag(path, kind, pickled=True, **config):
  """Writes a RAG directory of `kind` "token" or "sequence".

  Args:
    path: the directory.
    kind: of RAG.
    pickled: weights as facebook/rag-* have them; False: safetensors.
    config: of RagConfig.
  """
  made = transformers.RagConfig.from_question_encoder_generator_configs(
    dpr_config(),
    bart_config(),
    n_docs=N_DOCS,
    max_combined_length=CONTEXT,
    **config,
  )
  name = f"Rag{kind.capitalize()}ForGeneration"
  model = randomize(getattr(transformers, name)(made), seed=3)
  model.save_pretrained(path)
  save_bert(path / "question_encoder_tokenizer")
  save_bart(path / "generator_tokenizer")
  if pickled:
    (path / "generation_config.json").unlink(missing_ok=True)
    unsafe(path, model.state_dict())
  return path


def unsafe(path, state, **settings):
  """Puts pytorch_model.bin in the place of safetensors."""
  for file in path.glob("model*.safetensors*"):
    file.unlink()
  torch.save(state, path / "pytorch_model.bin", **settings)


def save_passage_encoder(path, pickled=True, seed=4):
  """Writes DPR's encoder of passages; the question encoder is another."""
  model = randomize(transformers.DPRContextEncoder(dpr_config()), seed)
  model.save_pretrained(path)
  save_bert(path)
  if pickled:
    unsafe(path, model.state_dict())
  return path


def write_passages(path):
  """Writes the corpus as a .jsonl file."""
  lines = [
    json.dumps({"id": p.id, "title": p.title, "text": p.text}) for p in PASSAGES
  ]
  path.write_text("\n".join(lines) + "\n")
  return path


class ExactIndex:
  """What RagRetriever asks for, without the packages it would take."""

  def __init__(self, embeddings):
    self.embeddings = embeddings

  def get_top_docs(self, embeddings, n_docs):
    """Returns numbers and embeddings of the best passages."""
    scores = embeddings @ self.embeddings.T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :n_docs]
    return ids, self.embeddings[ids]

  def get_doc_dicts(self, ids):
    """Returns their texts."""
    return [
      {
        "title": [PASSAGES[i].title for i in row],
        "text": [PASSAGES[i].text for i in row],
      }
      for row in ids
    ]


def reference(path, encoder, kind):
  """Returns transformers' model with a retriever, and its two tokenizers."""
  bert = transformers.BertTokenizer.from_pretrained(
    path / "question_encoder_tokenizer"
  )
  bart = transformers.BartTokenizer.from_pretrained(
    path / "generator_tokenizer"
  )
  tower = transformers.DPRContextEncoder.from_pretrained(encoder).eval()
  inputs = bert(
    [p.title for p in PASSAGES],
    [p.text for p in PASSAGES],
    truncation=True,
    max_length=96,
    padding="longest",
    return_tensors="pt",
  )
  with torch.inference_mode():
    embeddings = tower(inputs["input_ids"]).pooler_output.numpy()
  retriever = object.__new__(transformers.RagRetriever)
  retriever.config = transformers.RagConfig.from_pretrained(path)
  retriever.generator_tokenizer = bart
  retriever.question_encoder_tokenizer = bert
  retriever.index = ExactIndex(embeddings)
  retriever.n_docs, retriever.batch_size = N_DOCS, 8
  retriever.ctx_encoder_tokenizer = None
  retriever.return_tokenized_docs = False
  name = f"Rag{kind.capitalize()}ForGeneration"
  model = getattr(transformers, name).from_pretrained(path, retriever=retriever)
  return model.eval(), bert, bart


def answers(model, bert, bart, questions, **settings):
  """Returns texts and token ids, as the ten lines on the hub's page do it."""
  found = []
  for question in questions:
    inputs = bert(question, return_tensors="pt")
    with torch.inference_mode():
      written = model.generate(
        input_ids=inputs["input_ids"], do_sample=False, **settings
      )
    ids = written[0, 1:].tolist()  # without what the decoder starts with
    text = bart.batch_decode(written, skip_special_tokens=True)[0]
    found.append((text.strip(), ids))
  return found


def paths(root: pathlib.Path, kind: str, pickled: bool):
  """Writes both and returns their directories."""
  rag = save_rag(root / f"rag-{kind}", kind, pickled)
  return rag, save_passage_encoder(root / "ctx_encoder", pickled)
