"""The paper's tables beside what is in pretrained/, in Markdown, and figures of both, without TensorFlow.

`results`, where nothing else is said, are all that is there: see `runs.read_released`.
"""

import itertools
import re
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from command_line import leave
from comparison import comparison_table, markdown_table, paired, paired_difference
from run_folder import read_log, whole_file, write_text
from runs import GENERATOR, RELEASED, read_released

README = Path(__file__).resolve().with_name("README.md")

# Burda et al. 2016, Table 1: negative test log-likelihood on MNIST in nats, and active units.
PAPER = {
    "vae_l1_k1": (86.76, "19"),
    "vae_l1_k5": (86.47, "20"),
    "vae_l1_k50": (86.35, "20"),
    "vae_l2_k1": (85.33, "16+5"),
    "vae_l2_k5": (85.01, "17+5"),
    "vae_l2_k50": (84.78, "17+5"),
    "iwae_l1_k5": (85.54, "22"),
    "iwae_l1_k50": (84.78, "25"),
    "iwae_l2_k5": (83.89, "21+5"),
    "iwae_l2_k50": (82.90, "26+7"),
}
# Table 2: the run that is gone on from, the one whose objective and k follow, and what the paper's net is then worth.
SWITCHED = {
    "vae_to_iwae": ("vae_l1_k1", "iwae_l1_k50", 84.88, "22"),
    "vae_to_vae": ("vae_l1_k1", "vae_l1_k1", "", ""),  # as many passes without a switch, which the paper has not
    "iwae_to_vae": ("iwae_l1_k50", "vae_l1_k1", 86.02, "23"),
    "iwae_to_iwae": ("iwae_l1_k50", "iwae_l1_k50", "", ""),
}
# The lowest NLL published with the very nets of Table 1, and by whom: the README says what each is.
BEST = {
    "vae_l1_k1": "86.21 Rainforth",
    "vae_l1_k5": "86.02 nbip",
    "vae_l1_k50": "85.94 nbip",
    "iwae_l1_k5": "85.41 Li",
    "iwae_l1_k50": "84.59 xqding",
    "dreg_l1_k50": "86.73 ml-and-ds-degree",
    "vae_l2_k1": "84.83 nbip",
    "vae_l2_k5": "84.08 nbip",
    "vae_l2_k50": "83.89 nbip",
    "iwae_l2_k5": "83.48 nbip",
    "iwae_l2_k50": "82.82 nbip",
}
EVALUATIONS = {  # the folders in that of a released run: how it is evaluated in each
    "": {"split": "test", "images": None, "units": "all"},
    "splittrain__images10000": {"split": "train", "images": 10000, "units": "all"},
    "unitsactive": {"split": "test", "images": None, "units": "active"},
}
LENGTHS = "dreg_l1_k50_fast"  # trained by other numbers of passes, too
# Cells by the paper's first five stages and, of this seed, by ours: each pair trained on one machine.
FAST_SEEDS = {"vae_l1_k1": 1, "iwae_l1_k5": 1, "vae_l2_k1": 0}
BY_SCHEDULE = [(f"{cell}__epochs121__seed0", f"{cell}_fast__seed{seed}") for cell, seed in FAST_SEEDS.items()]


def seeds(results, name, evaluation=""):
    """The released results of a named run, {seed: results}."""
    found = [re.fullmatch(rf"{name}__seed(\d+)/?{evaluation}", folder) for folder in results]
    return {int(match[1]): results[match[0]] for match in found if match}


def mean(results, field="nll"):
    """The mean over seeds, of two decimals."""
    return f"{fmean(r[field] for r in results):.2f}"


def nll(results):
    """The mean NLL over seeds, and that of its standard errors."""
    return f"{mean(results)} ± {mean(results, 'nll_standard_error')}" if results else "not trained yet"


def shown(results, paper):
    """NLL and active units (of each seed), each followed by the paper's. paper: (NLL, units)."""
    active = ", ".join(dict.fromkeys("+".join(map(str, r["active_units"])) for r in results))
    return [nll(results), paper[0] and f"{paper[0]:.2f}", active, paper[1]]


