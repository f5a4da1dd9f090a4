"""A run on the terminal: a progress bar where there is one, plain lines otherwise. Both on standard error."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Shows what `train.run` tells: `with Display() as display: run(recipe, display)`."""

    def __init__(self, silent: bool = False):
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.silent = silent
        self.bar = None
        self.folder = None  # of the run, once it has begun

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.bar:
            self.bar.stop()
            self.bar = None

    def __call__(self, event: dict) -> None:
        self.folder = event.get("folder", self.folder)
        if not self.silent:
            getattr(self, f"_{event['event']}")(event)

    def note(self, text: str) -> None:
        """Shown even when silent."""
        self.console.print(text, markup=False)

    def _note(self, event):
        self.note(event["text"])

    def _start(self, event):
        self.__exit__()
        self.note(event["summary"])
        if event["step"]:
            self.note(f"going on at step {event['step']:,} of {event['total']:,}")
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True), TextColumn("{task.fields[shown]}"),
                console=self.console,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=event["total"], completed=event["step"], shown="")
            self.bar.start()

    def _step(self, event):
        if self.bar:
            self.bar.update(self.task, completed=event["step"], shown=_numbers(event))

    def _log(self, event):
        if not self.bar:
            self.note(f"step {event['step']:>5}  epoch {event['epoch']:.2f}  {_numbers(event)}")

    def _scoring(self, event):
        if self.bar:
            self.bar.update(self.task, shown=f"evaluating {event['done']:,} of {event['rows']:,} rows")

    def _eval(self, event):
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in event["metrics"].items())
        self.note(f"step {event['step']:>5}  {metrics}" + ("  (best so far, kept)" if event["best"] else ""))

    def _end(self, event):
        self.__exit__()


def _numbers(event: dict) -> str:
    return f"loss {event['loss']:.4f}  {event['tokens_per_s']:,.0f} tokens/s  peak {event['peak_mb']:,.0f} MB"
