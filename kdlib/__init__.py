"""kdlib: when does knowledge distillation help a small language model in post-training, and when does it fail?"""

import warnings

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "distill":  # which imports torch, and reading results does not
        from kdlib.own import distill
        return distill
    raise AttributeError(f"module 'kdlib' has no attribute {name!r}")


warnings.filterwarnings("ignore", message="IProgress not found")  # notebooks store no widgets, so tqdm need not ask for them
