"""Changes to the table of a shard set, with checksums as if it had been written so."""

import json
from pathlib import Path

import numpy as np

from moce_ds.common.storage.checksums import records_of, write_checked
from moce_ds.data.sample_table import SAMPLES, rows_checksum
from moce_ds.data.shard_manifest import MANIFEST


def exchange_samples(folder: Path, samples: np.ndarray) -> None:
    """Put another table into a shard set."""
    np.save(folder / SAMPLES, samples)
    manifest = json.loads((folder / MANIFEST).read_text())
    for number, shard in enumerate(manifest["shards"]):
        shard["rows_crc32"] = rows_checksum(samples[samples["shard"] == number])
    write_checked(folder / MANIFEST, manifest | {"files": manifest["files"] | records_of(folder, [SAMPLES])})


def as_earlier(folder: Path) -> None:
    """Remove what earlier versions did not write from the manifest: the checksums of the tables and of their rows."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for shard in manifest["shards"]:
        shard.pop("rows_crc32", None)
    del manifest["files"], manifest["content_sha256"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
