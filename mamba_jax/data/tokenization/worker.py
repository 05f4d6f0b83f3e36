"""A process that tokenises for another one, which `stream.py` starts and feeds."""

import sys

from mamba_jax.data.tokenization.stream import encode_pieces, receive, send
from mamba_jax.errors import InputError


def main() -> None:
    """Reads a tokenizer and then batches from standard input until it ends; writes the ids of each to the output."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    # What anything else prints must not come between the messages.
    sys.stdout = sys.stderr
    try:
        tokenizer = receive(source)
        while True:
            batch = receive(source)
            try:
                answer = encode_pieces(tokenizer, batch)
            except InputError as error:
                answer = error
            send(sink, answer)
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
