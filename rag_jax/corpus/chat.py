"""Chats as a model was trained on them: its chat template.

In: messages. Out: token ids, by the template in the files of a tokenizer.
"""

from collections.abc import Mapping, Sequence

from etils import epath
import jinja2

from rag_jax.corpus.tokenizer import Tokenizer
from rag_jax.corpus.tokenizer import load_tokenizer

Message = Mapping[str, str]  # "role" and "content"


class Chat:
  """The chat template of a tokenizer."""

  def __init__(self, tokenizer: Tokenizer | epath.PathLike):
    """Uses `tokenizer`, or opens the one in a directory.

    Raises:
      FileNotFoundError: there is no tokenizer.
      ValueError: it cannot be read, or has no chat template.
    """
    place = ""
    if not isinstance(tokenizer, Tokenizer):
      place = f" in {tokenizer}"
      tokenizer = load_tokenizer(tokenizer)
    self._tokenizer = tokenizer
    if not tokenizer.backend.chat_template:
      raise ValueError(
        f"The tokenizer{place} has no chat template; looked for"
        " chat_template.jinja, and for chat_template in tokenizer_config.json."
        " Expected that of a model trained on chats. Take such a model, or give"
        " this one plain text."
      )

  def harmless(self, text: str) -> str:
    """Returns `text` with a space inside of each text of a special token.

    Then "<|end|>" in a message cannot pose as its end: it is "< |end|>".
    """
    broken = {
      special: f"{special[0]} {special[1:]}"
      for special in self._tokenizer.special_texts
    }
    # A token of one character, or of spaces, cannot be broken: it would still
    # be there. It stays, and `text` refuses it.
    broken = {old: new for old, new in broken.items() if old not in new}
    # Again, since overlapping ones are found one after the other.
    while found := [special for special in broken if special in text]:
      for special in found:
        text = text.replace(special, broken[special])
    return text

  def text(self, messages: Sequence[Message], *, answer: bool = True) -> str:
    """Returns the chat as one text.

    Args:
      messages: in turn; "role" is "user", "assistant" and often "system".
      answer: whether it ends with what the assistant's next answer follows.

    Raises:
      ValueError: a message has the text of a special token, with which it could
        pose as another message (see `harmless`); or the template refuses the
        messages.
    """
    for message in messages:
      content = message["content"]
      found = [x for x in self._tokenizer.special_texts if x in content]
      if found:
        raise ValueError(
          f"The message {content[:60]!r} has the special token"
          f" {found[0]!r}; expected text, which cannot pose as the end of a"
          " message. Remove it."
        )
    try:
      text = self._tokenizer.backend.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=False,
        add_generation_prompt=answer,
      )
    except jinja2.TemplateError as error:
      roles = [message["role"] for message in messages]
      raise ValueError(
        f"The chat template refuses messages of the roles {roles} ({error})."
        " Expected those it was written for, mostly 'user' and 'assistant' in"
        " turn. Change the roles."
      ) from error
    return str(text)

  def ids(
    self, messages: Sequence[Message], *, answer: bool = True
  ) -> list[int]:
    """Returns the token ids of the chat; arguments and errors as in `text`."""
    text = self.text(messages, answer=answer)
    return self._tokenizer.encode_special([text])[0]
