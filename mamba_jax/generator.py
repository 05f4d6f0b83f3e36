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

from mamba_jax.errors import InputError
from mamba_jax.generation.beam_search import Hypothesis, beam_search
from mamba_jax.generation.context import Context, fingerprint_of, load_context, save_context
from mamba_jax.generation.decoder import Decoder
from mamba_jax.generation.engine import Engine
from mamba_jax.generation.rows import NOT_FINITE
from mamba_jax.generation.sampling import SamplingConfig, allowed_ids
from mamba_jax.generation.speculative import SpeculativeDecoder
from mamba_jax.generation.text_engine import Continuation, Generated, Piece, TextEngine, TextRequest, prompt_ids
from mamba_jax.generation.text_stream import TextStream
from mamba_jax.generation.weights import Weights, for_decoding
from mamba_jax.loaded import Model, load
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.state import is_endless
from mamba_jax.sharding import make_mesh, parameter_sharding
from mamba_jax.sharding.config import MeshConfig

__all__ = ["FoundText", "Generated", "Generator", "GeneratorConfig", "Piece"]

# Room for the tokens of a text in models with attention, if none is asked for.
_DEFAULT_LENGTH = 4096


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundText(Hypothesis):
    """A continuation that a beam search has found.

    Attributes:
        text: the text behind the prompt.
    """

    text: str


class Generator:
    """Writes text with a checkpoint.

    Several streams of one generator may be read in turns, by one thread; they share its rows.

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
        model = opened(checkpoint)
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
                small = opened(draft)
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
        continuations = [
            Continuation(
                self.tokenizer,
                TextRequest(
                    prompt=text, num_tokens=num_tokens, sampling=setting, seed=seed, stop=stop, context=context
                ),
            )
            for text, setting, seed in zip(texts, settings, numbers, strict=True)
        ]
        return self._pieces(continuations)

    def search(
        self,
        prompt: str,
        *,
        num_beams: int = 4,
        num_tokens: int = 128,
        length_penalty: float = 1.0,
        context: Context | None = None,
    ) -> list[FoundText]:
        """The likeliest continuations of a prompt that a beam search finds; see `beam_search`.

        Args:
            prompt: the text.
            num_beams: continuations that are kept at each token.
            num_tokens: most tokens to add.
            length_penalty: exponent of the length in the score.
            context: what stands in front of the prompt, which then may be empty.

        Returns:
            Up to `num_beams` continuations, the highest score first.

        Raises:
            InputError: see `stream` and `beam_search`.
        """
        asked = Continuation(self.tokenizer, TextRequest(prompt=prompt, num_tokens=num_tokens, context=context))
        with self._on_mesh():
            found = beam_search(
                self.decoder,
                asked.request,
                num_beams=num_beams,
                length_penalty=length_penalty,
                end=self.tokenizer.end_of_document,
                allowed=self._allowed,
            )
        before = [*asked.request.history, *asked.request.tokens]
        texts = []
        for hypothesis in found:
            stream = TextStream(self.tokenizer, prompt, before)
            text = stream.add(hypothesis.tokens) + stream.finish()
            texts.append(FoundText(text=text, **dataclasses.asdict(hypothesis)))
        return texts

    def read(self, text: str, *, context: Context | None = None) -> Context:
        """What the model knows after a text, to be continued any number of times; in place of `context`, behind it.

        Raises:
            InputError: the text has no tokens, or more than `max_length`.
        """
        return self.extended(context, prompt_ids(self.tokenizer, text, context))

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

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    @functools.cached_property
    def engine(self) -> TextEngine:
        """What continues the texts, for programs with a loop of their own; without the draft."""
        end = self.tokenizer.end_of_document
        with self._on_mesh():
            engine = Engine(self.decoder, rows=self.config.rows, end=end, allowed=self._allowed)
        return TextEngine(engine, self.tokenizer, on_mesh=self._on_mesh)

    @functools.cached_property
    def _allowed(self) -> np.ndarray:
        return allowed_ids(self.tokenizer.known, self.decoder.definition.config.vocab_size)

    @property
    def acceptance(self) -> float:
        """The share of the draft's proposals that became text; NaN without a draft."""
        return float("nan") if self._speculation is None else self._speculation.statistics.acceptance

    def _pieces(self, continuations: Sequence[Continuation]) -> Iterator[Piece]:
        """Continues texts until each has ended."""
        follow = self.engine.follow if self._speculation is None else self._by_speculation
        for piece in follow(continuations):
            if piece.generated is not None and piece.generated.finished == "failed":
                raise InputError(NOT_FINITE)
            yield piece

    def _by_speculation(self, continuations: Sequence[Continuation]) -> Iterator[Piece]:
        """The same with a draft, for as many texts at a time as there are rows."""
        assert self._speculation is not None
        options = {"end": self.tokenizer.end_of_document, "allowed": self._allowed}
        for first in range(0, len(continuations), self.config.rows):
            group = continuations[first : first + self.config.rows]
            is_open = [True] * len(group)
            rounds = self._speculation.continue_rows([continuation.request for continuation in group], **options)
            while any(is_open):
                with self._on_mesh():
                    progress = next(rounds)
                for part in progress:
                    if is_open[part.request]:
                        piece = group[part.request].add(part, first + part.request)
                        is_open[part.request] = piece.generated is None
                        yield piece


def opened(checkpoint: str | Path | Model) -> Model:
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
