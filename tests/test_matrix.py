"""Model family x precision x trainer feature: training is bit-identical, and the kernel is that of explicit rows.

Every pair of a family and a feature is met once, every pair with a precision at least once (`make slow`: every triple).
"""

import copy
from functools import partial
from typing import NamedTuple

import lightning.pytorch as pl
import lightning_cases as cases
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from grsd_callbacks import ShellDynamicsCallback, ShellMonitor
from grsd_callbacks.callbacks import step_axis

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*ModelCheckpoint"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step..` before"),
    pytest.mark.filterwarnings("ignore:grsd. measuring every . steps costs"),
]
NUM_PROBE, CLASSES, WORDS, LENGTH = 4, 4, 7, 5


# ---- families: net, inputs, targets, loss ----


class Residual(nn.Module):
    """A small ResNet with group norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, bias=False))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.stem(x.view(-1, 1, 8, 8))
        return self.head((x + self.body(x)).mean((2, 3)))


class Attention(nn.Module):
    """The rows of an image attend to each other."""

    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = x.view(-1, 8, 8)
        return self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.rnn(x.view(-1, 8, 8))[0][:, -1])


class Language(nn.Module):
    """A causal language model whose embedding is its head; outputs of shape (n, WORDS, LENGTH)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=self.embedding.weight.dtype)
        return self.head(self.layer(self.embedding(tokens), src_mask=mask, is_causal=True)).transpose(1, 2)


def norm_and_dropout():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(36, CLASSES),
    )


def images():
    x, labels = cases.digits(16)
    return x, labels % CLASSES


def vectors():
    x, labels = images()
    return x, F.one_hot(labels, CLASSES).float()


