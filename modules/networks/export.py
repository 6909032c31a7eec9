"""Networks as files that run without Trunkline: ONNX, and programs of `torch.export`; each is compared before it stays.

Needs onnx, onnxscript and onnxruntime, but only for ONNX.
"""

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.export import Dim, ExportedProgram

from trunkline import TrunklineError, __version__
from trunkline.files import cannot_write, replacing
from trunkline.modules.networks.base import Network
from trunkline.modules.networks.graphs import BATCH, Axis, Graph

Format = Literal["onnx", "torch-export"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
OPSET = 20
"""Of ONNX: the first with GELU. Attention, of opset 23, would be no faster, and fewer programs can read it."""
LARGEST_DIFFERENCE = 1e-4
"""Largest difference from the network, in times its largest output."""
CHECKED_SIZE = 1024
"""A size without a limit, or with a larger one, is checked up to this one."""
ONE_FILE = 2**31 - 2**20
"""Bytes of weights up to which an ONNX file holds them itself; the format ends at 2 GiB."""
FACTS_FILE = "trunkline.json"
"""In a program of torch: what `load` of `torch.export` returns for it in `extra_files`."""


class Exported(NamedTuple):
    """One graph that was written and compared."""

    path: Path
    graph: Graph
    outputs: list[str]
    """Their names."""
    difference: float
    """The largest one from the network, in times its largest output."""
    sizes: list[dict[str, int]]
    """Those with which it was compared."""


class Exportable(nn.Module):
    """A graph as a module, whose weights are those of the network.

    Args:
        network: what the graph is of.
        graph: one of its graphs.
    """

    def __init__(self, network: Network, graph: Graph) -> None:
        super().__init__()
        self.network = network
        # torch names what it asserts about sizes after the parameters; it cannot with `**inputs`.
        names = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in graph.inputs]
        self.forward = partial(graph.run)
        self.forward.__signature__ = Signature(names)  # type: ignore[attr-defined]


def export_network(network: Network, output: Path, to: Format) -> list[Exported]:
    """Write a network's graphs in another format, with what goes with it, and compare each with the network.

    A network of several graphs is written as files whose names end in theirs (`clip_image.onnx`). Beside them go the
    tokenizer and how inputs are prepared. Either all files are written or none.

    Args:
        network: in evaluation mode, in float32 and on the CPU.
        output: the file to write, in a folder that exists.
        to: the format.

    Raises:
        TrunklineError: if a package is missing, if the network cannot be exported, if what was written gives other
            results, if a file is there already, or cannot be written.
    """
    if to == "onnx":
        require_onnx()
    graphs, about = network.graphs(), facts_about(network)
    texts = {} if network.companions is None else network.companions.files()
    paths = [output.with_stem(f"{output.stem}_{graph.name}") if graph.name else output for graph in graphs]
    refuse_taken(paths, {output.with_name(name): text for name, text in texts.items()})
    found = []
    try:
        with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as place:
            for path, graph in zip(paths, graphs, strict=True):
                file = Path(place, path.name)
                compared = write_and_compare(network, graph, file, to, {**about, **graph.facts})
                found.append(compared._replace(path=path))
            for name, text in texts.items():
                Path(place, name).write_text(text, encoding="utf-8")
            files = sorted(Path(place).iterdir())  # with the weights of an ONNX file that is too large for them
            with replacing(*(output.with_name(file.name) for file in files)) as temporaries:
                for file, temporary in zip(files, temporaries, strict=True):
                    file.rename(temporary)
    except OSError as error:
        raise cannot_write(output, error, "output") from error
    return found


def require_onnx() -> None:
    """Raise an error that says what to install, if a package for ONNX is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(package)
        except ImportError as error:
            raise TrunklineError(f"ONNX needs the package {package}: pip install 'trunkline[onnx]'", "to") from error


def refuse_taken(paths: list[Path], companions: dict[Path, str]) -> None:
    """Refuse to write over files; those that go with a network may be there already if they are the same."""
    taken = [path for path in paths if path.exists()]
    taken += [p for p, text in companions.items() if p.exists() and (p.is_dir() or p.read_bytes() != text.encode())]
    if taken:
        names = " and ".join(map(str, taken))
        raise TrunklineError(f"there is {names} already; choose another folder or name", "output")


def facts_about(network: Network) -> dict[str, Any]:
    """What a file says about the network in it."""
    names = None if network.companions is None else network.companions.class_names
    return {"network": type(network).__name__} | ({} if names is None else {"class_names": names})


def write_and_compare(network: Network, graph: Graph, file: Path, to: Format, facts: Mapping[str, Any]) -> Exported:
    """Write one graph, read it again, and compare its results with the network's."""
    trials = trial_sizes(graph)
    what = f"the {graph.name} of the {type(network).__name__}" if graph.name else f"the {type(network).__name__}"
    with torch.no_grad(), quiet_exporters():
        try:
            outputs = list(graph.run(**example(graph, trials[0])))
            program = traced(network, graph)
            if to == "onnx":
                write_onnx(program, graph, outputs, file, facts)
            else:
                torch.export.save(program, file, extra_files={FACTS_FILE: json.dumps(facts)})
            run, found = runner_of(file, to, outputs), []
            for sizes in trials:
                inputs = example(graph, sizes)
                found.append(largest_difference(run(inputs), graph.run(**inputs)))
        except OSError:
            raise
        except Exception as error:  # torch and onnxruntime raise many kinds
            reason = str(error).strip().split("\n")[0]
            raise TrunklineError(f"{what} cannot be exported to {to}: {type(error).__name__}: {reason}") from error
    if not max(found) <= LARGEST_DIFFERENCE:
        at = ", ".join(f"{name} {size}" for name, size in trials[found.index(max(found))].items())
        raise TrunklineError(
            f"{file.name} gives other results than {what}: at {at} they differ by {max(found):.1e} of the largest, "
            f"more than {LARGEST_DIFFERENCE:.0e}. It was not kept; try the other format, or report this as a defect"
        )
    return Exported(file, graph, outputs, max(found), trials)


