"""Writes a tokenizer as transformers and servers read it.

    tokenizer_save.save(Path('merged'), base.tokenizer, max_length=2048)

For a base that came from another format, such as GGUF; one that came from a Hugging Face
directory has its files copied.
"""

from pathlib import Path
from typing import Any

from lora_jax.hub.tokenizer import ChatTokenizer
from lora_jax.records import write_json, write_text


def save(directory: Path, tokenizer: ChatTokenizer, max_length: int) -> None:
  """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

  Args:
    directory: made if it is not there.
    tokenizer: what to write.
    max_length: the longest context, in tokens.

  Raises:
    UserError: the directory cannot be written to.
  """
  text = {i: name for name, i in tokenizer.special_tokens.items()}
  names: dict[str, Any] = {
    'eos_token': text.get(tokenizer.eos_id),
    'pad_token': text.get(tokenizer.pad_id),
    'bos_token': None if tokenizer.bos_id is None else text.get(tokenizer.bos_id),
  }
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'chat_template': tokenizer.template.standalone(),
    'model_max_length': max_length,
    # The template puts in what begins a text; decoding gives back what was encoded.
    'add_bos_token': False,
    'clean_up_tokenization_spaces': False,
    **{name: token for name, token in names.items() if token is not None},
  }
  ends = {'eos_token_id': tokenizer.eos_id, 'pad_token_id': tokenizer.pad_id}
  if tokenizer.bos_id is not None:
    ends['bos_token_id'] = tokenizer.bos_id
  write_text(directory / 'tokenizer.json', tokenizer.to_json())
  write_json(directory / 'tokenizer_config.json', config)
  write_json(directory / 'generation_config.json', ends)
