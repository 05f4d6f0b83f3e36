"""Mamba-130M on sequences of a million tokens, on a pod of TPU v5e.

A batch is one sequence of 1,048,576 tokens, twice the tokens of a batch of configs/mamba_130m.py, and the run half of
its steps. Each chip works on 4,096 tokens; the states at their ends meet in 8 rounds of exchange a layer.

Command:   python train.py configs/pods/mamba_130m_1m_tokens_v5e_256.py --distributed --data.tokenizer.path FILE.json
Hardware:  v5litepod-256, a slice of 16x16 chips; the command runs on every host.
Data:      as in configs/mamba_130m.py; documents follow each other without a reset of the state.
Compiled:  python train.py configs/pods/mamba_130m_1m_tokens_v5e_256.py --compile-only --topology v5e:16x16
Report:    of the compiler and published figures; nothing was run.
  total               0.849 GiB of 16 GiB
  all-gather             105 times      952.5 MiB
  all-reduce             149 times     1154.1 MiB
  collective-permute    1152 times       57.6 MiB
  model operations of a step: 8.291e+14, of a device 3.239e+12, at the peak 16.4 ms
  time of a step: XLA's operations by the compiler's estimate 42.6 ms, kernels by their schedules 36.3 ms,
  exchange at the speed of the links 11.3 ms
  expected between 78.9 and 90.2 ms,
  model FLOPs utilisation at most 20.8%
"""

import dataclasses

from configs.mamba_130m import get_config as get_base_config
from mamba_jax.config import ExperimentConfig, MeshConfig


def get_config() -> ExperimentConfig:
    base = get_base_config()
    return dataclasses.replace(
        base,
        name="mamba_130m_1m_tokens_v5e_256",
        data=dataclasses.replace(base.data, seq_len=1_048_576, global_batch=1),
        train=dataclasses.replace(base.train, num_steps=2400, run_dir="runs/mamba_130m_1m_tokens_v5e_256"),
        mesh=MeshConfig(data=1, sequence=256),
    )
