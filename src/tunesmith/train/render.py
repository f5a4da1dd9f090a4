"""Pages that need nothing but themselves: one stylesheet, one script, and numbers as people read them."""

import base64
import hashlib
import math
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).parent


def number(value: float) -> str:
    """A whole number with separators, or a measured one with three or four significant digits."""
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if 0 < size < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0}f}"


def percent(value: float) -> str:
    """`value` is in percent already: 0.31 is "0.31 %"."""
    return f"{value:.2f} %" if value >= 0.01 or value == 0 else f"{value:.1g} %"


def size(count: float) -> str:
    """Bytes as B, kB, MB or GB (powers of 1,000)."""
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1)):
        if count < 1000:
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def method_label(method: str | dict) -> str:
    """`lora (rank 8, alpha 16)` for a method as a recipe writes it, `lora (rank 8) + ssf` for parts of one."""
    if isinstance(method, str):
        return method
    fields = [f"{key} {_plain(value)}" for key, value in method.items() if key not in ("method", "parts") and value is not None]
    name = " + ".join(map(method_label, method.get("parts") or ())) or str(method.get("method", "?"))
    return name + (f" ({', '.join(fields)})" if fields else "")


def model_name(model: str) -> str:
    """A hub id or a known name as it is, of a local folder the last part."""
    return Path(model).name if Path(model).is_absolute() or model.startswith(".") else model


def _plain(value) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list | tuple):
        words = [_plain(v) for v in value]
        return ", ".join(words) if len(words) <= 12 else f"{len(words):,}: {', '.join(words[:12])}, …"
    return str(value)


def flat(values: dict, prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as rows of a table: `{"train": {"rows": 5}}` is `[("train rows", "5")]`."""
    rows = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        rows += flat(value, name + " ") if isinstance(value, dict) else [(name, _plain(value))]
    return rows


@cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number, "percent": percent, "size": size, "duration": duration, "flat": flat, "model_name": model_name,
    }  # fmt: skip
    script = (HERE / "page.js").read_text(encoding="utf-8")
    # The browser runs this one script and nothing else, whatever text the user's data holds.
    environment.globals |= {
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "style": Markup((HERE / "page.css").read_text(encoding="utf-8")),
    }
    return environment


def render(template: Path, **values) -> str:
    """The HTML of `template`, which may extend or import the templates beside this file."""
    return _environment(template.parent).get_template(template.name).render(values)
