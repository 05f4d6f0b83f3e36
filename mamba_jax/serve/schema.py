"""What a client may ask for: the fields of a request, checked."""

import difflib
import secrets
from typing import Annotated, Any, NoReturn

import pydantic
from pydantic import Field

from mamba_jax.errors import InputError, short
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generation.text_engine import TextRequest
from mamba_jax.serve.refusal import Refusal

# Stop strings are compared at every token and biases added at every step, so they are few.
_MOST_STOPS, _LONGEST_STOP = 16, 1000
_MOST_BIASES = 1024
_MOST_CHOICES = 128
# Ids and counts of tokens are int32 on the device.
_LARGEST_ID = _MOST_TOKENS = 2**31 - 1


def _prompts(value: Any) -> list[str | list[int]]:
    """The prompts: a text, ids, or several of either."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        _refuse_prompt(value)
    if all(isinstance(item, str) for item in value):
        return value
    prompts = [value] if all(type(item) is int for item in value) else value
    for prompt in prompts:
        if not isinstance(prompt, list) or not prompt or not all(type(token) is int for token in prompt):
            _refuse_prompt(value)
        for token in prompt:
            if not 0 <= token <= _LARGEST_ID:
                raise ValueError(f"has the token id {short(token)}, but ids are 0 to {_LARGEST_ID}")
    return [*prompts]


def _refuse_prompt(value: Any) -> NoReturn:
    raise ValueError(
        f"must be a text, a list of texts, a list of token ids, or a list of such lists, none of them empty; "
        f"got {short(value)}"
    )


def _stops(value: Any) -> tuple[str, ...]:
    """The stop strings: one, several, or none."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"must be a text or a list of texts, got {short(value)}")
    if len(stops) > _MOST_STOPS or any(len(stop) > _LONGEST_STOP for stop in stops):
        raise ValueError(f"may hold {_MOST_STOPS} texts of {_LONGEST_STOP} characters each: give fewer or shorter ones")
    return tuple(stops)


def _check_biases(value: dict[str, float] | None) -> dict[str, float] | None:
    """Refuses too many biases, and keys that are no token ids."""
    if value is not None and len(value) > _MOST_BIASES:
        raise ValueError(f"has {len(value)} biases, but {_MOST_BIASES} is the most: give fewer")
    for key in value or ():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise ValueError(f"must map token ids to numbers, but {short(key)} is no id")
    return value


class _Fields(pydantic.BaseModel):
    """Fields with the types that JSON gives them; no other field may be there."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(_Fields):
    """How a stream is sent.

    Attributes:
        include_usage: whether a last chunk says how many tokens there were.
    """

    include_usage: bool | None = None


class CompletionRequest(_Fields):
    """The body of a request for completions; null stands for the default.

    Attributes:
        model: the name that the server gives its model.
        prompt: a text, a list of texts, a list of token ids, or a list of such lists.
        max_tokens: most tokens to add; 16 if not given.
        temperature: see `SamplingConfig`, as for the fields up to `logit_bias`.
        top_p: see there.
        top_k: see there; no field of OpenAI's.
        min_p: see there; no field of OpenAI's.
        repetition_penalty: see there; no field of OpenAI's.
        presence_penalty: see there.
        frequency_penalty: see there.
        logit_bias: a bias for token ids.
        n: continuations of each prompt; the seed of each is one more than that of the one before.
        best_of: `n`, or nothing.
        seed: what is random; none draws one.
        stop: strings that end a text.
        stream: whether the text is sent as it comes.
        stream_options: how.
        logprobs: 0 for the log-probabilities of the tokens that were drawn.
        echo: whether the prompt stands in front of the text.
        user: not looked at.
    """

    model: str
    prompt: Annotated[Any, pydantic.AfterValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, pydantic.AfterValidator(_check_biases)] = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    best_of: int | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    stop: Annotated[Any, pydantic.BeforeValidator(_stops)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: int | None = None
    echo: bool | None = None
    user: str | None = None

    @property
    def choices(self) -> int:
        """Continuations that are asked for."""
        return len(self.prompt) * (self.n or 1)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def texts(self) -> list[TextRequest]:
        """The continuations that are asked for, those of the first prompt first.

        Raises:
            InputError: a setting is out of its range.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
        given = {name: getattr(self, name) for name in (*names, "frequency_penalty")}
        settings = {name: value for name, value in given.items() if value is not None}
        biases = tuple((int(key), bias) for key, bias in (self.logit_bias or {}).items())
        sampling = SamplingConfig(**settings, logit_bias=biases)
        seed = secrets.randbits(32) if self.seed is None else self.seed
        prompts = [prompt for prompt in self.prompt for _ in range(self.n or 1)]
        return [
            TextRequest(
                prompt=prompt,
                num_tokens=self.max_tokens or 16,
                sampling=sampling,
                seed=(seed + index) % 2**32,
                stop=self.stop,
            )
            for index, prompt in enumerate(prompts)
        ]


def parse(body: bytes) -> CompletionRequest:
    """Reads the body of a request for completions.

    Raises:
        Refusal: it is no JSON, or a field is missing, unknown or wrong.
    """
    try:
        asked = CompletionRequest.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise _refusal(error) from None
    if asked.logprobs not in (None, 0):
        raise Refusal(
            400,
            f"logprobs is {asked.logprobs}, but likely tokens that were not drawn are not told: give 0, for the "
            "log-probabilities of those that were",
            param="logprobs",
        )
    if asked.logprobs is not None and asked.echo:
        raise Refusal(400, "the prompt's log-probabilities are not told: leave out echo or logprobs", param="echo")
    if asked.best_of not in (None, asked.n or 1):
        raise Refusal(400, f"best_of is {short(asked.best_of)}, but only n is offered: leave it out", param="best_of")
    if asked.stream_options is not None and not asked.stream:
        raise Refusal(400, "stream_options are given, but no stream is asked for: set stream", param="stream_options")
    return asked


def refused_input(error: InputError) -> Refusal:
    """The refusal of what cannot be continued; the field is the one that the message names, if any."""
    named = [name for name in CompletionRequest.model_fields if name in str(error).split()]
    return Refusal(400, str(error), param=named[0] if named else None)


def _refusal(error: pydantic.ValidationError) -> Refusal:
    """The first thing that is wrong with a body, in one line."""
    first = error.errors(include_url=False)[0]
    kind, place = first["type"], [str(part) for part in first["loc"]]
    name = ".".join(place[:2] if place[:1] == ["stream_options"] else place[:1])
    if kind == "json_invalid":
        return Refusal(400, f"the body cannot be read ({first['msg']}): send JSON", code="invalid_json")
    if not place:
        return Refusal(400, f"the body must be a JSON object, got {short(first['input'])}", code="invalid_json")
    if kind == "extra_forbidden":
        fields = (StreamOptions if "." in name else CompletionRequest).model_fields
        close = difflib.get_close_matches(place[-1], fields, n=1)
        advice = f"did you mean {close[0]!r}?" if close else "leave it out"
        return Refusal(400, f"there is no field {short(name)}; {advice}", param=short(name).strip("'\""))
    if kind == "missing":
        return Refusal(400, f"the field {name!r} is missing: give it", param=name)
    cause = first.get("ctx", {}).get("error")
    if cause is not None:
        return Refusal(400, f"{name} {cause}", param=name)
    problem = first["msg"][:1].lower() + first["msg"][1:]
    return Refusal(400, f"{name}: {problem}, got {short(first['input'])}", param=name)
