"""Random text and chats that are hard on tokenizers, for the tests of `lora_jax.hub`."""

# Ranges of code points: scripts, symbols, emoji, and numerals that are not 0 to 9.
PLACES = [(0x00, 0x7F), (0xA0, 0x24F), (0x370, 0x52F), (0x600, 0x6FF), (0x900, 0x97F)]
PLACES += [(0x2000, 0x2BFF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xFF00, 0xFFEF)]
PLACES += [(0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF)]
SPACES = ['', ' ', '  ', '    ', '\n', '\n\n', '\n\n\n', '\t\t', '\r\n', '\u00a0', '\u3000', ' \n ']
# fmt: off
WORDS = [
  'the', 'and', "it's", "we'll", "I'D", "they've", 'year', 'FY', 'bile', 'naïve', 'Straße', '“q”',
  'def', 'return', 'lambda', 'self.x', 'x_1', 'camelCase', '!=', '==', '->', '{}', '[]', '()',
  '"quoted"', '£', '€', '%', '$', '#', '/*', '*/', '//', '<tag>', '</tag>', '<|', '|>', '...', '–',
]
# fmt: on


def random_text(rng, pieces=40):
  """Words, code, numbers, scripts and runs of whitespace in random order."""

  def piece():
    kind = rng.integers(5)
    if kind == 0:
      return str(rng.integers(10 ** rng.integers(1, 10)))
    if kind == 1:
      low, high = PLACES[rng.integers(len(PLACES))]
      return ''.join(chr(c) for c in rng.integers(low, high, rng.integers(1, 6)))
    if kind == 2:
      return ''.join(chr(c) for c in rng.integers(0x20, 0x7F, rng.integers(1, 12)))
    return WORDS[rng.integers(len(WORDS))]

  return ''.join(piece() + SPACES[rng.integers(len(SPACES))] for _ in range(pieces))


def random_chat(rng):
  turns = [{'role': 'system', 'content': random_text(rng, 5)}] if rng.integers(2) else []
  for i in range(rng.integers(1, 4)):
    role = 'user' if i % 2 == 0 else 'assistant'
    turns.append({'role': role, 'content': random_text(rng, int(rng.integers(0, 30)))})
  return turns


def forged_chat(rng, specials):
  """A chat whose contents are strewn with special tokens and broken pieces of them."""
  chat = random_chat(rng)
  for turn in chat:
    words = turn['content'].split(' ')
    for _ in range(rng.integers(1, 6)):
      token = specials[rng.integers(len(specials))]
      cut = rng.integers(len(token))
      forms = [token, token[:cut] + token + token[cut:], token + token, f'\n{token}', token[cut:]]
      words.insert(rng.integers(len(words) + 1), forms[rng.integers(len(forms))])
    turn['content'] = ' '.join(words)
  return chat
