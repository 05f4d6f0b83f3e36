"""Text from a checkpoint: prompts in, continuations out, as they come or when they are whole."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.errors import InputError
from mamba_jax.generation.context import Context, fingerprint_of, load_context, save_context
from mamba_jax.generation.decoder import Decoder, Prefilled
from mamba_jax.generation.engine import Engine, Progress, Request
from mamba_jax.generation.sampling import SamplingConfig, allowed_ids
from mamba_jax.generation.speculative import SpeculativeDecoder
from mamba_jax.generation.stop_strings import StopStrings
from mamba_jax.generation.text_stream import TextStream
from mamba_jax.generation.weights import Weights, for_decoding
from mamba_jax.loaded import Model, load
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.state import is_endless
from mamba_jax.sharding import make_mesh, parameter_sharding
from mamba_jax.sharding.config import MeshConfig

# Room for the tokens of a text in models with attention, if none is asked for.
_DEFAULT_LENGTH = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """A continuation.

    Attributes:
        text: the text behind the prompt.
        tokens: the ids that were drawn, up to the one that ended the text.
        log_probabilities: of these ids in the model's own distribution, whatever settings they were drawn with.
        finished: why the text ends: "end" of the document, "stop" string, or "length".
    """

    text: str
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    finished: Literal["end", "stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What has been added to a continuation since its last piece.

    Attributes:
        prompt: the number of its prompt.
        text: new text, certain to stay; may be empty.
        num_tokens: tokens of the continuation so far.
        generated: the whole continuation, if this is its last piece; None before.
    """

    prompt: int
    text: str
    num_tokens: int
    generated: Generated | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """How a `Generator` runs.

    Attributes:
        rows: prompts that are continued together; more wait.
        max_length: most tokens of a text, prompt included; None is any number, for models with attention 4,096.
        weights: "exact", or "int8" for matrices that are rounded to 8 bits.
        state_dtype: what recurrent states are kept in from token to token.
        mesh: how weights and rows are split over devices; by default it takes one.
        num_proposals: tokens that a draft proposes at a time.
    """

    rows: int = 16
    max_length: int | None = None
    weights: Weights = "exact"
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=1))
    num_proposals: int = 4


