"""The teacher of SDR's second phase: the dense MAE that the run starts from, which the run folder keeps."""

from pathlib import Path

from moce_ds.distributed.runtime import Runtime
from moce_ds.models.build import ModelSpec
from moce_ds.models.dense import as_encoder
from moce_ds.models.mae import sincos_positions
from moce_ds.models.sdr import Teacher
from moce_ds.models.vit import Encoder, load_encoder, save_encoder
from moce_ds.models.warm_start import is_decoder, read_weights
from moce_ds.storage.files import atomic_folder, writes_to
from moce_ds.training.settings import PretrainRunSettings

TEACHER = "teacher"
"""Encoder folder in a run folder: the same teacher when the run goes on, wherever `run.init_from` is by then."""


def read_teacher(spec: ModelSpec, run: PretrainRunSettings) -> Encoder:
    """The teacher's encoder. Raises ArtefactError: it cannot be read, or does not fit `spec`."""
    if (kept := run.out / TEACHER).exists():
        return load_encoder(kept)
    source = run.init_from
    assert source is not None, "PretrainSettings sees to it"
    weights = read_weights(source, run.replace_positions)
    state = {name: tensor for name, tensor in weights.items() if not is_decoder(name)}
    state["pos_embed"] = sincos_positions(spec.shape, spec.shape.width)
    return as_encoder(state, spec, {"init_from": str(source)}, str(source))


def keep_teacher(encoder: Encoder, run: Path, runtime: Runtime) -> Teacher:
    """Leave the teacher in the folder of the run, and make it ready on this process's device; a collective.

    Raises:
        ArtefactError: the folder cannot be written to.
    """
    folder = run / TEACHER
    with runtime.raise_on_all_ranks(), writes_to(folder):
        if runtime.is_main and not folder.exists():
            with atomic_folder(folder) as draft:
                save_encoder(draft, encoder.model.state_dict(), encoder.shape, encoder.input, encoder.provenance)
    encoder.model.to(runtime.device)
    return Teacher(encoder)
