"""Several networks as one teacher: what is averaged, what is kept of it, and what goes together."""

import itertools

import numpy as np
import pytest
import torch

from gdlib import io
from gdlib.config import Config, ConfigError, plan
from gdlib.kernels import affinities, rows, unit
from gdlib.models import build
from gdlib.models.ensemble import VIEWS, turned
from gdlib.predict.predictor import Predictor
from gdlib.train.ask import ask
from gdlib.train.join import join, principal

OFFSETS = {2: [[-1, 0], [0, -1], [-3, 2]], 3: [[-1, 0, 0], [0, -1, 0], [0, 2, -3]]}
NARROW = {
    2: {"model": "resunet", "options": {"widths": [2, 3, 4, 5, 6], "embedding_dim": 5}},
    3: {"model": "resunet3d", "options": {"widths": [2, 3, 4, 5, 6], "embedding_dim": 4}},
}
SIDES = {2: (32, 48), 3: (4, 16, 32)}


def ensemble(ndim, **options):
    torch.manual_seed(ndim)
    members = [
        NARROW[ndim],
        NARROW[ndim] | {"options": NARROW[ndim]["options"] | {"embedding_dim": 3}},
    ]
    network = build("ensemble", {"members": members, "embedding_dim": None, **options})
    return network.eval().requires_grad_(False).double()


def seen(network, image):
    """What each member says in each view: numpy turns and mirrors image and maps."""
    for member, view in itertools.product(network.members, range(network.views)):
        mirrored, quarters = view >= 4, view % 4
        other = np.rot90(image, quarters, (-2, -1))
        other = other[..., ::-1] if mirrored else other
        found = member(torch.from_numpy(other.copy()))
        for maps in (found.embedding.numpy(), found.foreground.numpy()):
            maps = maps[..., ::-1] if mirrored else maps
            yield np.rot90(maps, -quarters, (-2, -1))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("augment", [False, True])
def test_affinities_and_foreground_are_the_means_over_members_and_views(ndim, augment):
    network = ensemble(ndim, augment=augment)
    image = np.random.default_rng(0).normal(size=(2, 1, *SIDES[ndim]))
    maps = list(seen(network, image))
    vectors, logits = maps[::2], maps[1::2]
    assert len(vectors) == 2 * (VIEWS if augment else 1)
    found = network(torch.from_numpy(image))
    got = affinities(unit(rows(found.embedding)), OFFSETS[ndim]).numpy()
    checked = 0
    for k, offset in enumerate(OFFSETS[ndim]):
        for p in itertools.islice(np.ndindex(*SIDES[ndim]), 0, None, 7):
            q = tuple(a + b for a, b in zip(p, offset, strict=True))
            if not all(0 <= n < side for n, side in zip(q, SIDES[ndim], strict=True)):
                continue
            cosines = [
                v[1][:, *p]
                @ v[1][:, *q]
                / np.linalg.norm(v[1][:, *p])
                / np.linalg.norm(v[1][:, *q])
                for v in (dict(enumerate(one)) for one in vectors)
            ]
            np.testing.assert_allclose(got[(1, k, *p)], np.mean(cosines), atol=1e-9)
            checked += 1
    assert checked > 100
    probability = np.mean([1 / (1 + np.exp(-one)) for one in logits], 0)
    np.testing.assert_allclose(found.foreground.sigmoid().numpy(), probability, atol=2e-6)


def test_a_turned_image_has_the_turned_affinities():
    """With all eight views, no direction is another one."""
    network = ensemble(2, augment=True)
    image = torch.rand(1, 1, 32, 48, dtype=torch.float64)
    plain = network(image)
    for view in range(VIEWS):
        other = network(turned(image, view))
        back = turned(other.embedding, view, back=True)
        products = [
            torch.einsum("bcyx,bczw->byxzw", e[..., ::5, ::5], e[..., ::5, ::5])
            for e in (plain.embedding, back)
        ]
        torch.testing.assert_close(*products)
        torch.testing.assert_close(turned(other.foreground, view, back=True), plain.foreground)


def test_feature_maps_are_those_of_the_first_member():
    network, image = ensemble(2, augment=True), torch.rand(2, 1, 32, 48, dtype=torch.float64)
    found, first = network(image), network.members[0](image)
    assert network.levels == network.members[0].levels
    assert found.features.keys() == first.features.keys() == network.levels.keys() != set()
    for name, maps in first.features.items():
        torch.testing.assert_close(found.features[name], maps)


