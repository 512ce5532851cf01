"""The settings of verbs that run images through an encoder."""

from pydantic import PositiveInt

from moce_ds.config.settings import option, settings


@settings
class EncodeSettings:
    """Running images through an encoder."""

    batch_size: PositiveInt = option(256, "images per batch and process")
    threads: PositiveInt = option(2, "decoding threads per process")


@settings
class FeatureSettings(EncodeSettings):
    """Writing the features of a shard set."""

    block_rows: PositiveInt = option(4096, "images per file of features; a kill loses at most one file")
