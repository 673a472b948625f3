"""GovReport (Huang et al. 2021): summarise a long government report."""

from lora_jax.data import rouge, synthetic_reports
from lora_jax.data.task import Example, Prompt, Task


def _prompt(example: Example) -> Prompt:
  return Prompt(
    before='Summarize this government report.\n\nReport:\n',
    document=example['report'],
    after='\n\nWrite the summary: the background, the main findings and what is recommended.',
  )


def _target(example: Example) -> str:
  return example['summary']


def _score(prediction: str, example: Example) -> dict[str, float]:
  return rouge.rouge(prediction, example['summary'])


TASK = Task(
  name='govreport',
  title='GovReport',
  hub_id='ccdv/govreport-summarization',
  features={'id': 'text', 'report': 'text', 'summary': 'text'},
  required=('report', 'summary'),
  prompt=_prompt,
  target=_target,
  score=_score,
  headline='rouge_lsum',
  synthetic=synthetic_reports.rows,
  max_new_tokens=512,
  note=(
    'The model reads the start of the report, as far as the token budget goes, and writes no more '
    'than the answer limit; it is scored against the whole reference summary, which bounds recall '
    'where the reference is longer. ROUGE with Porter stemming.'
  ),
)
