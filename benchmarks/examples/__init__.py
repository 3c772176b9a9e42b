"""Compares the programs in `docs/examples` with the same training written by hand.

Each `docs/examples/NAME.py` that has a `benchmarks/examples/by_hand/NAME.py` is a row.
The file by hand imports model, data, loss, and constants from the example, and has

- `main()`: trains on eight devices, and returns the metric that the example returns;
- `single_worker()`: trains one worker with the total batch and the same optimizer on as
  many examples, without exchanges, and returns the same metric;
- `steps()`: checks that both programs compute the same, and returns two functions that
  run one step of the example and one step by hand, each until it is done;
- `SHARED`: names of the functions and classes of the example that both programs share.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
BY_HAND = Path(__file__).parent / "by_hand"


def load(name: str, folder: Path = EXAMPLES) -> ModuleType:
    """Imports a program from its file, once for each call.

    Args:
      name: Name of the file, without ".py".
      folder: Folder of the file.

    Returns:
      The module.
    """
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
