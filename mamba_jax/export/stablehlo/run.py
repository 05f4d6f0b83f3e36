"""Continues a prompt with the model in this folder: python run.py "My fellow citizens" --num-tokens 50.

The folder was exported by mamba-jax, and needs nothing of it: this program needs jax, flatbuffers and safetensors, and
tokenizers for text. `stablehlo.json` lists what the programs take and return, b being the number of rows and l that of
tokens, as many as a call gives:

    prefill(weights, tokens (b, l), lengths (b,)) -> logits (b, V), state
    decode_step(weights, tokens (b,), state)      -> logits (b, V), state
    forward(weights, tokens (b, l))               -> logits (b, l, V)

Weights and state are dictionaries of arrays; those of the weights have their names in `model.safetensors`. Tokens and
lengths are int32. Prompts stand at the left of their rows; what is behind a prompt's length is ignored. Logits are
float32, of the token after the last one that was read; `forward` gives those after each token.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from safetensors.numpy import load_file


class Model:
    """The programs of a folder, with their weights.

    Args:
        folder: where this file lies.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.about: dict[str, Any] = json.loads((self.folder / "stablehlo.json").read_text())
        self.weights = jax.device_put(load_file(self.folder / "model.safetensors"))
        self.prefill, self.decode_step, self.forward = (
            jax.jit(self._program(name).call) for name in ("prefill", "decode_step", "forward")
        )

    def _program(self, name: str) -> export.Exported:
        about = self.about["programs"][name]
        data = (self.folder / about["file"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != about["sha256"]:
            raise ValueError(f"{self.folder / about['file']} is damaged: export it again")
        return export.deserialize(bytearray(data))

    def greedy(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """The most likely tokens after each of some prompts, `num_tokens` of them."""
        lengths, most = [len(prompt) for prompt in prompts], self.about["max_length"]
        if most is not None and max(lengths) + num_tokens > most:
            raise ValueError(
                f"the folder was exported for rows of at most {most} tokens: give fewer, or export it anew"
            )
        rows = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]
        logits, state = self.prefill(self.weights, jnp.asarray(rows, jnp.int32), jnp.asarray(lengths, jnp.int32))
        drawn = [jnp.argmax(logits, axis=-1).astype(jnp.int32)]
        while len(drawn) < num_tokens:
            logits, state = self.decode_step(self.weights, drawn[-1], state)
            drawn.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return jnp.stack(drawn, axis=1).tolist()


def main() -> None:
    """Prints the continuation of a prompt."""
    parser = argparse.ArgumentParser(description="Continues a prompt with the model in this folder.")
    parser.add_argument("prompt")
    parser.add_argument("--num-tokens", type=int, default=50)
    arguments = parser.parse_args()
    from tokenizers import Tokenizer

    try:
        model = Model(Path(__file__).parent)
        tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
        tokenizer.encode_special_tokens = True
        prompt = tokenizer.encode(arguments.prompt, add_special_tokens=False).ids
        if not prompt or arguments.num_tokens < 1:
            raise ValueError("give a prompt, and a number of tokens of at least 1")
        drawn = model.greedy([prompt], arguments.num_tokens)[0]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    end = model.about["end_of_document"]
    sys.stdout.write(tokenizer.decode(drawn[: drawn.index(end)] if end in drawn else drawn) + "\n")


if __name__ == "__main__":
    main()
