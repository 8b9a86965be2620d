"""Small networks that together have every kind of layer, for tests that run over all of them."""

from psmpi.nn.network import build
from psmpi.nn.zoo import make_network

FLAT, TANH, NORM = {"type": "flatten"}, {"type": "tanh"}, {"type": "batch_norm"}
BINARY = {"type": "binary"}


def conv(channels, kernel, pool="mean_pool", size=2, activation="sigmoid"):
    kind = {"type": pool, "size": size}
    return [{"type": "conv", "channels": channels, "kernel": kernel}, kind, {"type": activation}]


def separable(units, groups):
    return {"type": "separable_dense", "units": units, "groups": groups}


def dense(units):
    return {"type": "dense", "units": units}


def cosine(units, scale):
    return {"type": "cosine", "units": units, "scale": scale}


def unbiased(table):
    return {**table, "bias": False}


def residual(*layers, **settings):
    return {"type": "residual", "layers": layers, **settings}


def recurrent(kind, units, **settings):
    return {"type": kind, "units": units, **settings}


def sparse(units, fan_in, **settings):
    return {"type": "sparse", "units": units, "pattern": "random", "fan_in": fan_in, **settings}


LAST, LAYER_NORM, GELU, POSITIONS = ({"type": kind} for kind in ("last", "layer_norm", "gelu", "positions"))


def slab(units, domains, halo):
    return {"type": "slab", "units": units, "domains": domains, "halo": halo}


def attention(width, heads, **settings):
    """A dense layer that computes queries, keys and values, and an attention layer."""
    return [dense(3 * width), {"type": "attention", "heads": heads, **settings}]


