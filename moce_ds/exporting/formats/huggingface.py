"""Folders for the transformers library: ViT and ViT-MAE, by the names that its releases 4 and 5 both read."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moce_ds import __version__
from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.files import save_tensors, write_json
from moce_ds.exporting.formats.weights import DenseModel, renamed
from moce_ds.exporting.reference_model import Trial
from moce_ds.models.build import ModelSpec
from moce_ds.models.mae import NORM_EPS

_BLOCK = (
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
_ENCODER = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.", "encoder.layer."),
    *_BLOCK,
)
_DECODER = (("decoder_blocks.", "decoder_layers."), *_BLOCK)


def encoder_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of `ViTModel` and `ViTMAEModel`; qkv becomes query, key and value."""
    names = {("layernorm." + n.removeprefix("norm.") if n.startswith("norm.") else n): t for n, t in state.items()}
    return _split(renamed(names, _ENCODER))


def mae_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of `ViTMAEForPreTraining`."""
    decoder = {name: tensor for name, tensor in state.items() if name.startswith(("decoder_", "mask_token"))}
    encoder = {name: tensor for name, tensor in state.items() if name not in decoder}
    return {f"vit.{name}": tensor for name, tensor in encoder_names(encoder).items()} | {
        f"decoder.{name}": tensor for name, tensor in _split(renamed(decoder, _DECODER)).items()
    }


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in state.items():
        if ".attn.qkv." not in name:
            result[name] = tensor
            continue
        for kind, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            result[name.replace(".attn.qkv.", f".attention.attention.{kind}.")] = part
    return result


def write_vit(folder: Path, model: DenseModel) -> None:
    """A `ViTModel`."""
    _write(
        folder, model, "ViTModel", "vit", encoder_names(model.state), {"encoder_stride": model.spec.shape.patch_size}
    )


def write_vitmae_encoder(folder: Path, model: DenseModel) -> None:
    """A `ViTMAEModel`."""
    _write(folder, model, "ViTMAEModel", "vit_mae", encoder_names(model.state), _mae_config(model.spec))


def write_vitmae(folder: Path, model: DenseModel) -> None:
    """A `ViTMAEForPreTraining`."""
    _write(folder, model, "ViTMAEForPreTraining", "vit_mae", mae_names(model.state), _mae_config(model.spec))


def _mae_config(spec: ModelSpec) -> dict[str, Any]:
    return {
        "mask_ratio": spec.mask_ratio,
        "norm_pix_loss": True,
        "decoder_hidden_size": spec.decoder.width,
        "decoder_num_hidden_layers": spec.decoder.depth,
        "decoder_num_attention_heads": spec.decoder.heads,
        "decoder_intermediate_size": 4 * spec.decoder.width,
    }


def _write(
    folder: Path, model: DenseModel, architecture: str, kind: str, state: dict[str, Tensor], more: dict[str, Any]
) -> None:
    shape = model.spec.shape
    config = {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": int(shape.width * shape.mlp_ratio),
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": NORM_EPS,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "torch_dtype": "float32",
    }
    weights = folder / "model.safetensors"
    save_tensors(weights, {name: tensor.contiguous() for name, tensor in state.items()}, {"format": "pt"})
    write_json(folder / "config.json", config | more)
    write_json(folder / "preprocessor_config.json", _preprocessor(model.spec))
    (folder / "README.md").write_text(_card(model, architecture), encoding="utf-8")


def _preprocessor(spec: ModelSpec) -> dict[str, Any]:
    """The centre crop of evaluation: resize the shorter side, crop the centre."""
    size = spec.input.size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(size / spec.input.center_crop)},
        "resample": 3,  # bicubic, as in training
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.input.mean),
        "image_std": list(spec.input.std),
        "do_convert_rgb": True,
    }


_MOCE = "a masked autoencoder with cluster-conditional experts (MoCE)"
_FACTS = {
    "route": "experts of the route",
    "average": "average of experts",
    "layers": "in blocks",
    "step": "of step",
    "clusters": "clusters and shares",
    "max_difference": "largest difference from the trained model, relative to its largest output",
}
_CARD = """\
---
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [masked-autoencoder, mixture-of-experts, vision-transformer]
license: other  # set the licence before publishing: that of the training images may bind the weights
license_name: not-stated
---
# {title}

A dense vision transformer, the encoder of {origin}, pre-trained by self-supervision and not fine-tuned for any task.

{facts}

It was trained by `moce pretrain` and written by `moce export` of moce_ds {version}; `provenance.json` records more.

```python
from transformers import AutoImageProcessor, {auto}

processor = AutoImageProcessor.from_pretrained("THIS_FOLDER")
model = {auto}.from_pretrained("THIS_FOLDER"{pooling})
```

Its biases are those of the training images.
"""


def _card(model: DenseModel, architecture: str) -> str:
    dense = model.provenance.get("layers") is None
    name, origin = ("a dense MAE", "a masked autoencoder") if dense else ("an expert of a MoCE", _MOCE)
    sizes = ", ".join(f"{name} {value}" for name, value in asdict(model.spec.shape).items())
    known = [(text, model.provenance.get(key)) for key, text in _FACTS.items()]
    return _CARD.format(
        title=f"{architecture}: {name}",
        origin=origin,
        facts="\n".join(f"- {text}: {value}" for text, value in [("size", sizes), *known] if value is not None),
        version=__version__,
        auto="AutoModelForPreTraining" if architecture == "ViTMAEForPreTraining" else "AutoModel",
        pooling=", add_pooling_layer=False" if architecture == "ViTModel" else "",
    )


def run_vit(folder: Path, spec: ModelSpec, trial: Trial) -> Tensor:
    """Tokens of `ViTModel`."""
    from transformers import ViTModel

    model = _loaded(ViTModel, folder, add_pooling_layer=False)
    with torch.inference_mode():
        return model(pixel_values=trial.images_BCHW).last_hidden_state


def run_vitmae_encoder(folder: Path, spec: ModelSpec, trial: Trial) -> Tensor:
    """Visible tokens of `ViTMAEModel`, which masks every input."""
    from transformers import ViTMAEModel

    with torch.inference_mode():
        return _loaded(ViTMAEModel, folder)(pixel_values=trial.images_BCHW, noise=trial.noise_BN).last_hidden_state


def run_vitmae(folder: Path, spec: ModelSpec, trial: Trial) -> Tensor:
    """Patches of `ViTMAEForPreTraining`."""
    from transformers import ViTMAEForPreTraining

    with torch.inference_mode():
        return _loaded(ViTMAEForPreTraining, folder)(pixel_values=trial.images_BCHW, noise=trial.noise_BN).logits


def _loaded(cls: Any, folder: Path, **arguments: Any) -> Any:
    """A model loaded only from its folder; every weight must be present."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, report = cls.from_pretrained(folder, output_loading_info=True, local_files_only=True, **arguments)
    if any(report.values()):
        raise ArtefactError(f"transformers does not read {cls.__name__} as it was written: {report}. Please report it.")
    return model.eval()
