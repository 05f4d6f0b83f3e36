"""Configs of data: sources of text, and how text is cut into batches."""

import dataclasses
import itertools
import re
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mamba_jax.config_base import Config, Kinds, require
from mamba_jax.data.tokenization.config import TokenizerConfig as TokenizerConfig
from mamba_jax.data.tokenization.config import TokenizerKind as TokenizerKind

if TYPE_CHECKING:
    from mamba_jax.data.batches import Task
    from mamba_jax.data.documents import DocumentReader
    from mamba_jax.data.shards import TokenDataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(Config):
    """The base of every source's config; `docs/add_a_source.md` says how to add one.

    Attributes:
        kind: name of the source in JSON; each class has one of its own, as its default.
        prepare_flag: field that names the text, and the flag of `mamba_jax.data.prepare` for it; None leaves the source
            out of that command.
    """

    prepare_flag: ClassVar[tuple[str, str] | None] = None
    kind: str

    def open(self) -> "DocumentReader | TokenDataset | Task":
        """Opens the source: documents to tokenise, a stream of token ids, or a task that makes batches itself.

        Implementations import the reader inside this method, so that configs can be used without its dependencies.

        Raises:
            InputError: there is no such source, or it is damaged.
        """
        raise NotImplementedError

    def require_present(self) -> None:
        """Makes sure that `open` will not download anything; sources that never download inherit this empty method.

        Raises:
            InputError: the data is not on this machine.
        """

    @property
    def place(self) -> str:
        """Name or folder of the data, for messages: the field `path` or `name` if there is one, else the kind."""
        return str(getattr(self, "path", None) or getattr(self, "name", None) or self.kind)


SOURCES = Kinds()


@SOURCES.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardSource(Source):
    """Token shards that `python -m mamba_jax.data.prepare` wrote.

    Attributes:
        kind: discriminator.
        path: the folder that holds `index.json`.
    """

    kind: Literal["shards"] = "shards"
    path: str

    def open(self) -> "TokenDataset":
        """The shards, open for reading."""
        from mamba_jax.data.shards import TokenDataset

        return TokenDataset(Path(self.path))


