"""Makes the tables of the results pages from the output folders of the scripts in `examples`.

    python benchmarks/tables.py tasks --json docs/results/ca_mtl.json out/*/
    python benchmarks/tables.py transfer --json docs/results/transfer.json out/*/
    python benchmarks/tables.py glue --json docs/results/many_tasks.json out/*/

Prints the tables and stores their data in one file: settings, versions, scores, counts, times.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Run = dict[str, Any]
DROPPED = ("output_dir", "source_dir", "data_dir", "compare")  # paths on the machine that ran it


def read(folder: Path) -> Run:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def settings(run: Run) -> Run:
    return {name: value for name, value in run["config"].items() if name not in DROPPED}


def transfer_run(run: Run) -> Run:
    target = run["target"]
    kept = ("metrics", "baseline", "primary_metric", "rows", "best_epoch", "steps", "parameters", "seconds")
    folded = {name: target["folded"].get(name) for name in ("largest_logit_difference", "same_predictions", "reason")}
    sources = {
        name: {key: source[key] for key in ("metrics", "baseline", "primary_metric", "rows", "best_epoch", "steps")}
        for name, source in run["sources"].items()
    }
    return {
        "config": settings(run),
        "versions": run["versions"],
        "sources": sources,
        "target": {name: target[name] for name in kept},
        "folded": {name: value for name, value in folded.items() if value is not None},
    }


def percent(values: list[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    rule = [":---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def without_repeats(runs: list[Run]) -> None:
    """Keeps the results of each source once, because runs share sources."""
    known: Run = {}
    for run in runs:
        run["sources"] = {name: found for name, found in run.get("sources", {}).items() if known.get(name) != found}
        known |= run["sources"]


def transfer_tables(runs: list[Run]) -> str:
    """A table with a row per method and a column per target, and a table of the sources."""
    targets = list(dict.fromkeys(run["config"]["target"] for run in runs))
    methods = list(dict.fromkeys(run["config"]["method"] for run in runs))

    def of(method: str, target: str) -> list[Run]:
        return [r for r in runs if (r["config"]["method"], r["config"]["target"]) == (method, target)]

    def score(run: Run, part: str) -> float:
        split = next(iter(run["target"]["metrics"]))
        return run["target"][part][split][run["target"]["primary_metric"]]

    def cell(method: str, target: str) -> str:
        found = of(method, target)
        return percent([score(run, "metrics") for run in found]) if found else ""

    heads = []
    for target in targets:
        example = next(run for run in runs if run["config"]["target"] == target)
        seeds = max(len(of(method, target)) for method in methods)
        heads.append(f"{target}, {example['target']['primary_metric']}, seeds: {seeds}")
    rows = [[method, *(cell(method, target) for target in targets)] for method in methods]
    trivial = [next(percent([score(r, "baseline")]) for r in runs if r["config"]["target"] == t) for t in targets]
    counts = [
        str(next(r["target"]["parameters"]["transfer"] for r in runs if r["config"]["method"] == m)) for m in methods
    ]
    table = markdown(
        ["", *heads, "trained"], [["no input", *trivial, "0"], *([*r, c] for r, c in zip(rows, counts, strict=True))]
    )
    sources: dict[str, list[str]] = {}
    for run in runs:
        for name, source in run["sources"].items():
            split = next(iter(source["metrics"]))
            metric = source["primary_metric"]
            scores = (source["metrics"][split][metric], source["baseline"][split][metric])
            sources[name] = [name, metric, str(source["rows"]["train"]), *(f"{100 * value:.1f}" for value in scores)]
    return f"{table}\n\n{markdown(['source', 'metric', 'rows', 'score', 'no input'], sources.values())}"


def glue_run(run: Run) -> Run:
    kept = ("versions", "scores", "baseline", "average", "steps", "rows", "parameters")
    return {"config": settings(run), **{name: run[name] for name in kept}}


def glue_label(config: Run) -> str:
    """The recipe and the options, other than the seed, in which its runs differ."""
    corrected = {None: "", True: "corrected", False: "not corrected"}[config["adam_bias_correction"]]
    return " ".join(filter(None, (config["preset"], config["sampling"], corrected)))


def glue_tables(runs: list[Run]) -> str:
    """A table with a row per recipe (mean and spread over seeds) and a column per task, and a table of selections."""
    tasks = list(runs[0]["scores"])
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(glue_label(run["config"]), []).append(run)

    def cells(found: list[Run], part: str) -> list[str]:
        first = [{task: next(iter(run[part][task].values())) for task in tasks} for run in found]
        average = [statistics.fmean(scores[task] for task in runs[0]["config"]["tasks"]) for scores in first]
        return [*(percent([scores[task] for scores in first]) for task in tasks), percent(average)]

    def row(label: str, found: list[Run]) -> list[str]:
        trained = f"{found[0]['parameters']['trained_per_task']:,.0f}"
        return [label, *cells(found, "scores"), trained, str(found[0]["steps"]), str(len(found))]

    head = ["", *(f"{task}, {next(iter(runs[0]['scores'][task]))}" for task in tasks)]
    head += ["average", "trained per task", "steps", "seeds"]
    rows = [["no input", *cells(runs[:1], "baseline"), "0", "0", ""], *(row(*group) for group in groups.items())]
    chosen = [
        (label, run["rows"]["chosen"]) for label, found in groups.items() for run in found if "chosen" in run["rows"]
    ]
    table = markdown(head, rows)
    if not chosen:
        return table
    counts = [[label, *(f"{found[task]}" for task in tasks)] for label, found in chosen]
    return f"{table}\n\n{markdown(['rows chosen', *tasks], counts)}"


def tasks_run(run: Run) -> Run:
    kept = ("metrics", "baseline", "primary_metric", "rows", "rows_drawn", "steps")
    tasks = {name: {key: task[key] for key in kept if key in task} for name, task in run["tasks"].items()}
    found = {"config": settings(run), "versions": run["versions"], "parameters": run["parameters"], "tasks": tasks}
    return found | ({"sampling": run["sampling"]} if "sampling" in run else {})


def tasks_tables(runs: list[Run]) -> str:
    """A table with a row per run and a column per task, and a table of the examples that networks were trained on."""
    names = list(runs[0]["tasks"])

    def score(run: Run, name: str, part: str) -> float:
        task = run["tasks"][name]
        return next(iter(task[part].values()))[task["primary_metric"]]

    def row(label: str, run: Run, part: str) -> list[str]:
        scores = [score(run, name, part) for name in names]
        return [label, *(f"{100 * value:.1f}" for value in scores), f"{100 * statistics.fmean(scores):.1f}"]

    def label(run: Run) -> str:
        config = run["config"]
        return " ".join(filter(None, (config["method"], "joint" * config["joint"], config["sampling"])))

    head = ["", *(f"{name}, {runs[0]['tasks'][name]['primary_metric']}" for name in names), "mean"]
    table = markdown(head, [row("no input", runs[0], "baseline"), *(row(label(run), run, "metrics") for run in runs)])
    drawn = [run for run in runs if "sampling" in run]
    rows = [
        [
            label(run),
            *(str(run["tasks"][name]["rows_drawn"]) for name in names),
            str(run["sampling"]["rows_trained"]),
            str(run["sampling"]["candidates_forward"]),
        ]
        for run in drawn
    ]
    own = ["rows there are", *(str(runs[0]["tasks"][name]["rows"]["train"]) for name in names), "", ""]
    return f"{table}\n\n{markdown(['rows trained on', *names, 'all', 'candidates'], [own, *rows])}"


KINDS: dict[str, tuple[Callable[[Run], Run], Callable[[list[Run]], str]]] = {
    "tasks": (tasks_run, tasks_tables),
    "transfer": (transfer_run, transfer_tables),
    "glue": (glue_run, glue_tables),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, help="file for the data of the tables")
    options = parser.parse_args()
    reduce, tables = KINDS[options.kind]
    runs = [reduce(read(folder)) for folder in options.folders]
    if options.kind == "transfer":
        without_repeats(runs)
    if options.json is not None:
        options.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    print(tables(runs))


if __name__ == "__main__":
    main()
