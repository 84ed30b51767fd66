"""Small LightningModules on scikit-learn's digits, a quiet Trainer, and an image of all that a run leaves behind."""

import csv
import random
from functools import lru_cache, partial
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

NUM_TRAIN, BATCH = 64, 16


# ---- data ----


@lru_cache
def digits(num=NUM_TRAIN, dtype=torch.float32):
    """Images (num, 64) in [0, 1] and labels (num,)."""
    data = load_digits()
    return torch.tensor(data.data[:num] / 16, dtype=dtype), torch.tensor(data.target[:num])


def one_hot(labels, dtype=torch.float32):
    return F.one_hot(labels, 10).to(dtype)


def loader(x, y, batch_size=BATCH, shuffle=True, **options):
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle, **options)


def classes(dtype=torch.float32, **options):
    return loader(*digits(dtype=dtype), **options)


def regression(dtype=torch.float32, **options):
    x, y = digits(dtype=dtype)
    return loader(x, one_hot(y, dtype), **options)


class Augmented(Dataset):
    """Digits with noise from all three global generators."""

    def __init__(self):
        self.x, self.y = digits()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = 0.1 * torch.rand(64) + 0.1 * float(np.random.rand()) + 0.1 * random.random()
        return self.x[index] + noise, self.y[index]


# ---- nets ----


def mlp(width=16, activation=nn.Tanh, dtype=torch.float32, num_out=10):
    return nn.Sequential(nn.Linear(64, width), activation(), nn.Linear(width, num_out)).to(dtype)


def bn_dropout():
    return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10))


def cnn(norm, dtype=torch.float32):
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, padding=1),
        norm,
        nn.GELU(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(36, 10),
    ).to(dtype)


class Transformer(nn.Module):
    """The rows of an image are its eight tokens."""

    def __init__(self, dropout=0.1):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.encoder(x.view(-1, 8, 8)).mean(1))


class Drawing(nn.Module):
    """Stochastic depth as often written: numbers are drawn in eval mode too."""

    def __init__(self):
        super().__init__()
        self.inside, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        keep = torch.rand(x.shape[0], 1) + np.random.rand() + random.random() > 0.5
        return self.head(x + self.inside(x) * keep if self.training else x + self.inside(x))


class Counting(nn.Module):
    """A warm-up in training that counts all calls in a Python attribute."""

    def __init__(self):
        super().__init__()
        self.body, self.calls = mlp(), 0

    def forward(self, x):
        self.calls += 1
        return self.body(x) * (min(1.0, 0.1 * self.calls) if self.training else 1.0)


class Embedded(nn.Module):
    """Pixel values as indices; max_norm writes to the weight in every forward."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(17, 4, max_norm=0.5), nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.embedding((16 * x).long()).flatten(1))


# ---- LightningModules ----


DESCENT = partial(torch.optim.SGD, lr=0.1)


class Module(pl.LightningModule):
    """One net, one loss, plain training step."""

    def __init__(self, net, criterion, optimizer=DESCENT):
        super().__init__()
        self.net, self.criterion, self.make_optimizer = net, criterion, optimizer

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = self.criterion(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class FrozenNorm(Module):
    """The user keeps one layer in eval mode."""

    def on_train_start(self):
        self.net[1].eval()


class LogsInForward(Module):
    def forward(self, x):
        out = super().forward(x)
        self.log("mean_output", out.mean(), on_step=True, on_epoch=True)
        return out


class Adversarial(pl.LightningModule):
    """Manual optimization with two optimizers: an autoencoder against a critic."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 64))
        self.critic = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, x):
        return self.generator(x)

    def training_step(self, batch, batch_idx):
        x = batch[0]
        g, d = self.optimizers()
        fake = self(x)
        loss = F.mse_loss(fake, x) + 0.01 * F.softplus(-self.critic(fake)).mean()
        for optimizer, value in (
            (g, loss),
            (d, F.softplus(self.critic(fake.detach())).mean() + F.softplus(-self.critic(x)).mean()),
        ):
            optimizer.zero_grad()
            self.manual_backward(value)
            optimizer.step()
        self.log("train_loss", loss)

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.generator.parameters(), lr=0.1),
            torch.optim.Adam(self.critic.parameters(), lr=1e-3),
        ]


# ---- one run ----


def seed(value=0):
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def quiet_trainer(folder, callbacks=(), **options):
    """A Trainer on the CPU that prints nothing and writes only what is asked for."""
    defaults = dict(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit(module, data, folder, callbacks=(), ckpt_path=None, **options):
    """Train, and return the Trainer."""
    trainer = quiet_trainer(folder, callbacks, **options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


class Weights(pl.Callback):
    """Weights before every optimizer step, by step, and after the last one."""

    def __init__(self):
        self.at = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.at.setdefault(trainer.global_step, _copied(pl_module))

    def on_train_end(self, trainer, pl_module):
        self.at[trainer.global_step] = _copied(pl_module)


def _copied(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def image(trainer, module):
    """All that a run leaves behind, by name, in comparable form."""
    return {
        "weights": {name: value.tolist() for name, value in module.state_dict().items()},
        "grads": {name: None if p.grad is None else p.grad.tolist() for name, p in module.named_parameters()},
        "optimizers": [_plain(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "torch rng": torch.get_rng_state().tolist(),
        "numpy rng": [np.random.get_state()[1].tolist(), *np.random.get_state()[2:]],
        "python rng": random.getstate(),
        "flags": {name: part.training for name, part in module.named_modules()},
        "attributes": {name: vars(part).get("calls") for name, part in module.named_modules()},
        "callback_metrics": {
            name: value.tolist()
            for name, value in sorted(trainer.callback_metrics.items())
            if not name.startswith("grsd_")
        },
        "logged": csv_cells(trainer),
    }


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def csv_cells(trainer, ours=False):
    """(column, step, text) of every cell of the CSVLogger's file; ours or the others'."""
    cells = []
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
                for row in csv.DictReader(file):
                    named = {k: v for k, v in row.items() if k != "step" and v and k.startswith("grsd_") == ours}
                    cells += [(name, int(row["step"]), text) for name, text in named.items()]
    return sorted(cells)


def differences(one, other):
    """Names of the parts in which two images differ."""
    assert one.keys() == other.keys()
    return [name for name in one if repr(one[name]) != repr(other[name])]