NETWORKS = {
    "dense": ((7,), [dense(6), {"type": "tanh"}, dense(4)], 4),
    "identity": ((7,), [{"type": "identity"}, dense(4), {"type": "identity"}], 4),
    "separable dense, ignored inputs": ((11,), [separable(8, 4), {"type": "relu"}, separable(4, 4)], 4),
    "groups of two kinds": ((24,), [separable(16, 8), TANH, separable(12, 4), TANH, dense(4)], 4),
    "blocks cut by later blocks": ((12,), [separable(12, 2), {"type": "tanh"}, separable(4, 4)], 4),
    "separable after dense": ((6,), [dense(9), {"type": "tanh"}, dense(8), {"type": "tanh"}, separable(4, 4)], 4),
    "mean pooling": ((2, 9, 9), [*conv(3, 3), *conv(8, 2), FLAT, separable(4, 4)], 4),
    "mean pooling by three": ((2, 11, 11), [*conv(8, 2, size=3), FLAT, separable(4, 4)], 4),
    "max pooling": ((2, 9, 9), [*conv(3, 3, "max_pool", activation="relu"), FLAT, dense(4)], 4),
    "pooling first": ((2, 8, 8), [{"type": "mean_pool"}, *conv(4, 2, activation="tanh"), FLAT, dense(4)], 4),
    "no pooling": ((1, 5, 5), [{"type": "conv", "channels": 4, "kernel": 3}, TANH, FLAT, separable(4, 4)], 4),
    "separable convolution": (
        (4, 8, 8),
        [{"type": "separable_conv", "channels": 8, "kernel": 3, "groups": 4}, {"type": "mean_pool"}, TANH,
         {"type": "separable_conv", "channels": 8, "kernel": 2, "groups": 4}, TANH, FLAT, separable(4, 4)],
        4,
    ),
    "activations in a row": ((7,), [dense(6), {"type": "sigmoid"}, TANH, {"type": "relu"}, dense(4)], 4),
    "activations around a flatten": (
        (2, 5, 5),
        [TANH, {"type": "conv", "channels": 4, "kernel": 3}, {"type": "sigmoid"}, FLAT, TANH, separable(4, 4)],
        4,
    ),
    "channels cut by blocks": ((1, 8, 8), [*conv(3, 3), *conv(7, 2), FLAT, separable(5, 5)], 5),
    "small psnet": ((1, 8, 8), None, 10),
    "no biases": ((7,), [unbiased(dense(6)), TANH, unbiased(separable(8, 4)), TANH, separable(4, 4)], 4),
    "normalized": (
        (7,),
        [unbiased(dense(9)), NORM, {"type": "relu"}, unbiased(separable(8, 4)), NORM, TANH,
         unbiased(separable(4, 4)), {**NORM, "affine": False}],
        4,
    ),
    "normalized images": (
        (2, 9, 9),
        [{**unbiased(conv(3, 3)[0]), "pad": 1}, {"type": "mean_pool"}, NORM, TANH, *conv(7, 2), FLAT, separable(4, 4)],
        4,
    ),
    "normalized features that no class sees": (
        (2, 5, 5), [conv(3, 3)[0], FLAT, NORM, TANH, separable(4, 4), NORM], 4,
    ),
    "normalized inputs and activations": ((7,), [NORM, TANH, NORM, {"type": "relu"}, dense(4)], 4),
    "normalized groups": ((7,), [dense(8), {"type": "group_norm", "groups": 4}, TANH, separable(4, 4)], 4),
    "normalized groups of images": (
        (2, 9, 9),
        [{"type": "group_norm", "groups": 1}, conv(6, 3)[0], {"type": "group_norm", "groups": 3}, {"type": "relu"},
         {"type": "mean_pool"}, FLAT, {"type": "group_norm", "groups": 2}, separable(4, 4)],
        4,
    ),
    "cosines": ((7,), [dense(6), TANH, cosine(4, 3.0)], 4),
    "cosines of cosines": ((7,), [cosine(6, 2.0), TANH, separable(8, 4), cosine(4, 0.5)], 4),
    "residual": ((7,), [dense(6), TANH, residual(dense(5), TANH, dense(6), scale=0.5), TANH, dense(4)], 4),
    "residual around activations": ((7,), [dense(6), residual(TANH, dense(6), TANH), residual(TANH), dense(4)], 4),
    "residual of classes": ((8,), [separable(8, 4), residual(separable(8, 4), TANH), separable(4, 4)], 4),
    "residual images": (
        (2, 6, 6),
        [{**unbiased(conv(4, 3)[0]), "pad": 1},
         *[residual(NORM, {"type": "relu"}, {**conv(4, 3)[0], "pad": 1}, residual({"type": "relu"}), NORM, TANH,
                    {**conv(4, 3)[0], "pad": 1})] * 2,
         NORM, {"type": "relu"}, {"type": "mean_pool", "size": 3}, FLAT, dense(4)],
        4,
    ),
    "tanh states": ((3, 5), [recurrent("rnn", 6), LAST, dense(4)], 4),
    "long short-term memory": ((3, 5), [recurrent("lstm", 4), recurrent("lstm", 5, bias=False), LAST, dense(4)], 4),
    "gated recurrent units": ((3, 5), [recurrent("gru", 4), recurrent("gru", 5, bias=False), LAST, dense(4)], 4),
    "layers of each step": (
        (3, 5), [dense(6), TANH, recurrent("rnn", 4), residual(recurrent("gru", 4), dense(4)), LAST, dense(4)], 4,
    ),
    "tokens": ((1, 5), [{"type": "embedding", "vocabulary": 7, "units": 3}, recurrent("lstm", 4), LAST, dense(4)], 4),
    "tokens side by side": (
        (1, 4), [{"type": "embedding", "vocabulary": 5, "units": 3}, dense(2), TANH, FLAT, dense(4)], 4,
    ),
    "normalized layers": ((7,), [dense(6), LAYER_NORM, TANH, separable(8, 4), LAYER_NORM, dense(4)], 4),
    "errors": ((7,), [GELU, dense(6), GELU, residual(dense(5), GELU, dense(6)), GELU, dense(4)], 4),
    "attention": (
        (1, 5),
        [{"type": "embedding", "vocabulary": 7, "units": 6}, {**POSITIONS, "longest": 8},
         residual(LAYER_NORM, *attention(6, 2), dense(6)), residual(LAYER_NORM, dense(8), GELU, dense(6)),
         LAYER_NORM, LAST, dense(4)],
        4,
    ),
    "attention to all steps": ((3, 5), [dense(4), *attention(6, 3, causal=False), LAST, dense(4)], 4),
    "attention of classes": (
        (3, 5), [dense(8), separable(24, 4), POSITIONS, {"type": "attention", "heads": 4}, LAST, separable(4, 4)],
        4,
    ),
    "attention with scores of each step": ((3, 5), [dense(4), POSITIONS, *attention(4, 1), GELU, dense(4)], 4),
    "slabs": (
        (12,), [slab(8, 4, 1), TANH, slab(16, 4, 2), slab(12, 4, 0), TANH, slab(9, 1, 0), {"type": "relu"}, dense(4)],
        4,
    ),
    "slabs of images": (
        (2, 4, 6), [slab([3, 4, 6], [2, 3], 1), TANH, slab([6, 9], [2, 3], 2), slab([6, 3], [3, 1], 1), TANH, FLAT,
                    dense(4)],
        4,
    ),
    "sparse": ((9,), [sparse(8, 3), TANH, {"type": "sparse", "units": 8, "pattern": "radix", "radix": 2, "stride": 2,
                                           "copies": 2}, {"type": "relu"}, unbiased(sparse(6, 4)),
                      residual(dense(5), TANH, sparse(6, 2)), dense(4)], 4),
    "sparse scores": ((6,), [sparse(9, 3), TANH, sparse(8, 2, seed=1), TANH, sparse(4, 3)], 4),
    "sparse layers of classes": ((12,), [sparse(10, 2), TANH, unbiased(sparse(8, 2)), TANH,
                                         separable(4, 4)], 4),
    "the product of two steps": ((3, 2), [dense(6), {"type": "dot"}, dense(4)], 4),
    "two scores of one number": ((7,), [dense(6), TANH, dense(1), BINARY, dense(4)], 4),
    "two scores of one number at each step": ((3, 5), [dense(1), BINARY, recurrent("rnn", 4), LAST, dense(4)], 4),
    "scores of each step": ((3, 5), [recurrent("lstm", 6), separable(8, 4), TANH, separable(4, 4)], 4),
}  # fmt: skip


def has(layers, *kinds):
    return any(f"'{kind}'" in str(layers) for kind in kinds)


# Networks with scores and gradients of a sample that do not depend on other samples, and with a backward pass that may
# run more than once.
INDEPENDENT = [name for name, (_, layers, _) in NETWORKS.items() if not has(layers, "batch_norm", "rnn", "gru", "lstm")]


def make(name):
    shape, layers, classes = NETWORKS[name]
    if layers is None:
        return make_network("psnet", shape, classes)
    return build(name, shape, layers, classes, "scores of each step" in name)
