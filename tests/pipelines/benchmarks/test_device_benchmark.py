"""`trunkline benchmark --device`: a rehearsal on the CPU, the networks at full size, and its arithmetic and limits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trunkline import TrunklineError
from trunkline.modules.generation.compiled import CompiledDecoder
from trunkline.modules.generation.low_precision import Int8Linear
from trunkline.modules.networks import GPT
from trunkline.pipelines.benchmarks import device_benchmark, device_cases
from trunkline.pipelines.benchmarks.benchmark import benchmark
from trunkline.pipelines.benchmarks.device_benchmark import Budget, measure_device, window_steps
from trunkline.pipelines.benchmarks.device_cases import TINY, Bench, DeviceCase, Prepared, Sizes

CPU = torch.device("cpu")
PARAMETERS = {
    "GPT-2 124M": 124_439_808 + 47 * 768,  # OpenAI's, and 47 words that fill up a multiple of 64
    "ViT-S/16": 22_050_664,  # timm's vit_small_patch16_224
    "ViT-B/16": 86_567_656,
    "BERT-base": 109_514_298,  # bert-base-uncased with its head for masked tokens
    "CLIP ViT-B/32": 151_277_313,  # OpenAI's
}
"""Published numbers of parameters."""


def test_a_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All cases once, with the networks of the peers, and figures that fit together."""
    monkeypatch.setattr(device_benchmark, "WINDOW", 0.0)
    benchmark(device="cpu", rounds=2, output=str(tmp_path / "figures.json"))
    results, shown = json.loads((tmp_path / "figures.json").read_text()), capsys.readouterr().out
    assert results["left_out"] == []
    assert results["device"] == "cpu"
    assert results["rehearsal"]
    assert results["versions"]["torch"]
    assert [row["peer"] for row in results["cases"]] == [case.peer for case in device_cases.device_cases(TINY)]
    for row in results["cases"]:
        assert 0 < row["range"][0] <= row["ratio"] <= row["range"][1]
        assert row["rounds"] == 2
        assert row["mfu"] is None
        assert row["peak_memory_bytes"] is None
        assert f"{row['ratio']:.3f} times {row['peer']}" in shown
    names = [row["case"] for row in results["cases"] if "greedy" in row["case"]]
    assert names == [
        f"4 greedy tokens of tiny GPT-2 124M, {weights} weights, batch {batch}"
        for weights in ("bf16", "int8")
        for batch in (1, 4)
    ]
    trained = results["cases"][:5]
    assert all(row["peer_flops_per_step"] >= row["flops_per_step"] > 0 for row in trained)
    assert "say nothing about speed" in shown


def test_generation_is_compiled_where_the_peer_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights in bfloat16, then in int8; at each of the two batch sizes."""
    given: list[tuple[type, bool, int]] = []

    def generate(network: Any, tokens: torch.Tensor, **_: Any) -> None:
        int8 = any(isinstance(module, Int8Linear) for module in network.modules())
        given.append((type(network), int8, len(tokens)))

    monkeypatch.setattr(device_cases, "generate", generate)
    for compiled in (True, False):
        for case in device_cases.device_cases(TINY):
            if case.what == "generation":
                case.ours(Bench(TINY, case.batch_size, CPU, compiled))[0]()
    assert given == [(kind, int8, rows) for kind in (CompiledDecoder, GPT) for int8 in (False, True) for rows in (1, 4)]


@pytest.mark.parametrize("what", ["gpt", "vit", "bert"])
def test_the_operations_of_a_peer_are_its_own(what: str) -> None:
    """All tokens in all blocks and in the head: also where ours leaves those out that the loss does not read."""
    case = next(case for case in device_cases.device_cases(TINY) if case.what == what)
    ours, theirs = (side(Bench(TINY, 3, CPU, False))[1] for side in (case.ours, case.theirs))
    dim, patches = 16, (32 // 16) ** 2
    tokens = {"gpt": 24, "vit": patches + 1, "bert": 16}[what]
    head = {"gpt": tokens * dim * 64, "vit": dim * 10, "bert": tokens * dim * (dim + 64)}[what]
    first = patches * 3 * 16 * 16 * dim if what == "vit" else 0
    assert theirs == 3 * 3 * 2 * (first + tokens * (12 * dim * dim + 2 * tokens * dim) + head)
    assert ours == theirs if what == "gpt" else ours < theirs


def test_both_sides_are_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size, without memory: as many parameters as were published, and the operations of PaLM's formula."""
    built: list[nn.Module] = []

    def training_step(network: nn.Module, loss: Callable[[], Any], bf16: bool) -> Callable[[], None]:
        built.append(network)
        return lambda: None

    monkeypatch.setattr(device_cases, "training_step", training_step)
    monkeypatch.setattr(device_cases, "counted_flops", lambda *_: 0)  # a peer may read its inputs
    meta = torch.device("meta")
    for case in [case for case in device_cases.device_cases(Sizes()) if case.what not in ("generation", "loss")]:
        del built[:]
        with meta:
            bench = Bench(Sizes(), 2, meta, False)
            flops = case.ours(bench)[1]
            case.theirs(bench)
        name = next(name for name in PARAMETERS if case.name.startswith(name))
        ours, theirs = (sum(p.numel() for p in network.parameters()) for network in built)
        assert theirs == PARAMETERS[name]
        # Our class token needs no position of its own, and our CLIP has biases in its patches and both projections.
        more = {"ViT-S/16": -384, "ViT-B/16": -768, "CLIP ViT-B/32": -768 + 768 + 512 + 512}.get(name, 0)
        assert ours == theirs + more, name
        if case.what == "gpt":  # arXiv:2204.02311, appendix B; the embedding of words is also the output layer
            for_a_token = 6 * (ours - 1024 * 768) + 12 * 12 * 768 * 1024
            assert flops / (2 * 1024) == pytest.approx(for_a_token, rel=0.01)


