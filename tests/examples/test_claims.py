"""The parts of `benchmarks/claims.py` against independent computations, and the whole on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pal_adapters.errors import ConfigError

from .conftest import ROOT
from .data import write_tasks

sys.path.append(str(ROOT / "benchmarks"))

from claims.data import few
from claims.options import ClaimsOptions
from claims.pieces import Pieces, key_of
from claims.plans import PLANS, Group
from claims.recipes import HOULSBY_SHARE, RECIPES, build, houlsby_size
from claims.run import main
from claims.runs import Runs
from claims.table import row, signed
from claims.verdict import Difference, difference, learned

PIECE = {"recipe": "full", "tasks": ["rte"], "learning_rate": 1e-4}


def scores(predictions: Any, labels: Any, metric: str = "accuracy", trivial: float = 0.5) -> dict[str, Any]:
    return {"metric": metric, "predictions": list(predictions), "labels": list(labels), "trivial": trivial}


def test_pieces_run_once_for_each_setting_and_stop_with_the_budget(tmp_path: Path) -> None:
    now, ran = [0.0], []

    def run() -> dict[str, Any]:
        ran.append(now[0])
        now[0] += 2
        return {"tasks": {}}

    pieces = Pieces(tmp_path, 5, clock=lambda: now[0])
    first = pieces.get(PIECE, run)
    assert first == {"tasks": {}, "seconds": 2.0}
    assert pieces.get(dict(reversed(PIECE.items())), run) == first
    assert len(ran) == 1
    assert pieces.get(PIECE | {"learning_rate": 2e-4}, run) is not None
    assert pieces.get(PIECE | {"learning_rate": 3e-4}, run) is not None  # begins before the end
    assert pieces.get(PIECE | {"learning_rate": 4e-4}, run) is None
    assert pieces.get(PIECE, run) == first
    assert len(ran) == len(list(tmp_path.iterdir())) == 3
    assert Pieces(tmp_path, 5).get(PIECE, run) == first


def test_pieces_that_fail_leave_no_file_and_damaged_ones_are_reported(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path / "pieces", 60)

    def fails() -> dict[str, Any]:
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        pieces.get(PIECE, fails)
    assert pieces.find(PIECE) is None
    pieces.get(PIECE, dict)
    path = pieces.path(PIECE)
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole[:40], encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read as a piece"):
        pieces.find(PIECE)
    path.write_text(whole.replace("rte", "cola"), encoding="utf-8")
    with pytest.raises(ConfigError, match="was made with other settings"):
        pieces.find(PIECE)


def test_difference_of_accuracies() -> None:
    """With equal groups, the jackknife of a mean is its standard error."""
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 2, 100)
    left, right = (draw.integers(0, 2, (3, 100)) for _ in range(2))
    got = difference([([scores(p, labels) for p in left], [scores(p, labels) for p in right])])
    points = 100 * ((left == labels).astype(float) - (right == labels))  # [seeds, examples]
    assert got.mean == pytest.approx(points.mean())
    assert got.spread == pytest.approx(np.std(points.mean(1), ddof=1))
    assert got.examples == pytest.approx(stats.sem(points.mean(0)))
    low, high = stats.t.interval(0.95, 2, loc=points.mean(), scale=stats.sem(points.mean(1)))
    half = np.sqrt(((high - low) / 2) ** 2 + (1.96 * stats.sem(points.mean(0))) ** 2)
    assert got.interval == pytest.approx((points.mean() - half, points.mean() + half))


def test_difference_over_cells_of_several_metrics() -> None:
    draw = np.random.default_rng(2)
    numbers, classes = draw.normal(size=50), draw.integers(0, 2, 60)
    guesses = [numbers + draw.normal(size=50) for _ in range(2)]
    answers = [np.where(draw.random(60) < 0.7, classes, 1 - classes) for _ in range(2)]
    got = difference(
        [
            ([scores(guesses[0], numbers, "pearson")], [scores(guesses[1], numbers, "pearson")]),
            ([scores(answers[0], classes, "matthews")], [scores(answers[1], classes, "matthews")]),
        ]
    )
    correlation = [np.corrcoef(numbers, one)[0, 1] for one in guesses]
    matthews = [np.corrcoef(classes, one)[0, 1] for one in answers]  # of two classes, that is the same
    assert got.mean == pytest.approx(50 * (correlation[0] - correlation[1] + matthews[0] - matthews[1]))
    assert (got.seeds, got.spread, got.interval) == (1, None, None)
    assert got.verdict(-100) == "cannot tell"  # one seed


def test_verdicts() -> None:
    def verdict(low: float, high: float, least: float) -> str:
        return Difference((low + high) / 2, 3, 0.1, 0.1, (low, high)).verdict(least)

    assert verdict(-0.4, 1.0, -0.4) == "agrees"
    assert verdict(-0.5, 1.0, -0.4) == "cannot tell"
    assert verdict(-2.0, -0.4, -0.4) == "cannot tell"
    assert verdict(-2.0, -0.5, -0.4) == "disagrees"
    assert [signed(value) for value in (-0.04, 0.0, 0.04, -1.26, 10)] == ["0.0", "0.0", "0.0", "-1.3", "+10.0"]


def test_learned_takes_three_standard_errors() -> None:
    labels = np.tile([0, 1], 200)
    right = np.arange(400) < np.array([[260], [215]])  # 65 and 53.75 percent; the error is 2.5
    good, bad = (scores(np.where(r, labels, 1 - labels), labels) for r in right)
    assert learned([good])
    assert not learned([bad])


def test_few_examples_of_each_class() -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"label": [0, 1] * 30, "number": list(range(60))})
    found = few(rows, "label", 4, seed=3)
    assert sorted(found["label"]) == [0] * 4 + [1] * 4
    assert few(rows, "label", 4, seed=3)["number"] == found["number"]
    assert few(rows, "label", 4, seed=4)["number"] != found["number"]
    scored = datasets.Dataset.from_dict({"label": [0.5, 1.5]})
    with pytest.raises(ConfigError, match="labels are numbers without classes"):
        few(scored, "label", 4, seed=3)


def test_bottlenecks_are_as_large_as_the_papers() -> None:
    pytest.importorskip("peft")
    from transformers import BertConfig, BertModel

    from pal_adapters.multitask import load_toy_task

    config = BertConfig(
        vocab_size=400, hidden_size=96, num_hidden_layers=3, num_attention_heads=2, intermediate_size=384
    )
    base = BertModel(config)
    total = sum(p.numel() for p in base.parameters())
    task, splits = load_toy_task("entailment", train_size=8, test_size=4)
    size = houlsby_size(base)
    counts = build("houlsby", base, [task.with_data(splits)], "peft", "mean").count_parameters()
    trained = counts["trainable"] - counts["heads"]
    assert trained <= HOULSBY_SHARE * total < trained * (size + 1) / size


def test_every_recipe_gets_the_same_tries(tmp_path: Path) -> None:
    """Pieces of a made-up trainer: the second rate is the best, and the budget is one of pieces."""
    args = ClaimsOptions(str(tmp_path), seeds=2, tries=3, targets=["rte", "copa"], shots=[4])
    ran: list[dict[str, Any]] = []

    def run(settings: dict[str, Any], sources: Any) -> dict[str, Any]:
        ran.append(settings)
        assert [one["recipe"] for one in sources] in ([], ["source"] * len(sources))
        return {"dev": -RECIPES[settings["recipe"]].rates.index(settings["learning_rate"]) % 3 % 2 + 0.1}

    runs = Runs(args, Pieces(tmp_path, 60), {"width": 1}, str.upper, run)
    lines = PLANS["scalearn"](args)
    runs.work(lines)
    made = [one for one in ran if one["recipe"] != "source"]
    for recipe in ("scalearn", "fusion", "scalearn_uniform_pp"):
        for task in args.targets:
            for shots in (None, 4):
                some = [one for one in made if (one["recipe"], one["tasks"], one["shots"]) == (recipe, [task], shots)]
                assert [one["seed"] for one in some] == [0, 0, 0, 1]
                best = runs.rate(Group(recipe, (task,), shots))
                assert (
                    best
                    == some[-1]["learning_rate"]
                    == max(some[:3], key=lambda o: run(o, [])["dev"])["learning_rate"]
                )
                own = shots is None and task in args.sources
                assert ("rte" in some[0]["sources"]) is (own or task == "copa")
    assert len({key_of(one) for one in made}) == 3 * 2 * 2 * 4
    assert all(one["data"] == {task: task.upper() for task in one["tasks"]} for one in made)


def test_whole_script(tiny_encoder: str, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("adapters")
    write_tasks(tmp_path / "data", train_size=40, test_size=12)
    given = ["--model", tiny_encoder, "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    given += ["--claim", "houlsby", "scalearn", "--houlsby_tasks", "stsb", "--sources", "rte", "stsb"]
    given += ["--targets", "copa", "--shots", "2", "--seeds", "1", "--tries", "1", "--max_length", "48"]
    given += ["--batch_size", "4", "--evaluate_every", "1", "--max_evaluations", "2"]
    assert main(given) == 0
    printed = capsys.readouterr().out
    pieces = sorted((tmp_path / "out" / "pieces").iterdir())
    assert len(pieces) == 2 + 2 + 2 * 3
    found = json.loads((tmp_path / "out" / "claims.json").read_text(encoding="utf-8"))
    lines = [line for claim in found["claims"].values() for line in claim]
    assert [line["name"] for line in lines] == ["houlsby", "scalearn", "uniform_pp", "scalearn_2", "uniform_pp_2"]
    assert {line["verdict"] for line in lines} == {"cannot tell"}
    for line in lines:
        assert f"| {line['says']}" in printed
        left, right = (one["scores"][0] for one in line["cells"][0]["sides"])
        assert line["difference"]["mean"] == pytest.approx(left - right)
    for path in pieces:
        piece = json.loads(path.read_text(encoding="utf-8"))
        ((_, task),) = piece["result"]["tasks"].items()
        if task["metric"] == "pearson":
            value = 100 * np.corrcoef(task["predictions"], task["labels"])[0, 1]
        else:
            value = 100 * np.mean(np.equal(task["predictions"], task["labels"]))
        assert 100 * task["score"] == pytest.approx(value, abs=0.1)  # predictions are rounded
        if piece["settings"]["recipe"] == "scalearn":
            assert piece["result"]["parameters"]["trained"] == 2 * 2 * 24  # sources, blocks, width
            assert piece["result"]["transfer"]["moved_most"] > 0.001
            assert set(piece["settings"]["sources"]) == {"rte", "stsb"}
    before = [path.read_bytes() for path in pieces]
    assert main([*given, "--budget", "1e-9"]) == 0  # nothing is left to run
    assert [path.read_bytes() for path in pieces] == before
    assert {path.name for path in (tmp_path / "out").glob("*.png")} >= {"houlsby.png", "scalearn_copa_2.png"}
    # A changed setting is another piece, for which no budget is left.
    assert main([*given, "--patience", "3", "--budget", "1e-9"]) == 0
    assert "0 of 2 pieces are done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tries", "5"], "--tries 5"),
        (["--shots", "0"], "--shots 0"),
        (["--few_shot_only", "--whole_only"], "--few_shot_only --whole_only"),
    ],
)
def test_what_is_rejected(more: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--output_dir", str(tmp_path), *more])


def test_targets_with_all_or_with_few_examples() -> None:
    def shots(**given: Any) -> set[int | None]:
        args = ClaimsOptions(output_dir="out", shots=[4, 16], **given)
        return {group.shots for line in PLANS["scalearn"](args) for group in line.left}

    assert shots() == {None, 4, 16}
    assert shots(few_shot_only=True) == {4, 16}
    assert shots(whole_only=True) == {None}


def test_claims_on_a_gpu_run_beside_each_other(tmp_path: Path, monkeypatch: Any) -> None:
    import claims_gpu

    from pal_adapters.cli.options import parse

    events: list[Any] = []

    class Process:
        def __init__(self, command: list[str]) -> None:
            assert command[1] == str(ROOT / "benchmarks" / "claims.py")
            args, _ = parse("claims.py", "", command[2:], ClaimsOptions)
            assert (args.model, args.data_dir, args.output_dir) == ("m", "d", "o")
            assert (args.device, args.bf16, args.max_length) == ("cpu", True, 128)  # the last one counts
            events.append((args.claim, args.seeds, round(3600 * args.budget)))

        def wait(self) -> int:
            events.append("end")
            return 0

    monkeypatch.setattr("subprocess.Popen", Process)
    assert claims_gpu.main(["m", "d", "o", "--device", "cpu"]) == 0
    beside = [(["houlsby", "pals"], 5, 432), (["ca_mtl"], 5, 432), (["scalearn"], 5, 432)]
    every = ["houlsby", "pals", "scalearn", "ca_mtl"]
    assert events == [(["scalearn"], 1, 72), "end", *beside, *["end"] * 3, (every, 5, 0), "end"]
    assert sum(seconds for _, _, seconds in (events[0], beside[0])) < 600
    assert claims_gpu.main(["m"]) == 2


def test_verdicts_of_the_short_runs() -> None:
    import short_claims

    found = {line["name"]: line for lines in short_claims.lines().values() for line in lines}
    page = (ROOT / "docs" / "results" / "index.md").read_text(encoding="utf-8")
    stored = json.loads((ROOT / "docs" / "results" / "short_claims.json").read_text(encoding="utf-8"))
    for lines in stored.values():
        for line in lines:
            assert line["verdict"] == found[line["name"]]["verdict"]
            assert (line["difference"] or {}).get("mean") == (found[line["name"]]["difference"] or {}).get("mean")
            assert f"| {' | '.join(row(line))} |" in page
    runs = json.loads((ROOT / "docs" / "results" / "many_tasks.json").read_text(encoding="utf-8"))

    def scores(preset: str) -> Any:  # [seeds, tasks], of the tasks that a recipe learned
        some = [run for run in runs if run["config"]["preset"] == preset]
        some.sort(key=lambda run: run["config"]["seed"])
        return np.array([[next(iter(run["scores"][t].values())) for t in ("stsb", "sst2", "qnli")] for run in some])

    left, right = scores("houlsby"), scores("full_single")
    by_seed = 100 * (left - right).mean(1)
    assert found["houlsby"]["difference"]["mean"] == pytest.approx(by_seed.mean())
    assert found["houlsby"]["difference"]["spread"] == pytest.approx(np.std(by_seed, ddof=1))
    sizes = np.array([1500, 872, 5463])
    total = 0.0
    for side in (left.mean(0), right.mean(0)):
        total += (1 - side[0] ** 2) ** 2 / (sizes[0] - 1) + (side[1:] * (1 - side[1:]) / sizes[1:]).sum()
    assert found["houlsby"]["difference"]["examples"] == pytest.approx(100 * np.sqrt(total) / 3)
    assert set(found["houlsby"]["not_learned"]) == {"rte", "mrpc", "cola"}
