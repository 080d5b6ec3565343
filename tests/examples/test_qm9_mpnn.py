"""QM9 as graphs: bonds, features, units, collation, the network and a comparison on it."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples import compare
from examples.comparison import runs
from examples.comparison.benchmark import predict
from examples.comparison.benchmarks import SOURCES, qm9_mpnn
from examples.comparison.benchmarks.qm9_mpnn import GraphBatch, GraphPart
from examples.data import DATA_VARIABLE, molecules, qm9
from examples.data.molecules import find_bonds, load_molecules, paper_units, parse_smiles
from examples.message_passing import FactoredMessagePassing, MessagePassing
from tests.examples.small import run_of

MOLECULES = 200


@pytest.fixture(scope="module")
def frame():
    return qm9.read_frame("SMILES")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """A narrow network, of molecules that the package carries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(DATA_VARIABLE, raising=False)
        patch.setattr(qm9_mpnn, "_SIZES", (8, 128))
        yield


@pytest.fixture(scope="module")
def some():
    return load_molecules(MOLECULES)


@pytest.fixture(scope="module")
def geometric():
    return pytest.importorskip("torch_geometric.nn")


def of(frame, *smiles):
    """Molecules of the given SMILES."""
    rows = frame[frame["SMILES"].isin(smiles)].set_index("SMILES").loc[list(smiles)].reset_index()
    numbers, positions = qm9.parse_geometry(rows["Elements"], rows["XYZ_Ang"])
    bonds = find_bonds(list(rows["SMILES"]), numbers, positions)
    features = molecules.atom_features(numbers, bonds)
    parts = map(torch.from_numpy, (features, positions.astype("float32"), bonds))
    return molecules.Molecules(*parts, torch.zeros(len(rows), 11), "test")


def graphs(found, edges):
    part = GraphPart(
        found, torch.arange(len(found.bonds)), torch.zeros(len(found.bonds), 11), edges
    )
    return part.batch(torch.arange(len(part)))[0]


def select(found, rows):
    """Some molecules of several."""
    parts = (found.features, found.positions, found.bonds, found.targets)
    return molecules.Molecules(*(part[rows] for part in parts), "test")


def edge_list(batch):
    return {
        (int(i), int(j)): attributes.tolist()
        for i, j, attributes in zip(*batch.edge_index, batch.edge_attr, strict=True)
    }


# --- molecules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "elements", "bonds"),
    [
        ("C", "C", []),
        ("C#N", "CN", [(0, 1, 3)]),
        ("CC(=O)N", "CCON", [(0, 1, 1), (1, 2, 2), (1, 3, 1)]),
        ("C1CC1=O", "CCCO", [(0, 1, 1), (1, 2, 1), (0, 2, 1), (2, 3, 2)]),
        ("C1=CN=1", "CCN", [(0, 1, 2), (1, 2, 1), (0, 2, 2)]),
        ("[NH3+]C([O-])F", "NCOF", [(0, 1, 1), (1, 2, 1), (1, 3, 1)]),
        ("C12CC1C2", "CCCC", [(0, 1, 1), (1, 2, 1), (0, 2, 1), (2, 3, 1), (0, 3, 1)]),
    ],
)
def test_smiles(text, elements, bonds):
    atoms, found = parse_smiles(text)
    assert atoms == list(elements)
    assert sorted((*sorted(pair), order) for *pair, order in found) == sorted(bonds)


@pytest.mark.parametrize("text", ["", "c1ccccc1", "C(C", "C1C", "C)C"])
def test_a_smiles_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="cannot read the SMILES"):
        parse_smiles(text)


