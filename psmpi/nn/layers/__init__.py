"""Layers, one kind a file, and the registry of their types in configurations.

A new kind is a file and a line in `LAYERS`, or a class of another package or program (docs/own_layer.md).
"""

from psmpi.nn.layers.activation import ACTIVATIONS, Activation
from psmpi.nn.layers.attention import Attention
from psmpi.nn.layers.base import Layer, Part, SampleSums, Site, Stage
from psmpi.nn.layers.batch_norm import BatchNorm
from psmpi.nn.layers.binary import Binary
from psmpi.nn.layers.conv import Conv
from psmpi.nn.layers.cosine import Cosine
from psmpi.nn.layers.dense import Dense
from psmpi.nn.layers.dot import Dot
from psmpi.nn.layers.embedding import Embedding
from psmpi.nn.layers.flatten import Flatten
from psmpi.nn.layers.gelu import Gelu
from psmpi.nn.layers.group_norm import GroupNorm
from psmpi.nn.layers.last import Last
from psmpi.nn.layers.layer_norm import LayerNorm
from psmpi.nn.layers.pool import Pool
from psmpi.nn.layers.positions import Positions
from psmpi.nn.layers.recurrent import Recurrent
from psmpi.nn.layers.residual import Residual
from psmpi.nn.layers.slab import Slab
from psmpi.nn.layers.sparse import Sparse
from psmpi.registry import Registry

OWN: dict[str, type[Layer]] = {
    "dense": Dense,
    "separable_dense": Dense,
    "cosine": Cosine,
    "sparse": Sparse,
    "conv": Conv,
    "separable_conv": Conv,
    "mean_pool": Pool,
    "max_pool": Pool,
    "flatten": Flatten,
    "batch_norm": BatchNorm,
    "group_norm": GroupNorm,
    "layer_norm": LayerNorm,
    "residual": Residual,
    "slab": Slab,
    "rnn": Recurrent,
    "gru": Recurrent,
    "lstm": Recurrent,
    "embedding": Embedding,
    "positions": Positions,
    "attention": Attention,
    "last": Last,
    "gelu": Gelu,
    "binary": Binary,
    "dot": Dot,
    **dict.fromkeys(ACTIVATIONS, Activation),
}
LAYERS: Registry[type[Layer]] = Registry("layer", "layer type {!r}", "psmpi.nn.layers.base:Layer", OWN)

__all__ = ["ACTIVATIONS", "LAYERS", "Layer", "Part", "SampleSums", "Site", "Stage"]
