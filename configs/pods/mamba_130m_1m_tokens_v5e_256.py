"""Mamba-130M on sequences of a million tokens, on a pod of TPU v5e.

A batch is one sequence of 1,048,576 tokens, twice the tokens of a batch of configs/mamba_130m.py, and the run half of
its steps. Each chip works on 4,096 tokens; the states at their ends travel once through the pod for every layer.

Command:   python train.py configs/pods/mamba_130m_1m_tokens_v5e_256.py --distributed --data.tokenizer.path FILE.json
Hardware:  v5litepod-256, a slice of 16x16 chips; the command runs on every host.
Data:      as in configs/mamba_130m.py; documents follow each other without a reset of the state.
Compiled:  python train.py configs/pods/mamba_130m_1m_tokens_v5e_256.py --compile-only --topology v5e:16x16
Report:
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