def test_methane_water_and_hydrogen_cyanide_by_hand(frame):
    batch = graphs(of(frame, "C", "O", "C#N"), "bonds")
    assert batch.batch.tolist() == [0] * 5 + [1] * 3 + [2] * 3
    carbon, hydrogen = [0, 1, 0, 0, 0, 6, 0, 0, 0, 0, 4], [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert batch.x[:5].tolist() == [carbon, *[hydrogen] * 4]
    assert batch.x[5].tolist() == [0, 0, 0, 1, 0, 8, 0, 0, 0, 0, 2]
    edges = edge_list(batch)
    expected = {(0, k) for k in range(1, 5)} | {(5, 6), (5, 7), (8, 9), (8, 10)}
    assert set(edges) == expected | {(j, i) for i, j in expected}
    for (i, j), (*kind, distance) in edges.items():
        assert kind == ([0, 0, 1, 0] if {i, j} == {8, 9} else [1, 0, 0, 0])  # C≡N, the rest single
        length = 1.092 if max(i, j) < 5 else 0.962 if max(i, j) < 8 else None
        if length:
            assert distance == pytest.approx(length, abs=2e-3)
    assert edges[8, 9][-1] == pytest.approx(1.153, abs=5e-3)
    complete = edge_list(graphs(of(frame, "C", "O", "C#N"), "complete"))
    pairs = [itertools.permutations(r, 2) for r in (range(5), range(5, 8), range(8, 11))]
    assert set(complete) == set(itertools.chain(*pairs))
    assert all(complete[pair] == pytest.approx(edges[pair]) for pair in edges)
    *kind, distance = complete[1, 2]  # two hydrogens of methane, across the tetrahedron
    assert kind == [0, 0, 0, 0]
    assert distance == pytest.approx(1.092 * np.sqrt(8 / 3), abs=3e-3)


def test_bonds_are_short_and_saturate_the_atoms(some):
    symmetric = (some.bonds == some.bonds.transpose(1, 2)).all()
    assert symmetric and not some.bonds.diagonal(dim1=1, dim2=2).any()
    distance = torch.cdist(some.positions, some.positions)
    lengths = distance[some.bonds > 0]
    assert lengths.max() < 2.2 and (lengths < 1.75).double().mean() > 0.999  # one is torn by strain
    valence = some.bonds.sum(2)
    number = some.features[..., 5]
    neutral = {1: 1, 6: 4, 7: 3, 8: 2, 9: 1}
    for z, wanted in neutral.items():
        assert ((valence[number == z] - wanted).abs() <= 1).all()  # charged ones differ by one
        assert (valence[number == z] == wanted).double().mean() > 0.98
    assert torch.equal(
        some.features[..., 10], ((some.bonds > 0) & (number == 1)[:, None]).sum(2).float()
    )


def test_a_geometry_in_another_order_than_its_smiles_is_bonded_by_distance(frame):
    odd = of(frame, "C#CC#C")  # its atoms are listed in another order
    heavy = (odd.features[0, :, 5] > 1).nonzero()[:, 0]
    inner = odd.bonds[0][heavy][:, heavy]
    assert inner.count_nonzero() == 2 * 3 and inner.max() == 1
    assert torch.cdist(odd.positions[0], odd.positions[0])[odd.bonds[0] > 0].max() < 1.5


def test_targets_are_in_the_paper_s_units():
    datasets = pytest.importorskip("torch_geometric.datasets.qm9")
    numbers = np.zeros((1, 29), np.int64)
    numbers[0, :7] = [6, 7, 8, 9, 1, 1, 1]
    shipped = np.arange(1.0, 12.0)[None]
    found = dict(zip((t.name for t in qm9.TARGETS), paper_units(shipped, numbers)[0], strict=True))
    ev = 27.211386246
    assert found["mu"] == 1 and found["alpha"] == 2 and found["r2"] == 5 and found["cv"] == 11
    for name, value in (("homo", 3), ("lumo", 4), ("zpve", 6)):
        assert found[name] == pytest.approx(1000 * ev * value)
    for k, (name, value) in enumerate((("u0", 7), ("u", 8), ("h", 9), ("g", 10))):
        hydrogen, *others = datasets.atomrefs[7 + k]
        assert found[name] == pytest.approx(1000 * (ev * value - 3 * hydrogen - sum(others)))


def test_targets_of_methane_are_those_of_pyg(frame):
    row = frame.iloc[:1]
    numbers, _ = qm9.parse_geometry(row["Elements"], row["XYZ_Ang"])
    shipped = row[[t.column for t in qm9.TARGETS]].to_numpy()
    # torch_geometric.datasets.QM9, columns 0, 1, 2, 3, 5, 6, 12-15, 11 of the first molecule, of
    # which it prints four digits in eV.
    expected = [0.0, 13.21, -10549.9, 3186.5, 35.3641, 1217.7]
    expected += [-17172.2, -17286.8, -17389.7, -16151.9, 6.469]
    assert paper_units(shipped, numbers)[0] == pytest.approx(expected, rel=0, abs=0.051)


# --- batches and network -------------------------------------------------------------------------


@pytest.mark.parametrize("edges", ["complete", "bonds"])
def test_collation_is_pyg_s(some, geometric, edges):
    from torch_geometric.data import Batch, Data
    from torch_geometric.utils import sort_edge_index

    part = GraphPart(some, torch.arange(MOLECULES), some.targets.float(), edges)
    rows = torch.tensor([7, 3, 150, 7])
    single = [part.batch(row[None])[0] for row in rows]
    theirs = Batch.from_data_list(
        [Data(x=g.x, edge_index=g.edge_index, edge_attr=g.edge_attr) for g in single]
    )
    ours, y = part.batch(rows)
    assert torch.equal(ours.x, theirs.x) and torch.equal(ours.batch, theirs.batch)
    assert torch.equal(ours.edge_index, theirs.edge_index)
    assert torch.equal(ours.edge_attr, theirs.edge_attr)
    assert torch.equal(y, some.targets[rows].float())
    by_target, _ = sort_edge_index(
        ours.edge_index, ours.edge_attr, num_nodes=len(ours.x), sort_by_row=False
    )
    assert torch.equal(by_target[1], ours.edge_index[1])


@pytest.mark.parametrize("edges", ["complete", "bonds"])
def test_the_factored_network_is_nnconv_s(some, geometric, edges):
    plain = MessagePassing(6, geometric).double()
    factored = FactoredMessagePassing(6, geometric).double()
    factored.load_state_dict(plain.state_dict())
    part = GraphPart(some, torch.arange(5), some.targets[:5], edges)
    batch = doubled(part.batch(torch.arange(5))[0])
    torch.testing.assert_close(factored(batch), plain(batch), rtol=1e-12, atol=1e-13)
    for model in (plain, factored):
        (model(batch) * torch.arange(6)).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), factored.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=name)
    # Edges in any order, and an atom without neighbours.
    mixed = torch.randperm(batch.edge_index.shape[1])
    mixed = mixed[batch.edge_index[1][mixed] != 2]
    fewer = GraphBatch(batch.x, batch.edge_index[:, mixed], batch.edge_attr[mixed], batch.batch)
    torch.testing.assert_close(factored(fewer), plain(fewer), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(factored(fewer), factored(batch))


def doubled(batch):
    return GraphBatch(batch.x.double(), batch.edge_index, batch.edge_attr.double(), batch.batch)


@pytest.mark.parametrize("edges", ["complete", "bonds"])
def test_the_network_ignores_the_order_of_atoms_and_rotation(frame, geometric, edges):
    found = of(frame, "CC(N)=O", "C#N")
    order = torch.arange(29)
    order[:6] = torch.tensor([5, 2, 0, 4, 1, 3])  # acetamide has nine atoms, the other three
    order[[0, 6]] = order[[6, 0]]
    moved = found.positions @ torch.linalg.qr(torch.randn(3, 3))[0] + 3.0
    bonds = found.bonds[:, order][:, :, order]
    other = replace(
        found, features=found.features[:, order], positions=moved[:, order], bonds=bonds
    )
    network = FactoredMessagePassing(8, geometric)
    before, after = network(graphs(found, edges)), network(graphs(other, edges))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)
    changed = replace(found, positions=1.2 * found.positions)
    assert not torch.allclose(before, network(graphs(changed, edges)), rtol=1e-4, atol=1e-5)