def test_directions_are_those_that_change_inner_products_least(splits, make_spec):
    spec = make_spec("none")
    spec = spec.model_copy(
        update={"model": "ensemble", "options": {"members": [NARROW[2]], "augment": True}}
    )
    network = ensemble(2).float()
    network = build("ensemble", spec.options | {"embedding_dim": 6}).eval()
    header = {"channels": 1, "offsets": OFFSETS[2], "normalisation": {"lower": 1.0, "upper": 99.0}}
    directions = principal(spec, network, header, splits["train"], 6, "cpu")
    torch.testing.assert_close(directions @ directions.T, torch.eye(6), atol=1e-5, rtol=0)
    whole = build("ensemble", spec.options | {"embedding_dim": None}).eval()
    whole.members.load_state_dict(network.members.state_dict())
    predictor = Predictor(whole, header, device="cpu", precision="float32")
    vectors = np.concatenate(
        [
            predictor(s.image, keep_embedding=True).embedding.reshape(40, -1)
            for s in io.read_samples(splits["train"])
        ],
        1,
    ).astype(np.float64)
    left, values, _ = np.linalg.svd(vectors, full_matrices=False)
    # the same space, and in it the same lengths; of two that are as long, any mixture will do
    found = directions.numpy().astype(np.float64)
    alike = np.linalg.svd(left[:, :6].T @ found.T, compute_uv=False)
    np.testing.assert_allclose(alike, 1, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(found @ vectors, axis=1), values[:6], rtol=2e-3)
    assert values[5] > 1.01 * values[6]  # they are the only ones


@pytest.fixture(scope="module")
def members(tmp_path_factory, train, make_spec):
    """Weights of two trainings, and of one on other offsets."""
    folder = tmp_path_factory.mktemp("members")
    out = []
    for seed in range(2):
        spec = make_spec("teacher", seed=seed, widths=(4, 4, 8, 8, 8), steps=10)
        (folder / str(seed)).mkdir()
        train(spec, folder / str(seed))
        out.append(folder / str(seed) / "weights.safetensors")
    return out


def joined_spec(make_spec, members, **options):
    heads = [io.read_header(path) for path in members]
    return make_spec("teacher").model_copy(
        update={
            "model": "ensemble",
            "options": {
                "members": [{"model": h["model"], "options": h["options"]} for h in heads],
                "embedding_dim": 4,
                "in_channels": 1,
                **options,
            },
        }
    )


def test_a_joined_teacher_is_a_teacher(members, splits, make_spec, train, tmp_path):
    spec = joined_spec(make_spec, members)
    path = tmp_path / "joined.safetensors"
    files = {"train": splits["train"], "val": splits["val"]}
    scores = join(spec, members, **files, weights=path, device="cpu")
    header = io.read_header(path)
    assert header["members"] == [io.sha256(one) for one in members]
    assert header["validation"]["mutex_watershed"] == scores
    predictor = Predictor.load(path, engine="torch", device="cpu", precision="float32")
    image = next(iter(io.read_samples(splits["test"]))).image
    together = predictor(image, keep_embedding=True)
    alone = [
        Predictor.load(one, engine="torch", device="cpu", precision="float32") for one in members
    ]
    views = [
        np.rot90(tool(np.rot90(image, k, (-2, -1)).copy()).foreground, -k, (-2, -1))
        if not mirrored
        else np.rot90(
            tool(np.rot90(image, k, (-2, -1))[..., ::-1].copy()).foreground[..., ::-1], -k, (-2, -1)
        )
        for tool in alone
        for mirrored in (False, True)
        for k in range(4)
    ]
    np.testing.assert_allclose(together.foreground, np.mean(views, 0), atol=1.01)
    assert together.embedding.shape[0] == 4
    # a student learns from it as from any other, and from the feature maps of its first member
    (tmp_path / "student").mkdir()
    train(make_spec("grd"), tmp_path / "student", teacher=path)
    maps = [
        asked(teacher, splits["train"], tmp_path / f"{teacher.stem}.h5")
        for teacher in (path, members[0])
    ]
    for name, one in maps[1].items():
        np.testing.assert_array_equal(maps[0][name], one)


def asked(teacher, samples, out):
    """What a teacher says at one level, of every image."""
    ask(teacher, samples, out, level="stride4", device="cpu", precision="float32")
    with io.open_h5(out) as file:
        return {name: file[name]["stride4"][:] for name in file}


