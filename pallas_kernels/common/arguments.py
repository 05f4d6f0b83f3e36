"""What an op takes and returns, declared once: dataclasses whose fields say by letters what dimensions an array has.

A call's arguments travel from the public function to the kernels as one object. Argument checks, sharded calls, tests
and benchmarks read the same declarations. Letters are those of `pallas_kernels.common.array_types`.

Example:
    @arguments("moving_average")
    class AverageArguments(Arguments):
        x: Leaf = array("BLE")
        rate: Leaf = array("E")
        initial_state: Leaf | None = array("BE", optional=True)

    @result
    class AverageOutput:
        y: Leaf = array("BLE")
        final_state: Leaf = array("BE")
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, dataclass_transform

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Size

DType = Literal["real", "complex", "weight", "integer"]


def array(*letters: str, optional: bool = False, dtype: DType = "real", complex_with: str | None = None) -> Any:
    """An array among an op's arguments or results.

    Args:
        *letters: the dimensions it may have; different numbers of them tell layouts apart.
        optional: None stands for its absence.
        dtype: "real" floating, "complex" for real or complex floating, "weight" for real floating or int8, or
            "integer", which has no derivative.
        complex_with: it may be complex where this other argument is.
    """
    metadata = {"letters": letters, "optional": optional, "dtype": dtype, "complex_with": complex_with}
    return dataclasses.field(metadata=metadata, default=None) if optional else dataclasses.field(metadata=metadata)


def option(default: Any, *, choices: tuple[Any, ...]) -> Any:
    """A static argument that is one of `choices`."""
    return dataclasses.field(default=default, metadata={"static": True, "choices": choices})


def interval(default: tuple[float, float]) -> Any:
    """A static argument that is a least and a greatest value, neither negative."""
    return dataclasses.field(default=default, metadata={"static": True, "is_interval": True})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(array, option, interval))
def arguments(op: str) -> Callable[[type], type]:
    """Class decorator: makes the class a frozen dataclass and a pytree that declares the arguments of the op."""

    def decorate(cls: type) -> type:
        setattr(cls, "op", op)  # noqa: B010  a class variable of `Arguments`, which types of `type` do not know
        return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))

    return decorate


@dataclass_transform(frozen_default=True, field_specifiers=(array,))
def result[Output](cls: type[Output]) -> type[Output]:
    """Class decorator: makes the class a frozen dataclass and a pytree that declares the result of an op."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments of one call: arrays, of which the first declares the sizes that others follow, and options.

    Attributes:
        op: name of the op.
        derived: by letter, which other letter's size it has, and how much more.
    """

    op: ClassVar[str]
    derived: ClassVar[Mapping[str, tuple[str, int]]] = {}

    @classmethod
    def of[T](cls: type[T], **given: Any) -> T:
        """The arguments of a call, whatever becomes an array made one, once they are within the declarations.

        Raises:
            ValueError: a value is not an array, a shape or dtype is outside the declarations, or an option is unknown.
        """
        declared = fields_of(cls)
        arrays = {
            name: _as_array(cls, name, given[name])
            for name, field in declared.items()
            if given.get(name) is not None or not field.metadata["optional"]
        }
        intervals = {
            field.name: _as_interval(cls, field.name, given[field.name])
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
            if "is_interval" in field.metadata and field.name in given
        }
        checked: Any = cls(**(given | arrays | intervals))
        checked._check_shapes()
        checked._check_dtypes()
        checked._check_options()
        return checked

    def arrays(self) -> dict[str, jax.Array]:
        """The arrays that were given, by name."""
        return {name: value for name in fields_of(type(self)) if (value := getattr(self, name)) is not None}

    def letters(self) -> dict[str, str]:
        """Letters of the dimensions of every array that was given."""
        return {name: letters_of(type(self), name, value) for name, value in self.arrays().items()}

    def operands[T](self: T) -> tuple[T, dict[str, jax.Array]]:
        """The arguments without their integer arrays, and those: what has derivatives and what has none."""
        arguments: Any = self
        names = [name for name, field in fields_of(type(self)).items() if field.metadata["dtype"] == "integer"]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return dataclasses.replace(arguments, **dict.fromkeys(names)), given

    def _check_shapes(self) -> None:
        """Raises ValueError for a shape that no declared layout allows with the sizes of the arrays before it.

        The first array with a letter settles the letter's size; G may differ from array to array, see `_check_groups`.
        """
        sizes: dict[str, Size] = {}
        for name, value in self.arrays().items():
            allowed = fields_of(type(self))[name].metadata["letters"]
            found = next((letters for letters in allowed if _fits(letters, value.shape, sizes)), None)
            if found is None:
                raise ValueError(f"{self.op}: {name} has shape {value.shape}, expected {_expected(allowed, sizes)}")
            sizes |= {letter: size for letter, size in zip(found, value.shape, strict=True) if letter != "G"}
            self._check_groups(name, found, value.shape, sizes)
            sizes |= {letter: sizes[of] + more for letter, (of, more) in self.derived.items() if of in sizes}

    def _check_groups(self, name: str, letters: str, shape: tuple[Size, ...], sizes: dict[str, Size]) -> None:
        """Groups divide the channels, or heads; an array of one group serves all, others have equally many."""
        if "G" not in letters:
            return
        groups, members = shape[letters.index("G")], members_of_groups(sizes)
        if sizes[members] % groups:
            raise ValueError(f"{self.op}: {name} has {groups} groups, which do not divide {members}={sizes[members]}")
        if groups > 1 and sizes.setdefault("G", groups) != groups:
            raise ValueError(f"{self.op}: {name} has {groups} groups, another array has {sizes['G']}: make them equal")

    def _check_dtypes(self) -> None:
        """Raises ValueError unless integer arrays are integer, and all others floating.

        Complex arrays pass only where they are declared complex, or follow an argument that is complex in this call.
        """
        for name, value in self.arrays().items():
            metadata = fields_of(type(self))[name].metadata
            companion = metadata["complex_with"]
            may_be_complex = metadata["dtype"] == "complex" or (
                companion is not None and jnp.issubdtype(getattr(self, companion).dtype, jnp.complexfloating)
            )
            is_complex = jnp.issubdtype(value.dtype, jnp.complexfloating)
            if metadata["dtype"] == "integer":
                fits, expected = jnp.issubdtype(value.dtype, jnp.integer), "an integer dtype"
            elif metadata["dtype"] == "weight":
                fits = jnp.issubdtype(value.dtype, jnp.floating) or value.dtype == jnp.int8
                expected = "a real floating dtype or int8"
            else:
                fits = jnp.issubdtype(value.dtype, jnp.floating) or (is_complex and may_be_complex)
                takes_complex = metadata["dtype"] == "complex" or companion is not None
                expected = "a floating or complex dtype" if takes_complex else "a real floating dtype"
            if not fits and is_complex and companion is not None:
                raise ValueError(
                    f"{self.op}: {name} has dtype {value.dtype} but {companion} is real; give a complex {companion} or "
                    f"a real {name}"
                )
            if not fits:
                raise ValueError(f"{self.op}: {name} has dtype {value.dtype}, expected {expected}")

    def require_one_dtype(self, first: str, *others: str) -> None:
        """Raises ValueError unless these arrays have the dtype of the first one."""
        expected = getattr(self, first).dtype
        for name in others:
            if (dtype := getattr(self, name).dtype) != expected:
                raise ValueError(f"{self.op}: {name} is {dtype} and {first} {expected}; cast them to one dtype")

    def require_scales(self, *names: str) -> None:
        """Raises ValueError unless just those of these matrices that are int8 come with a scale."""
        for name in names:
            is_int8, is_scaled = getattr(self, name).dtype == jnp.int8, getattr(self, f"{name}_scale") is not None
            if is_int8 != is_scaled:
                raise ValueError(
                    f"{self.op}: {name} is {getattr(self, name).dtype} {'with' if is_scaled else 'without'} "
                    f"{name}_scale: give it to int8 matrices and to no others"
                )

    def _check_options(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "choices" in field.metadata and value not in field.metadata["choices"]:
                known = " or ".join(map(repr, field.metadata["choices"]))
                raise ValueError(f"{self.op}: unknown {field.name} {value!r}; choose {known}")


def _as_array(cls: Any, name: str, value: Any) -> jax.Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{cls.op}: {name} is not an array but {type(value).__name__} ({reason})") from error


def _as_interval(cls: Any, name: str, value: Any) -> tuple[float, float]:
    try:
        low, high = (float(bound) for bound in value)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not 0 <= low <= high:
        raise ValueError(f"{cls.op}: {name} must be two numbers, 0 <= least <= greatest, got {value!r}")
    return low, high


def members_of_groups(letters: Iterable[str]) -> str:
    """The letter of what is divided into groups: heads if there are any among the letters, else channels."""
    return "H" if "H" in letters else "E"


def fields_of(cls: type) -> dict[str, dataclasses.Field]:
    """The arrays among the fields of an op's arguments or results, by name."""
    return {field.name: field for field in dataclasses.fields(cls) if "letters" in field.metadata}