def test_the_loss_can_be_measured_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, of as many tokens as `batch_size` says; on a GPU also against the plain loss compiled."""
    monkeypatch.setattr(device_benchmark, "WINDOW", 0.0)
    made: list[tuple[Any, ...]] = []
    whole = device_cases.loss_step

    def loss_step(*arguments: Any) -> Callable[[], None]:
        made.append(arguments)
        return whole(*arguments)

    monkeypatch.setattr(device_cases, "loss_step", loss_step)
    benchmark("loss", rounds=1, batch_size=8, device="cpu", output=str(tmp_path / "a.json"))
    rows = json.loads((tmp_path / "a.json").read_text())["cases"]
    assert [(row["peer"], row["batch_size"]) for row in rows] == [("plain loss", 8), ("plain loss, compiled", 8)]
    assert [(row["flops_per_step"], row["peer_flops_per_step"]) for row in rows] == [(6 * 8 * 16 * 64,) * 2] * 2
    assert made == [(name, 8, CPU, True, 16, 64) for name in ("chunked", "plain") * 2]  # a rehearsal compiles nothing
    monkeypatch.setattr(device_cases, "loss_step", lambda *arguments: arguments)
    large = [case for case in device_cases.device_cases(Sizes()) if case.what == "loss"]
    given = [case.theirs(Bench(Sizes(), case.batch_size, CPU, True))[0] for case in large]
    assert given == [(kind, 4096, CPU, True, 768, 50304) for kind in ("plain", "compiled")]


class Clock:
    """A clock that only moves when something is done."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def pretended(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, *names: str, least: int = 1, setup: float = 20.0
) -> list[tuple[str, int]]:
    """Cases in which our step takes 1 s and theirs 2 s, after `setup` seconds for each side; returns what was made."""
    made: list[tuple[str, int]] = []

    def case(name: str) -> DeviceCase:
        def side(seconds: float, flops: int) -> Callable[[Bench], Prepared]:
            def make(bench: Bench) -> Prepared:
                clock.now += setup
                made.append((name, bench.batch_size))
                return lambda: setattr(clock, "now", clock.now + seconds), flops

            return make

        ours, theirs = side(1.0, 3 * 10**12), side(2.0, 9 * 10**12)
        return DeviceCase(name, name, "peer", "tokens", 32, least, 10, ours, theirs)

    monkeypatch.setattr(device_benchmark, "device_cases", lambda sizes: map(case, names))

    def seconds_a_step(step: Callable[[], object], steps: int, device: torch.device) -> float:
        before = clock.now
        for _ in range(steps):
            step()
        return (clock.now - before) / steps

    monkeypatch.setattr(device_benchmark, "seconds_a_step", seconds_a_step)
    return made


