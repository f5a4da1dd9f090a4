"""A training run as one checked YAML file; `key=value` on the command line overrides any key of it."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import TunesmithError, nearest

Positive = Annotated[int, Field(ge=1)]


class Recipe(BaseModel):
    """Everything that decides a run. Two runs of one recipe on one machine end in the same weights."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    model: str = Field(description="smollm2-135m, minilm, a hub id or a local folder")
    method: str | dict[str, Any] = Field("lora", description="a method's name, or a mapping {method: lora, rank: 16, targets: all-linear}")
    data: str = Field(description="training data: .csv .tsv .json .jsonl .parquet, or a data set's name")
    eval: str | None = Field(None, description="data that chooses the best checkpoint; default: a part held out of `data`")
    test: str | None = Field(None, description="data scored once, at the end, with the kept adapter")
    task: Literal["classification", "sft", "choice", "math", "lm"] | None = Field(None, description="guessed from the columns when absent")
    columns: dict[str, str] = Field({}, description="role: column, e.g. {text: utterance, label: intent}; guessed when obvious. {task: desk} says which task a row is of, for methods that route by task")
    task_options: dict[str, Any] = Field({}, description="of the task, e.g. {prompt: alpaca} for sft, choice and math")
    split: str = Field("train", description="split of a hub data set to train on")
    eval_split: str = Field("test", description="split of a hub data set to evaluate and test on")
    holdout: float = Field(0.1, ge=0, lt=1, description="share of `data` held out for evaluation when `eval` is absent; 0: none")
    limit: Positive | None = Field(None, description="train on so many rows, evenly spread over the data")
    per_label: Positive | None = Field(None, description="classification: train on so many rows of each label, drawn with the seed, the evaluation data apart")
    eval_limit: Positive | None = Field(None, description="evaluate on so many rows, evenly spread over the data")
    baseline: bool = Field(False, description="also evaluate the untouched model, before training")

    epochs: Positive = 3
    max_steps: Positive | None = Field(None, description="stop after so many optimiser steps")
    batch_size: Positive = 16
    accumulate: Positive = Field(1, description="batches per optimiser step")
    max_length: Annotated[int, Field(ge=2)] = Field(512, description="tokens per example; longer ones are cut")
    calibration_batches: Positive = Field(8, description="batches whose gradient a method starts from, if it does (init: gradient)")
    packing: bool = Field(False, description="sft: several examples per row, each seeing only itself")

    selection: str | dict[str, Any] | None = Field(None, description="which layers train at each step: ist (by importance), rst (at random), or a mapping {selection: ist, update: 0.25}; default: all")
    prune: str | dict[str, Any] | None = Field(None, description="cut heads, channels, adapters and ranks that a short first stage finds useless: light-peft, or a mapping {prune: light-peft, heads: 0.4, channels: 0.4, steps: 200}")
    optimizer: str | dict[str, Any] = Field("adamw", description="adamw, galore or natural-galore (full matrices, low-rank optimiser state), or a mapping such as {optimizer: galore, rank: 64}")
    lr: float | None = Field(None, gt=0, description="peak learning rate; default: the method's own")
    head_lr: float | None = Field(None, gt=0, description="peak learning rate of a new classification head; default: ten times lr, at most 0.01")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient; null: no clipping")
    warmup: float = Field(0.06, ge=0, lt=1, description="share of the steps in which the rate rises linearly")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"

    seed: int = Field(0, ge=0, lt=2**32)
    dtype: Literal["float32", "bfloat16"] | None = Field(None, description="of the base model; default: float32 on CPU, bfloat16 on GPU")
    quantize: str | dict[str, Any] | None = Field(None, description="store the base's weights in few bits: nf4, int8, int4, int3, int2, mxfp4, nvfp4, or a mapping such as {format: nf4, double_quant: true}")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    gradient_checkpointing: bool = False

    log_every: Positive = 10
    eval_every: Positive | None = Field(None, description="optimiser steps between evaluations; default: once per epoch")
    eval_batch_size: Positive = 32
    max_new_tokens: Positive | None = Field(None, description="longest answer generated in evaluation; default: the task's own")
    early_stop: Positive | None = Field(None, description="stop after so many evaluations without improvement")
    checkpoint_every: Positive | None = Field(None, description="optimiser steps between checkpoints; default: once a minute")
    output: str | None = Field(None, description="run folder; default: runs/<model>-<method>-<task>")


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, as everyone who writes a learning rate means it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)

Where = dict[tuple, str]
"""Path of a key in the recipe → the words that say where it was written (`r.yaml, line 3` or `lr=x`)."""


