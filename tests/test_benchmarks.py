"""benchmarks/: what is computed and written of the times and runs that are measured there."""

import json
import sys

import numpy as np
import pytest

import experiments
from benchmarks import speed
from benchmarks.recipes import HELD_OUT, PAGE, RECIPES, hold_out, recipe_table
from benchmarks.speed import CELLS, CURVE, DEPTHS, products, rate, share_table, step_table
from datasets_download import Dataset, load_dataset
from experiments import NETS
from models import Autoencoder


def jax_loss(weights, net, x, k):
    """-L_k of the plain JAX model with our weights."""
    jax = pytest.importorskip("jax")
    from benchmarks.reference_jax import loss, make_parameters

    parameters = make_parameters(x.shape[1], *NETS[net])
    for layer in (*parameters["encoder"], *parameters["decoder"]):
        heads = [head for name, head in layer.items() if name != "hidden"]
        for dense in (*layer["hidden"], *heads):
            dense["w"], dense["b"] = next(weights), next(weights)
    return float(loss(parameters, x, jax.random.PRNGKey(2), k))


def torch_loss(weights, net, x, k):
    """-L_k of the plain PyTorch model with our weights."""
    torch = pytest.importorskip("torch")
    from benchmarks.reference_torch import Net

    torch.manual_seed(2)
    theirs = Net(x.shape[1], *NETS[net])
    with torch.no_grad():
        for dense in (module for module in theirs.modules() if isinstance(module, torch.nn.Linear)):
            dense.weight.copy_(torch.from_numpy(next(weights).T))
            dense.bias.copy_(torch.from_numpy(next(weights)))
        return float(theirs.loss(torch.from_numpy(x), k))


@pytest.mark.parametrize("net", DEPTHS)
@pytest.mark.parametrize("reference_loss", [jax_loss, torch_loss])
def test_references_take_the_bound_that_we_take(reference_loss, net):
    """L_20 of one image by our weights, a mean of 2,000, within 5 standard errors (wrong once in a million), but not
    with another bias."""
    random = np.random.default_rng(0)
    x = np.repeat(np.float32(random.random((1, 12)) < 0.5), 2000, axis=0)
    model = Autoencoder(np.full(12, 0.3), *NETS[net])
    weights = [np.float32(w + 0.03 * random.normal(size=w.shape)) for w in model.get_weights()]
    model.set_weights(weights)
    bounds = np.logaddexp.reduce(model.log_weights(x, 20, seed=(0, 1)), axis=0) - np.log(20)
    tolerance = 5 * 2**0.5 * bounds.std() / 2000**0.5
    assert abs(reference_loss(iter(weights), net, x, 20) + bounds.mean()) < tolerance
    weights[-1] = weights[-1] + 1
    assert abs(reference_loss(iter(weights), net, x, 20) + bounds.mean()) > 2 * tolerance


@pytest.mark.parametrize("k, gigaflop", [(1, 0.045), (5, 0.144), (50, 1.26)])
def test_products_of_a_step_of_one_layer(k, gigaflop):
    """2 for a product forward, 4 backward, but for that with the image: here added up for one layer by hand."""
    encoder = 4 * 784 * 200 + 6 * (200 * 200 + 2 * 200 * 50)
    decoder = 6 * (50 * 200 + 200 * 200 + 200 * 784)
    assert products("l1", k) == 20 * (encoder + k * decoder) == pytest.approx(1e9 * gigaflop, rel=0.02)
    assert rate("l1", k, 1000.0) == pytest.approx(products("l1", k) / 1e9)


def test_products_of_two_layers_count_every_layer_once():
    """Of the gradient with respect to what a layer reads, all but the image's."""
    encoder = 4 * 784 * 200 + 6 * (200 * 200 + 2 * 200 * 100)
    upper = 6 * (100 * 100 + 100 * 100 + 2 * 100 * 50) + 6 * (50 * 100 + 100 * 100 + 2 * 100 * 100)
    decoder = 6 * (100 * 200 + 200 * 200 + 200 * 784)
    assert products("l2", 5) == 20 * (encoder + 5 * (upper + decoder))


