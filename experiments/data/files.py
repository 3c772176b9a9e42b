"""Finds and reads the local files of data sets."""

import contextlib
import gzip
from collections.abc import Iterator
from pathlib import Path

from experiments.errors import MissingFileError, UsageError


@contextlib.contextmanager
def readable(source: Path | str) -> Iterator[None]:
    """Converts any exception that a decoder raises on a broken file to a UsageError.

    Args:
      source: File that the error message names.

    Raises:
      UsageError: If the body raises any exception except a PermissionError.
    """
    try:
        yield
    except PermissionError:
        raise
    except Exception as error:  # decoders raise many types on broken bytes
        raise UsageError(
            f"{source} cannot be read ({type(error).__name__}: {error}): the file is "
            "broken or has another format; fetch it again."
        ) from error


def read_file(data_dir: str | Path, sub_folder: str, *names: str) -> tuple[Path, bytes]:
    """Reads the first existing file among some names, and decompresses gzip files.

    Args:
      data_dir: Folder to search.
      sub_folder: Name of a subfolder of `data_dir`, which is searched second.
      *names: Accepted names of the file, in order of preference. Each name may also end
        in `.gz`.

    Returns:
      The path of the file, for error messages, and its decompressed content.

    Raises:
      MissingFileError: If none of the files exists.
      UsageError: If a file whose name ends in `.gz` is not a valid gzip file.
    """
    for name in names:
        for folder in (Path(data_dir), Path(data_dir) / sub_folder):
            if (path := folder / name).is_file():
                return path, path.read_bytes()
            if (path := folder / f"{name}.gz").is_file():
                with readable(path):
                    return path, gzip.decompress(path.read_bytes())
    raise MissingFileError(
        f"data_dir='{data_dir}' holds no {' or '.join(names)} (or .gz of it), nor does "
        f"its subfolder {sub_folder}: put it there, or pass the folder that holds it."
    )
