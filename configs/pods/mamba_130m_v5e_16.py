"""Mamba-130M on 16 chips of TPU v5e: the run of configs/mamba_130m.py.

Every chip holds all parameters and works on its sequences; only gradients are exchanged. The chips have room for that,
and matrices of 768 columns split over 16 chips would be too narrow for their units.

Command:   python train.py configs/pods/mamba_130m_v5e_16.py --distributed --data.tokenizer.path 20B_tokenizer.json
Hardware:  v5litepod-16, a slice of 4x4 chips; the command runs on every host.
Data:      as in configs/mamba_130m.py.
Compiled:  python train.py configs/pods/mamba_130m_v5e_16.py --compile-only --topology v5e:4x4
Report:    of the compiler and published figures; nothing was run.
  total               5.803 GiB of 16 GiB
  all-reduce              51 times      643.2 MiB
  model operations of a step: 4.146e+14, of a device 2.591e+13, at the peak 131.5 ms
  time of a step: XLA's operations by the compiler's estimate 331.3 ms, kernels by their schedules 211.8 ms,
  exchange at the speed of the links 3.4 ms
  expected between 543.1 and 546.5 ms,
  model FLOPs utilisation at most 24.2%
"""

import dataclasses

from configs.mamba_130m import get_config as get_base_config
from mamba_jax.config import ExperimentConfig, MeshConfig


def get_config() -> ExperimentConfig:
    base = get_base_config()
    return dataclasses.replace(
        base,
        name="mamba_130m_v5e_16",
        train=dataclasses.replace(base.train, run_dir="runs/mamba_130m_v5e_16"),
        mesh=MeshConfig(data=16),
    )