def test_tables_compare_ours_with_each_contender_and_the_square_products():
    times = {("ours", net, k): 2.0 for net, k in CELLS} | {("JAX", net, k): 4.0 for net, k in CELLS}
    rows = step_table(times, ["JAX"]).splitlines()
    assert len(rows) == 2 + len(CELLS)
    assert [cell.strip() for cell in rows[4].split("|")] == ["", "1 layer, k = 50", "2.00", "4.00", "0.50", ""]
    ours = rate("l1", 50, 2.0)
    rows = share_table(times, {"oneDNN": 4 * ours, "XLA": 2 * ours}, ["JAX"]).splitlines()
    cells = ["1 layer, k = 50", "25%", "12%", "50%", "25%", "75%", "65%"]
    assert [cell.strip() for cell in rows[4].split("|")[1:-1]] == cells


@pytest.mark.parametrize("options", [[], ["--quick"]])
def test_speed_writes_what_was_measured(monkeypatch, tmp_path, capsys, options):
    """The page and the figure, but for --quick; the medians in any case."""
    times = {("ours", net, k): float(k) for net in DEPTHS for k in CURVE} | {("JAX", *cell): 2.0 for cell in CELLS}
    times |= {(20, 8): 30.0, (100, None): 200.0, (100, 8): 80.0, "last product": 2.0}
    squares = {"oneDNN": 200.0, "XLA": 128.0}
    monkeypatch.setattr(speed, "HERE", tmp_path)
    monkeypatch.setattr(speed, "installed", lambda: {"JAX": None})
    monkeypatch.setattr(speed, "step_times", lambda images, references, quick: (times, squares))
    monkeypatch.setattr(speed, "likelihood_seconds", lambda *arguments, **keywords: {"ours": 1.5, "JAX": 3.0})
    monkeypatch.setattr(speed, "start_up", lambda: [5.0, 4.0, 0.003])
    monkeypatch.setattr(sys, "argv", ["speed.py", *options, "--json", str(tmp_path / "medians.json")])
    speed.main()
    assert json.loads((tmp_path / "medians.json").read_text()) == {f"{net}_k{k}": k for net, k in CELLS}
    written = {path.name for path in tmp_path.iterdir()} - {"medians.json"}
    if options:
        assert not written
        return
    assert written == {"README.md", "time_per_step.png"}
    page = " ".join((tmp_path / "README.md").read_text().split())
    assert "k = 500 takes 10.00 and 10.00 times as long as k = 50 (one layer, two), 5.00 and 5.00 times as long" in page
    assert "0.60 of a step at batch 20, 0.40 of a step at batch 100" in page
    assert "ours 1.50 s, JAX 3.00 s" in page and "one step called alone then 3.0 ms" in page


def test_recipes_are_judged_on_images_that_they_are_not_trained_on(tmp_path):
    x = np.arange(HELD_OUT + 30, dtype=np.float32)[:, None] / 1e5
    data = Dataset("mnist", x, x[:5], x[:7], None, None, None, "stochastic", (1, 1))
    hold_out(data, tmp_path / "held_out.npz")
    held = load_dataset(str(tmp_path / "held_out.npz"))
    assert held.x_train[:, 0].tolist() == x[:30, 0].tolist() and held.x_test[:, 0].tolist() == x[30:, 0].tolist()


def test_recipe_table_has_the_best_first_and_pairs_each_with_the_first_recipe():
    results = [{"nll": 90.0, "log_likelihoods": np.float32([-89, -91])}]
    results += [{"nll": 89.0, "log_likelihoods": np.float32([-88, -90])}]
    best, other = recipe_table([{}, {"momentum": 0.9}], results, [1.0, 2.0]).splitlines()[2:]
    assert best.split("|")[1:] == [" `momentum=0.9` ", " 89.00 ", " -1.00 ± 0.00 ", " 2.0 s    ", ""]
    assert other.split("|")[1].strip() == "as it stands"


@pytest.mark.parametrize("title", RECIPES)
def test_recipes_are_legal_runs_and_their_table_has_its_place_on_the_page(title):
    assert all(experiments.resolve([title.partition("__epochs")[0]], recipe) for recipe in RECIPES[title])
    assert f"<!-- report: {title} -->" in PAGE.read_text()
