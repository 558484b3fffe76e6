"""A decoder-only transformer on Paddle: seeded random weights, grouped-query attention.

Everything is float64. A token comes to the same logits, up to some 1e-12, whatever it is batched with and however its
prompt was cut into chunks. The two best logits of a step lie much further apart: the engine keeps the smallest gap, and
the test asserts that it is above 1e-6. So the tokens are the same in every mode if the right keys and values were read.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import paddle

from examples.tiny_engine.attention import PagedAttention, Rows


class ModelConfig(NamedTuple):
    """Sizes of the model."""

    vocabulary: int = 512
    layers: int = 3
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 16
    inner: int = 192
    seed: int = 0

    @property
    def hidden(self) -> int:
        """Size of a token's vector."""
        return self.heads * self.head_dim


class Layer(NamedTuple):
    """Weights of one layer, ``[in, out]``."""

    query: paddle.Tensor
    key: paddle.Tensor
    value: paddle.Tensor
    out: paddle.Tensor
    gate: paddle.Tensor
    up: paddle.Tensor
    down: paddle.Tensor


class Model:
    """The weights, and one forward pass over a batch of tokens of many requests."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        rng = np.random.default_rng(config.seed)

        def weight(rows: int, columns: int, gain: float = 1.0) -> paddle.Tensor:
            return paddle.to_tensor(rng.standard_normal((rows, columns)) * gain / np.sqrt(rows))

        hidden, kv = config.hidden, config.kv_heads * config.head_dim
        self.embedding = paddle.to_tensor(rng.standard_normal((config.vocabulary, hidden)))
        self.layers = [
            Layer(
                # gains that make attention choose sharply, so that what it reads decides the next token
                query=weight(hidden, hidden, 2.0),
                key=weight(hidden, kv, 2.0),
                value=weight(hidden, kv, 2.0),
                out=weight(hidden, hidden, 2.0),
                gate=weight(hidden, config.inner),
                up=weight(hidden, config.inner),
                down=weight(config.inner, hidden),
            )
            for _ in range(config.layers)
        ]
        self.head = weight(hidden, config.vocabulary, 4.0)

    def forward(self, tokens: np.ndarray, rows: Rows, attention: PagedAttention) -> paddle.Tensor:
        """Logits of the tokens that end a request's rows, ``float64[requests, vocabulary]``.

        ``tokens``: ``int64[rows]``, those of all requests behind each other. Their keys and values are written to the
        pool on the way.
        """
        config = self.config
        x = self.embedding[paddle.to_tensor(tokens)]
        for number, layer in enumerate(self.layers):
            y = _normalized(x)
            query = (y @ layer.query).reshape([-1, config.heads, config.head_dim])
            key, value = ((y @ w).reshape([-1, config.kv_heads, config.head_dim]) for w in (layer.key, layer.value))
            attended = attention(number, query, key, value, rows)
            x = x + attended.reshape([-1, config.hidden]) @ layer.out
            y = _normalized(x)
            x = x + (paddle.nn.functional.silu(y @ layer.gate) * (y @ layer.up)) @ layer.down
        last = x[paddle.to_tensor([span.stop - 1 for span in rows.spans])]
        return _normalized(last) @ self.head


def _normalized(x: paddle.Tensor) -> paddle.Tensor:
    return x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)