# --- benchmark -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qm9-mpnn", "qm9-mpnn-bonds", "qm9-mpnn-small"])
def test_benchmark(name, geometric):
    data = SOURCES[name].load(MOLECULES, 100)
    assert [len(part) for part in (data.train, data.val, data.test)] == [100, 20, 20]
    assert [task.name for task in data.tasks] == [t.name for t in qm9.TARGETS]
    units = ["D", "bohr^3", "meV", "meV", "bohr^2", *["meV"] * 5, "cal/mol/K"]
    assert [task.unit for task in data.tasks] == units
    x, y = data.train.batch(torch.arange(100))
    torch.testing.assert_close(y.mean(0), torch.zeros(11), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(0), torch.ones(11), atol=1e-5, rtol=0)
    assert (x.edge_index.shape[1] > 10_000) == (name != "qm9-mpnn-bonds")
    assert data.version != SOURCES[name].load(MOLECULES, None).version
    assert name.endswith("bonds") == ("bonds graphs" in data.network)
    assert name.endswith("small") == ("32 dimensions" in data.network)
    assert data.model()(x)["regression"].shape == (100, 11)


def test_parts_of_the_full_protocol_are_the_paper_s(some, monkeypatch):
    sizes = []

    def split(count, **shares):
        sizes.extend(int(count * share) for name, share in shares.items() if name != "seed")
        raise StopIteration

    monkeypatch.setattr(qm9_mpnn, "load_molecules", lambda count: some)
    monkeypatch.setattr(qm9_mpnn, "split_indices", split)
    with pytest.raises(StopIteration):
        qm9_mpnn.load(SOURCES["qm9-mpnn"].paper_size)
    assert SOURCES["qm9-mpnn"].paper_size == 130_831
    assert sizes == [10_000, 10_000]


