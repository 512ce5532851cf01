"""`model.onnx`: images in, features and tokens out, for any number of images; its weights are in `model.onnx.data`.

timm's ViT becomes a graph node by node. torch's exporter traces any model but holds several copies of the weights; this
model is simple and known. A protobuf file is limited to 2 GB, and its readers hold all of it in memory. Weights in a
separate file have no such limit, are written one at a time, and are memory-mapped by onnxruntime.

This module imports onnx, which need not be installed.

Axes: B images, N patches (h x w), T tokens, D width, H heads, K width of a head, F hidden width of an MLP.
"""

import os
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto, helper, numpy_helper
from torch import Tensor

from moce_ds.exporting.formats.weights import DenseModel
from moce_ds.exporting.reference_model import Trial
from moce_ds.models.build import ModelSpec
from moce_ds.models.mae import NORM_EPS
from moce_ds.models.vit import ViTShape

_GRAPH, _WEIGHTS = "model.onnx", "model.onnx.data"
_OPSET, _IR_VERSION = 17, 8  # the oldest with LayerNormalization; runtimes and converters since 2022 read it
_TRANSPOSED = ".T"  # suffix of a linear layer's matrix for MatMul, [in, out]; timm's is [out, in]
_PAGE = 4096  # alignment of weights, required for memory mapping


def write(folder: Path, model: DenseModel) -> None:
    """Write both files. The graph names the other one by a relative path, so they can be moved together."""
    weights = write_weights(folder / _WEIGHTS, model.state)
    (folder / _GRAPH).write_bytes(vit_model(model.spec.shape, weights).SerializeToString())


def run(folder: Path, spec: ModelSpec, trial: Trial) -> Tensor:
    """Tokens by onnxruntime, for one image and then for the others, because the image axis must be dynamic."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / _GRAPH, providers=["CPUExecutionProvider"])
    images = trial.images_BCHW
    parts = [session.run(["tokens"], {"images": part.numpy()})[0] for part in (images[:1], images[1:])]
    return torch.cat([torch.from_numpy(part) for part in parts])


def write_weights(path: Path, state: Mapping[str, Tensor]) -> list[TensorProto]:
    """Write the weights of timm's ViT; returns the location of each. Needs the memory of the largest one."""
    placed = []
    with open(path, "wb") as file:
        for name, tensor in state.items():
            if tensor.ndim == 2:
                name, tensor = name + _TRANSPOSED, tensor.T
            array = tensor.detach().float().contiguous().numpy()
            file.seek(-file.tell() % _PAGE, os.SEEK_CUR)
            place = {"location": path.name, "offset": file.tell(), "length": array.nbytes}
            file.write(array.data)
            entries = [StringStringEntryProto(key=key, value=str(value)) for key, value in place.items()]
            placed.append(
                TensorProto(
                    name=name,
                    dims=array.shape,
                    data_type=TensorProto.FLOAT,
                    data_location=TensorProto.EXTERNAL,
                    external_data=entries,
                )
            )
    return placed


def vit_model(shape: ViTShape, weights: Sequence[TensorProto]) -> ModelProto:
    """`images` [B, 3, S, S] -> `features` [B, D] and `tokens` [B, T, D], with B free.

    Args:
        weights: as `write_weights` returns them.
    """
    graph = _ViT(shape).graph(weights)
    opset = helper.make_opsetid("", _OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION, producer_name="moce_ds")


