"""A book that runs: Stanford CS336 assignment 1, from Unicode to a trained language model."""

from importlib import import_module

__version__ = "0.1.0"

# Imported on first use, so that `import cs336_lm` stays light: torch alone takes seconds.
_LAZY = {"Tokenizer": "tokenizer", "train_bpe": "bpe", "ModelConfig": "transformer", "TransformerLM": "transformer",
         "TrainConfig": "training", "train": "training", "generate": "generation"}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY: raise AttributeError(f"module 'cs336_lm' has no attribute {name!r}")
    value = getattr(import_module(f"cs336_lm.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]: return sorted({*globals(), *_LAZY})
