"""Samples that are not along the first axis: found where they can be, refused where their losses are asked for."""

import pytest
import torch
import torch.nn.functional as F
from nets import mlp, randint, randn, seeded
from torch import nn

import grsd_callbacks.observation
from grsd_callbacks import ShellMonitor
from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.losses import resolve_loss
from grsd_callbacks.measure import Settings, measure
from grsd_callbacks.observation import observed
from grsd_callbacks.probe import Probe
from grsd_callbacks.sample_axis import SAMPLES_FIRST, SampleAxis, sample_axes, second_axis, take_second
from grsd_callbacks.training_step import observe_step, step_pair

N, T, WORDS = 6, 4, 5
TOKENS, NEXT = randint(WORDS, N, T, seed=1), randint(WORDS, N, T, seed=2)
SERIES, ANSWERS = randn(T, N, 3, seed=3), randn(T, N, 2, seed=4)


# ---- where the samples are ----


@pytest.mark.parametrize(
    ("shape", "place"),
    [
        ((N, 3), SampleAxis()),
        ((N * T, 3), SampleAxis(inner=False)),
        ((T * N, 3), SampleAxis(inner=True)),
        ((T, N, 3), SampleAxis(1)),
        ((T, 2 * N, 3), SampleAxis(1, inner=True)),
    ],
)
def test_rows_are_those_of_samples_and_go_back(shape, place):
    whole = randn(*shape, seed=5)
    rows = place.rows(whole, N)
    assert rows.shape == (N, whole.numel() // N) and torch.equal(place.put_back(rows, whole), whole)
    some = slice(0, 3)
    size = whole.shape[place.axis] // N * 3
    like = whole.narrow(place.axis, 0, size)
    part = place.put_back(rows[some], like)
    assert sample_axes(whole, part, N, some) == [place]
    assert sample_axes(whole, part + 1, N, some) == []


def test_samples_run_before_what_is_inside_them():
    whole = torch.arange(T * N).reshape(T, N).flatten()  # time 0 of all samples, then time 1, ...
    assert SampleAxis(inner=True).rows(whole, N)[2].tolist() == [2, N + 2, 2 * N + 2, 3 * N + 2]
    assert SampleAxis(2).without_classes() == SampleAxis(1) and SampleAxis().without_classes() == SampleAxis()


def test_the_second_axis_is_taken_wherever_it_is():
    tree = {"x": SERIES, "flat": SERIES.flatten(0, 1), "lengths": torch.arange(N), "other": torch.ones(T), "scale": 2.0}
    assert second_axis(tree) == (T, N) and second_axis([torch.ones(3), 1]) == (0, 0)
    half = take_second(tree, slice(0, 2))
    assert torch.equal(half["x"], SERIES[:, :2]) and torch.equal(half["flat"], SERIES[:, :2].flatten(0, 1))
    assert half["lengths"].tolist() == [0, 1] and half["other"] is tree["other"] and half["scale"] == 2.0


# ---- training steps ----


class Words(nn.Module):
    """A recurrent net on tokens; subclasses say in what layout."""

    def __init__(self):
        super().__init__()
        self.embedding, self.net = nn.Embedding(WORDS, 4), nn.GRU(4, 5)
        self.head = nn.Linear(5, WORDS)

    def forward(self, tokens):
        """Time first, as `nn.GRU` has it: (T, n) to (T, n, words)."""
        return self.head(self.net(self.embedding(tokens))[0])


class FlatTimeFirst(Words):
    """Batches (n, T); logits and targets are flattened with time first."""

    def training_step(self, batch, batch_idx):
        tokens, targets = batch
        return F.cross_entropy(self(tokens.T).flatten(0, 1), targets.T.flatten())


class ZeroHead(FlatTimeFirst):
    """All logits are zero at the start, so that only targets tell where the samples are."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)


class TimeFirstBatches(Words):
    """Batches (T, n)."""

    def training_step(self, batch, batch_idx):
        tokens, targets = batch
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


def step_of(kind, batch):
    module = seeded(kind)
    probe = Probe(*step_pair(list(batch)))
    found = observe_step(ModelFunction(module), probe)
    return module, probe, found


def gradients(values, parameters):
    rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in values]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("kind", [FlatTimeFirst, ZeroHead])
def test_samples_of_flattened_time_first_outputs_are_found(kind):
    module, probe, step = step_of(kind, (TOKENS, NEXT))
    assert step.outputs.axes == (SampleAxis(inner=True),) and step.notes == [] and not step.outputs.interacting
    function = ModelFunction(module, outputs=step.outputs)
    f = function.run(lambda: function.outputs(probe.inputs))
    torch.testing.assert_close(f, module(TOKENS.T).transpose(0, 1).flatten(1))
    plain = measure(module, probe, step.loss, Settings(outputs=step.outputs))
    found = observed(function, probe, step.loss, "loss_gradient")
    instant = measure(module, found.probe, found.loss, Settings(outputs=found.outputs))
    own = [F.cross_entropy(module(TOKENS[i : i + 1].T)[:, 0], NEXT[i]) for i in range(N)]
    g = gradients(own, list(module.parameters()))
    torch.testing.assert_close(instant.eigenvalues, torch.linalg.eigvalsh(g @ g.T / N).flip(0), atol=1e-12, rtol=1e-9)
    for measured in (plain, instant):
        assert float(measured.budget.dissipation.sum()) == pytest.approx(float(g.mean(0).square().sum()), rel=1e-9)


class TwoLosses(nn.Module):
    """A submodule returns zeros, flattened with time first, to two losses: only targets tell where samples are."""

    second = "same for all"

    def __init__(self):
        super().__init__()
        self.words = FlatWords()

    def training_step(self, batch, batch_idx):
        tokens, targets = batch
        z = self.words(tokens)
        by_time = F.one_hot(targets.T.flatten(), WORDS).double()
        first, second = torch.full_like(by_time, 0.2), by_time
        if self.second == "otherwise":  # two targets, each in a layout of its own
            first, second = by_time, F.one_hot(targets.flatten(), WORDS).double()
        return F.l1_loss(z, first) + F.mse_loss(z, second)


class Contradicting(TwoLosses):
    second = "otherwise"


class FlatWords(Words):
    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)

    def forward(self, tokens):
        return super().forward(tokens.T).flatten(0, 1)


def test_all_targets_together_tell_where_samples_are():
    module, probe, step = step_of(TwoLosses, (TOKENS, NEXT))
    assert step.outputs.places[0].kind == "module"  # so that what is put there reaches both losses
    assert step.outputs.axes == (SampleAxis(inner=True),) and step.notes == [] and not step.outputs.interacting
    with torch.no_grad():
        module.words.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    function = ModelFunction(module, outputs=step.outputs)
    f = function.run(lambda: function.outputs(probe.inputs))
    torch.testing.assert_close(f, module.words(TOKENS).unflatten(0, (T, N)).transpose(0, 1).flatten(1))


def test_targets_that_say_different_things_leave_samples_unknown():
    """The kernel is then that of the whole batch, whose parts are not told apart."""
    module, probe, step = step_of(Contradicting, (TOKENS, NEXT))
    assert step.outputs.interacting and "the kernel is taken from rows on the whole batch" in step.notes[0]
    found = measure(module, probe, step.loss, Settings(outputs=step.outputs))
    assert float(found.budget.dissipation.sum()) == pytest.approx(found.grad_norm_sq, rel=1e-9)


def test_parts_of_a_batch_together_tell_where_samples_are():
    """Targets of the first samples, and the first times of all, are the same: half of the batch leaves it open."""
    targets = NEXT.clone()
    targets[:, :2] = targets[: N // 2] = 1
    assert len(sample_axes(targets.T.flatten(), targets[: N // 2].T.flatten(), N, slice(0, N // 2))) == 2
    _, _, step = step_of(ZeroHead, (TOKENS, targets))
    assert step.outputs.axes == (SampleAxis(inner=True),) and step.notes == [] and not step.outputs.interacting


def test_a_batch_with_time_first_is_said_to_be_one():
    module, probe, step = step_of(TimeFirstBatches, (TOKENS.T.contiguous(), NEXT.T.contiguous()))
    assert step.outputs.time_first and step.outputs.interacting
    (note,) = step.notes
    assert "the batch's first axis (4) is not that of samples" in note and "the second (6), as with time first" in note
    assert note in step.outputs.description
    instant = measure(module, probe, step.loss, Settings(outputs=step.outputs))
    with torch.enable_grad():
        (g,) = gradients([module.training_step((TOKENS.T, NEXT.T), 0)], list(module.parameters()))
    assert float(instant.budget.dissipation.sum()) == pytest.approx(float(g.square().sum()), rel=1e-9)


def test_losses_of_a_batch_with_time_first_are_refused(monkeypatch):
    module, probe, step = step_of(TimeFirstBatches, (TOKENS.T.contiguous(), NEXT.T.contiguous()))
    function = ModelFunction(module, outputs=step.outputs)
    with pytest.raises(ValueError, match="observe='root_loss' needs samples along the first axis"):
        observed(function, probe, step.loss, "root_loss")
    monkeypatch.setattr(grsd_callbacks.observation, "MAX_ROWS", 10)
    assert observed(function, probe, step.loss, "auto").outputs is step.outputs  # all of them


def test_flattened_targets_of_a_batch_with_time_first():
    class Flat(TimeFirstBatches):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["tokens"]).flatten(0, 1), batch["targets"])

    module = seeded(Flat)
    batch = {"tokens": TOKENS.T.contiguous(), "targets": NEXT.T.flatten()}
    assert observe_step(ModelFunction(module), Probe(*step_pair(batch))).outputs.time_first


def test_time_of_a_causal_net_is_no_axis_of_samples():
    """Samples are first and interact; the first times do not know of the later ones."""

    class Causal(Words):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0].T).transpose(0, 1)
            return F.cross_entropy((logits - logits.mean(0)).flatten(0, 1), batch[1].flatten())

    _, _, step = step_of(Causal, (TOKENS, NEXT))
    assert not step.outputs.time_first and "samples of a batch interact" in step.notes[0]


def test_samples_that_interact_otherwise_are_not_mistaken():
    class Mixed(nn.Module):
        """Every feature by itself, but across the batch; features cannot be taken apart."""

        def __init__(self):
            super().__init__()
            self.body = mlp()

        def training_step(self, batch, batch_idx):
            z = self.body(batch[0])
            return F.mse_loss(z - z.mean(0), torch.ones_like(z))

    _, _, step = step_of(Mixed, (randn(N, 5, seed=6), NEXT))
    assert not step.outputs.time_first and "samples of a batch interact" in step.notes[0]


@pytest.mark.parametrize("refused", [None, (3, 5)])
def test_steps_that_assert_the_shape_of_a_batch_are_measured(refused):
    """On parts along either axis: what a model says to them only means that samples are not there."""

    class Asserting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def training_step(self, batch, batch_idx):
            assert batch[0].shape[1] == 5 and tuple(batch[0].shape) != refused, "the wrong shape"
            z = self.body(batch[0])
            return F.mse_loss(z - z.mean(0), torch.ones_like(z))

    _, _, step = step_of(Asserting, (randn(N, 5, seed=6), NEXT))
    assert not step.outputs.time_first and "samples of a batch interact" in step.notes[0]


# ---- forward ----


class Recurrent(nn.Module):
    """(T, n, 3) to (T, n, 2), as `nn.GRU` has it."""

    def __init__(self):
        super().__init__()
        self.net, self.head = nn.GRU(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.net(x)[0])


@pytest.mark.filterwarnings("ignore:the structured kernel is not complete for this model .v.T K v misses")
def test_losses_of_samples_are_refused_with_code_that_works(monkeypatch):
    net = seeded(Recurrent)
    along = r"outputs along it \(4\) depend on each other, but not along the second \(6\)"
    with pytest.raises(ValueError, match=along) as error:
        ShellMonitor(net, "mse", (SERIES, ANSWERS), observe="loss_gradient")
    names = {"torch": torch}
    exec(str(error.value).split("\n\n", 1)[1], names)
    probe = Probe(SERIES.transpose(0, 1), ANSWERS.transpose(0, 1))
    wrapped = names["SamplesFirst"](net)
    found = observed(ModelFunction(wrapped), probe, resolve_loss("mse"), "loss_gradient")
    instant = measure(wrapped, found.probe, found.loss, Settings(outputs=found.outputs))
    g = gradients([F.mse_loss(net(SERIES[:, i]), ANSWERS[:, i]) for i in range(N)], list(net.parameters()))
    torch.testing.assert_close(instant.eigenvalues, torch.linalg.eigvalsh(g @ g.T / N).flip(0), atol=1e-12, rtol=1e-9)
    monkeypatch.setattr(grsd_callbacks.observation, "MAX_ROWS", 10)
    monitor = ShellMonitor(net, "mse", (SERIES, ANSWERS), every_n_steps=1, observe="auto", on_error="raise")
    snapshot = monitor.step(0, lr=0.1)
    assert (snapshot.num_samples, snapshot.num_outputs) == (T, 2 * N) and abs(snapshot.closures["dissipation"]) < 1e-9


def test_losses_are_refused_where_only_outputs_have_samples_second():
    """As many samples as times, so that no shape tells."""

    class Turned(Recurrent):
        def forward(self, x):
            return super().forward(x.transpose(0, 1))

    probe = Probe(randn(N, N, 3, seed=7), randn(N, N, 2, seed=8))
    with pytest.raises(ValueError, match=r"first axis .* outputs of shape \(6, 6, 2\) have them along axis 1"):
        observed(ModelFunction(seeded(Turned)), probe, resolve_loss("mse"), "loss_gradient")


def test_classes_after_the_samples_stay_where_they_are():
    """(n, classes, T), as torch's cross-entropy has it."""

    class PerToken(Words):
        def forward(self, tokens):
            return super().forward(tokens.T).permute(1, 2, 0)

    net = seeded(PerToken)
    found = observed(ModelFunction(net), Probe(TOKENS, NEXT), resolve_loss("cross_entropy"), "loss_gradient")
    instant = measure(net, found.probe, found.loss, Settings(outputs=found.outputs))
    g = gradients([F.cross_entropy(net(TOKENS[i : i + 1]), NEXT[i : i + 1]) for i in range(N)], list(net.parameters()))
    torch.testing.assert_close(instant.eigenvalues, torch.linalg.eigvalsh(g @ g.T / N).flip(0), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("num", [1, N])
def test_samples_that_interact_in_forward_are_measured_as_before(num):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            if len(x) < num:
                raise RuntimeError("not on parts of a batch")
            z = self.body(x)
            return z - 0.5 * z.mean(0)

    net, x, y = seeded(Centred), randn(num, 5, seed=9), randn(num, 3, seed=10)
    found = observed(ModelFunction(net), Probe(x, y), resolve_loss("mse"), "loss_gradient")
    f = found.outputs.call(net, {"inputs": x, "targets": y})
    torch.testing.assert_close(f[:, 0], (net(x) - y).square().mean(1))


def test_the_code_in_the_message_is_python():
    compile(SAMPLES_FIRST, "message", "exec")