class _ViT:
    """Nodes in the order of timm's forward pass. Values are identified by name; every method returns the name of its
    result."""

    def __init__(self, shape: ViTShape) -> None:
        self.shape = shape
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def graph(self, weights: Sequence[TensorProto]) -> GraphProto:
        """All nodes with inputs, outputs and weights; call once, because it adds the nodes."""
        shape, size = self.shape, self.shape.image_size
        x_BTD = self.embedded("images")
        for block in range(shape.depth):
            x_BTD = self.block(x_BTD, f"blocks.{block}")
        self.features(self.norm(x_BTD, "norm", "tokens"))
        inputs = [("images", (3, size, size))]
        outputs = [("features", (shape.width,)), ("tokens", (shape.num_patches + 1, shape.width))]
        input_infos, output_infos = (
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *rest]) for name, rest in values]
            for values in (inputs, outputs)
        )
        return helper.make_graph(self.nodes, "vit", input_infos, output_infos, [*self.constants.values(), *weights])

    def embedded(self, images_BCHW: str) -> str:
        """The cls token, then the patches in row order, plus positions."""
        width, patch = self.shape.width, [self.shape.patch_size] * 2
        proj = "patch_embed.proj"
        grid_BDhw = self.add(
            "Conv", proj, images_BCHW, f"{proj}.weight", f"{proj}.bias", kernel_shape=patch, strides=patch
        )
        rows_BDN = self.reshape(grid_BDhw, (0, width, -1), "patch_embed.rows")
        patches_BND = self.add("Transpose", "patch_embed", rows_BDN, perm=[0, 2, 1])
        count = self.add("Shape", "cls.count", images_BCHW, start=0, end=1)
        copies = self.add("Concat", "cls.copies", count, self.constant("cls.once", [1, 1]), axis=0)
        cls_B1D = self.add("Expand", "cls", "cls_token", copies)
        return self.add("Add", "embedded", self.add("Concat", "rows", cls_B1D, patches_BND, axis=1), "pos_embed")

    def block(self, x_BTD: str, name: str) -> str:
        """Attention and MLP, each on normalised tokens and added to its input."""
        attended_BTD = self.attention(self.norm(x_BTD, f"{name}.norm1"), f"{name}.attn")
        x_BTD = self.add("Add", f"{name}.attended", x_BTD, attended_BTD)
        hidden_BTF = self.linear(self.norm(x_BTD, f"{name}.norm2"), f"{name}.mlp.fc1")
        mlp_BTD = self.linear(self.gelu(hidden_BTF, f"{name}.mlp.act"), f"{name}.mlp.fc2")
        return self.add("Add", name, x_BTD, mlp_BTD)

    def attention(self, x_BTD: str, name: str) -> str:
        """softmax(q k^T / sqrt(K)) v of every head, concatenated and projected."""
        width, heads = self.shape.width, self.shape.heads
        each = width // heads
        qkv_BT3HK = self.reshape(self.linear(x_BTD, f"{name}.qkv"), (0, 0, 3, heads, each), f"{name}.heads")
        qkv_3BHTK = self.add("Transpose", f"{name}.first", qkv_BT3HK, perm=[2, 0, 3, 1, 4])
        q_BHTK, k_BHTK, v_BHTK = (
            self.add("Gather", f"{name}.{letter}", qkv_3BHTK, self.constant(letter, index), axis=0)
            for index, letter in enumerate("qkv")
        )
        scaled_BHTK = self.add("Mul", f"{name}.scaled", q_BHTK, self.constant("scale", each**-0.5))
        transposed_BHKT = self.add("Transpose", f"{name}.transposed", k_BHTK, perm=[0, 1, 3, 2])
        scores_BHTT = self.add("MatMul", f"{name}.scores", scaled_BHTK, transposed_BHKT)
        shares_BHTT = self.add("Softmax", f"{name}.shares", scores_BHTT, axis=-1)
        mixed_BHTK = self.add("MatMul", f"{name}.mixed", shares_BHTT, v_BHTK)
        mixed_BTHK = self.add("Transpose", f"{name}.by_token", mixed_BHTK, perm=[0, 2, 1, 3])
        return self.linear(self.reshape(mixed_BTHK, (0, 0, width), f"{name}.joined"), f"{name}.proj")

    def gelu(self, x: str, name: str) -> str:
        """x / 2 * (1 + erf(x / sqrt(2))): ONNX has a node for it since opset 20; runtimes recognise the pattern."""
        erf = self.add("Erf", f"{name}.erf", self.add("Div", f"{name}.over", x, self.constant("sqrt2", sqrt(2))))
        twice = self.add("Mul", f"{name}.twice", x, self.add("Add", f"{name}.up", erf, self.constant("one", 1.0)))
        return self.add("Mul", name, twice, self.constant("half", 0.5))

    def features(self, tokens_BTD: str) -> None:
        """The mean of the patch tokens, as `moce features` computes it."""
        end = self.shape.num_patches + 1
        bounds = (self.constant(f"patches.{word}", [at]) for word, at in (("from", 1), ("to", end), ("axis", 1)))
        patches_BND = self.add("Slice", "patches", tokens_BTD, *bounds)
        self.add("ReduceMean", "features", patches_BND, axes=[1], keepdims=0)

    def norm(self, x: str, name: str, output: str = "") -> str:
        return self.add(
            "LayerNormalization", output or f"{name}.y", x, f"{name}.weight", f"{name}.bias", axis=-1, epsilon=NORM_EPS
        )

    def linear(self, x: str, name: str) -> str:
        product = self.add("MatMul", f"{name}.product", x, f"{name}.weight{_TRANSPOSED}")
        return self.add("Add", f"{name}.y", product, f"{name}.bias")

    def reshape(self, x: str, sizes: tuple[int, ...], name: str) -> str:
        """0 keeps an axis."""
        return self.add("Reshape", name, x, self.constant(f"{name}.sizes", list(sizes)))

    def constant(self, name: str, value: int | float | list[int]) -> str:
        """A small value stored in the graph itself."""
        array = np.asarray(value, np.float32 if isinstance(value, float) else np.int64)
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def add(self, operator: str, output: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output