def tokens():
    words = torch.randint(WORDS, (16, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return words[:, :-1].contiguous(), words[:, 1:].contiguous()


class Family(NamedTuple):
    net: type | partial
    data: type = images
    loss: type = nn.CrossEntropyLoss
    nu: float = 1 / NUM_PROBE


FAMILIES = {
    "mlp": Family(partial(cases.mlp, 8, num_out=CLASSES), vectors, nn.MSELoss, 2 / (NUM_PROBE * CLASSES)),
    "cnn": Family(norm_and_dropout),
    "resnet": Family(Residual),
    "attention": Family(Attention),
    "lstm": Family(Recurrent),
    "gpt": Family(Language, tokens, nu=1 / (NUM_PROBE * LENGTH)),
}
PRECISIONS = ["32-true", "64-true", "bf16-mixed", "16-true", "bf16-true"]


# ---- features: module, trainer options, callbacks ----


class Validated(cases.Module):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.criterion(self(batch[0]), batch[1]))


class Manual(cases.Module):
    """Two optimizers take turns, on the first parameters and on the others."""

    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = self.criterion(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("train_loss", loss)

    def configure_optimizers(self):
        first, *rest = self.parameters()
        return [torch.optim.SGD([first], lr=0.05), torch.optim.Adam(rest, lr=1e-2, eps=1e-3)]


class Scheduled(cases.Module):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Feature(NamedTuple):
    module: type = cases.Module
    options: dict = {}
    callbacks: tuple = ()
    optimizer: partial = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    saved_at: int = 0  # resume there


FEATURES = {
    "plain": Feature(),
    "accumulation, clipping": Feature(
        options={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_epochs": 3}
    ),
    "two optimizers by hand": Feature(Manual),
    "lbfgs": Feature(optimizer=partial(torch.optim.LBFGS, lr=0.5, max_iter=2)),
    "validation, early stopping": Feature(
        Validated, {"val_check_interval": 2}, (partial(EarlyStopping, "val_loss", patience=1),)
    ),
    "weight averaging": Feature(
        options={"max_epochs": 3},
        callbacks=(partial(StochasticWeightAveraging, 0.05, swa_epoch_start=1, annealing_epochs=1),),
    ),
    "scheduler": Feature(Scheduled),
    "clipping by value": Feature(options={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "logging every 3": Feature(options={"log_every_n_steps": 3}),
    "resume in mid-epoch": Feature(saved_at=3),
    "limits": Feature(Validated, {"limit_train_batches": 3, "limit_val_batches": 1, "max_steps": 5, "max_epochs": 4}),
}


class Weights(pl.Callback):
    """Weights before every batch, by the step of the curves' axis."""

    def __init__(self):
        self.at = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.at.setdefault(step_axis(trainer, pl_module), {k: v.clone() for k, v in pl_module.state_dict().items()})


def run(family, precision, feature, folder, ours=()):
    """(image of the run, its module), always from the same seed."""
    cases.seed()
    module = feature.module(family.net(), family.loss(), feature.optimizer)
    x, y = family.data()
    data = cases.loader(x, y, 4)
    validation = cases.loader(x, y, 8, shuffle=False) if feature.module is Validated else None
    logger = CSVLogger(folder, name="", version=0)
    options = {"precision": precision, "max_epochs": 2, "num_sanity_val_steps": 1, **feature.options}
    others = [make() for make in feature.callbacks]
    checkpoint = None
    if feature.saved_at:
        first = cases.quiet_trainer(
            folder,
            [ModelCheckpoint(folder, filename="saved", every_n_train_steps=feature.saved_at), *ours],
            enable_checkpointing=True,
            **{**options, "max_steps": feature.saved_at},
        )
        first.fit(module, data)
        checkpoint = folder / "saved.ckpt"
        cases.seed(1)
    trainer = cases.quiet_trainer(folder, [*others, *ours], logger=logger, **options)
    trainer.fit(module, data, validation, ckpt_path=checkpoint)
    return cases.image(trainer, module), module


def explicit(family, module, state, dtype):
    """(spectrum of nu J J^T, loss, |grad L|^2) on the probe, from rows of J by autograd on the module itself."""
    net = copy.deepcopy(module.net).to(dtype).eval()
    net.load_state_dict({k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")})
    x, y = (t[:NUM_PROBE].to(dtype) if t.is_floating_point() else t[:NUM_PROBE] for t in family.data())
    parameters = list(net.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        outputs = net(x)
        rows = [torch.autograd.grad(f, parameters, retain_graph=True) for f in outputs.flatten()]
        loss = family.loss()(outputs, y)
        gradient = torch.autograd.grad(loss, parameters)
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
    return (
        torch.linalg.eigvalsh(family.nu * J @ J.T).flip(0),
        loss.item(),
        sum(g.double().square().sum().item() for g in gradient),
    )


def pairs():
    """Every (family, feature), the precision turning with both so that all pairs with it are met too."""
    for i, family in enumerate(FAMILIES):
        for j, feature in enumerate(FEATURES):
            yield family, PRECISIONS[(i + 2 * j) % len(PRECISIONS)], feature


COVERING = list(pairs())
ALL = [(f, p, t) for f in FAMILIES for p in PRECISIONS for t in FEATURES]


def check(names, tmp_path):
    family, feature = FAMILIES[names[0]], FEATURES[names[2]]
    weights = Weights()
    callback = ShellDynamicsCallback(
        loss=family.loss(),
        probe=tuple(t[:NUM_PROBE] for t in family.data()),
        every_n_steps=2,
        method="exact",
        figures=False,
    )
    found, module = run(family, names[1], feature, tmp_path / "a", [callback, weights])
    assert cases.differences(found, run(family, names[1], feature, tmp_path / "b")[0]) == []
    assert len(callback.history) >= 2 and callback.monitor.num_failed == 0
    wide = names[1] == "64-true"
    snapshot = callback.history[1]
    values, loss, gradient = explicit(
        family, module, weights.at[snapshot.step], torch.float64 if wide else torch.float32
    )
    tolerance = 1e-9 if wide else 2e-5
    assert snapshot.method == "exact" and len(snapshot.eigenvalues) == len(values)
    assert float((snapshot.eigenvalues - values).abs().max()) <= tolerance * float(values[0])
    assert snapshot.loss == pytest.approx(loss, rel=tolerance)
    assert snapshot.grad_norm_sq == pytest.approx(gradient, rel=10 * tolerance)
    assert abs(snapshot.closures["dissipation"]) <= 10 * tolerance


@pytest.mark.parametrize("names", COVERING, ids=", ".join)
def test_covering(names, tmp_path):
    check(names, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("names", sorted(set(ALL) - set(COVERING)), ids=", ".join)
def test_all_others(names, tmp_path):
    check(names, tmp_path)


def test_the_design_covers_all_pairs():
    assert len(COVERING) >= 60 and len(set(COVERING)) == len(COVERING)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert {(c[a], c[b]) for c in COVERING} == {(c[a], c[b]) for c in ALL}


# ---- the gradient scaler: Lightning turns 16-mixed into bf16-mixed on the CPU, so in a loop of one's own ----


def scaled_run(monitored, num_steps=8):
    """(weights, scales, snapshots): float16 autocast, some steps left out because a gradient was infinite."""
    cases.seed()
    net, (x, y) = norm_and_dropout(), images()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
    monitor = (
        ShellMonitor(net, "cross_entropy", (x[:4], y[:4]), every_n_steps=1, on_error="raise") if monitored else None
    )
    weights, scales = [], []
    for step in range(num_steps):
        weights.append({name: value.clone() for name, value in net.state_dict().items()})
        if monitor is not None:
            monitor.step(step, optimizer=optimizer)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(net(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return weights, scales, [] if monitor is None else monitor.history


def test_a_gradient_scaler_is_left_alone():
    (weights, scales, snapshots), (plain, plain_scales, _) = scaled_run(True), scaled_run(False)
    assert scales == plain_scales
    assert all(torch.equal(w[name], p[name]) for w, p in zip(weights, plain, strict=True) for name in w)
    skipped = [torch.equal(a["6.weight"], b["6.weight"]) for a, b in zip(weights, weights[1:])]
    assert True in skipped and False in skipped
    for snapshot, state, left_out in zip(snapshots, weights, skipped):
        net = norm_and_dropout().eval()
        net.load_state_dict(state)
        x, y = images()
        assert snapshot.loss == pytest.approx(F.cross_entropy(net(x[:4]), y[:4]).item(), rel=1e-5)
        assert (float(snapshot.work.abs().sum()) == 0.0) == left_out
