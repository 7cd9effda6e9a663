import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the repository


def _load_machine():
    """jetkernels._machine without jetkernels, which imports torch before anything could be said about its threads."""
    name = "jetkernels._machine"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "jetkernels" / "_machine.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


machine = _load_machine()
machine.prepare_programs()