@SOURCES.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFolderSource(Source):
    """A folder of UTF-8 text files, one document a file, tokenised once into a cache before the run starts.

    Attributes:
        kind: discriminator.
        path: the folder; relative to the installed package `package` if that is given.
        package: name of an installed Python package that carries the text as data.
        pattern: glob below the folder.
        part: "all" files, or the side of the held-out split by `validation_fraction`.
        validation_fraction: share of the files (by a hash of the name), or of each if too few, that is "validation".
    """

    prepare_flag = ("path", "text")
    kind: Literal["text_folder"] = "text_folder"
    path: str
    package: str | None = None
    pattern: str = "**/*.txt"
    part: Literal["all", "train", "validation"] = "all"
    validation_fraction: float = 0.05

    def _check(self) -> None:
        self._require_fraction("validation_fraction")

    def open(self) -> "DocumentReader":
        """The files of the folder, found and not read yet."""
        from mamba_jax.data.sources.text_folder import TextFolder

        return TextFolder(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordSource(Source):
    """What sources of records share: which text of a record is taken, and which records.

    Attributes:
        text_field: the field of a JSON object, or the column of a table, that holds the text.
        template: text with fields in braces, such as "{title} {body}", in place of `text_field`.
        records: "text", all of which is learned; or "supervised", records with `prompt` and `completion`, or with chat
            `messages`, of which completions and the assistant's messages alone count in the loss.
        part: "all" text, or the side of the held-out split by `validation_fraction`.
        validation_fraction: share that is "validation": of the files by a hash of the name, if they are few the end of
            each, and of other sets the last rows.
        skip_bad: whether records without text are passed over and counted; else the first one ends the run.
        deduplicate: "exact" leaves out documents that are equal to an earlier one of the part.
    """

    text_field: str = "text"
    template: str | None = None
    records: Literal["text", "supervised"] = "text"
    part: Literal["all", "train", "validation"] = "all"
    validation_fraction: float = 0.05
    skip_bad: bool = False
    deduplicate: Literal["none", "exact"] = "none"

    def _check(self) -> None:
        self._require_fraction("validation_fraction")
        require(
            self.records == "text" or (self.text_field, self.template) == ("text", None),
            "records='supervised' reads prompt and completion, or messages: leave text_field and template out",
        )


@SOURCES.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesSource(RecordSource):
    """Files of text (one document a file), JSON lines or parquet, tokenised once into a cache before the run starts.

    Text and JSON lines may be packed by gzip or zstd: `.txt`, `.jsonl.gz`, `.txt.zst`.

    Attributes:
        kind: discriminator.
        path: a file, a folder with all files below it, or a glob.
    """

    prepare_flag = ("path", "files")
    kind: Literal["files"] = "files"
    path: str

    def open(self) -> "DocumentReader":
        """The files, found and not read yet, but for footers of tables and where packed files are cut in two."""
        from mamba_jax.data.sources.files import Files

        return Files(self)


@SOURCES.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsSource(Source):
    """A TensorFlow Datasets set prepared as array_record (reading needs no TensorFlow), tokenised once into a cache.

    Attributes:
        kind: discriminator.
        name: published name such as "lm1b" or "c4/en", or the folder of an already prepared set.
        split: split expression such as "train" or "train[:90%]".
        data_dir: where TFDS keeps prepared sets; None means its default.
        text_field: the feature that holds the text.
    """

    prepare_flag = ("name", "tfds")
    kind: Literal["tfds"] = "tfds"
    name: str
    split: str
    data_dir: str | None = None
    text_field: str = "text"

    def open(self) -> "DocumentReader":
        """The records of the split; a published set that is not prepared yet is downloaded and prepared."""
        from mamba_jax.data.sources.tfds import TfdsDocuments

        return TfdsDocuments(self)

    def require_present(self) -> None:
        """See `Source.require_present`."""
        from mamba_jax.data.sources.tfds import require_prepared

        require_prepared(self)


@SOURCES.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceSource(RecordSource):
    """A set of the Hugging Face `datasets` library, tokenised once into a cache before the run starts.

    Attributes:
        kind: discriminator.
        name: a folder that `save_to_disk` wrote, a folder of data files that the library can load, or a published name.
        subset: name of a configuration of the set.
        split: split such as "train"; with an expression such as "train[:90%]" unless it is streamed or saved to disk.
        revision: commit or tag of a published set.
        streaming: whether a set is read as it comes over the network, and not stored first.
    """

    prepare_flag = ("name", "hf")
    kind: Literal["hf_dataset"] = "hf_dataset"
    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False

    def _check(self) -> None:
        super()._check()
        require(
            not self.streaming or self.part == "all",
            f"HuggingFaceSource: part={self.part!r} needs the number of rows, which a streamed set does not tell: give "
            "another split, or leave streaming out",
        )

    def open(self) -> "DocumentReader":
        """The rows of the split; a published set that is not stored yet is downloaded unless it is streamed."""
        from mamba_jax.data.sources.hf_datasets import HuggingFaceDocuments

        return HuggingFaceDocuments(self)

    def require_present(self) -> None:
        """See `Source.require_present`."""
        require(
            Path(self.name).is_dir(),
            f"the published set {self.name!r} may have to be downloaded: give a folder with it, or other text",
        )


@SOURCES.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticSource(Source):
    """Rows of a synthetic task without end, of which the answers alone count in the loss.

    Attributes:
        kind: discriminator.
        task: which one; `mamba_jax.data.sources.synthetic` says what its rows are.
        num_ids: V, ids that rows are made of, 0 .. V - 1.
        items: M, tokens to copy, or pairs of key and value to recall.
        power: of the distances between pairs and queries: near 0 most are short, 1 makes all equally likely.
    """

    kind: Literal["synthetic"] = "synthetic"
    task: Literal["induction_heads", "selective_copying", "associative_recall"]
    num_ids: int
    items: int = 1
    power: float = 0.01

    def _check(self) -> None:
        self._require_positive("items", "power")
        require(self.num_ids >= 4, f"SyntheticSource.num_ids must be at least 4, got {self.num_ids}")

    def open(self) -> "Task":
        """The task."""
        from mamba_jax.data.sources.synthetic import SyntheticTask

        return SyntheticTask(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixturePart(Config):
    """A source of a mixture, and how much is taken of it.

    Attributes:
        name: name in metrics and reports, of letters, digits, dots, dashes and underscores.
        source: the text.
        weight: share of the windows, and so of the tokens, relative to the other parts; with a schedule, at step 0.
        schedule: weights later on, as pairs (step, weight) whose steps rise from 1 on; the last weight stays.
    """

    name: str
    source: Annotated[Source, SOURCES]
    weight: float = 1.0
    schedule: tuple[tuple[int, float], ...] = ()

    def _check(self) -> None:
        """Refuses names that metrics cannot have, negative weights, and steps that do not rise."""
        require(
            re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", self.name) is not None,
            f"MixturePart.name must have 1 to 64 letters, digits, dots, dashes or underscores, got {self.name!r}",
        )
        for step, weight in ((0, self.weight), *self.schedule):
            require(
                weight >= 0,
                f"the weight of {self.name!r} at step {step} must not be negative, got {weight}",
            )
        for before, step in itertools.pairwise((0, *(step for step, _ in self.schedule))):
            require(
                before < step,
                f"the steps in the schedule of {self.name!r} must rise from 1 on, got {step} behind {before}",
            )

    def weight_at(self, step: int) -> Fraction:
        """The exact weight at a step: linear between the steps of the schedule, the last one from there on."""
        points = [(at, Fraction(repr(weight))) for at, weight in ((0, self.weight), *self.schedule)]
        for (start, first), (end, last) in itertools.pairwise(points):
            if step < end:
                return first + (last - first) * Fraction(step - start, end - start)
        return points[-1][1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureSource(Source):
    """Several sources at once, each with a share of the windows; see `mamba_jax.data.mixture.Draws`.

    As held-out text, every part is measured apart, and the mean by the weights stands for the whole.

    Attributes:
        kind: discriminator.
        parts: the sources, of one tokenizer.
    """

    kind: Literal["mixture"] = "mixture"
    parts: tuple[MixturePart, ...]

    def _check(self) -> None:
        """Refuses mixtures without parts or with equal names, and weights that sum to 0 at a step of a schedule."""
        require(len(self.parts) > 0, "MixtureSource.parts is empty: give at least one MixturePart")
        names = [part.name for part in self.parts]
        twice = next((name for name in names if names.count(name) > 1), None)
        require(twice is None, f"MixtureSource.parts: two are called {twice!r}; names must differ")
        for step in sorted({0, *(step for part in self.parts for step, _ in part.schedule)}):
            require(
                any(part.weight_at(step) > 0 for part in self.parts),
                f"the weights of {', '.join(map(repr, names))} sum to 0 at step {step}: make one positive",
            )

    def require_present(self) -> None:
        """See `Source.require_present`."""
        for part in self.parts:
            part.source.require_present()

    @property
    def place(self) -> str:
        """See `Source.place`."""
        return ", ".join(part.source.place for part in self.parts)


SOURCES_AND_MIXTURES = Kinds(SOURCES, MixtureSource)

Documents = Literal["packed", "concatenated"]
Order = Literal["shuffled", "streams"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Which text, how it is cut, and how large a batch is.

    Attributes:
        train: source of training text.
        validation: source of held-out text; None disables evaluation during training.
        tokenizer: must agree with the one that made a `ShardSource`.
        seq_len: L, tokens of a training sequence.
        global_batch: B, sequences of a batch over all hosts and devices, before accumulation splits it.
        documents: "packed" marks documents by segment ids and resets the state between them; "concatenated" lets the
            state run on across the end-of-document token, as the published models were trained.
        order: "shuffled" draws windows of seq_len tokens at random; "streams" reads the text in order, as global_batch
            parallel streams, and the recurrent state of each is carried from one step to the next.
        cache_dir: where documents are tokenised to.
        prefetch: batches prepared ahead by background threads.
    """

    train: Annotated[Source, SOURCES_AND_MIXTURES]
    validation: Annotated[Source | None, SOURCES_AND_MIXTURES] = None
    tokenizer: TokenizerConfig = TokenizerConfig()
    seq_len: int
    global_batch: int
    documents: Documents = "packed"
    order: Order = "shuffled"
    cache_dir: str = "runs/data_cache"
    prefetch: int = 2

    def _check(self) -> None:
        """Refuses sizes that are not positive, and mixtures where their order or schedule means nothing."""
        self._require_positive("seq_len", "global_batch", "prefetch")
        if isinstance(self.train, MixtureSource):
            require(
                self.order == "shuffled",
                "data.order='streams' goes through one text in order, and a mixture takes turns: set data.order to "
                "'shuffled'",
            )
        if isinstance(self.validation, MixtureSource):
            scheduled = next((part.name for part in self.validation.parts if part.schedule), None)
            require(
                scheduled is None,
                f"data.validation: {scheduled!r} has a schedule, and held-out text has none: leave it out",
            )