def changed(results, test):
    """Another NLL of seed 0, less that of all test images: of the same images paired."""
    if 0 not in results:
        return ""
    r, whole = results[0], test[0]
    difference = paired(whole, r) if r["evaluated"] == whole["evaluated"] else f"{r['nll'] - whole['nll']:+.2f}"
    return f"{mean([r])} ({difference})"


def minutes(results):
    """The time of training, of several seeds the shortest and the longest: they were not all on one machine.

    With the generators of random numbers, where it was not today's alone.
    """
    if not results:
        return ""
    times, generators = [r["train_seconds"] / 60 for r in results], dict.fromkeys(r["generator"] for r in results)
    by = ", " + " and ".join(map(str.capitalize, generators)) if set(generators) != {GENERATOR} else ""
    return " to ".join(dict.fromkeys(f"{f(times):.0f}" for f in (min, max))) + " min" + by


def table_1(results):
    """Burda et al. 2016, Table 1, and `dreg`: a row per cell."""
    header = ["`python experiments.py`", "NLL", "paper", "active units", "paper", "difference", "best published"]
    header += ["seeds", "NLL, training images", "NLL, active units alone", "training"]
    rows = []
    for layers, k, objective in itertools.product((1, 2), (1, 5, 50), ("vae", "iwae", "dreg")):
        if k == 1 and objective != "vae":
            continue
        name = f"{objective}_l{layers}_k{k}"
        test, train, active = (seeds(results, f"{name}_fast", evaluation) for evaluation in EVALUATIONS)
        theirs, nlls = PAPER.get(name, ("", "")), [r["nll"] for r in test.values()]
        difference = f"{fmean(nlls) - theirs[0]:+.2f}" if nlls and theirs[0] else ""
        spread = str(len(nlls))
        if len(nlls) > 1:
            spread += f", ± {stdev(nlls):.2f}" if len(nlls) > 2 else f": {nlls[0]:.2f} and {nlls[1]:.2f}"
        ours = [difference, BEST.get(name, ""), spread, changed(train, test), changed(active, test)]
        rows.append([f"`{name}_fast`", *shown(test.values(), theirs), *ours, minutes(test.values())])
    return markdown_table(header, rows)


def paired_by_seed(first, other):
    """NLL less that of the first for each seed of both, paired, ± the largest of the standard errors over images."""
    both = [(r["log_likelihoods"], other[seed]["log_likelihoods"]) for seed, r in first.items() if seed in other]
    if not both:
        return "not trained yet"
    differences, errors = zip(*(paired_difference(*pair) for pair in both), strict=True)
    return f"{', '.join(f'{difference:+.2f}' for difference in differences)} ± {max(errors):.2f}"


def objectives_table(results):
    """What an objective is worth: cells of Table 1 paired, of each seed of both, and the paper's: a row per net."""
    rows = []
    for layers, k in itertools.product((1, 2), (5, 50)):
        vae, iwae, dreg = (seeds(results, f"{name}_l{layers}_k{k}_fast") for name in ("vae", "iwae", "dreg"))
        theirs = f"{PAPER[f'iwae_l{layers}_k{k}'][0] - PAPER[f'vae_l{layers}_k{k}'][0]:+.2f}"
        net = f"{layers} layer{'s' * (layers > 1)}, k = {k}"
        rows.append([net, paired_by_seed(vae, iwae), theirs, paired_by_seed(iwae, dreg)])
    return markdown_table(["net", "`iwae` less `vae`", "paper", "`dreg` less `iwae`"], rows)


def table_2(results):
    """Burda et al. 2016, Table 2: nets before and after the objective is switched, and less those not switched."""
    header = ["`python experiments.py`", *("NLL", "paper", "active units", "paper"), "then: NLL", "paper"]
    header += ["active units", "paper", "less not switched", "training"]
    rows = []
    for name, (first, _, *then) in SWITCHED.items():
        before, after = seeds(results, f"{first}_fast"), seeds(results, f"{name}_fast")
        last = name.split("_")[-1]
        same = "" if name == f"{last}_to_{last}" else paired_by_seed(seeds(results, f"{last}_to_{last}_fast"), after)
        before, after = [r for seed, r in before.items() if seed in (after or before)], after.values()
        rows.append([f"`{name}_fast`", *shown(before, PAPER[first]), *shown(after, then), same, minutes(after)])
    return markdown_table(header, rows)


