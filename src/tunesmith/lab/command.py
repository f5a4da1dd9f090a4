"""`tunesmith lab`: experiments with arithmetic."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import TunesmithError

app = typer.Typer(help="Experiments with arithmetic.", no_args_is_help=True)


@app.callback()
def lab():
    """Experiments with arithmetic."""


@app.command()
def fp4(
    output: Annotated[Path, typer.Option(help="Folder of the page and the finished runs; a killed sweep goes on from it.")] = Path("runs/fp4"),
    grid: Annotated[str, typer.Option(help="small: each technique alone and together; full: all crossed with formats and blocks.")] = "small",
    tasks: Annotated[str | None, typer.Option(help="Of regression, classification, diffusion and language; default: all whose data is here.")] = None,
    seeds: Annotated[str, typer.Option(help="Once per seed, e.g. 0,1,2.")] = "0,1,2",
    share: Annotated[float, typer.Option(min=0.01, help="Of the tasks' usual steps.")] = 1.0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once; default: one for each core.")] = os.cpu_count() or 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")] = False,
):
    """Train small models with products in simulated FP4: what each technique loses, against what it costs.

    \b
    Example: tunesmith lab fp4 --tasks regression,classification --seeds 0 --share 0.1
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from . import sweep as sweeps
    from .tasks import TASKS, shakespeare

    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise TunesmithError(f"--seeds {seeds}: seeds are whole numbers separated by commas, such as 0,1,2") from None
    configs, names = sweeps.grid(grid), list(TASKS) if tasks is None else [task.strip() for task in tasks.split(",") if task.strip()]
    if tasks is None:
        try:
            shakespeare()
        except TunesmithError as missing:
            names.remove("language")
            typer.echo(f"language is left out: {missing}", err=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), disable=quiet or as_json) as bar:
        line = bar.add_task("", total=None)
        result = sweeps.sweep(output, configs, names, numbers, share, jobs, lambda done, total, text: bar.update(line, completed=done, total=total, description=text))
    if as_json:
        return typer.echo(json.dumps(result, indent=2))
    if not quiet:
        for row in sorted(result["rows"], key=lambda row: row["gap"])[:10]:
            typer.echo(f"{100 * row['gap']:8.2f} % lost  {100 * row['overhead']:6.1f} % overhead  {row['name']}")
        typer.echo(f"open {output / 'fp4.html'}")
