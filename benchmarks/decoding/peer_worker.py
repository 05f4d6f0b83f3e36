"""Times `transformers` on an exported folder: python peer_worker.py JOB, which peer.py writes.

A job names the folder and the programs to time; a line of JSON comes back for each. Runs under another interpreter,
which has torch and transformers.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch  # pyrefly: ignore[missing-import]
import transformers  # pyrefly: ignore[missing-import]


class Clock(transformers.StoppingCriteria):
    """Notes when each token has been drawn, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **options: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def best_seconds(call: Callable[[], float], seconds: float) -> float:
    """The shortest of the times that repeated calls give, after one that warms up; at least three."""
    call()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        times.append(call())
    return min(times)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"]).eval()
    count, name = job["num_tokens"], f"transformers {transformers.__version__}, torch {torch.__version__}"
    with torch.no_grad():
        for batch in job["batches"]:
            ids = torch.full((batch, 4), 5)

            def generate(tokens: int, *criteria: Clock, ids: torch.Tensor = ids) -> torch.Tensor:
                options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
                return model.generate(ids, **options, stopping_criteria=transformers.StoppingCriteriaList(criteria))

            def decode(generate: Callable[..., torch.Tensor] = generate) -> float:
                # The first token also waits for the prompt to be read.
                generate(count + 1, clock := Clock())
                return (clock.times[-1] - clock.times[0]) / count

            seconds = best_seconds(decode, job["seconds"])
            tokens = generate(8)[0, 4:].tolist()
            print(json.dumps({"what": "decoding", "batch": batch, "seconds": seconds, "tokens": tokens, "name": name}))
        for batch in job["prompts"]:
            ids = torch.full((batch, job["prompt_length"]), 5)

            def read(ids: torch.Tensor = ids) -> float:
                begin = time.perf_counter()
                model(ids, logits_to_keep=1)
                return time.perf_counter() - begin

            seconds = best_seconds(read, job["seconds"])
            print(json.dumps({"what": "reading prompts", "batch": batch, "seconds": seconds, "name": name}))


if __name__ == "__main__":
    main()
