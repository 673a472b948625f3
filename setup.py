"""Package metadata. `python3 launch/local.py` installs from it into `.venv/`."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent

RUN = [
  'absl-py',
  'array-record',
  'flax',
  'gguf',
  'grain',
  'jax>=0.10',
  'jinja2',
  'markupsafe',
  'matplotlib',
  'numpy',
  'optax>=0.2.8',
  'orbax-checkpoint',
  'pillow',
  'rich',
  'rouge-score',
  'safetensors',
  'scipy>=1.15',
  'tensorflow-datasets',
  'tokenizers',
  'zss',
]

# A server over HTTP.
SERVE = ['prometheus-client', 'pydantic>=2', 'starlette', 'uvicorn']

# The references that tests and benchmarks compare with. On Linux the registry's torch
# is a CUDA build of several GB, so they are kept to one Python and one version, for
# which pip can be pointed at a CPU wheel (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL).
# Tests that need them therefore run on 3.11; all others run on every Python.
REFERENCES = [
  'peft; python_version < "3.12"',
  'torch==2.13.0; python_version < "3.12"',
  'transformers; python_version < "3.12"',
]

setuptools.setup(
  name='lora_jax',
  version='0.1.0',
  description='LoRA target-module selection in JAX: train, score, time and compare adapters',
  long_description=(HERE / 'README.md').read_text() if (HERE / 'README.md').exists() else '',
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11,<3.14',
  packages=setuptools.find_packages(
    include=[
      top + rest
      for top in ('lora_jax', 'experiments', 'benchmarks', 'launch')
      for rest in ('', '.*')
    ]
  ),
  # Stated, so that an editable install is one path entry rather than an import hook.
  package_dir={'': '.'},
  package_data={
    'lora_jax.hub': ['*.safetensors'],
    'lora_jax.report': ['page.css', 'page.html.jinja', 'page.js'],
  },
  install_requires=RUN,
  extras_require={
    # `nodejs` lets pyright run where there is no node.
    'test': [
      'httpx2',
      'openai',
      'pre-commit',
      'pyright[nodejs]',
      'pytest',
      'pytest-xdist',
      'ruff',
      'tensorboardX',
      *SERVE,
      *REFERENCES,
    ],
    'serve': SERVE,
    'hub': ['datasets', 'huggingface_hub'],
    # Metrics beyond JSON lines.
    'track': ['tensorboardX', 'wandb'],
    'tpu': ['jax[tpu]'],
    # The TPU compiler, for `experiments.plan`.
    'plan': ['libtpu'],
    'cuda': ['jax[cuda13]'],
  },
)
