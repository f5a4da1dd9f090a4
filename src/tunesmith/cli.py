"""The command line: each command parses, calls one function and prints. Heavy imports wait until a command needs them."""

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import TunesmithError
from .lab.command import app as lab

app = typer.Typer(
    help="Adapt pretrained models to a task with few trained parameters.",
    epilog="Start with: tunesmith train --data tickets.csv --model minilm --method lora",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(lab, name="lab")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys.", show_default=False)]


@app.command()
def methods(as_json: AsJson = False):
    """List the methods there are.

    \b
    Example: tunesmith methods
    """
    from dataclasses import asdict

    import tunesmith as ts

    rows = [asdict(info) for info in ts.methods()]
    if as_json:
        return _print_json(rows)
    _table(["method", "family", "title", "paper", "merges", "works on"],
           [[r["name"], r["family"], r["title"], r["paper"], "yes" if r["mergeable"] else "no", ", ".join(r["works_on"])] for r in rows])  # fmt: skip


@app.command()
def schema():
    """Print the JSON schema of a recipe, for editors.

    \b
    Example: tunesmith schema > recipe.schema.json
    Then begin a recipe with: # yaml-language-server: $schema=recipe.schema.json
    """
    from .train.recipe import json_schema

    _print_json(json_schema())


@app.command()
def train(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="A recipe (or a run folder) and keys that override it.", show_default=False)] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe, as the first argument may be.")] = None,
    data: Annotated[str | None, typer.Option(help="Training data: a file, or the name of a data set.")] = None,
    eval: Annotated[str | None, typer.Option(help="Evaluation data; default: a tenth of the training data.")] = None,
    test: Annotated[str | None, typer.Option(help="Data scored once, at the end.")] = None,
    model: Annotated[str | None, typer.Option(help="minilm, smollm2-135m, a hub id or a folder.")] = None,
    method: Annotated[str | None, typer.Option(help="One of `tunesmith methods`; default: lora.")] = None,
    output: Annotated[str | None, typer.Option(help="Run folder; default: runs/<model>-<method>-<task>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped run was.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")] = False,
):  # fmt: skip
    """Train an adapter and leave it in a run folder, with its metrics and a report.

    \b
    Examples:
      tunesmith train --data tickets.csv --model minilm --method lora
      tunesmith train recipe.yaml epochs=5 method.rank=16
      tunesmith train runs/minilm-lora-classification --resume
    """
    from .train import recipe as recipes

    file, overrides = _recipe_and_overrides(arguments or [], recipe)
    flags = {"data": data, "eval": eval, "test": test, "model": model, "method": method, "output": output}
    if file and file.is_dir():
        flags["output"] = output or str(file)
        file = file / "recipe.yaml"
    checked = recipes.load(file, overrides, flags)

    from .train.display import Display
    from .train.loop import run

    with Display(silent=as_json or quiet) as display:
        try:
            result = run(checked, display, resume, overwrite)
        except Interrupted:
            if display.folder:
                display.note(f"stopped; go on with: tunesmith train {display.folder} --resume")
            raise
    if not result.summary:  # another process of this run prints it
        return
    if as_json:
        _print_json({"folder": str(result.folder), **result.summary})
    elif not quiet:
        _print_summary(result)


