"""What `transformers` makes of exported folders: python transformers_worker.py JOB, which test_transformers.py writes.

The job names a model with token ids to run it on, and tokenizers with texts; the answers go to a folder beside it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch  # pyrefly: ignore[missing-import]
from transformers import AutoModelForCausalLM, AutoTokenizer  # pyrefly: ignore[missing-import]


def read_model(folder: str, ids: list[list[int]], prompts: list[str], out: Path) -> list[list[int]]:
    """Writes logits of the ids; returns greedy continuations of the prompts, as a padded batch."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        np.save(out / "logits.npy", model(torch.tensor(ids)).logits.numpy())
        tokens = model.generate(**batch, max_new_tokens=12)
    return tokens[:, batch["input_ids"].shape[1] :].tolist()


def read_tokenizer(folder: str, texts: list[str]) -> dict[str, object]:
    """What a program sees that asks for no option."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text).input_ids for text in texts]
    return {
        "ids": ids,
        "texts": [tokenizer.decode(row) for row in ids],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "size": len(tokenizer),
    }


def main() -> None:
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    answers = {
        "tokenizers": {name: read_tokenizer(folder, job["texts"]) for name, folder in job["tokenizers"].items()},
        "tokens": read_model(job["model"], job["ids"], job["prompts"], path.parent),
    }
    (path.parent / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
