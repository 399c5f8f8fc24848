"""kdlib: when does knowledge distillation help a small language model in post-training, and when does it fail?"""

import importlib.util
import pkgutil
import warnings

__version__ = "0.1.0"


def __getattr__(name: str):  # modules when they are first used: reading results needs no torch, and looking at data no trainer
    if name == "distill":
        return importlib.import_module("kdlib.own").distill
    if importlib.util.find_spec(f"kdlib.{name}"):
        return importlib.import_module(f"kdlib.{name}")
    raise AttributeError(f"module 'kdlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "distill", *(module.name for module in pkgutil.iter_modules(__path__))})


warnings.filterwarnings("ignore", message="IProgress not found")  # notebooks store no widgets, so tqdm need not ask for them