@app.command("eval")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a model to see how it does untouched.", show_default=False)],
    data: Annotated[str, typer.Option(help="A file, or the name of a data set.", show_default=False)],
    task: Annotated[str | None, typer.Option(help="For a model: classification, sft, choice, math or lm.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="So many rows, evenly spread over the data.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    output: Annotated[Path | None, typer.Option(help="Write each prediction to this JSONL file.")] = None,
    as_json: AsJson = False,
):
    """Score a run on other data.

    \b
    Examples:
      tunesmith eval runs/minilm-lora-classification --data more_tickets.csv
      tunesmith eval smollm2-135m --data addsub_test.json --task math
    """
    from .train.predict import evaluate_on

    result = evaluate_on(target, data, task, split, limit, batch_size)
    if output:
        from .train.folder import write_rows

        write_rows(output, result.predictions)
    if as_json:
        _print_json(result.metrics)
    else:
        _table(["metric", "value"], [[name, f"{value:.4f}"] for name, value in result.metrics.items()])


@app.command()
def predict(
    run: RunFolder,
    text: Annotated[str | None, typer.Argument(help="A text, or - for one text per line of standard input.", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="A file with the task's columns, but for the answer.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write JSONL here instead of printing.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    as_json: AsJson = False,
):
    """Answer with a trained adapter.

    \b
    Examples:
      tunesmith predict runs/minilm-lora-classification "my card was stolen"
      tunesmith predict runs/minilm-lora-classification --data new.csv --output answers.jsonl
      cat lines.txt | tunesmith predict runs/minilm-lora-classification -
    """
    from .train.predict import predict_rows, predict_texts

    if (text is None) == (data is None):
        raise TunesmithError("predict takes either a text (- reads lines from standard input) or --data FILE")
    if data:
        rows = predict_rows(run, data, batch_size)
    else:
        rows = predict_texts(run, [line.rstrip("\n") for line in sys.stdin] if text == "-" else [text], batch_size)
    if output:
        from .train.folder import write_rows

        write_rows(output, rows)
        typer.echo(f"{len(rows):,} answers in {output}", err=True)
    else:
        for row in rows:
            typer.echo(json.dumps(row, ensure_ascii=False) if as_json else row["predicted"])


@app.command()
def chat(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder of a generative task, or a model.", show_default=False)],
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
):
    """Talk to a model or a trained adapter; /reset forgets the conversation, /quit ends it.

    \b
    Example: tunesmith chat runs/smollm2-135m-lora-sft
    """
    from .train.chat import chat as talk

    talk(target, system, max_new_tokens)


@app.command()
def merge(
    run: RunFolder,
    out: Out,
    quantize: Annotated[str | None, typer.Option(help="Round the merged weights to a number format, such as int4.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Also where rounding undoes much of what the adapter does.")] = False,
    as_json: AsJson = False,
):
    """Write the model with the adapter merged into its weights, as a plain Hugging Face folder.

    \b
    Example: tunesmith merge runs/minilm-lora-classification merged/
    """
    from .lifecycle.export import merge_to_folder

    result = merge_to_folder(run, out, quantize, force)
    if as_json:
        return _print_json(result)
    typer.echo(f"{out}: merged and adapted logits differ by at most {result['max_error']:.2g}, {result['mean_error']:.2g} on average (largest logit {result['largest_logit']:.3g})")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="smollm2-135m, a hub id or a folder.", show_default=False)],
    out: Out,
    format: Annotated[str, typer.Option(help="nf4, nf3, nf2, int8, int4, int3, int2, mxfp4, nvfp4, sketch4, sketch3 or sketch2.")] = "nf4",
    group_size: Annotated[str | None, typer.Option(help="Weights that share a scale: a number, or row.")] = None,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="nf: scales in 8 bits.")] = False,
    calibrate: Annotated[str | None, typer.Option(help="Data that the layers' outputs are kept for; default: round to nearest.")] = None,
    text: Annotated[str | None, typer.Option(help="Held-out data to measure the perplexity on, before and after.")] = None,
    dtype: Annotated[str, typer.Option(help="What weights are read as: float32 or bfloat16.")] = "float32",
    as_json: AsJson = False,
):
    """Write a language model with its weights in few bits, for recipes and commands to take in place of it.

    \b
    Example: tunesmith quantize smollm2-135m small/ --format int4 --text held-out.txt
    """
    from .lifecycle.quantized import quantize_to_folder

    chosen = {"format": format, "double_quant": double_quant} | ({"group_size": _group(group_size)} if group_size else {})
    found = quantize_to_folder(model, out, chosen, calibrate, text, dtype=dtype)
    if as_json:
        return _print_json(found)
    typer.echo(f"{out}: {found['layers']} layers in {found['bits_per_weight']:.2f} bits per weight; {found['total_bytes'] / 2**20:,.0f} MiB, {found['original_bytes'] / 2**20:,.0f} before")
    if text:
        typer.echo(f"perplexity {found['before']:.2f} before, {found['after']:.2f} after")


