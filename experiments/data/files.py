"""Find and read the local files of data sets, with a clear error where they are not."""

import contextlib
import gzip
from collections.abc import Iterator
from pathlib import Path

from experiments.errors import MissingFileError, UsageError


@contextlib.contextmanager
def readable(source: Path | str) -> Iterator[None]:
    """Turns whatever a decoder raises on a broken file into one clear UsageError."""
    try:
        yield
    except PermissionError:
        raise
    except Exception as error:  # decoders raise nearly anything on broken bytes
        raise UsageError(
            f"{source} cannot be read ({type(error).__name__}: {error}): the file is "
            "broken or of another kind; fetch it again."
        ) from error


def read_file(data_dir: str | Path, sub_folder: str, *names: str) -> tuple[Path, bytes]:
    """Reads the first file there is of some names, unzipping it if need be.

    Args:
      data_dir: Folder to search.
      sub_folder: Folder in it, searched after it.
      *names: The file's name, then others it may have; with ``.gz`` added, too.

    Returns:
      Where it was, for messages, and its content.

    Raises:
      MissingFileError: If there is none.
      UsageError: If it is no gzip file though its name ends so.
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
        f"its sub-folder {sub_folder}: put it there, or pass the folder which holds it."
    )
