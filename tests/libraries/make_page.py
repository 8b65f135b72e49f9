"""Make docs/libraries.md: try adapters on small models of the libraries that are installed here.

    python tests/libraries/make_page.py [MODEL ...]

Each model is checked in a process of its own, in each mode. A library has a section of the page for each of its
versions; rows of the page are written for what is installed and, if models are named, for those. The others stay.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "libraries.md"
MODES = {"PyNative": 1, "graph": 0}
CHECKS = {
    "fresh": "a fresh LoRA adapter computes as the base does",
    "train": "training steps change the adapter, every part of it, and nothing else",
    "disable": "`disable_adapter` computes as the base does",
    "switch": "a second adapter computes something else, and the first one the same as before",
    "mixed": "`adapter_names` gives each sample its own adapter",
    "merge": "`merge_adapter` computes as the adapter does, and `unmerge_adapter` gives back every bit",
    "save": "a saved adapter computes the same on a network that gets the base's weights afterwards",
    "unload": "`unload` gives the base's outputs, and its parameters bit for bit, in name and order",
    "merge and unload": "`merge_and_unload` computes as the adapter does, with the base's Cells and parameters",
    "biases": 'an adapter with `bias="all"` is saved and loaded',
    "linear": '`target_modules="all-linear"` takes the layers that are known to be linear',
    "adapter": "a fresh AdapterConfig adapter computes as the base does",
}
HEADER = """# Models of other libraries

What was tried with small models of random weights, on CPU, in both modes. This page is made by
`tests/libraries/make_page.py`; run it where the libraries are installed. mindpet imports none of them: their own linear
layers and embeddings are known by the paths of their classes (`mindpet/network/libraries.py`), and a layer of yours
by `register_layer`, see [peft.md](peft.md).

The checks are:

{checks}

Operators of `mindspore.mint` that have kernels on accelerators only are replaced by the same mathematics from others
(`tests/libraries/stand_ins.py`). "Does not run" is said of a model that fails without an adapter, too.

