"""Reading data files: their encoding, their shape, and what is wrong with them, by line."""

import csv
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable

from ..errors import TunesmithError

PickSplit = Callable[[list[str]], str]
_BOMS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}


def decode(content: bytes, name: str) -> str:
    text = _decode(content, name)
    if not text.strip():
        raise TunesmithError(f"{name} is empty")
    return text


def _decode(content: bytes, name: str) -> str:
    """Text of a file: a byte-order mark decides; else UTF-8; else, if no line is non-ASCII UTF-8, cp1252 or latin-1.

    A guess is told as a warning. A file with both UTF-8 lines and lines that are not is refused with the line number.
    """
    for bom, encoding in _BOMS.items():
        if content.startswith(bom):
            return content.decode(encoding, errors="replace")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        pass
    utf8 = other = 0
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            if not line.decode("utf-8").isascii():
                utf8 = utf8 or number
        except UnicodeDecodeError:
            other = other or number
    if utf8:
        raise TunesmithError(f"{name} mixes encodings: line {utf8} is UTF-8 and line {other} is not; "
                             "save the file as UTF-8")
    try:
        text, encoding = content.decode("cp1252"), "cp1252 (Windows)"
    except UnicodeDecodeError:
        text, encoding = content.decode("latin-1"), "latin-1"
    warnings.warn(f"{name} is not UTF-8 (line {other}); it was read as {encoding}", stacklevel=2)
    return text


def _dataset(columns: dict[str, list]):
    from datasets import Dataset

    return Dataset.from_dict({name: _uniform(values) for name, values in columns.items()})


def _uniform(values: list) -> list:
    """Scalars of several types as text, since a column has one type; None stays None."""
    kinds = {type(v) for v in values if v is not None}
    if len(kinds) < 2 or kinds <= {int, float} or not kinds <= {str, int, float, bool}:
        return values
    return [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]


def _from_rows(rows: list[dict], name: str, where: str):
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise TunesmithError(f"{name}, {where} {number}: a row is an object such as {{\"text\": …}}, "
                                 f"not {json.dumps(row, ensure_ascii=False)[:40]}")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    try:
        return _dataset({key: [row.get(key) for row in rows] for key in keys})
    except Exception as error:  # noqa: BLE001 - pyarrow's several complaints about values of different shapes
        raise TunesmithError(f"{name}: a column holds values of different types ({str(error).splitlines()[0]})") from error


def _csv(content: bytes, name: str, pick: PickSplit, delimiter: str | None = None):
    text = decode(content, name)
    header_line = text.lstrip("\r\n").splitlines()[0]
    if delimiter is None:
        delimiter = "," if "," in header_line else next((d for d in ";\t|" if d in header_line), ",")
    try:
        records = _records(text, name, delimiter, csv.QUOTE_MINIMAL)
    except TunesmithError:
        if delimiter != "\t":
            raise
        records = _records(text, name, delimiter, csv.QUOTE_NONE)  # tab-separated text often quotes nothing
    header = [h.strip() for h in records[0][1]]
    header = [h or ("unnamed" if i == 0 else "") for i, h in enumerate(header)]  # pandas leaves its index nameless
    for column, times in Counter(header).items():
        if times > 1:
            raise TunesmithError(f'{name}: the header has {times} columns called "{column}"')
    for line, record in records[1:]:
        if len(record) != len(header):
            hint = "; a text with a comma needs quotes" if delimiter == "," and len(record) > len(header) else ""
            raise TunesmithError(f"{name}, line {line}: {len(record)} fields, but the header has {len(header)} "
                                 f"({', '.join(header)}){hint}")
    return _dataset({column: [record[i] for _, record in records[1:]] for i, column in enumerate(header)})


def _records(text: str, name: str, delimiter: str, quoting: int) -> list[tuple[int, list[str]]]:
    """(line it begins on, fields) of every record that is not blank."""
    before = csv.field_size_limit(2**31 - 1)  # the module's default refuses texts over 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    records, line = [], 1
    try:
        for record in reader:
            if record:
                records.append((line, record))
            line = reader.line_num + 1
    except csv.Error as error:
        reason = "a quote is opened and never closed" if "unexpected end" in str(error) else str(error)
        raise TunesmithError(f"{name}, line {line}: {reason}") from error
    finally:
        csv.field_size_limit(before)
    return records


def _tsv(content: bytes, name: str, pick: PickSplit):
    return _csv(content, name, pick, "\t")


def _json_lines(content: bytes, name: str, pick: PickSplit):
    rows, lines = [], []
    for number, line in enumerate(decode(content, name).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise TunesmithError(f"{name}, line {number}: not JSON ({error})") from error
            lines.append(number)
    bad = next((n for row, n in zip(rows, lines, strict=True) if not isinstance(row, dict)), None)
    if bad:
        raise TunesmithError(f'{name}, line {bad}: a row is an object such as {{"text": …}}')
    return _from_rows(rows, name, "row")


def _json(content: bytes, name: str, pick: PickSplit):
    """A list of objects; objects by split ({"train": [...], ...}); columns ({"text": [...], ...}); or JSON lines."""
    text = decode(content, name)
    try:
        value = json.loads(text)
    except ValueError as error:
        if re.match(r"\s*\{.*\}\s*\n\s*\{", text, re.DOTALL) and "Extra data" in str(error):
            return _json_lines(content, name, pick)
        raise TunesmithError(f"{name}: not JSON ({error})") from error
    if isinstance(value, dict):
        lists = {key: rows for key, rows in value.items() if isinstance(rows, list)}
        nested = {key: rows for key, rows in lists.items() if rows and isinstance(rows[0], dict | list)}
        if len(nested) > 1 or set(nested) & _SPLITS:
            value = nested[pick(list(nested))]
        elif nested:
            value = next(iter(nested.values()))
        elif lists and len({len(rows) for rows in lists.values()}) == 1 and len(lists) == len(value):
            return _dataset(lists)
        else:
            value = [value]
    if not isinstance(value, list):
        raise TunesmithError(f"{name}: a data file is a list of objects, not {type(value).__name__}")
    return _from_rows([_pair(row) for row in value], name, "row")


_SPLITS = {"train", "training", "val", "validation", "valid", "dev", "test"}


def _pair(row):
    return {"text": row[0], "label": row[1]} if isinstance(row, list) and len(row) == 2 else row


def _parquet(content: bytes, name: str, pick: PickSplit):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    try:
        return Dataset(pq.read_table(io.BytesIO(content)))
    except (pa.ArrowException, ValueError, OSError) as error:
        raise TunesmithError(f"{name} is not a Parquet file ({str(error).splitlines()[0]})") from error


def _text(content: bytes, name: str, pick: PickSplit):
    return _dataset({"text": list(io.StringIO(decode(content, name), newline=""))})


READERS: dict[str, Callable] = {".csv": _csv, ".tsv": _tsv, ".json": _json, ".jsonl": _json_lines,
                                ".parquet": _parquet, ".txt": _text}