def test_prediction_in_chunks_is_prediction_at_once(monkeypatch, geometric):
    data = SOURCES["qm9-mpnn-bonds"].load(MOLECULES, None)
    model, seen = data.model(), []
    model.register_forward_pre_hook(lambda _, x: seen.append(int(x[0].batch.max()) + 1))
    whole, y = predict(model, data.val)
    monkeypatch.setattr(data.val, "chunk", 8, raising=False)
    parts, again = predict(model, data.val)
    assert seen == [20, 8, 8, 4]
    torch.testing.assert_close(parts["regression"], whole["regression"], rtol=1e-4, atol=1e-5)
    assert torch.equal(y, again)


@pytest.mark.parametrize("name", ["ls", "pcgrad", "mgda-ub", "bayesagg", "famo"])
def test_every_kind_of_method_trains_on_graphs(name, geometric):
    runs.load.cache_clear()
    run = run_of("qm9-mpnn-bonds", name, 100, 20, epochs=2, batch_size=10, warmup_steps=2)
    assert len(run.test) == 11 and all(task["mae"] > 0 for task in run.test)


# --- data from elsewhere -------------------------------------------------------------------------


def downloaded(folder, some, count):
    """A folder as PyG's QM9 leaves it, of the first molecules; y has its 19 columns."""
    from torch_geometric.data import Data, InMemoryDataset

    data = []
    for i in range(count):
        batch = graphs(select(some, slice(i, i + 1)), "bonds")
        n = len(batch.x)
        data.append(
            Data(
                x=batch.x,
                pos=some.positions[i, :n],
                edge_index=batch.edge_index,
                edge_attr=batch.edge_attr[:, :4],
                y=torch.arange(19.0)[None] + 100 * i,
                smiles="C",
            )
        )
    path = folder / "QM9/processed/data_v3.pt"
    path.parent.mkdir(parents=True)
    InMemoryDataset.save(data, str(path))


def test_data_of_pyg_are_used_where_they_are(tmp_path, monkeypatch, some, geometric):
    downloaded(tmp_path, some, 12)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    monkeypatch.setattr(molecules, "read_frame", lambda *_: pytest.fail("took the package's"))
    found = load_molecules(12)
    assert found.source == "torch_geometric.datasets.QM9"
    rows = np.random.default_rng(0).permutation(12)
    for name in ("features", "positions", "bonds"):
        assert torch.equal(getattr(found, name), getattr(some, name)[rows])
    columns = torch.tensor([0, 1, 2, 3, 5, 6, 12, 13, 14, 15, 11])
    scale = torch.tensor([1, 1, 1000, 1000, 1, 1000, 1000, 1000, 1000, 1000, 1]).double()
    expected = (columns + 100 * torch.from_numpy(rows)[:, None]).double() * scale
    assert torch.equal(found.targets, expected)
    with pytest.raises(ValueError, match="has 12 molecules"):
        load_molecules(13)


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    output, data = tmp_path / "output", tmp_path / "data"
    data.mkdir()
    monkeypatch.setenv(DATA_VARIABLE, "")  # the command sets it: to be put back after the test
    runs.load.cache_clear()
    arguments = ["--data-dir", str(data), "--output", str(output)]
    assert compare.main(["qm9-mpnn", *arguments]) == 1
    error = capsys.readouterr().err
    assert "QM9/processed/data_v3.pt" in error and "import QM9" in error and str(data) in error
    assert not list(output.iterdir())
