"""avjax: audio-visual emotion recognition in JAX and Flax."""

__version__ = "0.1.0"


def load(folder):
    """Reads a bundle of `avjax.export` (see `avjax.inference.bundle.load`)."""
    from avjax.inference import bundle  # here: most of what imports avjax needs no more than a part of it

    return bundle.load(folder)