def command(run):
    """What experiments.py is called with for a run, of its folder's name."""
    words = re.sub(r"__(epochs|seed)", r" --\1 ", run)
    return f"`{words.removesuffix(' --seed 0')}`"


def passes_table(results):
    """The cell LENGTHS by fewer and more passes than its schedule has, each paired with that: a row each."""
    whole = results[f"{LENGTHS}__seed0"]
    found = {run: r for run, r in results.items() if re.fullmatch(rf"{LENGTHS}(__epochs\d+)?__seed0", run)}
    rows = [
        [command(run), str(r["epochs"]), nll([r]), paired(whole, r), minutes([r])]
        for run, r in sorted(found.items(), key=lambda item: item[1]["epochs"])
    ]
    return markdown_table(["`python experiments.py`", "passes", "NLL", "NLL difference", "training"], rows)


def schedules_table(results):
    """The pairs BY_SCHEDULE: a row for each."""
    rows = []
    for pair in BY_SCHEDULE:
        both = {run: results[run] for run in pair}
        cells = [cell for run, r in both.items() for cell in (command(run), nll([r]), minutes([r]))]
        rows.append([*cells, paired(*both.values())])
    return markdown_table([*2 * ["`python experiments.py`", "NLL", "training"], "NLL difference"], rows)


