"""`moce attach`: makes a shard set at an address, such as `s3://bucket/set`, usable as a folder.

The folder holds the tables and the address; the tar files stay where they are, and images are read from there.
"""

from pathlib import Path

from moce_ds.common.errors import ArtefactError, DataError
from moce_ds.common.host.machine import refused
from moce_ds.common.storage.checksums import write_checked
from moce_ds.common.storage.files import atomic_folder, check_writable, writes_to
from moce_ds.data.sample_table import SAMPLES, TARGETS
from moce_ds.data.shard_manifest import MANIFEST, Manifest
from moce_ds.data.shard_storage import ADDRESS, AddressStorage, storage_of
from moce_ds.data.shards import REJECTED, SOURCES, ShardSet


def attach(address: str, out: Path) -> ShardSet:
    """Copy the tables of the set at `address` into the folder `out`; an attached set is opened instead.

    Raises:
        ConfigError: the address has an unknown protocol, or its client is not installed.
        ArtefactError: `out` holds something else, or cannot be written.
        DataError: there is no whole shard set at the address, or it cannot be read.
    """
    storage = AddressStorage(address.rstrip("/"))
    if out.exists():
        if not ShardSet.recognises(out) or storage_of(out) != storage:
            raise ArtefactError(f"{out} exists and is not the set at {address}: choose another folder.")
        return ShardSet.open(out)
    check_writable(out)
    with writes_to(out), atomic_folder(out) as draft:
        _copy(storage, MANIFEST, draft)
        manifest = Manifest.read(draft)
        for name in (SAMPLES, SOURCES, REJECTED, *([TARGETS] if manifest.multi_label else [])):
            _copy(storage, name, draft)
        write_checked(draft / ADDRESS, {"address": storage.address})
        ShardSet.open(draft, named=out).verify_sizes()
    return ShardSet.open(out)


def _copy(storage: AddressStorage, name: str, folder: Path) -> None:
    try:
        storage.copy(name, folder / name)
    except FileNotFoundError:
        raise DataError(f"{storage.where(name)} is missing: expected a set that `moce shards` wrote, whole.") from None
    except OSError as error:
        raise refused(DataError, f"{storage.where(name)} cannot be read", error) from None