What is not taken for a linear layer, because mindpet cannot know what it computes: subclasses with a `construct` of
their own, among them the standardised convolutions of BiT and the `Linear` of the vision models of mindformers; layers
of experts, whose weight has more than two axes; and the layers of mindformers that cut their weights over ranks
themselves (`parallel_core.inference`, `experimental.infer`, `experimental.parallel_core.pynative`): a delta beside such
a layer would be computed from a part of its input. A configuration that names them is refused.
"""


class Case:
    """The checks of one model in one mode; `failed` has what does not work.

    Args:
        model (Model): the model.
    """

    def __init__(self, model):
        self.model, self.inputs, self.failed = model, model.inputs(), {}

    @contextlib.contextmanager
    def check(self, name):
        """A context in which an error is noted as that of a check."""
        try:
            yield
        except Exception as error:  # whatever it is, it goes into the page
            lines = str(error).strip().splitlines() or [""]
            self.failed[name] = f"{type(error).__name__}: {lines[0]}"
            if os.environ.get("SHOW"):
                import traceback

                traceback.print_exc()

    def network(self):
        network = self.model.make()
        network.set_train(False)
        return network

    def run(self, network, **keywords):
        """The first output."""
        out = network(*self.inputs, **self.model.keywords, **keywords)
        out = getattr(out, "logits", out)
        return (out[0] if isinstance(out, (tuple, list)) else out).asnumpy()

    def peft(self, network, config=None, name="default", **fields):
        from mindpet.peft import LoraConfig, get_peft_model

        config = config or LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": self.model.targets, **fields})
        return get_peft_model(network, config, name)

    def all(self):
        """Run everything."""
        import mindspore as ms
        import numpy as np

        from mindpet.errors import ConfigError
        from mindpet.peft import AdapterConfig, LoraConfig, PeftModel

        network, folder = self.network(), tempfile.mkdtemp()
        ms.save_checkpoint(network, f"{folder}/base.ckpt")
        base, parameters = self.run(network), contents(network)
        model, out = None, None
        with self.check("fresh"):
            model = self.peft(network, lora_dropout=0.1)
            close(self.run(model), base)
        if model is None:
            return
        with self.check("train"):
            before = dict(values(model))
            self.train(model, base)
            changed = {name for name, value in values(model) if before[name] != value}
            equal(changed, {name for name, param in network.parameters_and_names() if param.requires_grad})
        move(model, 0)
        out = self.run(model)
        with self.check("disable"):
            apart(out, base)
            with model.disable_adapter():
                close(self.run(model), base)
            close(self.run(model), out)
        with self.check("switch"):
            model.add_adapter("two", LoraConfig(r=2, target_modules=self.model.targets))
            model.set_adapter("two")
            move(model, 1)
            second = self.run(model)
            apart(second, out)
            model.set_adapter("default")
            close(self.run(model), out)
        with self.check("mixed"):
            mixed = self.run(model, adapter_names=["two", "default"])
            close(mixed, np.stack([second[0], out[1]]))
        with self.check("merge"):
            model.merge_adapter()
            close(self.run(model), out)
            model.unmerge_adapter()
            equal([each for each in contents(network) if "mindpet" not in each[0]], parameters)
        with self.check("save"):
            model.save_pretrained(folder, selected_adapters=["default"])
            other = self.network()
            loaded = PeftModel.from_pretrained(other, folder, force=True)
            ms.load_param_into_net(other, ms.load_checkpoint(f"{folder}/base.ckpt"))
            close(self.run(loaded), out)
            with self.check("merge and unload"):
                merged = loaded.merge_and_unload()
                close(self.run(merged), out)
                equal([name for name, _, _ in contents(merged)], [name for name, _, _ in parameters])
        with self.check("unload"):
            model.unload()
            close(self.run(network), base)
            equal(contents(network), parameters)
        with self.check("biases"):
            model = self.peft(network, bias="all")
            move(model, 2)
            out = self.run(model)
            model.save_pretrained(f"{folder}/biases")
            model.unload()
            model = PeftModel.from_pretrained(network, f"{folder}/biases")
            close(self.run(model), out)
            model.unload()
            equal(contents(network), parameters)
        with self.check("linear"):
            try:
                model = self.peft(network, target_modules="all-linear", init_lora_weights=False)
            except ConfigError as error:
                if "nothing to train" not in str(error):  # the head is left out, and there is no other
                    raise
            else:
                apart(self.run(model), base)
                model.unload()
        with self.check("adapter"):
            targets = self.linear_targets(network)
            if targets:
                model = self.peft(network, AdapterConfig(target_modules=targets, bottleneck_size=4))
                close(self.run(model), base)
                model.unload()

    def linear_targets(self, network):
        """The targets but for convolutions, which only LoRA takes."""
        from mindpet.network.kinds import layer_kind

        convolutions = [
            f".{name}" for name, cell in network.cells_and_names() if getattr(layer_kind(cell), "is_convolution", False)
        ]
        return [name for name in self.model.targets if not any(path.endswith(f".{name}") for path in convolutions)]

    def train(self, model, like):
        """A few steps: the first moves B, the next A, and a branch may be dropped."""
        import numpy as np
        from mindspore import Tensor, nn

        keywords = self.model.keywords
        weight = Tensor(np.random.default_rng(3).normal(size=like.shape).astype(np.float32))

        class Loss(nn.Cell):
            def __init__(self):
                super().__init__(auto_prefix=False)
                self.network = model

            def construct(self, *inputs):
                out = self.network(*inputs, **keywords)
                out = out[0] if isinstance(out, (tuple, list, dict)) else out
                return (out * weight).mean() if out.ndim else out  # a loss as it is

        step = nn.TrainOneStepCell(Loss(), nn.Adam(model.trainable_params(), 0.01))
        step.set_train()
        try:
            for _ in range(4):
                step(*(self.model.training_inputs or self.model.inputs)())
        finally:
            model.set_train(False)


def contents(network):
    return [(path, param.name, param.asnumpy().tobytes()) for path, param in network.parameters_and_names()]


def values(model):
    return [(path, value) for path, _, value in contents(model.network)]


def move(model, seed):
    """Give what trains other values."""
    import numpy as np
    from mindspore import Tensor

    rng = np.random.default_rng(seed)
    for param in model.trainable_params():
        param.set_data(Tensor((param.asnumpy() + 0.2 * rng.normal(size=param.shape)).astype(np.float32)))


def close(got, expected):
    import numpy as np

    error = np.abs(got - expected).max() / max(1, np.abs(expected).max())
    if not error < 1e-4:
        raise AssertionError(f"off by {error:.2g}")


def apart(got, other):
    import numpy as np

    if not np.abs(got - other).max() > 1e-3:
        raise AssertionError("the adapter changes nothing")


def equal(got, expected):
    if isinstance(got, set):
        got, expected = sorted(got - expected), sorted(expected - got)
        if got or expected:
            raise AssertionError(f"surplus {got[:3]}, missing {expected[:3]}")
    if got != expected:
        raise AssertionError(f"{str(got)[:200]} is not {str(expected)[:200]}")


def child(name, mode):
    """Check one model in this process; prints the result as JSON."""
    import mindspore as ms
    import models
    import stand_ins  # noqa: F401

    ms.set_context(mode=MODES[mode])
    ms.set_seed(1)
    case = Case(models.MODELS[name])
    try:
        case.run(case.network())
    except Exception as error:
        print("RESULT", json.dumps({"base": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}))
        return
    case.all()
    print("RESULT", json.dumps(case.failed))


def cell_of(failed):
    """What stands in the table."""
    if "base" in failed:
        return f"does not run ({_shown(failed['base'])})"
    if not failed:
        return f"all {len(CHECKS)}"
    reasons = "; ".join(f"{name}: {_shown(reason)}" for name, reason in failed.items())
    return f"{len(CHECKS) - len(failed)} of {len(CHECKS)}; not {reasons}"


def _shown(reason):
    return reason.replace("|", "/")[:160]


def main(wanted):
    """Check models of what is installed, and write their rows of the page."""
    import models

    for name, model in models.MODELS.items():
        if (wanted and name not in wanted) or importlib.util.find_spec(model.library) is None:
            continue
        row = [name]
        for mode in MODES:
            done = subprocess.run([sys.executable, __file__, "--child", name, mode], capture_output=True, text=True)
            found = re.findall(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
            failed = json.loads(found[-1]) if found else {"base": f"the process ended with {done.returncode}"}
            row.append(cell_of(failed))
            print(name, mode, row[-1], flush=True)
        write(f"{model.library} {importlib.metadata.version(model.library)}", row)


def write(title, row):
    """Write a row of a section of the page; the others stay."""
    import mindspore

    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    sections = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", old, re.MULTILINE))
    rows = {line.split(" | ")[0]: line for line in re.findall(r"^\| .*", sections.get(title, ""), re.MULTILINE)[1:]}
    line = f"| {' | '.join(row)} |"
    rows[line.split(" | ")[0]] = line
    table = ["| model | PyNative | graph |", "|---|---|---|", *rows.values()]
    sections[title] = f"\nMindSpore {mindspore.__version__}.\n\n" + "\n".join(table) + "\n\n"
    checks = "\n".join(f"* {name}: {what};" for name, what in CHECKS.items())[:-1] + "."
    parts = [HEADER.format(checks=checks)] + [
        f"## {title}\n{body.rstrip()}\n" for title, body in sorted(sections.items())
    ]
    PAGE.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main(sys.argv[1:])
