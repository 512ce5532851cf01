"""What a complete tuning run ends with: `result.json`, the measures and the checksums of the model they are of."""

import json
from pathlib import Path
from typing import Any

from moce_ds.storage.checksums import Files, check_file, names_below, read_checked, records_of, with_checksum
from moce_ds.storage.encoder_folder import WEIGHTS
from moce_ds.storage.files import valid_record
from moce_ds.tuning.classification import TUNED

RESULT = "result.json"
_WHAT, _MADE_BY = "a result", "moce finetune"


def result_text(run: Path, record: dict[str, Any]) -> str:
    """The content of `result.json`, once the model is in the run's folder: an encoder with a head, or all weights."""
    model = [*names_below(run / TUNED, f"{TUNED}/"), *(path.name for path in run.glob(WEIGHTS))]
    return json.dumps(with_checksum(record | {"files": records_of(run, model)}), indent=2) + "\n"


def read_result(run: Path) -> dict[str, Any]:
    """The result of a complete run, whose model is there as it was measured.

    Raises:
        ArtefactError: the result or a file of the model is missing or damaged.
    """
    result = read_checked(run / RESULT, dict[str, Any], _WHAT, _MADE_BY)
    files = valid_record(Files, result.get("files", {}), str(run / RESULT), _WHAT, _MADE_BY)
    for name in files:
        again = f"restore it from a copy, or delete {run / RESULT} and run the same command: it is measured again."
        check_file(run, name, files, again)
    return result
