"""The results of `choosing.py`: a file of runs, and what the docs have of it."""

import json
import math
import pathlib

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "docs/choosing.jsonl"
PICTURE = ROOT / "docs/images/choosing.png"
RATES = [float(f"{base}e{power}") for power in range(-5, 1) for base in (1, 3)]
FIRST, SECOND = "code", "classes"
HEAD_RATE = 0.1  # of the fresh head, which every method of the second task trains


class Results:
    """The records of all runs: a file with one in a line."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.records = [json.loads(line) for line in lines]

    def add(self, record):
        """Keep a record, in the file too."""
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def of(self, task, method, **wanted):
        """The records of a method on a task, with the wanted seed or rate."""
        wanted = {"task": task, "method": method, **wanted}
        return [record for record in self.records if all(record[key] == value for key, value in wanted.items())]

    def losses(self, task, method):
        """Learning rate -> loss of the first seed on the validation part, infinite where the run diverged."""
        losses = {record["rate"]: record["validation"]["loss"] for record in self.of(task, method, seed=1)}
        return {rate: loss if math.isfinite(loss) else math.inf for rate, loss in losses.items()}

    def best_rate(self, task, method):
        """The learning rate whose loss on the validation part is smallest; None if none was tried."""
        losses = self.losses(task, method)
        return min(losses, key=losses.get) if losses else None

    def best(self, task, method):
        """The records with that learning rate."""
        return self.of(task, method, rate=self.best_rate(task, method))

    def next_rate(self, task, method, start):
        """The learning rate of RATES to try next on a task, or None if there were enough.

        On the first task it begins with the nearest to `start`, goes up first, and ends when both neighbours of the
        best were tried. On the second it is what the first has chosen; the next smaller one is tried, too, as long as
        the smallest is the best and yet no better than the head alone.
        """
        losses, best = self.losses(task, method), self.best_rate(task, method)
        if task == FIRST:
            place = RATES.index(best or nearest_rate(start))
            tries = reversed(RATES[max(place - 1, 0) : place + 2]) if losses else [RATES[place]]
        elif not losses:
            tries = [HEAD_RATE if method == "head" else self.best_rate(FIRST, method)]
        elif best == min(losses) and losses[best] > min(self.losses(task, "head").values(), default=math.inf):
            tries = RATES[max(RATES.index(best) - 1, 0) :][:1]
        else:
            tries = []
        return next((rate for rate in tries if rate not in losses), None)

    def methods(self, task):
        """The methods with all runs of a task, from the smallest loss on."""
        names = dict.fromkeys(record["method"] for record in self.records)
        return sorted((name for name in names if self.is_done(task, name)), key=lambda name: self.mean(task, name)[0])

    def is_done(self, task, method):
        """Whether there are runs enough for a standard error."""
        return len(self.best(task, method)) >= 3

    def mean(self, task, method, what="loss"):
        """The mean over the seeds on the test part, and its standard error."""
        values = [record["test"][what] for record in self.best(task, method)]
        return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def nearest_rate(rate):
    """The one of RATES that is nearest, as a factor."""
    return min(RATES, key=lambda other: abs(math.log(other / rate)))


def bits(mean_and_error):
    """Nats as bits."""
    return tuple(value / math.log(2) for value in mean_and_error)


def pair(mean_and_error, digits=3):
    """A mean with its standard error, as the tables have it."""
    mean, error = mean_and_error
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def step_ms(results, task, method):
    """Processor time of a step: the least of the runs, whose medians it is."""
    return min(record["step_ms"] for record in results.of(task, method))


def table(heads, rows):
    """A table of Markdown, whose first column is text and the others are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines)
        .replace("| --- |", "|---|")
        .replace(" ---: |", "---:|")
    )


def row(results, task, method, *scores):
    """What trains, scores with their standard errors, the time of a step, and the bytes while it trains."""
    record = results.of(task, method)[0]
    megabytes = f"{record['bytes'] / 1e6:.1f}"
    return [method, f"{record['trained']:,}", *map(pair, scores), f"{step_ms(results, task, method):.0f}", megabytes]


COST = ["ms a step", "weight + gradient + optimizer MB"]


def code_table(results):
    """Quality and cost on the first task."""
    rows = [row(results, FIRST, name, bits(results.mean(FIRST, name))) for name in results.methods(FIRST)]
    return table(["method", "trained", "bits a byte", *COST], rows)


def classes_table(results):
    """Quality and cost on the second task."""
    rows = [
        row(results, SECOND, name, results.mean(SECOND, name, "accuracy"), results.mean(SECOND, name))
        for name in results.methods(SECOND)
    ]
    return table(["method", "trained", "accuracy", "cross entropy", *COST], rows)


def rates_table(results):
    """The learning rates, and the losses on the validation part that chose them."""
    rows = []
    for name in results.methods(FIRST):
        tries = sorted(results.losses(FIRST, name).items())
        rate = f"{results.best_rate(FIRST, name):g}"
        rows.append([name, rate, ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in tries)])
    return table(["method", "learning rate", "tried: cross entropy"], rows)


def checks_table(results):
    """What the rates of the first task, and smaller ones, gave on the second."""
    rows = []
    for name in results.methods(SECOND):
        tries = sorted(results.losses(SECOND, name).items(), reverse=True)
        rows.append([name, ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in tries)])
    return table(["method", "tried: cross entropy"], rows)


TABLES = {
    "docs/choosing.md": {
        "code": code_table,
        "classes": classes_table,
        "rates": rates_table,
        "checks": checks_table,
    },
    "README.md": {"code": code_table},
}


def pages(results):
    """Path -> the page as it stands, with its tables made anew."""
    texts = {}
    for path, tables in TABLES.items():
        texts[path] = (ROOT / path).read_text(encoding="utf-8")
        for name, make in tables.items():
            before, start, rest = texts[path].partition(f"<!-- choosing.py: {name} -->\n")
            _, end, after = rest.partition("\n<!-- end -->")
            if not (start and end):
                raise ValueError(f"{path} must have a place for the table {name!r}")
            texts[path] = f"{before}{start}\n{make(results)}\n{end}{after}"
    return texts


def draw(results, path):
    """Quality against trained parameters, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(15, 10))
    for axes, task, label in zip(panels, (FIRST, SECOND), ("bits a byte, code", "cross entropy, classes")):
        names = results.methods(task)
        trained = [results.of(task, name)[0]["trained"] for name in names]
        means = [results.mean(task, name) for name in names]
        means, errors = np.array([bits(mean) for mean in means] if task == FIRST else means).T
        axes.errorbar(trained, means, errors, fmt="o", capsize=2, markersize=4)
        axes.set(xscale="log", xlabel="trained parameters", ylabel=f"{label}: lower is better", xmargin=0.15)
        axes.grid(alpha=0.3)
        height = np.ptp(axes.get_ylim()) / 58  # of a name
        taken = []
        for name, x, y in sorted(zip(names, trained, means), key=lambda point: point[2]):
            place = y
            while any(abs(place - other) < height and abs(math.log10(x / at)) < 0.6 for at, other in taken):
                place += height / 4
            taken.append((x, place))
            line = {"arrowstyle": "-", "linewidth": 0.4, "color": "grey", "shrinkA": 0}
            axes.annotate(name, (x, y), (x * 1.2, place), fontsize=8, va="center", arrowprops=line)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight")


def write(results):
    """Write the tables into the pages, and the picture."""
    for path, text in pages(results).items():
        (ROOT / path).write_text(text, encoding="utf-8")
    draw(results, PICTURE)