def letters_of(cls: type, name: str, value: Any) -> str:
    """Letters of the dimensions of an array, by their number; a group for all channels is a "1"."""
    letters = next(layout for layout in fields_of(cls)[name].metadata["letters"] if len(layout) == value.ndim)
    return letters.replace("G", "1") if "G" in letters and value.shape[letters.index("G")] == 1 else letters


def _fits(letters: str, shape: tuple[Size, ...], sizes: Mapping[str, Size]) -> bool:
    """Whether a shape has these dimensions, of the sizes that are known; only a window (W) may be empty."""
    if len(letters) != len(shape):
        return False
    pairs = list(zip(letters, shape, strict=True))
    return all(
        (size != 0 or letter == "W") and (letter == "G" or sizes.get(letter, size) == size) for letter, size in pairs
    )


def _expected(allowed: tuple[str, ...], sizes: Mapping[str, Size]) -> str:
    """The layouts in letters, and in numbers as far as sizes are known."""

    def written(letters: str, names: Mapping[str, Any]) -> str:
        return f"({', '.join(str(names.get(letter, letter)) for letter in letters)}{',' * (len(letters) == 1)})"

    numbers = [written(letters, sizes) for letters in allowed]
    meaning = " or ".join(written(letters, {"W": "K - 1"}) for letters in allowed)
    return f"{meaning} = {' or '.join(numbers)}" if sizes else f"non-empty {meaning}"


@dataclasses.dataclass(frozen=True)
class OpTable:
    """An op as others see it: what it takes, and what it returns.

    Attributes:
        takes: class of its arguments.
        returns: class of its result.
    """

    takes: type[Arguments]
    returns: type

    @property
    def arguments(self) -> dict[str, tuple[str, ...]]:
        """Layouts of every array that it takes, in letters."""
        return {name: field.metadata["letters"] for name, field in fields_of(self.takes).items()}

    @property
    def outputs(self) -> dict[str, str]:
        """Layout of every array that it returns, in letters."""
        return {name: field.metadata["letters"][0] for name, field in fields_of(self.returns).items()}

    def letters(self, name: str, value: Any) -> str:
        """Letters of the dimensions of one of its arguments."""
        return letters_of(self.takes, name, value)

    def sizes(self, arrays: Mapping[str, Any]) -> dict[str, Size]:
        """The size of every letter among the dimensions of some of its arguments.

        A "1" is not a letter: `letters` writes it for G where one group serves all channels or heads, which does not
        tell how many groups there are. So G is missing if none of the arguments has several.
        """
        return {
            letter: size
            for name, array in arrays.items()
            for letter, size in zip(self.letters(name, array), array.shape, strict=True)
            if letter != "1"
        }
