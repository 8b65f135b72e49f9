"""Random walks through the calls of a PeftModel, in both modes; `oracle` tells what must come out.

After each call everything is compared: outputs, the values of the base and of every adapter, requires_grad, the mode of
every Cell, and the base's parameters, their names and their order. A walk that fails is shrunk by Hypothesis to a short
one, which is printed. The walks are the same ones each time; `WALKS=1000 STEPS=40 pytest tests/peft/test_walks.py`
takes others.
"""

import contextlib
import copy
import os
import pathlib
import tempfile
import warnings

import mindspore as ms
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mindspore import Parameter, Tensor, nn, ops
from walked import ATTENTIVE, CONFIGS, KINDS, VOCAB, Holder, Loss, covered, make_network

from mindpet.delta._base import Delta
from mindpet.delta._config import TargetConfig
from mindpet.delta.registry import METHODS, method_of
from mindpet.errors import AdapterError, CheckpointError, ConfigError, MergeError, MindPetError
from mindpet.graph import freeze_delta, load_delta
from mindpet.network.kinds import SLOTS
from mindpet.network.parameters import matches
from mindpet.peft import (
    AdapterDrop,
    LoraConfig,
    PeftModel,
    drop_adapter_layers,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

NAMES = ("default", "fc", "third", "fourth")
WHICH = st.integers(0, 59)  # of so many adapters as there are
WAYS = ("load_param_into_net", "load_state_dict", "load_delta", "set_data")  # how a base is loaded


class Known:
    """What is known of an adapter.

    Args:
        config (PeftConfig): its configuration.
        values (dict): path -> array.
        trainable (bool): whether it trains.
        loaded (bool): whether its values come from a file.
    """

    def __init__(self, config, values, trainable, loaded=False):
        self.config, self.trainable, self.loaded = config, trainable, loaded
        self.values, self.started = values, {}
        self.strayed = False  # whether PiSSA was trained, and then another base was loaded
        self.places = oracle.places(config, values)

    @property
    def is_lora(self):
        return isinstance(self.config, LoraConfig)

    @property
    def methods(self):
        return [method_of(part) for part in self.config.parts]

    @property
    def folds(self):
        """Whether all of its deltas can be folded into weights."""
        return all(place.folds for place in self.places.values())

    @property
    def dropout(self):
        fields = [vars(part) for part in self.config.parts]
        return max((own[name] for own in fields for name in own if name.endswith("dropout")), default=0)

    @property
    def drops(self):
        """Whether dropout may change what it computes."""
        return self.dropout > 0

    @property
    def surely_drops(self):
        """Whether dropout changes what it computes; it does not act on the ids of an embedding."""
        layers = [path for path in oracle.layers_of(self.values) if path != "embed"]
        return self.drops and self.is_lora and any(self.values[f"{path}.{oracle.B}"].any() for path in layers)

    @property
    def diverged(self):
        return any(np.isnan(value).any() for value in self.values.values())

    @property
    def copies(self):
        """Paths of its values that are copies of the base's -> path of what they are copies of."""
        return {path: path.replace(oracle.COPY, "") for path in self.values if oracle.COPY in path}

    @property
    def mixes(self):
        """Whether it can be in a batch with others."""
        return not self.copies and not any(kind in SLOTS for path in self.places for kind in oracle.kinds_of(path))

    @property
    def in_files(self):
        """Paths of the values that stand in its file one by one, or are a part of a table in it."""
        paths = set(self.copies)
        for place in self.places.values():
            files = {**(place.paths if place.delta.file_names is None else place.delta.file_names)}
            files.update(place.delta.shared_names)
            paths |= {path for name, path in place.paths.items() if name in files or not files and path in self.trained}
        return paths

    @property
    def is_computed(self):
        """Whether its file has what it computes, and not what it trains."""
        tables = [place for place in self.places.values() if place.delta.file_names == {}]
        return any(len(self.trained & set(place.paths.values())) > 1 for place in tables)

    def are_whole_parts(self, places):
        """Whether places are all that one of its methods has."""
        parts = {}
        for path, place in self.places.items():
            parts.setdefault(place.method.name, set()).add(path)
        return any(own <= set(places) for own in parts.values())

    @property
    def trained(self):
        """Paths of the values that train."""
        patterns = [pattern for method in self.methods for pattern in method.trainable]
        return {path for path in self.values if oracle.COPY in path or matches(path, patterns)}

    @property
    def folded(self):
        """Paths of the weights that merging writes to."""
        weights = {oracle.weight_of(path) for path, place in self.places.items() if place.folds}
        return weights | {f"{path}.bias" for path, place in self.places.items() if place.folds_bias}

    @property
    def reaches_ties(self):
        """Whether other layers with the weight of its targets see its deltas."""
        return any(place.delta.tied_deltas for place in self.places.values())

    def groups(self):
        """(path of a weight of the base, paths of the values that start from it)."""
        groups = [(base, (path,)) for path, base in self.copies.items()]
        for path, place in self.places.items():
            lora = ((oracle.A, oracle.B, oracle.START_A, oracle.START_B), (oracle.MAGNITUDE,))
            for names in lora if place.method.name == "lora" else (place.starts,):
                if names and names[-1] in place.paths:
                    groups.append((oracle.weight_of(path), tuple(place.paths[name] for name in names)))
        return groups


class Walk(RuleBasedStateMachine):
    """A walk in PyNative mode."""

    mode = ms.PYNATIVE_MODE

    # The start

    @initialize(
        kind=st.sampled_from(KINDS),
        training=st.booleans(),
        root=st.sampled_from(["model", "network", "jit"]),
        method=st.sampled_from(list(CONFIGS)),
    )
    def start(self, kind, training, root, method):
        ms.set_context(mode=self.mode, pynative_synchronize=True)
        ms.set_seed(1)
        self.rng = np.random.default_rng(1)
        self.stack = contextlib.ExitStack()
        self.folder = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.kind = kind
        self.is_tied, self.is_attentive = "tied" in kind, "attention" in kind
        self.root, self.holder, self.left = root, None, None  # what is called
        self.blocks = ["blocks.0.fc", "blocks.0.fc" if kind == "shared" else "blocks.1.fc"]
        self.ids = self.rng.integers(0, VOCAB, (3, 2)).astype(np.int32)
        self.look_at(make_network(kind))
        self.base = {path: param.asnumpy().copy() for path, param in self.params.items()}
        self.saved, self.steps = {}, []
        self.mark = getattr(self.network.blocks[0], "_cell_init_args", None)
        self.leave()
        self.set_base(list(self.base))
        self.training = training
        self.network.set_train(training)
        self.wrap(method, True, False, False)

    def look_at(self, network):
        """Know the Parameters of the network, but for those of adapters."""
        self.network = network
        self.places = [
            (path, cell, key, cell._params[key])
            for path, cell, key in (
                (".".join(filter(None, (path, key))), cell, key)
                for path, cell in network.cells_and_names()
                for key in cell._params
            )
            if "mindpet" not in path
        ]
        own = [param for param in network.get_parameters() if "mindpet" not in param.name]
        self.order = [(param, param.name, param.requires_grad) for param in own]
        self.params = {path: param for path, param in network.parameters_and_names() if "mindpet" not in path}

    def leave(self):
        """There are no adapters any more."""
        self.model, self.known, self.active = None, {}, None
        self.merged, self.context, self.dirty = None, None, False

    def teardown(self):
        if hasattr(self, "stack"):
            if self.context is not None:
                self.dirty = False
                with contextlib.suppress(AdapterError):
                    self.context.__exit__(None, None, None)
            self.stack.close()
        ms.set_context(mode=ms.PYNATIVE_MODE, pynative_synchronize=False)

    # What must be

    @property
    def wrapped(self):
        return self.model is not None

    @property
    def locked(self):
        """The error of most calls while an adapter is merged or disabled."""
        return AdapterError if self.merged is not None or self.context is not None else None

    @property
    def current(self):
        """The active adapter, or None."""
        return self.known.get(self.active)

    def weights(self):
        """The base's own."""
        return {"classifier.weight": self.base[oracle.TABLE], **self.base}

    def merged_weights(self):
        weights = self.weights()
        for name in self.merged or ():
            weights = oracle.with_deltas(weights, self.known[name].places, self.known[name].values)
        return weights

    def outputs(self, known=None, without=()):
        """Of the base with an adapter, or without its deltas in some places."""
        if known is None:
            return oracle.forward(self.weights(), self.blocks, self.ids)
        if not known.folds:
            return Alone.of(self.kind, known.config).outputs(self.base, known.values, without, self.ids)
        kept = {path: place for path, place in known.places.items() if path not in without}
        weights = oracle.with_deltas(oracle.with_copies(self.weights(), known.values), kept, known.values)
        return oracle.forward(weights, self.blocks, self.ids)

    def expected(self):
        """The network's outputs."""
        if self.merged is None:
            return self.outputs(self.current if self.context is None else None)
        live = self.current.values if self.active in self.merged else {}
        return oracle.forward(oracle.with_copies(self.merged_weights(), live), self.blocks, self.ids)

    @property
    def is_out(self):
        """Whether others are merged, so that the active adapter is not in the network."""
        return self.merged is not None and self.active not in self.merged

    def active_trains(self, path):
        """Whether the active adapter trains a delta in a place."""
        place = self.current.places.get(path) if self.current else None
        return place is not None and not self.trains().isdisjoint(place.paths.values())

    def trains(self):
        """Paths of the active adapter's values that train now."""
        if self.current is None or not self.current.trainable or self.context is not None:
            return set()
        if self.merged is not None:
            return set(self.current.copies) if self.active in self.merged else set()
        return self.current.trained

    def call(self, error, function):
        """Call what must fail, or with None must not; returns whether it did not."""
        if error is None:
            function()
            return True
        with pytest.raises(error):
            function()
        return False

    @invariant()
    def all_is_as_it_must_be(self):
        self.check_base()
        self.check_adapters()
        self.check_flags()
        self.check_outputs()

    def check_base(self):
        shown = self.merged_weights()
        folded = set().union(*(self.known[name].folded for name in self.merged or ()))
        for path, cell, key, param in self.places:
            assert cell._params[key] is param, path
        for path, param in self.params.items():
            if path in folded:
                np.testing.assert_allclose(param.asnumpy(), shown[path], rtol=1e-4, atol=1e-5, err_msg=path)
            else:
                assert param.asnumpy().tobytes() == self.base[path].tobytes(), path
        own = [param for param in self.network.get_parameters() if "mindpet" not in param.name]
        assert [(param, param.name) for param in own] == [(param, name) for param, name, _ in self.order]
        if self.kind == "lazy":
            self.check_marks()
        if not self.wrapped:
            assert len(list(self.network.get_parameters())) == len(own)
            for path, cell in self.network.cells_and_names():
                names = {*vars(cell), *cell._cells, *cell._params, path}
                assert not any("mindpet" in name or name == "construct" for name in names), path

    def check_marks(self):
        """MindSpore (not on a CPU) compiles a block once for all that have an equal mark."""
        marks = [block._cell_init_args for block in self.network.blocks]
        live = {} if self.is_out else self.live()
        inside = [{path[9:] for path in live if path.startswith(f"blocks.{number}.")} for number in (0, 1)]
        assert (marks[0] == marks[1]) == (inside[0] == inside[1])
        assert [mark == self.mark for mark in marks] == [not names for names in inside]

    def check_adapters(self):
        if not self.wrapped:
            return
        assert list(self.model.adapters) == list(self.known)
        assert self.model.active_adapter == self.active
        assert self.model.merged_adapters == (self.merged or [])
        seen = {layer.name: layer for layer in get_layer_status(self.model)}
        assert len(seen) == get_model_status(self.model).num_adapter_layers
        for path in {path for known in self.known.values() for path in known.places}:
            assert seen[path].available_adapters == sorted(
                name for name, known in self.known.items() if path in known.places
            )
            assert seen[path].requires_grad.get(self.active, False) in (self.active_trains(path), self.is_out)
        for name, known in self.known.items():
            got = self.model.adapters[name].values
            assert set(got) == set(known.values)
            assert [path for path in got if not equal(got[path], known.values[path])] == [], name

    def check_flags(self):
        for path, cell in (self.model or self.network).cells_and_names():
            assert cell.training == self.training or "_recompute" in path, path
        if not self.wrapped:
            assert all(param.requires_grad == flag for param, _, flag in self.order)
            return
        live = {id(param): path for path, param in self.live().items()}
        assert {live.get(id(param), param.name) for param in self.model.trainable_params()} == self.trains()
        for name, adapter in self.model.adapters.items():
            got = {path for path, param in adapter.slot.params.items() if param.requires_grad}
            assert got == set() or (name == self.active and (got == self.trains() or self.is_out)), name
        size = sum(self.current.values[path].size for path in self.trains())
        assert self.model.get_nb_trainable_parameters()[0] == size

    def live(self):
        """The Parameters of the active adapter."""
        return self.model.adapters[self.active].slot.params if self.current is not None else {}

    def call_network(self, ids):
        """Not all at once: a Cell that another one has called could hide that its own graph is stale."""
        if self.root == "jit" and (self.mode == ms.GRAPH_MODE or "WALKS" in os.environ):
            # Its graph does not see a later `set_train` (MindSpore 2.7 to 2.10, without mindpet too).
            return self.jitted.setdefault(self.training, jitted(self.network))(ids)
        return self.model(ids) if self.root == "model" and self.wrapped else self.network(ids)

    def check_outputs(self):
        if self.dirty:
            return
        got, expected = self.call_network(Tensor(self.ids)).asnumpy(), self.expected()
        if self.locked or not self.training or self.current is None or not self.current.drops:
            close(got, expected)
        elif self.current.surely_drops:
            assert np.isnan(expected).any() or np.abs(got - expected).max() > 1e-5

    # The calls

    def adopt(self, name, trainable, loaded=None):
        """Take over a new adapter; the values that it starts with must be right.

        Args:
            name (str): its name.
            trainable (bool): whether it trains.
            loaded (Known): what its file is of. Default: None, for a fresh one.
        """
        adapter = self.model.adapters[name]
        config, values = adapter.plan.config, adapter.values
        known = self.known[name] = Known(config, values, trainable, loaded is not None)
        for path, value in loaded.values.items() if loaded and set(loaded.values) == set(values) else ():
            assert equal(values[path], value) or "lora_start" in path, path
        self.follow(known, list(self.base))
        if loaded is None and all(method.identity for method in known.methods):
            if not (known.is_lora and config.init_lora_weights is False):
                close(self.outputs(known), self.outputs())
        elif loaded is not None and set(loaded.values) != set(values):  # a file has what a projection computes
            close(self.outputs(known), self.outputs(loaded))
        for place in known.places.values():
            if place.method.name == "lora":
                rank, alpha, is_rslora = (place.arguments[name] for name in ("rank", "alpha", "use_rslora"))
                scaling = alpha / (rank**0.5 if is_rslora else rank)
                np.testing.assert_allclose(values[place.paths[oracle.SCALING]], scaling, rtol=1e-6)

    def follow(self, known, changed, got=None):
        """What starts from other values of the base now must have followed, unless it was trained or loaded."""
        for base, paths in known.groups():
            fresh = paths not in known.started or all(
                equal(known.values[path], known.started[paths][path]) for path in paths
            )
            if self.source(base) not in changed:
                continue
            if not fresh:
                known.strayed |= paths[-1].endswith(oracle.START_B)
                continue
            taken = [path for path in paths if not known.loaded or "lora_start" in path]
            known.values.update({path: got[path] for path in taken} if got else {})
            known.started[paths] = {path: known.values[path] for path in paths}
            self.check_start(known, self.weights()[base], paths)

    def check_start(self, known, weight, paths):
        """What has started from a weight is what it must be."""
        values, layer = known.values, paths[-1].rpartition(".")[0]
        if paths[-1].endswith(oracle.START_B):
            start = values[paths[3]].astype(float) @ values[paths[2]] * values[f"{layer}.{oracle.SCALING}"]
            close(start, oracle.largest(weight, len(values[paths[0]])))
            assert known.loaded or (
                equal(values[paths[0]], values[paths[2]]) and equal(values[paths[1]], values[paths[3]])
            )
        elif known.loaded:
            return
        elif paths[-1] in known.copies:
            assert equal(values[paths[-1]], weight)
        elif paths[-1].endswith(oracle.MAGNITUDE):
            close(values[paths[-1]], np.linalg.norm(weight + oracle.product(values, layer), axis=1))
        elif layer == "":  # words by chance
            assert {row.tobytes() for row in values[paths[-1]]} <= {row.tobytes() for row in weight}
        else:
            place = known.places[layer]
            close(values[paths[-1]], oracle.STARTS[place.method.name](weight, **place.arguments))

    def source(self, path):
        """Where a weight of a layer stands in the base."""
        return oracle.TABLE if self.is_tied and path == "classifier.weight" else path

    def config(self, method, trainable, dropout):
        if self.kind == "shared" and method == "one block":
            method = "one layer"  # the other block has the same one
        config = CONFIGS[method](0.5 if dropout else 0.0)
        config.inference_mode = not trainable
        return config

    def refusal(self, method):
        """The error of a method that the network has no place for."""
        return None if self.is_attentive or method not in ATTENTIVE else MindPetError

    def wrap(self, method, trainable, dropout, bare):
        config, error = self.config(method, trainable, dropout), self.refusal(method)
        if bare:
            self.model = PeftModel(self.network)
            if not self.call(error, lambda: self.model.add_adapter("default", config)):
                assert self.model.unload() is self.network
                return self.leave()
        elif self.call(error, lambda: self.__dict__.update(model=get_peft_model(self.network, config))):
            self.active = "default"
        else:
            return
        self.adopt("default", trainable)

    @precondition(lambda self: not self.wrapped)
    @rule(method=st.sampled_from(list(CONFIGS)), trainable=st.booleans(), dropout=st.booleans(), bare=st.booleans())
    def get_peft_model(self, method, trainable, dropout, bare):
        self.wrap(method, trainable, dropout, bare)

    @precondition(lambda self: self.wrapped)
    @rule()
    def wrap_twice(self):
        self.call(ConfigError, lambda: get_peft_model(self.network, CONFIGS["lora"](0.0)))

    @precondition(lambda self: self.wrapped)
    @rule(
        name=st.sampled_from(NAMES),
        method=st.sampled_from(list(CONFIGS)),
        trainable=st.booleans(),
        dropout=st.booleans(),
        activate=st.booleans(),
    )
    def add_adapter(self, name, method, trainable, dropout, activate):
        config = self.config(method, trainable, dropout)
        error = self.locked or (AdapterError if name in self.known else self.refusal(method))
        if self.call(error, lambda: self.model.add_adapter(name, config)):
            self.adopt(name, trainable)
            if activate:
                self.all_is_as_it_must_be()
                self.activate(name)

    @precondition(lambda self: self.wrapped)
    @rule(which=WHICH)
    def set_adapter(self, which):
        self.activate(self.pick(which))

    def pick(self, which):
        """The name of an adapter, or now and then one that there is not."""
        return [*self.known, "none"][which % (len(self.known) + 1)]

    def activate(self, name):
        error = self.locked or (None if name in self.known else AdapterError)
        if self.call(error, lambda: self.model.set_adapter(name)):
            self.active = name

    @precondition(lambda self: self.wrapped)
    @rule(which=WHICH)
    def delete_adapter(self, which):
        name = self.pick(which)
        can = name in self.known and len(self.known) > 1
        if self.call(self.locked or (None if can else AdapterError), lambda: self.model.delete_adapter(name)):
            del self.known[name]
            if name == self.active:
                self.active = next(iter(self.known))

    @precondition(lambda self: self.wrapped)
    @rule(which=WHICH)
    def prepare_for_training(self, which):
        name = self.pick(which)
        error = self.locked or (None if name in self.known else AdapterError)
        if self.call(error, lambda: self.model.prepare_for_training(name)):
            self.active, self.training, self.known[name].trainable = name, True, True

    @precondition(lambda self: self.wrapped and self.context is None and self.active is not None)
    @rule()
    def disable(self):
        context = self.model.disable_adapter()
        if self.call(self.locked, context.__enter__):
            self.context = context

    @precondition(lambda self: self.context is not None)
    @rule(inside=st.sampled_from([None, ValueError("an error inside of the context")]))
    def enable(self, inside):
        error = AdapterError if self.dirty and inside is None else None
        context, self.context, self.dirty = self.context, None, False
        self.call(error, lambda: context.__exit__(inside and type(inside), inside, None))

    @precondition(lambda self: self.context is not None)
    @rule()
    def disable_again(self):
        with pytest.raises(KeyError), self.model.disable_adapter():
            self.check_outputs()
            raise KeyError

    @precondition(lambda self: self.wrapped)
    @rule(which=st.none() | st.lists(WHICH, max_size=2))
    def merge_adapter(self, which):
        names = which and list(map(self.pick, which))
        error = self.locked or self.merge_error(names, False)
        if self.call(error, lambda: self.model.merge_adapter(names)):
            self.merged = [self.active] if names is None else names

    def merge_error(self, names, for_good, untie=False):
        names = [name for name in (self.active,) if name] if names is None else names
        if not names or len(set(names)) < len(names) or not set(names) <= set(self.known):
            return AdapterError
        chosen = [self.known[name] for name in names]
        folded = set().union(*(known.folded for known in chosen))
        live = set(self.current.copies.values()) if self.active in names else set()
        tied = (folded | (live if for_good else set())) - {
            oracle.TABLE
            for _ in chosen[:1]
            if all(known.reaches_ties for known in chosen if oracle.TABLE in known.folded)
        }
        wrong = [
            any(not method.mergeable for known in chosen if known.places for method in known.methods),
            any(known.copies and known is not self.current for known in chosen),
            bool(folded & live),  # it would be folded into what is hidden
            any(known.folded and known.diverged for known in chosen),
            self.is_tied and not untie and not tied.isdisjoint({oracle.TABLE, "classifier.weight"}),
        ]
        return MergeError if any(wrong) else None

    @precondition(lambda self: self.wrapped)
    @rule()
    def unmerge_adapter(self):
        is_dirty, was_merged = self.dirty, self.merged is not None
        self.call(AdapterError if is_dirty or not was_merged else None, lambda: self.model.unmerge_adapter())
        if was_merged:
            self.merged, self.dirty = None, False

    @precondition(lambda self: self.wrapped)
    @rule()
    def unload(self):
        was_dirty = self.dirty and self.merged is not None
        error = AdapterError if self.context is not None or was_dirty else None
        if self.call(error, lambda: self.model.unload()):
            self.leave()
        elif was_dirty:
            self.merged, self.dirty = None, False

    @precondition(lambda self: self.wrapped and not self.dirty)
    @rule(untie=st.booleans())
    def merge_and_unload(self, untie):
        error = AdapterError if self.context is not None else self.merge_error(self.merged, True, untie)
        merged = self.merged or [self.active]
        if self.call(error, lambda: self.model.merge_and_unload(untie_weights=untie)):
            self.merged = merged
            shown = self.merged_weights()
            live = self.current.copies if self.active in merged else {}
            folded = set().union(*(self.known[name].folded for name in merged))
            if self.is_tied and self.network.classifier.weight is not self.network.embed.embedding_table:
                self.untie()
            for path in folded:
                got = self.params[path].asnumpy().copy()
                close(got, shown[path])
                self.base[path] = got
            self.base.update({base: self.current.values[path] for path, base in live.items()})
            self.leave()

    def untie(self):
        """The head has a weight of its own now."""
        flags = [flag for _, _, flag in self.order]
        self.look_at(self.network)
        assert not self.network.classifier.weight.requires_grad
        assert self.network.classifier.weight.name.endswith("classifier.weight")
        names = [name for name in self.params if name != "classifier.weight"]
        assert names == list(self.base) and len(self.order) == len(flags) + 1
        self.base["classifier.weight"] = self.base[oracle.TABLE]
        self.is_tied, self.kind, self.saved = False, {"tied": "plain"}.get(self.kind, "attention"), {}

    @precondition(lambda self: self.wrapped)
    @rule(
        which=st.lists(WHICH, min_size=1, max_size=3),
        combination=st.sampled_from(["cat", "svd", "linear"]),
        weight=st.sampled_from([1.0, -0.5]),
    )
    def add_weighted_adapter(self, which, combination, weight):
        names = list(map(self.pick, which))
        parts = [self.known.get(name) for name in names]
        weights = [weight, 2.0, 0.7][: len(names)]
        ranks = {part.config.r for part in parts if part is not None and part.is_lora}
        error = self.locked
        if "fourth" in self.known or None in parts or not all(is_plain(part) for part in parts):
            error = AdapterError
        values = [part.values for part in parts if part is not None]
        layers = sorted({path for own in values for path in oracle.layers_of(own)})
        if error is None and combination == "linear":
            shapes = [
                {len(own[f"{path}.{oracle.A}"]) for own in values if f"{path}.{oracle.A}" in own} for path in layers
            ]
            error = AdapterError if any(len(ranks) > 1 for ranks in shapes) else None
        if any(part.diverged for part in parts if part is not None):
            error = AdapterError
        rank = 4 if combination == "svd" else None  # nothing is lost with it
        arguments = (names, weights, "fourth", combination, rank)
        if self.call(error, lambda: self.model.add_weighted_adapter(*arguments)):
            got = self.model.adapters["fourth"]
            assert set(oracle.layers_of(got.values)) == set(layers), ranks
            for path in layers:
                expected = oracle.weighted_sum(values, weights, path, combination)
                close(oracle.product(got.values, path), expected)
            self.known["fourth"] = Known(got.plan.config, got.values, False, loaded=True)

    @precondition(lambda self: self.wrapped)
    @rule(which=st.lists(st.none() | WHICH, min_size=3, max_size=3))
    def adapter_names(self, which):
        names = ["__base__" if one is None else self.pick(one) for one in which]
        used = [self.known.get(name) for name in names if name != "__base__"]
        error = self.locked
        if error is None and (None in used or not all(known.mixes for known in used)):
            error = AdapterError
        if error is None and before_and_behind(used):
            error = ConfigError
        got = []
        if self.call(error, lambda: got.append(self.model(Tensor(self.ids), adapter_names=names).asnumpy())):
            if not (self.training and any(known.drops for known in used)):
                rows = [self.outputs(self.known.get(name)) for name in names]
                close(got[0], np.stack([outputs[row] for row, outputs in enumerate(rows)]))

    @precondition(lambda self: self.wrapped)
    @rule(which=WHICH)
    def save_pretrained(self, which):
        name = self.pick(which)
        folder = self.folder / str(len(self.saved))
        error = None if name in self.known and not self.known[name].strayed else AdapterError
        if self.call(error, lambda: self.model.save_pretrained(folder, selected_adapters=[name])):
            known = copy.copy(self.known[name])
            known.values = dict(known.values)
            self.saved[folder / ("" if name == "default" else name)] = known, dict(self.base)

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 9), name=st.sampled_from(NAMES), trainable=st.booleans(), force=st.booleans())
    def load(self, which, name, trainable, force):
        folder = list(self.saved)[which % len(self.saved)]
        saved, base = self.saved[folder]
        error = self.locked or (AdapterError if name in self.known else None)
        whole = {oracle.TABLE if self.is_tied else "classifier.weight", "classifier.bias"}
        whole = whole if saved.config.modules_to_save else set()
        if any(not equal(base[path], self.base[path]) for path in base if path not in whole) and not force:
            error = error or CheckpointError
        if not all(np.isfinite(value).all() for value in saved.values.values()) and not force:
            error = error or CheckpointError
        if self.wrapped:
            if self.call(error, lambda: self.model.load_adapter(folder, name, trainable, force=force)):
                self.adopt(name, trainable, saved)
            return
        got = []
        arguments = {"adapter_name": name, "is_trainable": trainable, "force": force}
        if self.call(error, lambda: got.append(PeftModel.from_pretrained(self.network, folder, **arguments))):
            self.model, self.active = got[0], name
            self.adopt(name, trainable, saved)

    @precondition(lambda self: self.wrapped and not self.dirty)
    @rule(which=WHICH)
    def set_state_dict(self, which):
        """Tensors of an adapter's file, other ones."""
        name = self.pick(which)
        known, half = self.known.get(name), {}
        if self.call(
            None if known else AdapterError, lambda: half.update(get_peft_model_state_dict(self.model, None, name))
        ):
            half = {key: value.asnumpy() * np.float32(0.5) for key, value in half.items()}
        error = self.locked or (None if known else AdapterError)
        if error is None and known.is_computed:
            error = CheckpointError
        if error is None and known.diverged:
            error = CheckpointError
        if self.call(error, lambda: set_peft_model_state_dict(self.model, half, name)):
            written = known.in_files
            got = self.model.adapters[name].values
            for path, value in known.values.items():
                expected = value * np.float32(0.5) if path in written else value
                assert equal(got[path], expected), path
            known.values, known.loaded = got, True
            known.started = {paths: {path: got[path] for path in paths} for _, paths in known.groups()}

    @precondition(lambda self: self.wrapped)
    @rule(number=st.integers(1, 2), which=WHICH)
    def drop_adapter_layers(self, number, which):
        name = self.pick(which)
        known, error = self.known.get(name), self.locked
        if "fourth" in self.known or known is None:
            error = AdapterError
        below = self.numbered(known, number) if known else {}
        if error is None and (not below or known.are_whole_parts(below)):
            error = AdapterError
        if self.call(error, lambda: drop_adapter_layers(self.model, number, "fourth", name)):
            adapter = self.model.adapters["fourth"]
            new = self.known["fourth"] = Known(adapter.plan.config, adapter.values, False, known.loaded)
            assert set(new.places) == set(known.places) - set(below)
            new.started = {paths: known.started[paths] for _, paths in new.groups()}
            new.strayed = known.strayed
            close(self.outputs(new), self.outputs(known, below))

    def numbered(self, known, number):
        """Places of an adapter in a layer with a number below one -> that number."""
        if not all(isinstance(part, TargetConfig) for part in known.config.parts):
            return {}
        numbers = {path: int(path.split(".")[1]) for path in known.places if path.startswith("blocks.")}
        if self.kind == "shared":
            numbers.update({path: 1 for path in numbers if path == "blocks.0.fc"})
        return {path: own for path, own in numbers.items() if own < number}

    @precondition(lambda self: self.wrapped and not self.dirty)
    @rule(levels=st.lists(st.integers(0, 1), max_size=2))
    def leave_out(self, levels):
        """What AdapterDrop does in a step of training."""
        error = self.locked or (None if self.current else AdapterError)
        if error is None:
            below = self.numbered(self.current, 1)
            others = [self.current.places[path].delta for path in below]
            can = [delta.construct is Delta.construct and delta.before is Delta.before for delta in others]
            error = None if can and all(can) and len(self.numbered(self.current, 2)) > len(below) else AdapterError
        self.call(error, lambda: self.walk_up(levels))

    def walk_up(self, levels):
        with AdapterDrop(self.model) as drop:
            for level in levels:
                drop.leave_out(level)
                got = self.call_network(Tensor(self.ids)).asnumpy()
                if not (self.training and self.current.drops):
                    close(got, self.outputs(self.current, self.numbered(self.current, level)))

    @precondition(lambda self: self.wrapped and self.context is None and not self.dirty and self.left is None)
    @precondition(lambda self: self.kind != "recompute")  # MindSpore cannot copy such a network, without mindpet too
    @rule(stays=st.booleans())
    def copy_all(self, stays):
        """A deep copy of everything; one of both is left as it is."""
        twin = copy.deepcopy(self.model)
        self.left = twin if stays else self.model, self.expected(), self.current and self.current.drops
        if not stays:
            self.model, flags = twin, [flag for _, _, flag in self.order]
            self.look_at(twin.network)
            self.order = [(param, name, flag) for (param, name, _), flag in zip(self.order, flags)]
            self.jitted, self.steps = {}, []

    @precondition(lambda self: self.left is not None)
    @rule()
    def look_back(self):
        """What was left is as it was."""
        (model, expected, drops), self.left = self.left, None
        if not (model.training and drops):
            close(model(Tensor(self.ids)).asnumpy(), expected)

    @precondition(lambda self: self.holder is None)
    @rule()
    def hold(self):
        """The network comes into another Cell, which gives its Parameters other names."""
        self.holder = Holder(self.network)
        self.holder.set_train(self.training)
        self.order = [(param, f"inner.{name}", flag) for param, name, flag in self.order]

    @precondition(lambda self: not self.dirty)
    @rule(which=st.integers(0, 19), way=st.sampled_from(WAYS))
    def load_base(self, which, way):
        paths = list(self.base)
        self.set_base(paths[which : which + 1] or paths, way)

    def set_base(self, paths, way="load_param_into_net"):
        new = {path: 0.5 * self.rng.normal(size=self.base[path].shape).astype(np.float32) for path in paths}
        self.base.update(new)
        values = {self.params[path].name: Parameter(Tensor(value)) for path, value in new.items()}
        if way == "load_param_into_net":
            assert ms.load_param_into_net(self.model or self.network, values, strict_load=True)[1] == []
        elif way == "load_state_dict":
            self.network.load_state_dict({path: values[self.params[path].name] for path in new}, strict=False)
        elif way == "load_delta":
            ms.save_checkpoint(
                [{"name": name, "data": value} for name, value in values.items()], str(self.folder / "base.ckpt")
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the adapter is not in the file
                load_delta(self.model or self.network, str(self.folder / "base.ckpt"), strict=False)
        else:
            for path, value in new.items():
                self.params[path].set_data(Tensor(value))
        self.jitted = {}  # the old one would have the old memory (MindSpore, without mindpet too)
        for name, known in self.known.items():
            self.follow(known, new, self.model.adapters[name].values)

    @rule(flag=st.booleans())
    def set_train(self, flag):
        (self.model or self.network).set_train(flag)
        self.training = flag

    @precondition(lambda self: self.trains())
    @rule(way=st.sampled_from(["assign", "load_delta"]))
    def move(self, way):
        """What training does, or `load_delta`: other values in the Parameters."""
        if way == "load_delta":
            live = {path: self.live()[path] for path in self.trains()}
            content = [{"name": param.name, "data": Tensor(param.asnumpy() * 0.5)} for param in live.values()]
            ms.save_checkpoint(content, str(self.folder / "delta.ckpt"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what an adapter has besides
                load_delta(self.model, str(self.folder / "delta.ckpt"), strict=False)
            for path, param in live.items():
                assert equal(param.asnumpy(), self.current.values[path] * np.float32(0.5)), path
                self.current.values[path] = param.asnumpy().copy()
            return
        for path in sorted(self.trains()):
            param = self.live()[path]
            # Not set_data: an optimizer that was made before goes on with the old memory (MindSpore, PyNative mode).
            ops.assign(param, Tensor(param.asnumpy() + 0.3 * self.rng.normal(size=param.shape).astype(np.float32)))
            self.current.values[path] = param.asnumpy().copy()

    @precondition(lambda self: self.trains())
    @rule()
    def diverge(self):
        """What a rate of learning that is too high does."""
        for path in sorted(self.trains()):
            param = self.live()[path]
            ops.assign(param, Tensor(np.full(param.shape, np.nan, np.float32)))
            self.current.values[path] = param.asnumpy().copy()

    @precondition(lambda self: self.trains())
    @rule(freeze=st.booleans())
    def train(self, freeze):
        """A new training step."""
        if freeze and self.merged is None and self.current.is_lora:
            freeze_delta(self.model, "lora", exclude=["*classifier.*"] if self.current.config.modules_to_save else None)
            kept = {path for path in self.trains() if oracle.COPY not in path}
            kept |= {
                path
                for path in self.current.copies
                if path.startswith("classifier.") and self.current.config.modules_to_save
            }
            assert {path for path, param in self.live().items() if param.requires_grad} == kept
        step = nn.TrainOneStepCell(Loss(self.model), nn.Momentum(self.model.trainable_params(), 0.03, 0.9))
        step.set_train()
        self.training = True
        self.steps = [*self.steps[-2:], (self.current, step)]
        self.run(step, self.current)
        if freeze and self.merged is None:
            self.model.set_adapter(self.active)

    @precondition(lambda self: self.steps)
    @rule(which=st.integers(0, 2))
    def train_on(self, which):
        """A step that was made earlier, perhaps for another adapter, or for one that is no more."""
        owner, step = self.steps[which % len(self.steps)]
        self.run(step, owner)

    def run(self, step, owner):
        own = self.wrapped and owner is self.current
        before = {path: param.asnumpy().copy() for path, param in self.live().items()} if self.wrapped else {}
        try:
            step(Tensor(self.ids)).asnumpy()
        except Exception:
            if own and not self.locked:
                raise
        if not self.wrapped or owner not in self.known.values():
            return
        name = next(name for name, known in self.known.items() if known is owner)
        values = self.model.adapters[name].values
        changed = {path for path in values if not equal(values[path], owner.values[path])}
        assert changed <= owner.trained
        if own and not self.locked and not owner.diverged:
            given = {id(param) for param in step.optimizer.parameters}
            trained = {part(path) for path, param in self.live().items() if id(param) in given}
            idle = {
                part(path) for path in owner.values if path.endswith("key.mindpet_trained_bias")
            }  # behind a softmax
            assert {part(path) for path in changed} - idle == trained - idle
        owner.values = values
        if self.context is not None or self.active in (self.merged or ()):
            hidden = [path for path in self.live() if path not in self.trains()]
            self.dirty |= any(not equal(before[path], self.live()[path].asnumpy()) for path in hidden)


class GraphWalk(Walk):
    """A walk in graph mode."""

    mode = ms.GRAPH_MODE


class Alone:
    """A network with one adapter, for what the oracle has no formula of; one for each configuration."""

    made = {}

    @classmethod
    def of(cls, kind, config):
        """The one for a kind of network and a configuration."""
        kind = "plain" if kind in ("lazy", "recompute") else kind  # the same Parameters
        config = copy.deepcopy(config)
        config.inference_mode = False
        key = kind, config.to_json()
        if key not in cls.made:
            cls.made[key] = cls(kind, config)
        return cls.made[key]

    def __init__(self, kind, config):
        self.network = make_network(kind)
        self.params = dict(self.network.parameters_and_names())
        self.model = get_peft_model(self.network, config).set_train(False)

    def outputs(self, base, values, without, ids):
        """With these values of the base and of the adapter, without the deltas in some places."""
        mode, slot = ms.get_context("mode"), self.model.adapters["default"].slot
        ms.set_context(mode=ms.PYNATIVE_MODE)
        for path, param in self.params.items():
            ops.assign(param, Tensor(base[path]))
        for path, param in slot.params.items():
            ops.assign(param, Tensor(values[path]))
        for path in without:
            slot.deltas[path].reset()
        try:
            return self.model(Tensor(ids)).asnumpy()
        finally:
            ms.set_context(mode=mode)


def jitted(network):
    """A compiled function that has a network in its closure."""

    @ms.jit
    def call(ids):
        return network(ids)

    return call


def is_plain(known):
    """Whether an adapter can be in a weighted sum."""
    extra = (oracle.MAGNITUDE, oracle.BIAS, oracle.START_A)
    return known.is_lora and not known.copies and not any(path.endswith(extra) for path in known.values)


def before_and_behind(used):
    """Whether deltas stand on both sides of the activation of `fc`."""
    return len({known.places["fc"].delta.before_activation for known in used if "fc" in known.places}) > 1


def part(path):
    """What of an adapter must change in a step: a copy, or any of the values beside a layer; some start with zeros."""
    return path if oracle.COPY in path else path.partition(".mindpet")[0]


def equal(one, other):
    """Whether two arrays are the same bit by bit."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)  # NaN equals NaN


def walks(machine, count, steps):
    own = "WALKS" in os.environ
    test = machine.TestCase
    test.settings = settings(
        max_examples=int(os.environ.get("WALKS", count)),
        stateful_step_count=int(os.environ.get("STEPS", steps)),
        derandomize=not own,
        print_blob=True,
        report_multiple_bugs=False,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return test


def test_every_method_has_a_way_in():
    """One without a configuration of its own in `walked` gets that of its defaults."""
    for make in CONFIGS.values():
        get_peft_model(make_network("attention"), make(0.0))
    assert covered() == set(METHODS)


TestWalk = walks(Walk, 160, 20)
TestGraphWalk = walks(GraphWalk, 20, 6)