class Generator:
    """Writes text with a checkpoint.

    Example:
        generator = Generator("runs/quickstart")
        for piece in generator.stream("My fellow citizens", num_tokens=200, sampling=SamplingConfig(top_p=0.9)):
            print(piece.text, end="", flush=True)
        answers = generator.generate(["The Congress", "The army"], stop=["."])

        speech = generator.read(long_text)                     # read once,
        generator.save(speech, "speech.safetensors")           # kept,
        generator.generate(questions, context=speech)          # and asked often

    Attributes:
        config: how it runs.
        decoder: the model.
        tokenizer: that of the checkpoint.

    Args:
        checkpoint: a training run, a folder with `config.json` and safetensors, or a model.
        config: how it runs.
        draft: a smaller checkpoint that proposes tokens, see `SpeculativeDecoder`; the text has the same distribution.

    Raises:
        InputError: a checkpoint cannot be read, has no tokenizer, or has fewer ids than the tokenizer; the two have
            different tokenizers; or the mesh does not fit.
    """

    def __init__(
        self,
        checkpoint: str | Path | Model,
        config: GeneratorConfig = GeneratorConfig(),
        *,
        draft: str | Path | Model | None = None,
    ) -> None:
        model = _opened(checkpoint)
        self.config, self.tokenizer = config, model.tokenizer
        sizes = dataclasses.astuple(config.mesh)
        devices = jax.devices() if -1 in sizes else jax.devices()[: math.prod(sizes)]
        self._mesh = None if set(sizes) == {1} else make_mesh(config.mesh, devices)
        self._own = (model.definition, model.params)

        def decoder(model: Model) -> Decoder:
            params = model.params if self._mesh is None else _on_devices(model.definition, model.params, self._mesh)
            is_long = config.max_length is None and not is_endless(model.config)
            return Decoder(
                *for_decoding(model.definition, params, weights=config.weights),
                max_length=_DEFAULT_LENGTH if is_long else config.max_length,
                state_dtype=config.state_dtype,
            )

        with self._on_mesh():
            self.decoder = decoder(model)
            self._speculation = None
            if draft is not None:
                small = _opened(draft)
                if small.tokenizer.fingerprint != self.tokenizer.fingerprint:
                    raise InputError("the draft has another tokenizer than the model: take one that shares it")
                self._speculation = SpeculativeDecoder(self.decoder, decoder(small), num_proposals=config.num_proposals)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        num_tokens: int = 128,
        sampling: SamplingConfig | Sequence[SamplingConfig] = SamplingConfig(),
        seeds: Sequence[int] | int = 0,
        stop: Sequence[str] = (),
        context: Context | None = None,
    ) -> list[Generated]:
        """Continues prompts of any lengths; arguments as in `stream`.

        Returns:
            The continuations, in the order of the prompts.
        """
        options: dict[str, Any] = {"sampling": sampling, "seeds": seeds, "stop": stop, "context": context}
        pieces = self.stream(prompts, num_tokens=num_tokens, **options)
        found = {piece.prompt: piece.generated for piece in pieces if piece.generated is not None}
        return [found[number] for number in range(len(found))]

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        num_tokens: int = 128,
        sampling: SamplingConfig | Sequence[SamplingConfig] = SamplingConfig(),
        seeds: Sequence[int] | int = 0,
        stop: Sequence[str] = (),
        context: Context | None = None,
    ) -> Iterator[Piece]:
        """Continues prompts, and gives text as soon as it is certain.

        A continuation follows from its own prompt, settings and seed alone.

        Args:
            prompts: one text, or several.
            num_tokens: most tokens to add to each.
            sampling: how tokens are drawn; one setting for all, or one for each.
            seeds: of each prompt, in 0 .. 2**32 - 1; one number s gives the i-th prompt the seed s + i.
            stop: strings that end a text; they are not shown, nor is any part of them.
            context: what stands in front of all prompts, see `read`; then prompts may be empty.

        Raises:
            InputError: a prompt without tokens, another number of seeds or settings than of prompts, a stop string of
                no characters, or more tokens than `max_length`.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        settings = [sampling] * len(texts) if isinstance(sampling, SamplingConfig) else list(sampling)
        numbers = [(seeds + index) % 2**32 for index in range(len(texts))] if isinstance(seeds, int) else list(seeds)
        for name, values in (("settings", settings), ("seeds", numbers)):
            if len(values) != len(texts):
                raise InputError(f"there are {len(texts)} prompts but {len(values)} {name}: give as many")
        writers = [_Writer(self.tokenizer, text, self._ids(text, context), stop, context) for text in texts]
        requests = [
            Request(
                tokens=writer.prompt_ids,
                num_tokens=num_tokens,
                sampling=setting,
                seed=seed,
                start=None if context is None else Prefilled(logits=context.logits[None], state=context.state),
                history=() if context is None else context.tokens.tolist(),
            )
            for writer, setting, seed in zip(writers, settings, numbers, strict=True)
        ]
        return self._pieces(writers, requests)

    def read(self, text: str, *, context: Context | None = None) -> Context:
        """What the model knows after a text, to be continued any number of times; in place of `context`, behind it.

        Raises:
            InputError: the text has no tokens, or more than `max_length`.
        """
        return self.extended(context, self._ids(text, context))

    def extended(self, context: Context | None, tokens: Sequence[int]) -> Context:
        """What the model knows after more tokens; None stands for a text that begins with them."""
        ids = np.asarray(tokens, np.int32)
        with self._on_mesh():
            if context is None:
                read, before = self.decoder.prefill(ids[None]), ids[:0]
            else:
                read, before = self.decoder.extend(context.state, ids[None]), context.tokens
        return Context(tokens=np.concatenate([before, ids]), logits=read.logits[0], state=read.state)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the model's weights, by which a kept state finds its model again."""
        return fingerprint_of(*self._own)

    def save(self, context: Context, path: str | Path) -> None:
        """Keeps a context in a safetensors file.

        Raises:
            InputError: the file cannot be written.
        """
        save_context(path, context, self._own[0], self.fingerprint)

    def load(self, path: str | Path) -> Context:
        """Reads a context that was kept.

        Raises:
            InputError: the file cannot be read, is damaged, or is of another model.
        """
        options: dict[str, Any] = {"max_length": self.decoder.max_length, "state_dtype": self.decoder.state_dtype}
        return load_context(path, self._own[0], self.fingerprint, **options)

    def _ids(self, text: str, context: Context | None) -> list[int]:
        """The ids of a prompt; behind a context it is no beginning, before which some tokenizers put a space."""
        self.tokenizer.check_prompt(text)
        ids = self.tokenizer.encode_batch([text], continues=[context is not None])[0].tolist()
        if not ids and context is None:
            raise InputError("the prompt is empty: give at least one character")
        return ids

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    @functools.cached_property
    def _engine(self) -> Engine:
        return Engine(
            self.decoder,
            rows=self.config.rows,
            end=self.tokenizer.end_of_document,
            allowed=self._allowed,
        )

    @functools.cached_property
    def _allowed(self) -> np.ndarray:
        return allowed_ids(self.tokenizer.known, self.decoder.definition.config.vocab_size)

    @property
    def acceptance(self) -> float:
        """The share of the draft's proposals that became text; NaN without a draft."""
        return float("nan") if self._speculation is None else self._speculation.statistics.acceptance

    def _pieces(self, writers: "list[_Writer]", requests: list[Request]) -> Iterator[Piece]:
        """Adds what is drawn to the texts until each has ended."""
        is_open = [True] * len(writers)
        progress = (self._by_engine if self._speculation is None else self._by_speculation)(requests, is_open)
        for index, part in progress:
            text, generated = writers[index].add(part)
            is_open[index] = generated is None
            yield Piece(prompt=index, text=text, num_tokens=len(writers[index].tokens), generated=generated)

    def _by_engine(self, requests: list[Request], is_open: list[bool]) -> Iterator[tuple[int, Progress]]:
        """Progress with the number of its request, of those that are open; gives the others up."""
        numbers: dict[int, int] = {}
        try:
            for index, request in enumerate(requests):
                with self._on_mesh():
                    numbers[self._engine.submit(request)] = index
            while any(is_open):
                with self._on_mesh():
                    progress = self._engine.step()
                for part in progress:
                    if part.request in numbers and is_open[index := numbers[part.request]]:
                        yield index, part
                        if not is_open[index]:
                            self._engine.cancel(part.request)
        finally:
            for number in numbers:
                self._engine.cancel(number)

    def _by_speculation(self, requests: list[Request], is_open: list[bool]) -> Iterator[tuple[int, Progress]]:
        """The same with a draft, for as many requests at a time as there are rows."""
        assert self._speculation is not None
        options = {"end": self.tokenizer.end_of_document, "allowed": self._allowed}
        for first in range(0, len(requests), self.config.rows):
            group = range(first, min(first + self.config.rows, len(requests)))
            rounds = self._speculation.continue_rows([requests[index] for index in group], **options)
            while any(is_open[index] for index in group):
                with self._on_mesh():
                    progress = next(rounds)
                for part in progress:
                    if is_open[first + part.request]:
                        yield first + part.request, part


