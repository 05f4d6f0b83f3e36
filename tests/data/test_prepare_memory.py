"""Memory does not grow with the input: generated JSON lines, tokenised by two processes, killed, and gone on with."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mamba_jax.data.shards import TokenDataset
from tests.data.test_tokenizer import train_bpe

# Ten times as much shows the same and takes ten times as long.
GIGABYTES = float(os.environ.get("MAMBA_JAX_PREPARE_GIGABYTES", "1"))
# What a program with JAX takes before it reads anything, and the batches that are on their way: 293 MiB were measured.
MOST = 400 * 2**20


def generate(path: Path, num_bytes: float) -> int:
    """Writes documents of words in random order, each followed by its number; returns how many."""
    words = np.array([*(f"{word} " for word in ("the", "thing", "of", "theory", "and", "state", "other")), "\n"])
    rng, count = np.random.default_rng(0), 0
    with path.open("w") as file:
        while file.tell() < num_bytes:
            rows = rng.integers(0, len(words), (200, 700))
            file.writelines(
                json.dumps({"text": "".join(words[row]) + str(count + i)}) + "\n" for i, row in enumerate(rows)
            )
            count += len(rows)
    return count


def memory(process: int) -> dict[int, int]:
    """The memory that a process and each of its children take alone or share, in bytes."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            status = path.read_text()
        except OSError:
            continue
        parent = re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)
        resident = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        if resident and parent and process in (int(path.parent.name), int(parent[1])):
            found[int(path.parent.name)] = int(resident[1]) * 1024
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600 * max(1, round(GIGABYTES)))
def test_memory_is_flat_and_a_kill_loses_one_shard(tmp_path: Path) -> None:
    documents = generate(tmp_path / "a.jsonl", GIGABYTES * 1e9)
    tokenizer = train_bpe(tmp_path / "bpe.json")
    flags = [
        "--files",
        tmp_path / "a.jsonl",
        "--output",
        tmp_path / "out",
        "--tokenizer",
        tokenizer.path,
        "--workers",
        2,
    ]
    command = [
        sys.executable,
        "-m",
        "mamba_jax.data.prepare",
        *map(str, flags),
        "--shard-tokens",
        str(int(GIGABYTES * 2**24)),
    ]
    peaks: dict[str, list[int]] = {"killed": [], "gone on": []}
    err = ""
    for name, most in peaks.items():
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                taken = memory(process.pid)
                most.append(max(taken.values(), default=0))
                time.sleep(1)
                finished = len(list(tmp_path.glob(".out.*/tokens-*")))
                if name == "killed" and finished > 5:
                    process.send_signal(signal.SIGKILL)
                    # Those that worked for it end by themselves.
                    deadline = time.monotonic() + 30
                    while any(Path(f"/proc/{child}").exists() for child in set(taken) - {process.pid}):
                        assert time.monotonic() < deadline
                        time.sleep(0.2)
            out, err = process.communicate()
        print(name, f"{max(most) / 2**20:.0f} MiB at most in a process", out, err[-300:])
        assert process.returncode == (-signal.SIGKILL if name == "killed" else 0)
        assert max(most) < MOST
    assert re.search(r"going on behind [456] finished shards", err)
    second_half = peaks["gone on"][len(peaks["gone on"]) // 2 :]
    assert max(second_half) < 1.1 * max(peaks["gone on"][: len(peaks["gone on"]) // 2])
    dataset = TokenDataset(tmp_path / "out")
    dataset.check()
    assert dataset.num_documents == documents
