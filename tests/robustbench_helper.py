"""RobustBench's own networks, for tests that load our weights into them."""

import importlib.util
from pathlib import Path


def robustbench_class(name):
    """A class from RobustBench's own file; the whole package would import its data sets too."""
    root = Path(importlib.util.find_spec("robustbench").submodule_search_locations[0])
    path = root / "model_zoo" / "architectures" / "dm_wide_resnet.py"
    spec = importlib.util.spec_from_file_location("dm_wide_resnet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
