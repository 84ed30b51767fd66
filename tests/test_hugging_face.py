"""Transformers built from a config, as LightningModules: their own training step, or outputs and loss named by hand."""

import lightning.pytorch as pl
import lightning_cases as cases
import pytest
import torch
from nets import randint, randn
from torch.utils.data import DataLoader

from grsd_callbacks import ShellDynamicsCallback
from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.losses import resolve_loss
from grsd_callbacks.measure import measure
from grsd_callbacks.probe import Probe
from grsd_callbacks.settings import Settings
from grsd_callbacks.training_step import observe_step, step_pair

transformers = pytest.importorskip("transformers")

VOCABULARY = 13
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def gpt2():
    shape = {"n_positions": 6, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**TEXT, **shape, loss_type="ForCausalLM")
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(**TEXT, **SMALL, num_key_value_heads=1, max_position_embeddings=6)
    return transformers.LlamaForCausalLM(config)


def t5():
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**TEXT, **shape))


def bert():
    config = transformers.BertConfig(**TEXT, **SMALL, max_position_embeddings=6, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def vit():
    config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_channels=1, num_labels=3)
    return transformers.ViTForImageClassification(config)


def causal(n):
    tokens = 1 + randint(VOCABULARY - 1, n, 5)
    return {"input_ids": tokens, "labels": tokens}


def translated(n):
    labels = 1 + randint(VOCABULARY - 1, n, 3, seed=1)
    labels[::3, 2:] = -100
    return {"input_ids": 1 + randint(VOCABULARY - 1, n, 5), "labels": labels}


def sentences(n):
    mask = torch.ones(n, 5, dtype=torch.long)
    mask[::2, 3:] = 0
    return {"input_ids": 1 + randint(VOCABULARY - 1, n, 5), "attention_mask": mask, "labels": randint(3, n, seed=1)}


def images(n):
    return {"pixel_values": randn(n, 1, 8, 8).float(), "labels": randint(3, n, seed=1)}


# make, batch of n, outputs a sample, targets that are averaged
MODELS = {
    "gpt2": (gpt2, causal, 5 * VOCABULARY, lambda batch: batch["labels"][:, 1:].numel()),
    "llama": (llama, causal, 5 * VOCABULARY, lambda batch: batch["labels"][:, 1:].numel()),
    "t5": (t5, translated, 3 * VOCABULARY, lambda batch: int((batch["labels"] != -100).sum())),
    "bert": (bert, sentences, 3, lambda batch: len(batch["labels"])),
    "vit": (vit, images, 3, lambda batch: len(batch["labels"])),
}


class Lit(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Named(Lit):
    """The same with a forward that returns the ModelOutput."""

    def forward(self, **batch):
        return self.model(**batch)


def built(name, kind=Lit):
    cases.seed()
    return kind(MODELS[name][0]())


@pytest.mark.parametrize("name", MODELS)
def test_step_kernel_and_closure(name):
    """nu = 1/targets; v.Mv = |J^T v|^2; D sums to |grad L|^2 by autograd on the model itself."""
    _, data, width, averaged = MODELS[name]
    module, batch = built(name).double().eval(), data(3)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    probe = Probe(*step_pair(batch))
    found = observe_step(ModelFunction(module), probe)
    assert found.loss.kind == "cross_entropy" and found.gap < 1e-12
    assert found.loss.nu == pytest.approx(1 / averaged(batch), rel=1e-6)
    op = NTKOperator(module, batch, outputs=found.outputs)
    assert op.shape == (3 * width, 3 * width)
    v = randn(op.shape[0])
    assert float(v @ (op @ v)) == pytest.approx(float(op.vjp(v).square().sum()), rel=1e-6)
    instant = measure(module, probe, found.loss, Settings(outputs=found.outputs, method="krylov", num_matvecs=3))
    loss = module.model(**batch).loss
    grads = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    assert instant.loss == pytest.approx(loss.item(), rel=1e-6)
    norm = float(sum(g.square().sum() for g in grads if g is not None))
    assert instant.grad_norm_sq == pytest.approx(norm, rel=1e-9)
    assert float(instant.budget.dissipation.sum()) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_training_is_bit_identical_and_needs_no_argument(name, tmp_path):
    rows = MODELS[name][1](12)
    samples = [{key: value[i] for key, value in rows.items()} for i in range(12)]

    def run(callbacks):
        module = built(name)
        data = DataLoader(samples, batch_size=4, shuffle=True)
        trainer = cases.fit(module, data, tmp_path, callbacks, max_epochs=1)
        return cases.image(trainer, module)

    callback = ShellDynamicsCallback(every_n_steps=3, num_probe=2, on_error="raise", work=False)
    assert cases.differences(run([]), run([callback])) == []
    assert len(callback.history) == 2 and callback.monitor.num_failed == 0
    assert "training_step: " in callback.monitor.report and "F.cross_entropy" in callback.monitor.report
    assert all(abs(snapshot.closures["dissipation"]) < 1e-4 for snapshot in callback.history)


def test_a_large_vocabulary_is_observed_by_loss_gradients(tmp_path, monkeypatch):
    monkeypatch.setattr("grsd_callbacks.observation.MAX_ROWS", 100)
    samples = [{key: value[i] for key, value in causal(12).items()} for i in range(12)]
    callback = ShellDynamicsCallback(every_n_steps=3, on_error="raise")
    cases.fit(built("gpt2"), DataLoader(samples, batch_size=4), tmp_path, [callback], max_epochs=1)
    assert (callback.history[0].num_samples, callback.history[0].num_outputs) == (4, 1)
    assert "observed: loss gradient" in callback.monitor.report
    assert all(abs(snapshot.closures["dissipation"]) < 1e-5 for snapshot in callback.history)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_outputs_and_loss_by_hand_agree_with_the_step(name):
    """forward with the batch's keywords, logits of the ModelOutput, cross-entropy: the same kernel and residual."""
    batch = MODELS[name][1](3)
    module = built(name, Named).eval()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    by_hand = measure(module, Probe(inputs, batch["labels"]), resolve_loss("cross_entropy"))
    probe = Probe(*step_pair(batch))
    found = observe_step(ModelFunction(module), probe)
    by_step = measure(module, probe, found.loss, Settings(outputs=found.outputs))
    torch.testing.assert_close(by_step.eigenvalues, by_hand.eigenvalues, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(by_step.state.residual, by_hand.state.residual, rtol=1e-5, atol=1e-6)


def test_shifted_tokens_by_hand_have_the_spectrum_of_the_step():
    """The last position has no target; the step leaves it out of f, and so do outputs named by hand."""
    module, batch = built("gpt2", Named).eval(), causal(2)
    by_hand = measure(
        module,
        Probe({"input_ids": batch["input_ids"]}, batch["labels"][:, 1:]),
        resolve_loss("cross_entropy"),
        Settings(outputs=lambda raw: raw.logits[:, :-1].transpose(1, 2), method="exact"),
    )
    probe = Probe(*step_pair(batch))
    found = observe_step(ModelFunction(module), probe)
    by_step = measure(module, probe, found.loss, Settings(outputs=found.outputs, method="exact"))
    kept = by_hand.eigenvalues.numel()
    torch.testing.assert_close(by_step.eigenvalues[:kept], by_hand.eigenvalues, rtol=1e-4, atol=1e-6)
    assert float(by_step.eigenvalues[kept:].abs().max()) < 1e-6
