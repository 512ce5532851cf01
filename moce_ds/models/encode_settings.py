"""The settings of verbs that run images through an encoder."""

from pydantic import PositiveInt

from moce_ds.config.settings import option, settings


@settings
class EncodeSettings:
    """How images are run through an encoder."""

    batch_size: PositiveInt = option(256, "images at a time in each process")
    threads: PositiveInt = option(2, "decoding threads of each process")


@settings
class FeatureSettings(EncodeSettings):
    """How the features of a shard set are written."""

    block_rows: PositiveInt = option(4096, "images in a file of features; what is lost at most by a kill")