def test_members_that_do_not_go_together(members, splits, make_spec, train, tmp_path):
    files = {"train": splits["train"], "val": splits["val"], "weights": tmp_path / "w.safetensors"}
    spec = joined_spec(make_spec, members)
    with pytest.raises(ValueError, match="2 members have 1 weights"):
        join(spec, members[:1], **files)
    narrow = spec.model_copy(update={"options": spec.options | {"members": [NARROW[2]] * 2}})
    with pytest.raises(io.DataError, match="does not have at this place; give the weights in"):
        join(narrow, members, **files)
    other = make_spec("teacher", widths=(4, 4, 8, 8, 8), steps=2, normalisation={"upper": 90.0})
    train(other, tmp_path)
    with pytest.raises(io.DataError, match=r"normalisation .* differs .* the same dataset"):
        join(spec, [members[0], tmp_path / "weights.safetensors"], **files)
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"members": []}, "at least one member"),
        ({"members": [NARROW[2], NARROW[3]]}, "all be 2D, or all 3D"),
        ({"members": [{"model": "mala"}]}, "loses margins"),
        ({"members": [NARROW[2]], "augment": False, "embedding_dim": 6}, "5 numbers together"),
    ],
)
def test_networks_that_make_no_ensemble(options, said):
    with pytest.raises(ValueError, match=said):
        build("ensemble", options)


SEVERAL = {"members": ["resunet_w8"], "augment": True}


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"model": "resunet", **SEVERAL}, "either `model`, or `members`"),
        ({}, "either `model`, or `members`"),
        ({**SEVERAL, "weights": "a.safetensors"}, "cannot have `weights`"),
        ({"model": "resunet", "augment": True}, "augment is of a teacher that has `members`"),
        ({"members": ["resunet_w9"]}, 'members: there is no "resunet_w9"'),
        ({"members": ["resunet_w8_turned"]}, '"resunet_w8_turned" has members itself'),
        ({"members": ["mala"]}, '"mala" loses margins'),
        ({"members": ["resunet_w8", "resunet3d_w8"]}, "2 axes, and others with 3"),
        ({**SEVERAL, "options": {"embeding_dim": 8}}, 'did you mean "embedding_dim"'),
    ],
)
def test_a_catalogue_says_what_is_wrong_with_a_teacher_of_several(raw, teacher, said):
    raw["teachers"]["several"] = teacher
    with pytest.raises(ConfigError, match=r"teachers\.several") as error:
        Config.parse(raw)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_student_cannot_be_several(raw):
    raw["students"]["several"] = SEVERAL
    with pytest.raises(ConfigError, match=r"students\.several: a student is trained here"):
        Config.parse(raw)


def test_a_study_trains_the_members_and_joins_them(raw):
    raw["teachers"]["several"] = SEVERAL | {"member_seeds": [0, 3]}
    raw["studies"]["smoke"] |= {"teacher": ["several", "resunet3d_w8"], "teacher_seeds": [0, 1]}
    raw["study"] = "smoke"
    config = Config.parse(raw)
    asked, data = plan.Plan(config), config.selected.datasets[0]
    teachers = [run for run in asked.runs_on(data) if run[2] == "teacher"]
    members = [(data, "resunet_w8", "teacher", seed) for seed in (0, 3)]
    assert teachers == [(data, "several", "teacher", 0), *members]
    assert asked.trained(teachers) == asked.members_of(data, "several") == members
    volumes = config.selected.datasets[1]
    assert [run[3] for run in asked.teacher_runs(volumes, "resunet3d_w8")] == [0, 1]
    spec = asked.spec_of(teachers[0])
    one = {"model": "resunet", "options": {"widths": [8, 16, 32, 64, 128]}}
    assert (spec.model, spec.options["members"]) == ("ensemble", [one, one])
    assert asked.networks_of(data)[:2] == ["several", "resunet_w8"]
    raw["studies"]["smoke"] |= {"teachers_beside": ["resunet_w8_turned", "segformer_b0"]}
    config = Config.parse(raw)
    asked = plan.Plan(config)
    beside = [(data, "resunet_w8_turned", "teacher", 0)]
    beside += [(data, "segformer_b0", "teacher", seed) for seed in (0, 1)]
    found = [run for run in asked.runs_on(data) if run[2] == "teacher"]
    assert found == [teachers[0], *beside, *members]
    assert config.teachers_of(data) == ["several"]
    assert config.methods_of(data) == ["none", "grd"]
    files = asked.network_code("join", "several")
    assert {"models/ensemble.py", "models/resunet.py", "train/join.py"} <= set(files)
    assert "models/segformer.py" not in files
