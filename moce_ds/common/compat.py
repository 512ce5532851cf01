"""Work-arounds for third-party packages, each with its reason and when it can be removed."""

import contextlib
import importlib
import io
import logging
import os
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    # DeepSpeed prints a warning if it has to detect a CPU-only machine itself, and would take the GPU of a Mac.
    # `moce_ds/__init__.py` imports this module before it.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# timm imports `tqdm.auto`, which asks for ipywidgets in a notebook; our progress bars need none.
warnings.filterwarnings("ignore", message="IProgress not found")

# The library object must outlive the operators that it defines.
_torchvision_operators: list[torch.library.Library] = []


def repair_torchvision() -> None:
    """Make `import torchvision` (which timm does) work with a CPU build of torch.

    The torchvision wheel on the package index is built for CUDA. With a CPU build of torch its compiled operators do
    not load, and the import fails at the first one it looks up ("operator torchvision::nms does not exist"). Models and
    transforms do not need them, so the missing names are declared. Can be removed when a CPU wheel is on the index.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision_operators.append(library)
        importlib.import_module("torchvision")


def supply_torchvision_operators() -> None:
    """Provide nms and roi_align for torchvision's detectors if its compiled operators do not load.

    With a CPU build of torch (see `repair_torchvision`) `nms` is an error, and `roi_align` falls back to one that needs
    a C++ compiler at run time. Implemented in torch, they let the same Mask R-CNN run everywhere. Does nothing
    otherwise. Can be removed with `repair_torchvision`.
    """
    repair_torchvision()
    extension = importlib.import_module("torchvision.extension")
    if extension._has_ops():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.impl("nms", nms, "CompositeExplicitAutograd")
    library.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    )
    library.impl("roi_align", roi_align, "CompositeImplicitAutograd")
    _torchvision_operators.append(library)
    # `torchvision.ops.roi_align` is the function; its module has a copy of the name.
    for module in (extension, importlib.import_module("torchvision.ops.roi_align")):
        module._has_ops = lambda: True  # type: ignore[attr-defined]


def nms(boxes_N4: Tensor, scores_N: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes (x1, y1, x2, y2) that no better kept box overlaps by more than the threshold, best first.

    The greedy choice is the fixed point of "kept unless a better kept box overlaps", reached after a few rounds.
    """
    from torchvision.ops import box_iou

    order_N = scores_N.argsort(descending=True, stable=True)
    boxes_N4 = boxes_N4[order_N].float()
    beats_NN = (box_iou(boxes_N4, boxes_N4) > iou_threshold).triu(diagonal=1)
    kept_N, previous_N = torch.ones_like(order_N, dtype=torch.bool), None
    while previous_N is None or not torch.equal(kept_N, previous_N):
        previous_N, kept_N = kept_N, ~(beats_NN & kept_N[:, None]).any(dim=0)
    return order_N[kept_N]


def roi_align(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Means of bilinear samples in the bins of regions, [K, C, pooled_height, pooled_width].

    Args:
        input: feature maps, [B, C, H, W].
        rois: [K, 5]: index of the image, then x1, y1, x2, y2 in pixels of the image, within it.
        spatial_scale: pixels of the map per pixel of the image.
        sampling_ratio: samples along each side of a bin; 0 or less: one per pixel of the map.
    """
    bins_2 = torch.tensor([pooled_width, pooled_height], device=rois.device)
    corners_K4 = rois[:, 1:].float() * spatial_scale - (0.5 if aligned else 0.0)
    sides_K2 = (corners_K4[:, 2:] - corners_K4[:, :2]).clamp(min=0.0 if aligned else 1.0)
    counts_K2 = (sides_K2 / bins_2).ceil().clamp(min=1).long()
    if sampling_ratio > 0:
        counts_K2 = torch.full_like(counts_K2, sampling_ratio)
    pooled_KCHW = input.new_zeros((len(rois), input.shape[1], pooled_height, pooled_width))
    alike_G3, group_K = torch.cat([rois[:, :1].long(), counts_K2], dim=1).unique(dim=0, return_inverse=True)
    for group, (image, *counts) in enumerate(alike_G3.tolist()):  # regions of one image with as many samples
        mine_N = (group_K == group).nonzero().flatten()
        places = []
        for axis, bins in enumerate((pooled_width, pooled_height)):
            inside_S = (torch.arange(bins * counts[axis], device=rois.device) + 0.5) / (bins * counts[axis])
            pixel_NS = corners_K4[mine_N, axis, None] + inside_S * sides_K2[mine_N, axis, None]
            places.append((2 * pixel_NS + 1) / input.shape[3 - axis] - 1)  # -1 to 1, as grid_sample counts
        x_NHW, y_NHW = torch.broadcast_tensors(places[0][:, None, :], places[1][:, :, None])
        sampled_1CSW = F.grid_sample(
            input[image, None].float(),
            torch.stack([x_NHW, y_NHW], dim=-1).flatten(0, 1)[None],
            padding_mode="border",
            align_corners=False,
        )
        means_CSW = F.avg_pool2d(sampled_1CSW[0], (counts[1], counts[0]))
        means_NCHW = means_CSW.unflatten(1, (len(mine_N), pooled_height)).transpose(0, 1)
        pooled_KCHW = pooled_KCHW.index_copy(0, mine_N, means_NCHW.to(input.dtype))
    return pooled_KCHW


def destroy_process_group() -> None:
    """End the process group of this process, and with it the groups that DeepSpeed has made, if it is in use.

    DeepSpeed keeps its groups in its modules: after `torch.distributed.destroy_process_group` alone, the next engine in
    this process would use those that have ended.
    """
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
    else:
        torch.distributed.destroy_process_group()


def quiet_deepspeed() -> None:
    """Prevent DeepSpeed from compiling what training does not use, and reduce its log output.

    `init_distributed` compiles a shared-memory operator (31 s, needs g++) that only inference uses. The check of any
    optimizer imports Muon, whose functions are declared for `torch.compile`, which imports TorchInductor (1.6 s in
    every process). Seen in 0.19.8; can be removed when DeepSpeed builds and imports them on first use.
    """
    import deepspeed
    from deepspeed.runtime import compiler
    from deepspeed.utils import logger

    compiler.compile = lambda: lambda function: function  # only Muon uses it in DeepSpeed

    # The first access looks at all operators. On a GPU without the CUDA toolkit each prints that it cannot be compiled.
    with contextlib.redirect_stdout(io.StringIO()):
        operators = deepspeed.ops.__compatible_ops__
    operators["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)
    # Raised inside DeepSpeed on every process, about a name that torch 2.13 renamed.
    warnings.filterwarnings("ignore", message=".*_tensor` is deprecated", category=FutureWarning)
