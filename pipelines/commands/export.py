"""`trunkline export`: the network of a checkpoint as ONNX or as a program of torch, compared with it."""

from pathlib import Path
from typing import Literal

import trunkline
from trunkline.modules.networks.export import OPSET, SUFFIXES, Exported, export_network
from trunkline.modules.networks.graphs import Axis
from trunkline.pipelines.commands.output import check_output


def export(checkpoint: str, output: str, to: Literal["onnx", "torch-export"] = "onnx") -> None:
    """Write the network of a checkpoint as a file that runs without Trunkline, and compare the results of both.

    Batch and lengths may vary. With it go the tokenizer, how pictures and sounds are prepared, and in the file the
    names of the classes. A CLIP becomes two files, of images and of texts, and a network that writes texts becomes an
    encoder and a decoder: `clip.onnx` stands for clip_image.onnx and clip_text.onnx.

    Args:
        checkpoint: whatever `trunkline.load` takes: a file that `trunkline fit` wrote, the folder of a run, a folder
            that `convert` wrote, a model of transformers, timm or open_clip, or a hub name.
        output: the file to write, .onnx or .pt2. Files that are there already are kept, and are an error.
        to: onnx (for onnxruntime and others; needs `pip install 'trunkline[onnx]'`) or torch-export (for
            `torch.export.load`, without Python code of the network).
    """
    check_output(output, (SUFFIXES[to],))
    network = trunkline.load(checkpoint).float()
    kind = f"ONNX, opset {OPSET}" if to == "onnx" else "a program of torch.export"
    for found in export_network(network, Path(output), to):
        print(f"{found.path}: {kind}, {found.path.stat().st_size / 1e6:,.1f} MB; {signature(found)}")
        print(
            f"  compared with the network at {len(found.sizes)} sizes: results differ by {found.difference:.1e} of the "
            "largest at most"
        )


def signature(found: Exported) -> str:
    """Inputs with their shapes, and outputs."""
    inputs = []
    for name, each in found.graph.inputs.items():
        inputs.append(f"{name} ({', '.join(a.name if isinstance(a, Axis) else str(a) for a in each.shape)})")
    return f"{', '.join(inputs)} -> {', '.join(found.outputs)}"