class _Writer:
    """The text of one continuation while it grows."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: str, prompt_ids: list[int], stop: Sequence[str], context: Context | None
    ) -> None:
        before = [] if context is None else context.tokens.tolist()
        self.prompt_ids = prompt_ids
        self._stream = TextStream(tokenizer, prompt, before + prompt_ids)
        self._stop = StopStrings(stop)
        self.tokens: list[int] = []
        self._text, self._log_probabilities = "", []

    def add(self, progress: Progress) -> tuple[str, Generated | None]:
        """The text that the tokens of a progress make certain, and the continuation if they end it."""
        new, finished = "", progress.finished
        for token, log_probability in zip(progress.tokens, progress.log_probabilities, strict=True):
            self.tokens.append(token)
            self._log_probabilities.append(log_probability)
            shown = self._stop.add(self._stream.add([token]))
            new += shown.text
            if shown.stopped:
                finished = "stop"
                break
        if finished in ("end", "length"):
            last = self._stop.add(self._stream.finish())
            new += last.text + self._stop.finish()
            finished = "stop" if last.stopped else finished
        self._text += new
        if finished is None:
            return new, None
        return new, Generated(
            text=self._text,
            tokens=tuple(self.tokens),
            log_probabilities=tuple(self._log_probabilities),
            finished=finished,
        )


def _opened(checkpoint: str | Path | Model) -> Model:
    """A checkpoint whose tokenizer has no more ids than its model."""
    model = checkpoint if isinstance(checkpoint, Model) else load(checkpoint)
    if model.tokenizer.vocab_size > model.config.padded_vocab_size:
        raise InputError(
            f"the tokenizer has {model.tokenizer.vocab_size} ids but the model only {model.config.padded_vocab_size}: "
            "give the tokenizer it was trained with"
        )
    return model


def _on_devices(definition: ModelDefinition, params: Params, mesh: jax.sharding.Mesh) -> Params:
    """The parameters, split over the devices of a mesh."""

    def put(path: Any, leaf: Any, axes: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.device_put(leaf, parameter_sharding(mesh, leaf.shape, axes, name=name))

    return jax.tree.map_with_path(put, params, definition.axes)
