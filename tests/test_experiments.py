"""The experiments, tiny, but all of the way to table and figure."""

import pytest
import torch
from test_examples import load


def test_residual_vs_plain(tmp_path, capsys):
    module = load("examples", "residual_vs_plain")
    argv = ["--out", str(tmp_path), "--quiet", "--depths", "2", "--samples", "32", "--steps", "12", "--data", "digits"]
    found = module.main([*argv, "--seeds", "2", "--norms", "layer", "--measurements", "2"])
    records = found["records"]
    assert len(records) == 2 * 2 * 2  # seeds, nets, skips
    for net in ("mlp", "cnn"):
        assert len({r["num_parameters"] for r in records if r["net"] == net}) == 1
    assert all(r["steps"] == [0, 12] and r["lr_lambda_max"][0] == pytest.approx(0.3, rel=1e-3) for r in records)
    assert "upported here" in found["text"] and (tmp_path / "defect.png").stat().st_size > 5000
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])  # killed while writing
    assert len(module.completed(tmp_path / "runs.jsonl")) == 7
    assert "difference" in (tmp_path / "README.md").read_text() and "comparisons" in capsys.readouterr().out


def test_nets_of_residual_vs_plain_have_the_same_gain():
    module = load("examples", "residual_vs_plain")
    x, _ = module.power_law(64, 0)
    sizes = []
    for residual in (True, False):
        net = module.Net("cnn", "none", 3, residual).calibrated(x)
        for block in net.blocks:
            block.register_forward_pre_hook(lambda _, args: sizes.append(float(args[0].detach().square().mean())))
        assert float(net(x).detach().square().mean()) == pytest.approx(1.0, rel=1e-3)
    assert sizes == pytest.approx([1.0] * 6, rel=1e-3)


def test_comparisons_of_residual_vs_plain():
    """Pairs of one seed, so a common scatter of seeds drops out of the difference."""
    module = load("examples", "residual_vs_plain")
    case = dict(data="digits", net="mlp", norm="none", depth=4)
    records = [
        {**case, "skip": skip, "seed": seed, "defect": [None, 10.0 * seed + shift + 0.01 * seed]}
        for seed in range(5)
        for skip, shift in (("residual", 0.0), ("plain", 0.2))
    ]
    (row,) = module.compared(records, "defect", "later")
    assert row["difference"] == pytest.approx((-0.2, 0.0), abs=1e-9) and row["plain"][1] > 10
    assert "lower in 1, higher in 0" in module.sentence([row])


def test_lazy_vs_rich(tmp_path):
    module = load("examples", "lazy_vs_rich")
    argv = ["--out", str(tmp_path), "--quiet", "--alphas", "0.5", "64", "--seeds", "1"]
    rich, lazy = module.main([*argv, "--steps", "300", "--samples", "40"])
    assert rich["signs"]["kernel_drift"] > 5 * lazy["signs"]["kernel_drift"] and lazy["regime"] == "lazy"
    assert rich["train"][-1] < 0.5 * rich["train"][0]
    assert "Supported here: the kernel" in (tmp_path / "README.md").read_text()
    assert module.main([*argv, "--steps", "1", "--samples", "1"]) == [rich, lazy]  # found, not repeated
    assert (tmp_path / "lazy_vs_rich.png").stat().st_size > 5000


def test_double_descent(tmp_path):
    module = load("examples", "double_descent")
    argv = ["--out", str(tmp_path), "--quiet", "--samples", "24", "--seeds", "3", "--sizes", "8", "24", "120"]
    results = module.main(argv)
    for found in results.values():
        ends = found["error"][:, :, -1].mean(1)
        assert ends.argmax() == 1 and ends[1] > 3 * ends[2]  # the peak stands at p = n
        assert found["lambda_min"][1].mean() < found["lambda_min"][2].mean()
    assert "peaks at p = 24" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "double_descent.png").stat().st_size > 5000


def test_double_descent_agrees_with_a_training_run():
    """The flow from the kernel against gradient descent with a small step, at t = 30 / lambda_max."""
    module = load("examples", "double_descent")
    data = module.digits(20, 12, 0)
    (error,), _ = module.errors(data, [30.0])
    net, x, y, x_test, y_test = data
    M = 2 / 20 * torch.tanh(x @ net.body) @ torch.tanh(x @ net.body).T / 12
    lr = 30 / 3000 / float(torch.linalg.eigvalsh(M)[-1])
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for _ in range(3000):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    assert float((net(x_test) - y_test).detach().square().mean()) == pytest.approx(error, rel=1e-3)