def _group(text: str) -> int | str:
    return int(text) if text.isdigit() else text


@app.command()
def export(
    run: RunFolder,
    out: Out,
    format: Annotated[str, typer.Option(help="peft or tunesmith.")] = "peft",
    as_json: AsJson = False,
):
    """Write the adapter alone, in Hugging Face peft's format or tunesmith's own.

    \b
    Example: tunesmith export runs/minilm-lora-classification adapter/ --format peft
    """
    from .lifecycle.export import export_adapter

    export_adapter(run, out, format)
    _print_json({"folder": str(out), "format": format}) if as_json else typer.echo(f"{out}: the adapter in {format} format")


@app.command()
def targets(
    model: Annotated[str, typer.Argument(help="minilm, smollm2-135m, a hub id or a folder.", show_default=False)],
    method: Annotated[str, typer.Option(help="One of `tunesmith methods`.")] = "lora",
    targets: Annotated[list[str] | None, typer.Option(help="A suffix or regular expression of module names; may be repeated.")] = None,
    as_json: AsJson = False,
):
    """Show which modules a method would adapt, and how many parameters it would train at each.

    \b
    Example: tunesmith targets smollm2-135m --method lora --targets q_proj --targets v_proj
    """
    from .train.prepare import preview

    rows = preview(model, method, targets)
    if as_json:
        return _print_json(rows)
    _table(["module", "type", "shape", "trained"], [[r["path"], r["type"], "×".join(map(str, r["shape"])), f"{r['trainable']:,}"] for r in rows], right=(3,))
    typer.echo(f"{len(rows)} modules, {sum(r['trainable'] for r in rows):,} trained parameters")


