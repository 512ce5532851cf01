"""An exported expert as a module of timm."""

from moce_ds.api.given import AnyPath, as_path
from moce_ds.common.errors import ArtefactError
from moce_ds.common.host.program import python_call
from moce_ds.common.storage.encoder_folder import EXPORT
from moce_ds.models.vit import VisionTransformer, load_encoder


@python_call()
def load_expert(path: AnyPath) -> VisionTransformer:
    """An exported expert: timm's VisionTransformer in evaluation mode, on the CPU, with `forward_features`.

    `timm.data.resolve_model_data_config` returns the size, crop and normalisation of its images.

    Args:
        path: a folder that `moce export` wrote in timm's layout.

    Raises:
        ArtefactError: it is not such a folder, was written for another library, or is damaged.

    Example::

        model = moce_ds.load_expert("expert")
        tokens = model.forward_features(pixels)  # [B, 1 + patches, width] for pixels [B, 3, H, W]
        feature = tokens[:, 1:].mean(dim=1)  # [B, width]
    """
    folder = as_path(path)
    if (folder / EXPORT).exists():
        raise ArtefactError(f"{folder} was exported for another library: export it again with --format timm.")
    encoder = load_encoder(folder)
    input = encoder.input
    encoder.model.pretrained_cfg = {
        "input_size": (3, input.size, input.size),
        "mean": input.mean,
        "std": input.std,
        "crop_pct": input.center_crop,
        "crop_mode": "center",
        "interpolation": "bicubic",
    }
    return encoder.model
