"""ROUGE F-measures of a summary (Lin 2004), as the `rouge-score` package computes them.

ROUGE-Lsum wants one sentence a line, so both texts are split into sentences first.
"""

import functools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from rouge_score.rouge_scorer import RougeScorer

# A sentence ends at . ! or ? (with closing quotes or brackets) before a space and what can
# begin a sentence. A single capital or an abbreviation that a name follows does not end one;
# neither does a decimal point, since no space follows it.
_ABBREVIATION = re.compile(
  r'(?:^|[\s("])(?:[A-Z]|(?:[A-Z]\.)+[A-Z]|Mr|Mrs|Ms|Dr|Prof|Gen|Sen|Rep|Gov|Hon|Jr|Sr|St|Inc|Corp'
  r'|Co|Ltd|No|Nos|[Ss]ec|[Ff]igs?|[Vv]ol|Dept|vs|v|al|cf|e\.g|i\.e)\.$'
)
_BOUNDARY = re.compile(r'[.!?]["\'\u201d\u2019)\]]*(?=\s+["\'\u201c\u2018(\[]*[A-Z0-9])')


def split_sentences(text: str) -> list[str]:
  """The sentences of `text`, in order and stripped; a line break always ends one."""
  sentences = []
  for line in text.splitlines():
    start = 0
    for match in _BOUNDARY.finditer(line):
      if not _ABBREVIATION.search(line[start : match.end()]):
        sentences.append(line[start : match.end()].strip())
        start = match.end()
    sentences.append(line[start:].strip())
  return [sentence for sentence in sentences if sentence]


def rouge(prediction: str, reference: str) -> dict[str, float]:
  """F-measures 'rouge1', 'rouge2' and 'rouge_lsum', each in 0..1, with Porter stemming."""
  scores = _scorer().score(
    '\n'.join(split_sentences(reference)), '\n'.join(split_sentences(prediction))
  )
  return {
    'rouge1': float(scores['rouge1'].fmeasure),
    'rouge2': float(scores['rouge2'].fmeasure),
    'rouge_lsum': float(scores['rougeLsum'].fmeasure),
  }


@functools.cache
def _scorer() -> 'RougeScorer':
  # Imported on first use: the package loads NLTK, a second that no other task should pay.
  from rouge_score.rouge_scorer import RougeScorer

  return RougeScorer(['rouge1', 'rouge2', 'rougeLsum'], use_stemmer=True)
