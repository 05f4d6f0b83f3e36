"""The model that `lm_eval` sees; importing this module registers it there as `mamba_jax`.

It needs the extra: pip install 'mamba-jax[lm-eval]'. `python -m mamba_jax.evaluation.lm_eval` is the command line.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lm_eval.api.instance import Instance  # pyrefly: ignore[missing-import]
from lm_eval.api.model import TemplateLM  # pyrefly: ignore[missing-import]
from lm_eval.api.registry import register_model  # pyrefly: ignore[missing-import]
from lm_eval.models.utils import normalize_gen_kwargs  # pyrefly: ignore[missing-import]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyrefly: ignore[missing-import]
from tqdm import tqdm

from mamba_jax.config_base import Config, from_json, require
from mamba_jax.data.config import TokenizerConfig
from mamba_jax.data.tokenization.config import tokenizer_kind
from mamba_jax.errors import InputError, short
from mamba_jax.evaluation.scoring import Pair, Score, Scorer
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generator import Generator, GeneratorConfig, opened
from mamba_jax.loaded import Model, load

# What lm_eval's "auto" stands for.
_BATCH_SIZE = 16
# Standard errors by bootstrap are computed in forked processes otherwise, and a fork of a process of JAX may hang.
os.environ.setdefault("DISABLE_MULTIPROC", "1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessConfig(Config):
    """What `--model_args` may say besides the checkpoint.

    Attributes:
        batch_size: texts that are read or continued together; "auto" is `max_batch_size`.
        max_batch_size: see there; None is 16.
        max_length: most tokens that the model sees, contexts are cut from the left; None cuts nothing.
        max_gen_toks: most tokens of an answer, where a task does not say.
        dtype: of matrix products and activations; "auto" takes that of the checkpoint.
        weights: of a training run, "weights" or "average".
        step: which checkpoint of a training run; None is the newest.
        tokenizer: a `tokenizers` JSON file, for folders without one; None takes that of the checkpoint.
        end_of_document: the token of this file that separates documents.
        device: not used, but lm_eval always names one; JAX_PLATFORMS chooses devices.
        trust_remote_code: not used either; no code is loaded.
    """

    batch_size: int | str = "auto"
    max_batch_size: int | None = None
    max_length: int | None = None
    max_gen_toks: int = 256
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    weights: Literal["weights", "average"] = "weights"
    step: int | None = None
    tokenizer: str | None = None
    end_of_document: str = TokenizerConfig.end_of_document
    device: str | None = None
    trust_remote_code: bool = False

    def _check(self) -> None:
        self._require_positive("max_batch_size", "max_length", "max_gen_toks")
        text = str(self.batch_size)
        is_number = text.isdecimal() and int(text) > 0
        require(
            is_number or text == "auto" or text.startswith("auto:"),
            f"HarnessConfig.batch_size must be a positive number or auto, got {text!r}",
        )

    @property
    def rows(self) -> int:
        """The batch size as a number."""
        return int(self.batch_size) if str(self.batch_size).isdecimal() else self.max_batch_size or _BATCH_SIZE


@register_model("mamba_jax")
class MambaJaxLM(TemplateLM):
    """A checkpoint of this library for `lm_eval`.

    Example:
        import lm_eval
        from mamba_jax.evaluation.harness import MambaJaxLM

        model = MambaJaxLM("runs/quickstart", batch_size=32)
        results = lm_eval.simple_evaluate(model=model, tasks=["lambada_openai"])

    Args:
        pretrained: a training run, a folder with `config.json` and safetensors, or a model.
        **options: see `HarnessConfig`.

    Raises:
        InputError: an option is unknown or has a bad value; the checkpoint is missing, damaged or has no tokenizer.
    """

    def __init__(self, pretrained: str | Path | Model | None = None, **options: Any) -> None:
        super().__init__()
        self._config = config = from_json(HarnessConfig, json.dumps(options, default=str), origin="model arguments")
        if pretrained is None:
            raise InputError("no checkpoint to evaluate: give --model_args pretrained=FOLDER")
        self._model = model = _model(pretrained, config)
        self._tokenizer = model.tokenizer
        self._scorer = Scorer(model.definition, model.params, batch_size=config.rows, max_length=config.max_length)

    @property
    def eot_token_id(self) -> int:
        """The end-of-document id, behind which a text without a context stands."""
        return self._tokenizer.end_of_document

    @property
    def max_length(self) -> int | None:
        """Most tokens that the model sees; None for any number."""
        return self._config.max_length

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer from others in lm_eval's caches."""
        return self._tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; there are no special tokens to add."""
        del add_special_tokens, kwargs
        return self._tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what the model would say."""
        del kwargs
        for texts, _, continuation in requests:
            if not continuation:
                raise InputError(f"the tokenizer has no ids for the continuation {short(texts[1])} of a question")
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        return [(score.log_probability, score.is_greedy) for score in self._scores(pairs, disable_tqdm)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each behind the end-of-document token; in windows of `max_length`, if set."""
        windows: list[Pair] = []
        counts = []
        for (text,) in [request.args for request in requests]:
            ids = self.tok_encode(text)
            length = self.max_length or max(len(ids), 1)
            own = get_rolling_token_windows(ids, prefix_token=self.prefix_token_id, max_seq_len=length, context_len=1)
            pairs = [make_disjoint_window(window) for window in own]
            windows += pairs
            counts.append(len(pairs))
        scores = iter(self._scores(windows, disable_tqdm))
        return [math.fsum(next(scores).log_probability for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues texts up to a stop string, the end of the document or the largest number of tokens."""
        groups: dict[tuple[Any, ...], dict[int, str]] = {}
        for number, request in enumerate(requests):
            text, given = request.args
            groups.setdefault(_settings(given, self._config.max_gen_toks), {})[number] = text
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Writing") as bar:
            for settings, texts in groups.items():
                for number, answer in self._continued(texts, *settings):
                    answers[number] = answer
                    self.cache_hook.add_partial("generate_until", requests[number].args, answer)
                    bar.update()
        return [answers[number] for number in range(len(requests))]

    def _continued(
        self, texts: dict[int, str], until: tuple[str, ...], num_tokens: int, sampling: SamplingConfig
    ) -> Iterator[tuple[int, str]]:
        """Answers to numbered texts; those without tokens start a document, and those that are too long are cut."""
        room = None if self.max_length is None else self.max_length - num_tokens
        if room is not None and room < 1:
            raise InputError(
                f"an answer may have {num_tokens} tokens, but max_length is {self.max_length}: raise it, or lower "
                "max_gen_toks"
            )
        ids = {number: self.tok_encode(text) for number, text in texts.items()}
        whole = [number for number, own in ids.items() if own and (room is None or len(own) <= room)]
        options: dict[str, Any] = {"num_tokens": num_tokens, "sampling": sampling, "stop": until}
        for piece in self._generator.stream([texts[number] for number in whole], seeds=whole, **options):
            if piece.generated is not None:
                yield whole[piece.prompt], piece.generated.text
        for number in ids.keys() - set(whole):
            kept = ids[number] or [self.eot_token_id]
            context = self._generator.extended(None, kept if room is None else kept[-room:])
            yield number, self._generator.generate([""], seeds=[number], context=context, **options)[0].text

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refuses: these models continue texts, and have no form for the turns of a conversation."""
        del chat_history, add_generation_prompt
        raise InputError("these models have no chat template: leave --apply_chat_template out")

    @functools.cached_property
    def _generator(self) -> Generator:
        """Made when a task asks for text: it has weights of its own, laid out for single tokens."""
        return Generator(self._model, GeneratorConfig(rows=self._config.rows, max_length=self._config.max_length))

    def _scores(self, pairs: Sequence[Pair], disable_tqdm: bool) -> list[Score]:
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="Reading") as bar:

            def show(done: int) -> None:
                bar.update(done - bar.n)

            return self._scorer.score(pairs, progress=show)


def _model(checkpoint: str | Path | Model, config: HarnessConfig) -> Model:
    """The model of a checkpoint as the options ask for it."""
    if isinstance(checkpoint, Model):
        return opened(checkpoint)
    dtype = None if config.dtype == "auto" else config.dtype
    model = load(str(checkpoint), step=config.step, weights=config.weights, compute_dtype=dtype)
    if config.tokenizer is not None:
        kind = tokenizer_kind(config.tokenizer)
        own = TokenizerConfig(kind=kind, path=config.tokenizer, end_of_document=config.end_of_document)
        model = Model(model.config, model.params, tokenizer=own)
    return opened(model)


def _settings(given: dict[str, Any], default_length: int) -> tuple[tuple[str, ...], int, SamplingConfig]:
    """Stop strings, number of tokens and sampling of a task's generation settings.

    Raises:
        InputError: a setting is not offered.
    """
    own = dict(normalize_gen_kwargs(given, default_max_gen_toks=default_length))
    until, num_tokens = tuple(text for text in own.pop("until") if text), own.pop("max_gen_toks")
    own.pop("do_sample", None)
    if own.pop("num_beams", 1) != 1:
        raise InputError("lm_eval's adapter does no beam search: leave num_beams out of the task's generation settings")
    own.setdefault("temperature", 0.0)
    try:
        return until, num_tokens, SamplingConfig(**own)
    except TypeError:
        raise InputError(f"generation settings {short(own)} are not all offered: leave out what is not known") from None
