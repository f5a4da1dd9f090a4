"""A space of configurations: parts of `combined`, each with one size, and the layers they sit in."""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..errors import TunesmithError, nearest
from ..methods import parse, registry
from ..train.recipe import read_yaml

SIZES = ("bottleneck", "rank", "tokens", "k", "n_frequency")  # what a method's size is called
DEFAULT = {
    "series-adapter": [0, 1, 3, 6, 12, 24, 48, 96],
    "parallel-adapter": [0, 1, 3, 6, 12, 24, 48, 96],
    "prefix-tuning": [0, 1, 3, 6, 12, 24],
    "lora": [0, 1, 2, 4, 8, 16, 32],
}

Point = tuple[int, ...]  # the number of each part's size, then a bit for each layer


class Space(BaseModel):
    """AutoPEFT's space (Zhou et al. 2024, arXiv 2301.12132), for any registered methods.

    `parts`: method → its sizes in ascending order (0: the method is left out), or a mapping with its size's name, a list, and
    further fields. `layers`: "any" (a bit for each transformer layer, shared by the parts) or "all".
    """

    model_config = ConfigDict(extra="forbid")

    parts: dict[str, list[int] | dict[str, Any]] = Field(default_factory=lambda: {name: sizes for name, sizes in DEFAULT.items() if name in registry})
    layers: Literal["any", "all"] = "any"

    def __init__(self, **fields):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            raise TunesmithError(f"search space: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None

    @field_validator("parts")
    @classmethod
    def known(cls, parts):
        for name, sizes in parts.items():
            if name not in registry:
                raise TunesmithError(f"search space: unknown method {name!r}{nearest(name, registry)}")
            size, values, fields = _sized(name, sizes)
            if sorted(set(values)) != values or min(values, default=-1) < 0 or len(values) < 2:
                raise TunesmithError(f"search space: {name} has the sizes {values}; they are two or more different whole numbers, ascending, 0 leaving it out")
            parse({"method": name, size: values[-1], **fields})
        if not parts:
            raise TunesmithError("search space: it has no part; name a method and its sizes")
        return parts

    @property
    def sizes(self) -> list[tuple[str, str, list[int], dict]]:
        """(method, its size's name, the sizes, further fields) of each part."""
        return [(name, *_sized(name, sizes)) for name, sizes in self.parts.items()]

    def choices(self, depth: int) -> list[int]:
        """How many values each coordinate of a point has, for a model of `depth` layers."""
        return [len(values) for _, _, values, _ in self.sizes] + [2] * (depth if self.layers == "any" else 0)

    def size(self, depth: int) -> int:
        """How many valid points there are."""
        every = prod(len(values) for _, _, values, _ in self.sizes) - all(0 in values for _, _, values, _ in self.sizes)
        if self.layers == "all":
            return every
        tokens = [(name, values) for name, _, values, _ in self.sizes if not _layered(name)]
        others = [values for name, _, values, _ in self.sizes if _layered(name)]
        alone = prod(len(values) for _, values in tokens) - all(0 in values for _, values in tokens) if all(0 in values for values in others) else 0
        return (every - alone) * (2**depth - 1) + alone

    def valid(self, point: Point) -> bool:
        """Whether something is on, and in some layer; prompts alone, which no layer can be without, in all."""
        on = [name for i, (name, _, values, _) in zip(point, self.sizes, strict=False) if values[i]]
        bits = point[len(self.parts) :]
        if self.layers == "all" or all(bits):
            return bool(on)
        return any(bits) and any(map(_layered, on))

    def method(self, point: Point) -> dict[str, Any]:
        """The method that a valid point stands for."""
        layers = None if self.layers == "all" or all(point[len(self.parts) :]) else [i for i, bit in enumerate(point[len(self.parts) :]) if bit]
        parts = []
        for i, (name, size, values, fields) in zip(point, self.sizes, strict=False):
            if values[i]:
                kept = {"layers": layers} if layers is not None and _layered(name) else {}
                parts.append({"method": name, size: values[i], **fields, **kept})
        return parts[0] if len(parts) == 1 else {"method": "combined", "parts": parts}

    def text(self, point: Point) -> str:
        """The point in a few words."""
        parts = [f"{name} {values[i]}" for i, (name, _, values, _) in zip(point, self.sizes, strict=False) if values[i]]
        bits = point[len(self.parts) :]
        where = "" if self.layers == "all" or all(bits) else f" in {_runs([i for i, bit in enumerate(bits) if bit])}"
        return " + ".join(parts) + where


def _layered(name: str) -> bool:
    """Whether a method can be kept to some layers; a prompt is of the text, which all of them read."""
    return "tokens" not in registry[name].works_on or registry[name].own_layers


def _sized(name: str, sizes: Sequence[int] | dict) -> tuple[str, list[int], dict]:
    fields = registry[name].model_fields
    if isinstance(sizes, dict):
        listed = [key for key, value in sizes.items() if isinstance(value, list) and all(type(each) is int for each in value) and key in fields]
        if len(listed) != 1:
            raise TunesmithError(f"search space: {name} needs one field with a list of sizes, such as {{{next((s for s in SIZES if s in fields), 'rank')}: [0, 4, 16]}}")
        return listed[0], sizes[listed[0]], {key: value for key, value in sizes.items() if key != listed[0]}
    size = next((key for key in SIZES if key in fields), None)
    if size is None:
        raise TunesmithError(f"search space: {name} has no size of its own; say which field varies, as {{field: [values]}}")
    return size, list(sizes), {}


def _runs(numbers: list[int]) -> str:
    """0, 1, 2, 5 as 0–2,5."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def load(file: str | Path | None) -> Space:
    """The space in a YAML file, or the default one. Raises `TunesmithError` for what is wrong in it."""
    return Space(**({str(key): value for key, value in read_yaml(file)[0].items()} if file else {}))
