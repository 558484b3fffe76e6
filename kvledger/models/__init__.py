"""What a model's ``config.json`` says about its KV cache: kinds of layers, tensors, bytes per block.

Nothing is downloaded and no code of a model is run: a local file or a dictionary is read. :mod:`kvledger.models.shape`
knows the architectures, :mod:`kvledger.models.sizing` turns memory into blocks. :meth:`kvledger.CacheConfig.for_model`
and ``kvledger size`` use both; nothing here knows a ledger.
Words: ``docs/glossary.md``.
"""

from kvledger.models.shape import Layers, ModelError, ModelShape, shape_of
from kvledger.models.sizing import Sizing, size

__all__ = ["Layers", "ModelError", "ModelShape", "Sizing", "shape_of", "size"]