def schedules_figure(logs, nlls):
    """A Figure of the bound (nats) on validation images against passes and minutes: a row for each depth.

    logs: {run: records of log.jsonl}, two runs of each cell one after the other; nlls: {run: NLL in nats}. The first
    tenth of the passes, far below the rest, may be cut off.
    """
    from canvas import PALETTE, label_axes, legend_above, new_figure

    of_depth = [{run: log for run, log in logs.items() if f"_{net}_" in run} for net in ("l1", "l2")]
    of_depth = [runs for runs in of_depth if runs]
    caption = "Solid: the paper's schedule, cut off after 121 passes; dashed: `fast`. Lines: the bound that the run "
    caption += "ascends, on 400 validation images, with averaged weights for `fast`; the lowest values are cut off. "
    caption += "Dots (hollow: the paper's): -NLL in the end, L_5000 on the test images, a tighter bound. "
    caption += "Both runs of a cell: one machine."
    figure = new_figure("Bound on validation images, by passes and by time", caption, 0.6 + 3.4 * len(of_depth))
    quantities = (("passes", "epoch", 1), ("minutes", "seconds", 60))
    for row, runs in zip(figure.subplots(len(of_depth), 2, sharey="row", squeeze=False), of_depth, strict=True):
        bounds = {run: [record["bound_validation"] for record in log] for run, log in runs.items()}
        for axes, (xlabel, field, unit) in zip(row, quantities, strict=True):
            for i, (run, log) in enumerate(runs.items()):
                style = {"color": PALETTE[i // 2], "linestyle": ("-", "--")[i % 2]}
                label = f"{run}: NLL {nlls[run]:.2f}"
                x = [record[field] / unit for record in log]
                axes.plot(x, bounds[run], label=label, **style)
                fill = style["color"] if i % 2 else "white"
                axes.scatter(x[-1], -nlls[run], s=16, edgecolors=style["color"], facecolors=fill, zorder=3)
            label_axes(axes, xlabel, "bound (nats)")
        lowest, highest = min(np.quantile(bound, 0.1) for bound in bounds.values()), -min(nlls[run] for run in runs)
        axes.set_ylim(lowest, highest + 0.1 * (highest - lowest))
        legend_above(row[0])
    return figure


def minutes_figure(results):
    """A Figure of the NLL of each net of Table 1 against its minutes of training, one seed each: a panel a depth."""
    from canvas import PALETTE, SMALL, label_axes, new_figure

    caption = "NLL: -L_5000 on the test images, one seed; beside it k. "
    caption += "Filled: `fast`, of 130 passes if none are given; hollow: the paper's schedule, cut off. "
    caption += "Dotted: the paper's NLL with k = 50, after 3280 passes. "
    caption += "Machines differed by a factor of two, and now and then had other work."
    figure = new_figure("NLL by minutes of training on two cores", caption, 4.6)
    styles = {"vae": (PALETTE[0], (0, 5), "center"), "iwae": (PALETTE[1], (5, -3), "left")}
    styles["dreg"] = PALETTE[2], (0, -12), "center"
    for axes, (net, title) in zip(figure.subplots(1, 2), {"l1": "1 layer", "l2": "2 layers"}.items(), strict=True):
        for objective, (colour, offset, side) in styles.items():
            for run, r in results.items():
                if found := re.fullmatch(rf"({objective}_{net}_k(\d+))(_fast)?(?:__epochs(\d+))?__seed(\d+)", run):
                    cell, k, fast, passes, seed = found.groups()
                    if int(seed) != (FAST_SEEDS.get(cell, 0) if fast else 0):
                        continue
                    place = r["train_seconds"] / 60, r["nll"]
                    axes.plot(*place, "o", color=colour, markersize=5, markerfacecolor=colour if fast else "white")
                    style = {"textcoords": "offset points", "ha": side, "fontsize": SMALL - 1, "color": colour}
                    axes.annotate(k + f" ({passes} passes)" * bool(passes), place, offset, **style)
            axes.plot([], [], "o", color=colour, markersize=5, label=objective)
            if paper := PAPER.get(f"{objective}_{net}_k50"):
                axes.axhline(paper[0], color=colour, linestyle=":", linewidth=1)
        axes.set_title(title, loc="left", fontsize=SMALL)
        axes.set_xlim(0, 1.2 * axes.get_xlim()[1])
        axes.margins(y=0.1)
        axes.legend(frameon=False, fontsize=SMALL)
        label_axes(axes, "minutes", "NLL (nats)")
    return figure


def check_evaluations(results, named_runs):
    """Leave where one is not what its named run and EVALUATIONS say, or not of the same images as the others."""
    wrong, images = [], {}
    for run, r in results.items():
        name, _, place = run.partition("/")
        asked = {"dataset": "mnist", "k_evaluation": named_runs[name.partition("__")[0]].k_evaluation}
        asked |= EVALUATIONS.get(place, {})
        asked["evaluated"] = images.setdefault(place, r["evaluated"])
        bad = [f"{field} = {r[field]}, must be {value}" for field, value in asked.items() if r[field] != value]
        wrong += [f"--report: {RELEASED / 'mnist' / run}: {line}: evaluate and release it again" for line in bad]
    leave(wrong)


def write_report(named_runs, runs_2d):
    """Write the README's tables of the runs in pretrained/, and their curves, again, from what is there alone.

    named_runs: {name: Parameters} of what may lie there; runs_2d: names of the runs with two latent units, the first of
    which the others are compared with.
    """
    from canvas import save_figure

    results = read_released()
    check_evaluations(results, named_runs)
    runs_2d = [f"{name}__seed0" for name in runs_2d]
    by_schedule = list(itertools.chain(*BY_SCHEDULE))
    needed = [*runs_2d, f"{LENGTHS}__seed0", *by_schedule]
    leave([f"--report: {RELEASED / 'mnist' / run} is missing" for run in needed if run not in results])
    tables = {"table 1": table_1(results), "table 2": table_2(results), "passes": passes_table(results)}
    tables |= {"objectives": objectives_table(results), "schedules": schedules_table(results)}
    tables["posterior_2d"], _ = comparison_table({run: results[run] for run in runs_2d})
    page = rewritten(README, tables)
    logs = {run: read_log(RELEASED / "mnist" / run, results[run]["epochs"]) for run in by_schedule}
    curves = schedules_figure(logs, {run: results[run]["nll"] for run in by_schedule})
    for name, figure in (("schedules", curves), ("minutes", minutes_figure(results))):
        with whole_file(README.parent / "docs" / f"{name}.png") as partial_file:
            save_figure(figure, partial_file)
    write_text(README, page)
    print(f"tables: {README}")


def rewritten(path, tables):
    """The text of a page with each table {name: text} afresh between its markers; what has no new text stays.

    Leaves with those that have no place there.
    """
    page, missing = path.read_text(), []
    for name, table in tables.items():
        marks = f"<!-- report: {name} -->\n", "<!-- end -->"
        between = re.compile(f"({marks[0]})(?:(?!<!-- ).)*({marks[1]})", re.DOTALL)
        page, found = between.subn(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", page)
        if not found:
            missing.append(f"{path}: the line <!-- report: {name} -->, or its <!-- end -->, is missing")
    leave(missing)
    return page
