"""Settings of running images through an encoder."""

from moce_ds.common.config.settings import Positive, option, settings


@settings
class EncodeSettings:
    """Running images through an encoder."""

    batch_size: Positive = option(256, "images per batch and process")
    threads: Positive = option(2, "decoding threads per process")


@settings
class FeatureSettings(EncodeSettings):
    """Writing the features of a shard set."""

    block_rows: Positive = option(4096, "images per file of features; a kill loses at most one file")
