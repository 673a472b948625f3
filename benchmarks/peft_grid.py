"""The peer of the grid: a loop of PEFT runs, each trained and then scored, in one process.

  python -m benchmarks.peft_grid --weights=DIR --dtype=float32 --work=FILE.json \
    --batches=FILE.npz --prompts=FILE.npz --out=FILE.json

The base is loaded once; each configuration gets fresh adapters (`get_peft_model`), which
are taken off again after it (`unload`). FILE.json says

  rank, learning_rate, lr_ratio     of the adapters and of AdamW (the last: rate of B over A's)
  configurations                    [{name, modules, rows}]; no modules: the base alone
  max_new_tokens, eos_id, pad_id    of generation

`rows` is how many rows of the training batches (as of `benchmarks/peft_peer.py`) are gone
through, in order and round; the last batch is cut to fit. The prompts' file holds
`tokens_<i>` and `mask_<i>`, padded on the left, and where something is chosen `choices_<i>`
(B, C), the token of each choice.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import peft_peer


def train(model: Any, work: dict[str, Any], batches: list[peft_peer.Batch]) -> list[float]:
  """Trains the adapters of a configuration; the loss before each step."""
  named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
  of = lambda letter: [p for name, p in named if f'lora_{letter}' in name]
  rate = work['learning_rate']
  groups = [
    {'params': of('A'), 'lr': rate},
    {'params': of('B'), 'lr': rate * work['lr_ratio']},
  ]
  optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
  losses = [peft_peer.update(model, optimizer, batch) for batch in batches]
  # Read at the end, so that the steps of a GPU queue up as ours do.
  return [loss.item() for loss in losses]


def first_rows(batches: list[peft_peer.Batch], rows: int) -> list[peft_peer.Batch]:
  """Batches of so many rows in all, in order and round."""
  chosen = []
  for batch in itertools.cycle(batches):
    if rows <= 0:
      return chosen
    parts = (batch.tokens[:rows], batch.labels[:rows], batch.mask[:rows])
    chosen.append(peft_peer.Batch(*parts))
    rows -= len(batch.tokens)
  raise ValueError('there are no batches')


def score(model: Any, work: dict[str, Any], path: Path) -> list[list[int]]:
  """For each prompt the index of the likeliest choice, or the generated tokens."""
  model.eval()
  said: list[list[int]] = []
  with np.load(path) as file, torch.inference_mode():
    for i in range(sum(name.startswith('tokens_') for name in file.files)):
      field = lambda name, i=i: torch.from_numpy(file[f'{name}_{i}'].astype(np.int64))
      tokens, mask = (field(name).to(peft_peer.device()) for name in ('tokens', 'mask'))
      if f'choices_{i}' in file.files:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        # The head runs on the last position alone.
        out = model(
          input_ids=tokens,
          attention_mask=mask,
          position_ids=positions,
          logits_to_keep=1,
          use_cache=False,
        )
        best = out.logits[:, -1].float().cpu().gather(1, field('choices')).argmax(1)
        said += [[int(index)] for index in best]
      else:
        out = model.generate(
          input_ids=tokens,
          attention_mask=mask,
          max_new_tokens=work['max_new_tokens'],
          do_sample=False,
          eos_token_id=work['eos_id'],
          pad_token_id=work['pad_id'],
          use_cache=True,
        )
        said += out[:, tokens.shape[1] :].cpu().tolist()
  return said


def run(options: argparse.Namespace) -> dict[str, Any]:
  """Goes through the configurations and returns the record that `--out` holds."""
  torch.manual_seed(0)
  work = json.loads(options.work.read_text())
  held = peft_peer.read_batches(options.batches)
  start = time.perf_counter()
  base = peft_peer.load(options.weights, options.dtype)
  load_seconds = time.perf_counter() - start
  cells = []
  for configuration in work['configurations']:
    batches = first_rows(held, configuration['rows'])
    modules, start, losses = configuration['modules'], time.perf_counter(), []
    model = peft_peer.adapt(base, modules, work['rank']) if modules else base
    if modules:
      losses = train(model, work, batches)
    train_seconds, start = time.perf_counter() - start, time.perf_counter()
    said = score(model, work, options.prompts)
    cells.append(
      {
        'name': configuration['name'],
        'train_seconds': train_seconds,
        'score_seconds': time.perf_counter() - start,
        'real_tokens': sum(batch.real_tokens for batch in batches),
        'losses': losses,
        'said': said,
      }
    )
    if modules:
      base = model.unload()
  return {
    'dtype': options.dtype,
    'load_seconds': load_seconds,
    'train_seconds': sum(cell['train_seconds'] for cell in cells),
    'score_seconds': sum(cell['score_seconds'] for cell in cells),
    'cells': cells,
    **peft_peer.memory(),
    'versions': peft_peer.versions(),
  }


def main() -> None:
  """Reads the flags, runs, writes the record."""
  parser = argparse.ArgumentParser(description='A grid of LoRA runs with PEFT, one by one.')
  parser.add_argument('--weights', type=Path, required=True, help='a Hugging Face directory')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), required=True)
  parser.add_argument('--work', type=Path, required=True)
  parser.add_argument('--batches', type=Path, required=True)
  parser.add_argument('--prompts', type=Path, required=True)
  parser.add_argument('--out', type=Path, required=True)
  options = parser.parse_args()
  options.out.write_text(json.dumps(run(options), indent=2))


if __name__ == '__main__':
  main()
