"""features.py: VGG16 against its layers by hand, Inception's file, downloads and what does not fit."""

import math
import urllib.error

import pytest
import torch
import torch.nn.functional as F
import torchvision
from pytorch_fid import inception
from safetensors.torch import save_file

from models.features import InceptionFeatures, VGG16Features, WeightsError, feature_network

VGG_CONVOLUTIONS = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
VGG_POOLS_AFTER = {2, 7, 14, 21}


def picture(seed: int, b: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(b, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vgg_state() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in torchvision.models.vgg16(weights=None).features.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    return {
        f"features.{name}": torch.randn(shape, generator=generator) * (2 / math.prod(shape[1:])) ** 0.5
        if len(shape) > 1
        else torch.randn(shape, generator=generator) * 0.1
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def vgg_file(vgg_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file({**vgg_state, "lin.0": torch.zeros(1, 64, 1, 1)}, path)
    return path


@torch.no_grad()
def test_vgg16_features_are_the_spatial_mean_of_relu5_3(vgg_state, vgg_file):
    images = picture(0, b=2, size=32)
    network = feature_network("vgg16", vgg_file)
    x = torchvision.transforms.functional.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for i in VGG_CONVOLUTIONS:
        x = F.relu(F.conv2d(x, vgg_state[f"features.{i}.weight"], vgg_state[f"features.{i}.bias"], padding=1))
        x = F.max_pool2d(x, 2) if i in VGG_POOLS_AFTER else x
    features = network(images)
    assert features.shape == (2, network.dimensions) and features.std() > 1e-3
    torch.testing.assert_close(features, x.mean(dim=(2, 3)))
    torch.testing.assert_close(network(images[1:]), features[1:])
    assert network.label == "FD-VGG16" and not network.training
    assert not any(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match="at least 16x16"):
        network(images[..., :8, :8])


def test_vgg16_reads_torchvisions_state_dict_and_ignores_its_classifier(vgg_state, vgg_file, tmp_path):
    path = tmp_path / "vgg16-397923af.pth"
    torch.save({**vgg_state, "classifier.0.bias": torch.zeros(4096)}, path)
    images = picture(0, size=16)
    torch.testing.assert_close(VGG16Features(path)(images), VGG16Features(vgg_file)(images))


def test_vgg16_weights_that_do_not_fit_are_named(vgg_state, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth: no such weights file"):
        VGG16Features(tmp_path / "nothing.pth")
    some = tmp_path / "some.safetensors"
    save_file({"features.0.bias": vgg_state["features.0.bias"]}, some)
    with pytest.raises(ValueError, match=r"some\.safetensors: not the weights of a VGG16, no features\.0\.weight"):
        VGG16Features(some)
    shape = tmp_path / "shape.pth"
    torch.save({name: tensor[:1].clone() for name, tensor in vgg_state.items()}, shape)
    with pytest.raises(ValueError, match=r"shape\.pth: does not fit a VGG16"):
        VGG16Features(shape)
    for name, content in (("text.pth", b"hello"), ("text.safetensors", b"hello"), ("empty.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: not a weights file"):
            VGG16Features(tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth: expected a state_dict"):
        VGG16Features(tmp_path / "list.pth")


def test_feature_network_lists_the_known_names():
    with pytest.raises(ValueError, match="unknown features 'clip', expected one of inception, vgg16"):
        feature_network("clip")


def test_vgg16_without_a_file_takes_torchvisions(monkeypatch, tmp_path, vgg_state, vgg_file):
    def fetch(url, file, hash_prefix):
        assert (url, hash_prefix) == (torchvision.models.VGG16_Weights.IMAGENET1K_V1.url, "397923af")
        torch.save(vgg_state, file)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    network, images = feature_network("vgg16"), picture(0, size=16)
    assert network.weights_file == tmp_path / "checkpoints" / "vgg16-397923af.pth"
    torch.testing.assert_close(network(images), VGG16Features(vgg_file)(images))


def test_vgg16_offline_says_in_one_line_what_to_pass(monkeypatch, tmp_path):
    def fail(url, file, hash_prefix):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(
        WeightsError, match=r"the VGG16 weights could not.*vgg16-397923af.*--feature-weights FILE"
    ) as told:
        VGG16Features()
    assert "\n" not in str(told.value)


@torch.no_grad()
def test_inception_takes_its_weights_from_the_hub_folder_without_a_download(monkeypatch, tmp_path):
    untrained = []  # captured where pytorch-fid would load weights into it
    with monkeypatch.context() as patch:
        patch.setattr(torchvision.models.Inception3, "load_state_dict", lambda self, state: untrained.append(self))
        patch.setattr(inception, "load_state_dict_from_url", lambda url, progress: {})
        inception.fid_inception_v3()
    state = untrained[0].state_dict()
    path = tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    path.parent.mkdir()
    torch.save(state, path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("the file is there"))
    loader = inception.load_state_dict_from_url
    network = feature_network("inception")
    assert inception.load_state_dict_from_url is loader  # left as it was
    loaded = network.network.blocks[3].state_dict()  # Mixed_7a, Mixed_7b, Mixed_7c
    assert torch.equal(loaded["2.branch_pool.conv.weight"], state["Mixed_7c.branch_pool.conv.weight"])
    features = network(picture(0, b=1, size=64))
    assert features.shape == (1, network.dimensions) and features.isfinite().all() and features.std() > 0
    assert network.weights_file == path and network.label == "FID"
    assert not network.training and not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), RuntimeError("invalid hash value")])
def test_inception_without_network_says_which_file_to_put_where(monkeypatch, tmp_path, error):
    def fail(url, file, hash_prefix):
        assert hash_prefix == "6726825d"
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(WeightsError) as raised:
        InceptionFeatures()
    text = str(raised.value)
    assert inception.FID_WEIGHTS_URL in text and "--feature-weights FILE" in text
    assert str(tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth") in text
    assert isinstance(raised.value, RuntimeError)


def test_inception_file_that_does_not_fit_is_named(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"other\.pth: does not fit pytorch-fid's Inception"):
        InceptionFeatures(path)
