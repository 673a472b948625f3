"""The peer of the serving engine: PEFT's generation of a batch whose rows have different adapters.

  python -m benchmarks.peft_serve --weights=DIR --adapters=DIR --dtype=float32 \
    --prompts=FILE.json --new_tokens=32 --turns=3 --out=FILE.json

The prompts' file holds {"ids": [[...], ...] of one length, "adapters": [a name in DIR, ...]}.
Decoding is greedy and goes on to its last token. Batches with their adapters and batches
without take turns.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import peft
import torch

from benchmarks import peft_peer


def run(options: argparse.Namespace) -> dict[str, Any]:
  """Loads the base and all adapters, generates, and returns the record that `--out` holds."""
  asked = json.loads(options.prompts.read_text())
  base = peft_peer.load(options.weights, options.dtype)
  names = list(dict.fromkeys(asked['adapters']))
  model: Any = peft.PeftModel.from_pretrained(base, options.adapters / names[0], names[0])
  for name in names[1:]:
    model.load_adapter(options.adapters / name, name)
  model.eval()
  tokens = torch.tensor(asked['ids'], device=peft_peer.device())

  def generate(adapters: list[str]) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    with torch.inference_mode():
      out = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        adapter_names=adapters,
        max_new_tokens=options.new_tokens,
        min_new_tokens=options.new_tokens,
        do_sample=False,
        pad_token_id=0,
      )
    said = out[:, tokens.shape[1] :].cpu().tolist()
    return time.perf_counter() - start, said

  # PEFT's own name of no adapter.
  without = ['__base__'] * len(asked['ids'])
  seconds: dict[str, list[float]] = {'mixed': [], 'base': []}
  said: list[list[int]] = []
  for turn in range(options.turns + 1):
    for work, adapters in (('mixed', asked['adapters']), ('base', without)):
      taken, out = generate(adapters)
      if work == 'mixed':
        said = out
      if turn:
        seconds[work].append(taken)
  return {
    'dtype': options.dtype,
    'seconds': seconds,
    'said': said,
    **peft_peer.memory(),
    'versions': peft_peer.versions(),
  }


def main() -> None:
  """Reads the flags, runs, writes the record."""
  parser = argparse.ArgumentParser(description='Generation with PEFT, an adapter a row.')
  parser.add_argument('--weights', type=Path, required=True, help='a Hugging Face directory')
  parser.add_argument('--adapters', type=Path, required=True)
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), required=True)
  parser.add_argument('--prompts', type=Path, required=True)
  parser.add_argument('--new_tokens', type=int, required=True)
  parser.add_argument('--turns', type=int, required=True)
  parser.add_argument('--out', type=Path, required=True)
  options = parser.parse_args()
  options.out.write_text(json.dumps(run(options), indent=2))


if __name__ == '__main__':
  main()
