"""kdlib: when does knowledge distillation help a small language model in post-training, and when does it fail?"""

import warnings

__version__ = "0.1.0"
warnings.filterwarnings("ignore", message="IProgress not found")  # notebooks store no widgets, so tqdm need not ask for them
