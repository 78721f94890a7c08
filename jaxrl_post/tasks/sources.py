"""Reading records from files, folders and the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxrl_post.errors import InputError, nearest, one_line, shown

_SUFFIXES = (".jsonl", ".json", ".parquet")


def read(
    source: str, split: str, *, subset: str | None = None, revision: str | None = None
) -> list[dict[str, Any]]:
    """All records of one split.

    Args:
      source: a ``.jsonl``, ``.json`` (an object or a list of them) or ``.parquet``
        file, taken whole; a folder with one such file per split (``train.jsonl``);
        else the id of a data set on the Hub, opened with `datasets`.
      split: name of the split. Of no meaning for a file.
      subset: configuration of the Hub's data set.
      revision: branch, tag or commit of it.

    Raises:
      InputError: a folder without the split; a broken line, with its number; a data set
        that the Hub does not have or that cannot be fetched.
    """
    if (path := _local_file(source, split)) is not None:
        with _readable(source):
            return _read_file(path)
    import datasets

    with _fetched(source, split):
        return list(
            datasets.load_dataset(source, subset, split=split, revision=revision)
        )


def stream(
    source: str, split: str, *, subset: str | None = None
) -> Callable[[], Iterator[dict[str, Any]]]:
    """What opens the records of one split, to be read one after the other.

    Args:
      source, split, subset: as for `read`, but that a ``.json`` file is read whole.

    Raises:
      InputError: as `read`, of a record when it is its turn.
    """
    path = _local_file(source, split)
    if path is not None and path.suffix not in _STREAMED:
        raise InputError(
            f"{path} cannot be streamed, only {' and '.join(_STREAMED)}; set "
            "streaming: false."
        )

    def records() -> Iterator[dict[str, Any]]:
        if path is not None:
            with _readable(source):
                yield from _STREAMED[path.suffix](path)
            return
        import datasets

        with _fetched(source, split):
            yield from datasets.load_dataset(
                source, subset, split=split, streaming=True
            )

    return records


def local(path: str | Sequence[str] | None) -> str | None:
    """The local copy of a data set that is on the Hub too, or None for the Hub's.

    Args:
      path: one place, taken as it is; or several, of which the first that exists.

    >>> local("data/gsm8k"), local(["no/such/folder"]), local(None)
    ('data/gsm8k', None, None)
    """
    if path is None or isinstance(path, str):
        return path
    return next((p for p in path if Path(p).expanduser().exists()), None)


def column(record: Mapping[str, Any], name: str) -> Any:
    """A column of a record.

    Raises:
      InputError: there is no such column; names those that there are.
    """
    if not isinstance(record, Mapping):
        raise InputError(f"A row must be an object of columns, got {shown(record)}.")
    if name not in record:
        raise InputError(f"The data has no column {name!r}; {nearest(name, record)}")
    return record[name]


def text(record: Mapping[str, Any], name: str) -> str:
    """A column that holds a text.

    Raises:
      InputError: there is no such column, or it holds something else.
    """
    value = column(record, name)
    if not isinstance(value, str):
        raise InputError(f"Column {name!r} must hold texts, got {shown(value)}.")
    return value


def _local_file(source: str, split: str) -> Path | None:
    """The file of a split; None where the source can only be on the Hub."""
    with _readable(source):
        path = Path(source).expanduser()
        if path.is_dir():
            return _split_file(path, split)
        if path.is_file():
            return path
    if path.suffix in _SUFFIXES or source.count("/") > 1 or path.is_absolute():
        raise InputError(
            f"There is no file or folder {source!r}; name the place of your copy."
        )
    return None


@contextmanager
def _readable(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # unreadable, too long, no such home
        raise InputError(f"{source!r} cannot be read: {one_line(error)}") from error


@contextmanager
def _fetched(source: str, split: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the client raises a dozen unrelated types
        raise InputError(
            f"{source!r} is no local file or folder, and fetching its split {split!r} "
            f"from the Hugging Face hub failed ({one_line(error)}). "
            "Check the name, the split and the connection, or name a local copy."
        ) from error


def _split_file(folder: Path, split: str) -> Path:
    for suffix in _SUFFIXES:
        if (file := folder / f"{split}{suffix}").is_file():
            return file
    found = [file.stem for file in folder.iterdir() if file.suffix in _SUFFIXES]
    raise InputError(f"Folder {folder} has no split {split!r}; {nearest(split, found)}")


def _read_file(path: Path) -> list[dict[str, Any]]:
    records: Any
    if path.suffix in _STREAMED:
        records = list(_STREAMED[path.suffix](path))
    elif path.suffix == ".json":
        records = _parsed(path.read_bytes(), str(path))
        records = [records] if isinstance(records, dict) else records
        if not isinstance(records, list):
            raise InputError(f"{path} must hold an object, or a list of objects.")
        for number, record in enumerate(records, start=1):
            _check_record(record, f"{path}, item {number}")
    else:
        raise InputError(f"{path} must end in one of {', '.join(_SUFFIXES)}.")
    if not records:
        raise InputError(f"{path} has no rows.")
    return records


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                record = _parsed(line, where)
                _check_record(record, where)
                yield record


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # The index that pandas stores beside the columns is no column.
            names = [
                n for n in file.schema_arrow.names if not n.startswith("__index_level_")
            ]
            for batch in file.iter_batches(columns=names):
                yield from batch.to_pylist()
    except Exception as error:  # arrow raises a dozen unrelated types
        raise InputError(f"{path} is no parquet file: {one_line(error)}") from error


_STREAMED = {".jsonl": _lines, ".parquet": _parquet_rows}
"""How files are read that need not be held."""


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON in UTF-8: {one_line(error)}") from error


def _check_record(record: Any, where: str) -> None:
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object of columns, {shown(record)}.")
    try:  # JSON can write halves of characters, which no tokenizer takes
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has text that is no Unicode: {error}") from None
