"""kdlib: when does knowledge distillation help a small language model in post-training, and when does it fail?"""

__version__ = "0.1.0"
