"""What a complete tuning run ends with: `result.json`, the measures and the checksums of the model they are of.

The model is `tuned/`, an encoder folder with a head (classification), or `model.safetensors` (detection, segmentation).
"""

import json
from pathlib import Path
from typing import Any

from moce_ds.checkpoint.run_layout import RESULT, TUNED
from moce_ds.storage.checksums import (
    Files,
    Findings,
    check_file,
    document_findings,
    file_findings,
    names_below,
    read_checked,
    records_of,
    with_checksum,
)
from moce_ds.storage.encoder_folder import WEIGHTS, EncoderFolder
from moce_ds.storage.files import valid_record

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
    result = _read(run)
    files = valid_record(Files, result.get("files", {}), str(run / RESULT), _WHAT, _MADE_BY)
    for name in files:
        again = f"restore it from a copy, or delete {run / RESULT} and run the same command: it is measured again."
        check_file(run, name, files, again)
    return result


def result_measures(run: Path) -> dict[str, float]:
    """The measures of a complete run, whatever has become of its model; none before. Raises ArtefactError."""
    return dict(_read(run)["measures"]) if (run / RESULT).exists() else {}


def verify_result(run: Path) -> Findings:
    """What is wrong with the result and the model that it is of. Where there is no result, the run may have been killed
    before it wrote one. Raises ArtefactError: the result is damaged."""
    if not (run / RESULT).exists():
        kept = [name for name in (TUNED, WEIGHTS) if (run / name).exists()]
        message = (
            f"{RESULT}: is missing, but {kept[0] if kept else ''} exists: rerun the same command to resume the run"
        )
        return Findings(unverified=[message] if kept else [])
    result = _read(run)
    found = document_findings(run / RESULT, RESULT)
    if "files" not in result:
        tuned = run / TUNED
        return found + (EncoderFolder.open(tuned).verify().below(TUNED) if tuned.exists() else Findings())
    return found + file_findings(run, valid_record(Files, result["files"], str(run / RESULT), _WHAT, "moce"))


def _read(run: Path) -> dict[str, Any]:
    return read_checked(run / RESULT, dict[str, Any], _WHAT, _MADE_BY)
