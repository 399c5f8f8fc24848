"""kdlib: when does knowledge distillation help a small language model in post-training, and when does it fail?"""

import warnings

__version__ = "0.1.0"

# Notebooks store no widgets, so tqdm has no use for ipywidgets and need not ask for it.
warnings.filterwarnings("ignore", message="IProgress not found")