@app.command()
def compare(
    overrides: Overrides = None,
    methods: Annotated[str, typer.Option(help="Names of methods, separated by commas, or a YAML file with a list of names and mappings such as {method: lora, rank: 4}.")] = "lora,bitfit,ia3,linear-probe,full",
    recipe: Annotated[Path | None, typer.Option(help="A recipe that all runs share.")] = None,
    data: Annotated[str | None, typer.Option(help="Training data.")] = None,
    eval: Annotated[str | None, typer.Option(help="Evaluation data.")] = None,
    test: Annotated[str | None, typer.Option(help="Data scored once, at the end.")] = None,
    model: Annotated[str | None, typer.Option(help="minilm, smollm2-135m, a hub id or a folder.")] = None,
    output: Annotated[str, typer.Option(help="Folder of the table, the page and the runs.")] = "runs/compare",
    seeds: Annotated[str | None, typer.Option(help="Train each method once per seed, e.g. 0,1,2.")] = None,
    rates: Annotated[str | None, typer.Option(help="Learning rates to choose from for each method, on the evaluation data, e.g. 5e-4,2e-3 or 0.3x,1x,3x of its default.")] = None,
    trial: Annotated[list[str] | None, typer.Option(help="A recipe key that is otherwise in the runs that choose a rate, e.g. epochs=2.", metavar="KEY=VALUE")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each with its share of the cores.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")] = False,
):
    """Train several methods on one task and set accuracy against parameters, time and memory.

    \b
    Example: tunesmith compare --data tickets.csv --model minilm --methods lora,bitfit,full epochs=2
    """
    from .train import recipe as recipes

    flags = {"data": data, "eval": eval, "test": test, "model": model}
    base = recipes.load(recipe, overrides or [], flags)
    tried = recipes.load(recipe, [*(overrides or []), *(trial or [])], flags)

    from .bench.compare import compare as run_all
    from .train.display import Display

    chosen = recipes.read_methods(methods) if methods.endswith((".yaml", ".yml")) else [name.strip() for name in methods.split(",") if name.strip()]
    with Display(silent=as_json or quiet) as display:
        result = run_all(
            chosen, base, output, _numbers("seeds", seeds, int) if seeds else None, overwrite, display, _numbers("rates", rates, _rate) if rates else None, jobs,
            tried.model_dump(mode="json", exclude_unset=True) if trial else None,
        )  # fmt: skip
    if as_json:
        return _print_json(result)
    if not quiet and result["rows"]:
        rows = [[r["label"], f"{r['value']:.4f}", f"{r['trainable']:,}", f"{r['time_s']:.0f}", f"{r['peak_mb']:,.0f}"] for r in result["rows"]]
        _table(["method", result["metric"], "trained", "seconds", "peak MB"], rows, right=(1, 2, 3, 4))
        typer.echo(f"open {Path(output) / 'compare.html'}")
    for failure in result["failures"]:
        typer.echo(f"failed: {failure['label']}: {failure['reason']}", err=True)
    if result["failures"]:
        raise typer.Exit(1)


@app.command()
def search(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="A recipe, and recipe keys.", show_default=False)] = None,
    recipe: Annotated[Path | None, typer.Option(help="The recipe, if not the first argument.")] = None,
    data: Annotated[str | None, typer.Option(help="Training data.")] = None,
    eval: Annotated[str | None, typer.Option(help="Evaluation data.")] = None,
    model: Annotated[str | None, typer.Option(help="minilm, smollm2-135m, a hub id or a folder.")] = None,
    output: Annotated[str, typer.Option(help="Folder of the front, the page, the trials and the database.")] = "runs/search",
    space: Annotated[Path | None, typer.Option(help="YAML of the search space; default: adapters, prefixes and LoRA of many sizes, in any layers.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Finished trials of all workers together.")] = 60,
    startup: Annotated[int, typer.Option(min=1, help="Random trials before the guided ones.")] = 20,
    cost: Annotated[str, typer.Option(help="What is weighed against the metric: trainable, train_s or peak_mb.")] = "trainable",
    storage: Annotated[str | None, typer.Option(help="Database URL that workers share, such as postgresql+psycopg://...; default: an SQLite file in the output.")] = None,
    fidelity: Annotated[list[str] | None, typer.Option(help="A recipe key that is otherwise in the trials, e.g. limit=1000.", metavar="KEY=VALUE")] = None,
    warm_start: Annotated[Path | None, typer.Option(help="Output of an earlier search, whose front is tried first.")] = None,
    random: Annotated[bool, typer.Option("--random", help="Random search, to compare with.")] = False,
    on: Annotated[str | None, typer.Option(help="ray: spread the trials over the Ray cluster at $RAY_ADDRESS, or one started here.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="How many, on ray; default: one for each GPU, or each CPU.")] = None,
    seed: Annotated[int, typer.Option(help="Of the proposals.")] = 0,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")] = False,
):
    """Search for the modules, sizes and layers that are good and cheap on a task; run it again, anywhere, for more workers.

    \b
    Example: tunesmith search --data tickets.csv --model minilm --trials 40 epochs=2
    """
    from .train import recipe as recipes

    file, overrides = _recipe_and_overrides(arguments or [], recipe)
    flags = {"data": data, "eval": eval, "model": model}
    base = recipes.load(file, overrides, flags)
    low = recipes.load(file, [*overrides, *(fidelity or [])], flags)

    from .search.search import search as run_all
    from .search.space import load

    def tell(event):
        if not (quiet or as_json):
            if event["event"] == "note":
                return typer.echo(event["text"], err=True)
            typer.echo(f"{event['done']:4d}/{event['total']}  {event['metric']} {event['value']:.4f}  {event['cost']:,.4g}  {event['text']}", err=True)

    options = {
        "space": load(space), "trials": trials, "startup": startup, "cost": cost, "storage": storage, "warm_start": warm_start, "random": random, "seed": seed,
        "fidelity": low.model_dump(mode="json", exclude_unset=True) if fidelity else None,
    }  # fmt: skip
    if on not in (None, "ray"):
        raise TunesmithError(f"--on {on}: there is ray; without it the search runs here")
    if workers and not on:
        raise TunesmithError("--workers is for --on ray; run the command again, in another terminal or on another machine, for more workers")
    if on:
        from .search.cluster import on_ray

        found = on_ray(base, output, workers, progress=tell, **options)
    else:
        found = run_all(base, output, progress=tell, **options)
    if as_json:
        return _print_json(found)
    if not quiet:
        rows = [[r["text"], f"{r['value']:.4f}", f"{r['trainable']:,}", f"{r['train_s']:.0f}"] for r in sorted(found["trials"], key=lambda r: r[cost]) if r["front"]]
        _table(["front", found["metric"], "trained", "seconds"], rows, right=(1, 2, 3))
        typer.echo(f"open {Path(output) / 'search.html'}; recipes in {Path(output) / 'front'}")


def _rate(text: str) -> float | str:
    return f"{float(text[:-1])}x" if text.endswith("x") else float(text)


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        form = "whole numbers separated by commas, such as 0,1,2" if kind is int else "numbers separated by commas, such as 5e-4,2e-3 or 0.3x,1x,3x"
        raise TunesmithError(f"--{option} {text}: {option} are {form}") from error


@app.command()
def claims(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Names of experiments; default: all.", show_default=False)] = None,
    run: Annotated[bool, typer.Option("--run", help="Measure again, which takes minutes to an hour each.")] = False,
    folder: Annotated[Path, typer.Option(help="The experiments.")] = Path("benchmarks/claims"),
    as_json: AsJson = False,
):
    """What papers claim, and what was measured here.

    \b
    Examples:
      tunesmith claims
      tunesmith claims bone --run
    """
    from .bench import claims as experiments

    if run:
        for name in names or experiments.names(folder):
            experiments.run(folder, name, lambda row: typer.echo(f"{row['paper']}: {row['claim']}: {experiments.verdict(row)}", err=True))
    rows = experiments.results(folder, names)
    if as_json:
        return _print_json(rows)
    _table(["experiment", "claim", "paper's figure", "measured", "holds"],
           [[r["experiment"], r["claim"], r["reported"], r["summary"], experiments.verdict(r)] for r in rows])  # fmt: skip


def _recipe_and_overrides(arguments: list[str], recipe: Path | None) -> tuple[Path | None, list[str]]:
    files = [a for a in arguments if "=" not in a or Path(a).exists()]
    if recipe:
        files.append(str(recipe))
    if len(files) > 1:
        raise TunesmithError(f"one recipe at a time, not {' and '.join(files)}; other arguments are key=value")
    if files and not Path(files[0]).exists():
        raise TunesmithError(f"there is no recipe {files[0]} (other arguments are key=value, such as epochs=5)")
    return Path(files[0]) if files else None, [a for a in arguments if a not in files]


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _print_summary(result) -> None:
    summary, params = result.summary, result.summary["params"]
    for data in ("eval", "test"):
        if metrics := summary.get(data):
            typer.echo(f"{data}: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    typer.echo(
        f"{summary['method']}: {params['trainable']:,} trained parameters ({params['percent']:.2f}%), {summary['time_s']:.0f} s, "
        f"peak {summary['peak_mb']:,.0f} MB\nadapter {result.folder / 'adapter'}\nreport  {result.folder / 'report.html'}"
    )


def _table(header: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> None:
    """Columns as wide as their widest cell, so that a pipe sees whole values."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = (cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        typer.echo("  ".join(cells).rstrip())


class Interrupted(BaseException):
    """Ctrl-C, under a name that the argument parser does not take for its own."""


def _interrupt(*_):
    raise Interrupted


def main() -> None:
    """Exit codes: 0 done, 2 bad input (one line on standard error), 130 interrupted."""
    signal.signal(signal.SIGINT, _interrupt)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        app()
    except TunesmithError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted:
        sys.exit(130)