def axes_of(graph: Graph) -> list[Axis]:
    """The sizes that may vary, the batch first."""
    return list(dict.fromkeys(a for each in graph.inputs.values() for a in each.shape if isinstance(a, Axis)))


def trial_sizes(graph: Graph) -> list[dict[str, int]]:
    """Sizes to compare with: the largest, the smallest and some between, in batches of one row and of several."""
    trials = []
    for number, (batch, limit) in enumerate(((1, CHECKED_SIZE), (3, CHECKED_SIZE), (2, 65), (5, 23))):
        shares, sizes = (1.0, 0.0, 0.4, 0.7), {}
        for place, axis in enumerate(axes_of(graph)):
            high = max(axis.low, min(axis.high or limit, limit))
            sizes[axis.name] = axis.low + round((high - axis.low) * shares[(number + place - 1) % 4])
        trials.append(sizes | {BATCH.name: batch})
    return trials


def example(graph: Graph, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Inputs of the given sizes, the same ones at each call."""
    draws = Generator().manual_seed(0)
    shapes = {n: [sizes[a.name] if isinstance(a, Axis) else a for a in each.shape] for n, each in graph.inputs.items()}
    return {name: each.draw(shapes[name], draws) for name, each in graph.inputs.items()}


def traced(network: Network, graph: Graph) -> ExportedProgram:
    """The graph as a program for all sizes that it takes."""
    # A size in the middle: torch would take one at the end of its range for a constant.
    middle = {a.name: a.low + (min(a.high or CHECKED_SIZE, CHECKED_SIZE) - a.low + 1) // 2 for a in axes_of(graph)}
    dims = {a.name: Dim(a.name, min=a.low, max=a.high) for a in axes_of(graph) if a.high is None or a.low < a.high}
    shapes = {
        name: {place: dims[a.name] for place, a in enumerate(each.shape) if isinstance(a, Axis) and a.name in dims}
        for name, each in graph.inputs.items()
    }
    return torch.export.export(
        Exportable(network, graph),
        (),
        example(graph, middle | {BATCH.name: 2}),
        dynamic_shapes=shapes,
        # Equations of sizes that hold but that torch cannot prove are then checked in each call, and not refused.
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def write_onnx(
    program: ExportedProgram, graph: Graph, outputs: list[str], file: Path, facts: Mapping[str, Any]
) -> None:
    """Write a program as ONNX; weights that are shared are written once."""
    names = {
        name: {place: axis.name for place, axis in enumerate(each.shape) if isinstance(axis, Axis)}
        for name, each in graph.inputs.items()
    }
    written: Any = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(graph.inputs),
        output_names=outputs,
        dynamic_shapes=names,
        verbose=False,
    )
    written.model.producer_name, written.model.producer_version = "trunkline", __version__
    written.model.metadata_props.update({k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()})
    size = sum(weight.numel() * weight.element_size() for weight in program.state_dict.values())
    written.save(file, external_data=size > ONE_FILE)


def runner_of(file: Path, to: Format, outputs: list[str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Read a file that was written, with the library that others will read it with."""
    if to == "torch-export":
        module = torch.export.load(file).module()
        return lambda inputs: module(**inputs)
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(outputs, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)}

    return run


def largest_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest difference of any output, in times its largest value; infinite for other shapes, and for NaN."""
    differences = [0.0]
    for name, want in wanted.items():
        got = found[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            return math.inf
        if not want.is_floating_point():
            differences.append(0.0 if torch.equal(got, want) else math.inf)
            continue
        scale = want.abs().max().clamp(min=torch.finfo(want.dtype).tiny)
        difference = float((got - want).abs().max() / scale)
        differences.append(math.inf if math.isnan(difference) else difference)
    return max(differences)


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """A block in which the exporters do not report what our comparison finds out."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