def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    pretended(monkeypatch, clock, "one")
    monkeypatch.setattr(device_benchmark, "peak_speed", lambda device, dtype: 6 * 10**12)
    results = measure_device("all", 3, None, str(tmp_path / "a.json"), "cpu", None, Sizes(), clock)
    (row,) = results["cases"]
    assert (row["per_second"], row["peer_per_second"]) == (320, 160)
    assert (row["ratio"], row["range"], row["rounds"]) == (2.0, (2.0, 2.0), 3)
    assert (row["mfu"], row["peer_mfu"]) == (0.5, 0.75)
    assert row["preparation_seconds"] == 2 * 20 + 4 * (1 + 2)  # three steps of each side, and one that is timed
    assert "320 tokens a second, 2.000 times peer" in (shown := capsys.readouterr().out)
    assert "MFU 50.0% (theirs 75.0%)" in shown


def test_the_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A case takes 52 s to prepare and 3 s a round. In 2 minutes: one whole, one with fewer rounds, and no third."""
    clock = Clock()
    made = pretended(monkeypatch, clock, "one", "two", "three")
    results = measure_device("all", 4, None, str(tmp_path / "a.json"), "cpu", 2.0, Sizes(), clock)
    assert [(row["case"], row["rounds"]) for row in results["cases"]] == [("one", 4), ("two", 1)]
    assert clock.now <= 1000 + 120
    assert results["left_out"] == [{"case": "three", "reason": "there was no time left"}]
    assert {name for name, _ in made} == {"one", "two"}
    assert "left out: three: there was no time left" in capsys.readouterr().out
    with pytest.raises(TrunklineError, match="no case could be measured: the time ran out while it was prepared"):
        measure_device("all", 4, None, str(tmp_path / "b.json"), "cpu", 0.5, Sizes(), clock)


def test_a_batch_too_large_is_halved_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    made = pretended(monkeypatch, clock, "one", least=4)
    limit, freed = [8], []
    monkeypatch.setattr(device_benchmark, "free_memory", freed.append)
    whole = device_benchmark.warmed_up

    def warmed_up(make: Callable[[], Any], device: torch.device) -> Any:
        found = whole(make, device)
        if len(made) % 2 == 0 and made[-1][1] > limit[0]:  # the peer needs more
            raise torch.OutOfMemoryError("CUDA out of memory")
        if made[-1][1] > limit[0]:
            made.append(made[-1])
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(device_benchmark, "warmed_up", warmed_up)
    (row,) = measure_device("all", 1, None, str(tmp_path / "a.json"), "cpu", None, Sizes(), clock)["cases"]
    assert (row["batch_size"], row["asked_batch_size"], row["per_second"]) == (8, 32, 80)
    assert len(freed) == 3
    assert "32 did not fit into memory" in capsys.readouterr().out
    limit[0] = 2
    with pytest.raises(TrunklineError, match="no case could be measured: not enough memory for a batch of 4"):
        measure_device("all", 1, None, str(tmp_path / "a.json"), "cpu", None, Sizes(), clock)


def test_one_case_does_not_cost_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a missing peer nor a defect of one; and the results so far are in the file when a run is cut off."""
    clock, file = Clock(), tmp_path / "a.json"
    pretended(monkeypatch, clock, "one", "two", "three", "four")
    whole = device_benchmark.measure_case

    def measure_case(case: DeviceCase, *rest: Any) -> Any:
        if case.name == "four":
            raise KeyboardInterrupt
        faults = {"one": TrunklineError("run pip install peer"), "two": RuntimeError("a defect\nof theirs")}
        if case.name in faults:
            raise faults[case.name]
        return whole(case, *rest)

    monkeypatch.setattr(device_benchmark, "measure_case", measure_case)
    with pytest.raises(KeyboardInterrupt):
        measure_device("all", 1, None, str(file), "cpu", None, Sizes(), clock)
    results = json.loads(file.read_text())
    assert [row["case"] for row in results["cases"]] == ["three"]
    reasons = {part["case"]: part["reason"] for part in results["left_out"]}
    assert reasons == {"one": "run pip install peer", "two": "RuntimeError: a defect"}


def test_windows_and_budget() -> None:
    assert [window_steps(seconds) for seconds in (1e-6, 0.05, 0.3, 7.0)] == [50, 10, 2, 1]
    clock = Clock()
    budget = Budget(2.0, clock)
    clock.now += 50
    assert budget.left() == 70
    assert Budget(None, clock).left() == float("inf")


def test_a_gpu_too_old_for_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_benchmark, "find_device", lambda name: torch.device(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    with pytest.raises(TrunklineError, match=r"Tesla T4 has compute capability 7\.5"):
        benchmark(device="cuda")