def _value(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise TunesmithError(f"{where}: the value is not YAML ({str(error).splitlines()[0]})") from error


def _lines(node: yaml.Node | None, file: str, path: tuple = ()) -> Where:
    found = {path: f"{file}, line {node.start_mark.line + 1}"} if node else {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, key.value)
            if inner in found:
                raise TunesmithError(f"{file}, line {key.start_mark.line + 1}: the key {key.value!r} is there twice")
            found |= _lines(value, file, inner) | {inner: f"{file}, line {key.start_mark.line + 1}"}
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            found |= _lines(value, file, (*path, i))
    return found


def read_methods(file: str | Path) -> list[str | dict]:
    """The list of methods in a YAML file: names, and mappings as a recipe has them."""
    values, _ = _read(file)
    if not isinstance(values, list) or not all(isinstance(each, str | dict) for each in values):
        raise TunesmithError(f"{file}: methods are a list, each a name or a mapping such as `- {{method: lora, rank: 4}}`")
    return values


def read_yaml(file: str | Path) -> tuple[dict, Where]:
    """The mapping in a YAML file and the line of each of its keys."""
    values, node = _read(file)
    if not isinstance(values, dict):
        raise TunesmithError(f"{file}: a recipe is a mapping of keys to values, such as `model: minilm`")
    return values, _lines(node, str(file))


def _read(file: str | Path) -> tuple[Any, yaml.Node | None]:
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        node = yaml.compose(text, _Loader)
        values = yaml.load(text, _Loader) if node else {}  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise TunesmithError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TunesmithError(f"{file} is not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise TunesmithError(f"{file}, line {mark.line + 1 if mark else 1}: not YAML ({error.problem or error.context})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TunesmithError(f"{file}: not YAML ({str(error).splitlines()[0]})") from error
    return values, node


def _override(values: dict, where: Where, text: str) -> None:
    """Apply `a.b=value` to nested mappings; `method.rank=8` on `method: lora` opens the name into a mapping."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise TunesmithError(f"{text!r} is not key=value (for example lr=1e-3 or method.rank=16)")
    path = tuple(key.split("."))
    here = values
    for depth, part in enumerate(path[:-1]):
        inner = here.setdefault(part, Recipe.model_fields["method"].default if path[0] == "method" else {})
        if depth == 0 and part == "method" and isinstance(inner, str):
            inner = here[part] = {"method": inner}
        if not isinstance(inner, dict):
            raise TunesmithError(f"{text}: {'.'.join(path[: depth + 1])!r} holds {inner!r}, which has no key {path[depth + 1]!r}")
        here = inner
    here[path[-1]] = _value(value, text)
    where[path] = text


def _sentence(error: dict, where: Where) -> str:
    """One pydantic error as a clause: where it stands, what is wrong, what would be right."""
    path = tuple(error["loc"])
    written = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in where), ())
    name = ".".join(str(part) for part in written or path[:1])
    place = f"{where[written]}: " if where.get(written) else ""
    if error["type"] == "extra_forbidden":
        return f"{place}unknown key {name!r}{nearest(name, Recipe.model_fields) or ' (`tunesmith schema` lists all keys)'}"
    if error["type"] == "missing":
        return f"{name!r} is missing ({Recipe.model_fields[name].description}); put it in the recipe, or say {name}=... on the command line"
    given = repr(error["input"])
    message = error["msg"].replace("Input should be", "should be").replace("Field required", "is required")
    return f"{place}{name} {message}, not {given if len(given) <= 60 else given[:57] + '...'}"


def check(values: dict, where: Where | None = None) -> Recipe:
    """`values` as a Recipe whose method exists; raises `TunesmithError` naming key, place and what would be right."""
    where = where or {}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        seen: dict[tuple, str] = {}
        for each in error.errors():
            seen.setdefault(tuple(each["loc"])[:1], _sentence(each, where))
        raise TunesmithError("; ".join(seen.values())) from error
    from .. import methods
    from ..optim.build import parse as optimizer
    from ..quantize import formats
    from ..schedule import ist, light_peft

    for key, parse in (("quantize", formats.parse), ("selection", ist.parse), ("prune", light_peft.parse_prune), ("optimizer", optimizer)):
        try:
            if (value := getattr(recipe, key)) is not None:
                parse(value)
        except TunesmithError as error:
            raise TunesmithError(f"{where[(key,)]}: {error}" if (key,) in where else str(error)) from error
    try:
        methods.parse(recipe.method)
    except TunesmithError as error:
        keys = recipe.method if isinstance(recipe.method, dict) else ()
        found = {key: re.search(rf"'{re.escape(str(key))}'|\b{re.escape(str(key))}=", str(error)) for key in keys if ("method", key) in where}
        named = sorted((hit.start(), key) for key, hit in found.items() if hit)
        path = ("method", named[0][1]) if named else ("method",)
        raise TunesmithError(f"{where[path]}: {error}" if path in where else str(error)) from error
    return recipe


def load(file: str | Path | None = None, overrides: list[str] = (), flags: dict[str, Any] | None = None) -> Recipe:
    """A recipe from a YAML file (or none), command line `flags` (None: not given) and `key=value` overrides, later ones winning.

    Raises `TunesmithError` with the line of the file, or the override, that is wrong.
    """
    values, where = read_yaml(file) if file else ({}, {})
    for key, value in (flags or {}).items():
        if value is not None:
            values[key] = value
            where = {path: place for path, place in where.items() if path[:1] != (key,)} | {(key,): f"--{key}"}
    for text in overrides:
        _override(values, where, text)
    return check(values, where)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that `load` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, with every method's own fields, for editors that complete YAML."""
    from ..methods import registry

    schema = Recipe.model_json_schema()
    schema |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "tunesmith recipe"}
    choices: list[dict] = [{"enum": sorted(registry)}]
    for name, config in sorted(registry.items()):
        one = config.model_json_schema()
        schema.setdefault("$defs", {}).update(one.pop("$defs", {}))
        one["properties"] = {"method": {"const": name}, **one["properties"]}
        choices.append(one | {"required": ["method", *one.get("required", [])], "title": config.title})
    schema["properties"]["method"] = {"description": Recipe.model_fields["method"].description, "default": "lora", "anyOf": choices}
    return schema
