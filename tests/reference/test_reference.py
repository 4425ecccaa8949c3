"""The PyTorch reference against hand-worked numbers and plain loops."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.reference import losses as reference_losses  # noqa: E402
from tests.reference.model import (  # noqa: E402
    ConvolutionalBlockAttention,
    ModalityAlleviation,
    MPANet,
    NonLocal,
    Outputs,
    instance_norm,
    randomise,
)
from tests.reference.resnet import ResNet  # noqa: E402
from tests.reference.train import ema_ratio, make_optimizer, train_step  # noqa: E402

TINY = {"stage_sizes": (1, 1, 1, 1), "width": 8}


def tiny(seed=0, num_ids=5, **options):
    return randomise(MPANet(num_ids, **{**TINY, **options}).double(), seed)


def batch(seed=0, identities=3, images_per_identity=4, height=32, width=16):
    generator = torch.Generator().manual_seed(seed)
    size = identities * images_per_identity
    images = torch.randn(size, 3, height, width, generator=generator, dtype=torch.float64)
    labels = torch.tensor([4, 0, 2, 1, 3][:identities]).repeat_interleave(images_per_identity)
    modality = (torch.arange(size) % images_per_identity >= images_per_identity // 2).long()
    return images, labels, modality


def test_resnet50_has_torchvisions_parameters():
    network = ResNet()
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == 23_508_032
    assert count + 2048 * 1000 + 1000 == 25_557_032  # with `fc`, the number in torchvision's documentation
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert len(shapes) == 318  # 320 entries of torchvision's file less fc.weight and fc.bias
    assert shapes["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert shapes["layer3.5.conv2.weight"] == (256, 256, 3, 3)
    assert shapes["layer4.2.bn3.running_var"] == (2048,)
    assert "layer1.1.downsample.0.weight" not in shapes


def test_stride_is_on_the_3x3_convolution_and_stage_4_keeps_the_resolution():
    with torch.device("meta"):
        at_stride_1, at_stride_2 = ResNet(last_stride=1), ResNet(last_stride=2)
        image = torch.empty(1, 3, 384, 128)
        assert at_stride_1(image).shape == (1, 2048, 24, 8)
        assert at_stride_2(image).shape == (1, 2048, 12, 4)
    assert at_stride_1.layer2[0].conv1.stride == (1, 1)
    assert at_stride_1.layer2[0].conv2.stride == (2, 2)
    assert at_stride_1.layer4[0].conv2.stride == at_stride_1.layer4[0].downsample[0].stride == (1, 1)


def test_feature_sizes_at_384x128():
    with torch.device("meta"):
        backbone = ResNet()
        assert (1 + 6) * backbone(torch.empty(1, 3, 384, 128)).shape[1] == 14336
    network = MPANet(5, stage_sizes=(1, 1, 1, 1), width=4).eval()
    outputs = network(torch.zeros(2, 3, 384, 128))
    assert outputs.pattern_maps.shape == (2, 6, 24, 8)
    assert outputs.feature.shape == outputs.embedding.shape == (2, 7 * 4 * 32)


def test_state_dict_names_are_the_published_ones():
    names = {name for name in tiny().state_dict() if not name.startswith(("backbone.layer", "backbone.bn1"))}
    assert names == {
        "backbone.conv1.weight",
        *(f"backbone.MAM{s}.channel_attention.{i}.weight" for s in (3, 4) for i in (0, 2)),
        "spatial_attention.weight",
        "spatial_attention.bias",
        *(f"bn_neck.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        *(f"{n}classifier{e}.weight" for n in ("visible_", "infrared_") for e in ("", "_")),
        "classifier.weight",
    }
    cbam = tiny(mam="cbam", pam="none").state_dict()
    assert cbam["backbone.CBAM4.spatial.weight"].shape == (1, 2, 7, 7)
    assert cbam["backbone.CBAM3.mlp.0.weight"].shape == (8, 128, 1, 1)
    assert "non_local.bn.running_mean" in tiny(pam="non_local").state_dict()
    baseline = tiny(mam="none", pam="none", modality_learning=False).state_dict()
    assert {name for name in baseline if not name.startswith(("backbone.", "bn_neck."))} == {"classifier.weight"}
    assert not any("MAM" in name for name in baseline)


def test_instance_norm_matches_pytorch_and_a_hand_example():
    z = torch.tensor([[[[1.0, 3.0]]]], dtype=torch.float64)  # mean 2, biased variance 1
    expected = 1 / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(instance_norm(z), torch.tensor([[[[-expected, expected]]]], dtype=torch.float64))
    z = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(instance_norm(z), torch.nn.functional.instance_norm(z, eps=1e-5))


def test_mam_by_hand():
    """16 channels, so W₁ is 1×16: it picks channel 0; W₂ = (ln 3, 0, …): m₀ = σ(ln 3·mean) and m = ½ elsewhere."""
    z = torch.arange(1.0, 33.0, dtype=torch.float64).reshape(1, 16, 2, 1)
    z[0, 0] = torch.tensor([[0.0], [2.0]])  # mean 1, variance 1
    for normalise in (True, False):
        mam = ModalityAlleviation(16, normalise).double()
        with torch.no_grad():
            for layer in (mam.channel_attention[0], mam.channel_attention[2]):
                layer.weight.zero_()
                layer.weight.view(-1)[0] = 1.0 if layer is mam.channel_attention[0] else math.log(3)
        out = mam(z)[0, :, :, 0]
        normal = 1 / math.sqrt(1 + 1e-5) if normalise else 0.0
        assert out[0].tolist() == pytest.approx([0.25 * -normal, 0.75 * 2 + 0.25 * normal])
        normal = 0.5 / math.sqrt(0.25 + 1e-5) if normalise else 0.0  # channel 1 is (3, 4)
        assert out[1].tolist() == pytest.approx([1.5 - 0.5 * normal, 2 + 0.5 * normal])


def test_cbam_and_non_local_by_loops():
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, 32, 3, 2, generator=generator, dtype=torch.float64)
    cbam = ConvolutionalBlockAttention(32).double()
    w1, w2 = (cbam.mlp[i].weight.detach().numpy()[:, :, 0, 0] for i in (0, 2))
    kernel = cbam.spatial.weight.detach().numpy()[0]
    got = cbam(z).detach().numpy()
    for image, out in zip(z.numpy(), got, strict=True):
        logits = sum(w2 @ np.maximum(w1 @ pooled, 0) for pooled in (image.mean((1, 2)), image.max((1, 2))))
        image = image / (1 + np.exp(-logits))[:, None, None]
        padded = np.pad(np.stack([image.mean(0), image.max(0)]), ((0, 0), (3, 3), (3, 3)))
        for i in range(3):
            for j in range(2):
                weight = 1 / (1 + np.exp(-(kernel * padded[:, i : i + 7, j : j + 7]).sum()))
                np.testing.assert_allclose(out[:, i, j], weight * image[:, i, j], rtol=1e-12)

    block = NonLocal(32).double().eval()
    parameters = {name: value.numpy() for name, value in block.state_dict().items()}
    got = block(z).detach().numpy()
    for image, out in zip(z.numpy(), got, strict=True):
        x = image.reshape(32, 6)
        theta, phi, g = (
            parameters[f"{name}.weight"][:, :, 0, 0] @ x + parameters[f"{name}.bias"][:, None]
            for name in ("theta", "phi", "g")
        )
        for i in range(6):
            weights = np.exp(theta[:, i] @ phi)
            y = g @ (weights / weights.sum())
            residual = (parameters["w.weight"][:, :, 0, 0] @ y + parameters["w.bias"]) / math.sqrt(1 + 1e-5)
            np.testing.assert_allclose(out.reshape(32, 6)[:, i], x[:, i] + residual, rtol=1e-10)
    assert MPANet(5, **TINY, pam="non_local").non_local.bn.weight.eq(0).all()  # starts as the identity


def test_feature_is_pattern_major_with_the_global_feature_last():
    network = tiny().eval()
    images, _, _ = batch()
    seen = {}
    network.backbone.MAM4.register_forward_hook(lambda _m, _i, out: seen.update(feature_map=out))
    outputs = network(images)
    feature_map, maps = seen["feature_map"], outputs.pattern_maps
    assert outputs.feature.shape == (12, 7 * 256)
    torch.testing.assert_close(outputs.feature[:, 6 * 256 :], feature_map.mean((2, 3)))
    expected = torch.einsum("bkhw,bchw->bkc", maps, feature_map) / maps[0, 0].numel()
    torch.testing.assert_close(outputs.feature[:, : 6 * 256], expected.flatten(1))


def test_separation_loss_by_hand():
    """Three maps of two positions: pairs 1·3+2·4 = 11, 1·5+2·6 = 17, 15+24 = 39; 67·2/(3·2); the second image has 0."""
    maps = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]], [[[0.0, 0.0]]] * 3])
    assert reference_losses.separation_loss(maps).item() == pytest.approx(67 / 3 / 2)


def test_center_cluster_loss_by_loops():
    generator = torch.Generator().manual_seed(5)
    feature = 0.2 * torch.randn(12, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([7, 7, 7, 7, 2, 2, 2, 2, 5, 5, 5, 5])
    f, y = feature.numpy(), labels.numpy()
    centers = {k: sum(f[i] for i in range(12) if y[i] == k) / 4 for k in (7, 2, 5)}
    pull = sum(math.dist(f[i], centers[y[i]]) for i in range(12)) / 12
    push = sum(max(0.7 - math.dist(centers[a], centers[b]), 0) for a, b in ((7, 2), (7, 5), (2, 5))) / 3
    assert push > 0.1
    got = reference_losses.center_cluster_loss(feature, labels)
    assert got.item() == pytest.approx(pull + push, rel=1e-12)


def test_center_cluster_gradient_is_finite_where_features_coincide():
    feature = torch.ones(8, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0] * 4 + [1] * 4)
    loss = reference_losses.center_cluster_loss(feature, labels)
    loss.backward()
    assert loss.item() == pytest.approx(0.7)  # centres coincide too: the full margin
    assert feature.grad.eq(0).all()


def hand_model(logits):
    """A model with two-dimensional features and two identities, whose classifiers scale the feature."""
    network = tiny(num_ids=2)
    for name, scale in logits.items():
        layer = torch.nn.Linear(2, 2, bias=False).double()
        layer.weight.data = scale * torch.eye(2, dtype=torch.float64)
        layer.weight.requires_grad_(not name.endswith("_"))
        setattr(network, name, layer)
    return network


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_losses_by_hand(preset):
    """Logits (s·a, 0): softmax gives p = 1/(1+e^(−s·a)). Visible image a = ln 3, infrared ones a = ln 2 (twice)."""
    scales = {"classifier": 1, "visible_classifier": 1, "infrared_classifier": 2}
    scales |= {"visible_classifier_": 3, "infrared_classifier_": 0}
    network = hand_model(scales)
    g = torch.tensor([[math.log(3), 0], [math.log(2), 0], [math.log(2), 0]], dtype=torch.float64, requires_grad=True)
    labels, modality = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 1])
    terms = reference_losses.losses(network, Outputs(g, g, None), labels, modality, preset=preset)

    visible_id, infrared_id = -math.log(3 / 4), -math.log(1 / 3)
    visible_sid, infrared_sid = -math.log(3 / 4), -math.log(1 / 5)  # infrared: 2·ln 2, so p = 4/5
    kl = lambda a, b: a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))  # noqa: E731
    # Visible: own 3/4, teacher = infrared mean classifier, 1/2. Infrared: own 4/5, teacher = visible one, 8/9.
    if preset == "paper":
        expected = {"id": visible_id + infrared_id, "mm": kl(1 / 2, 3 / 4) + kl(8 / 9, 4 / 5)}
    else:
        expected = {"id": (visible_id + 2 * infrared_id) / 3, "mm": (kl(3 / 4, 1 / 2) + 2 * kl(4 / 5, 8 / 9)) / 3}
    expected |= {"sid": visible_sid + infrared_sid, "sep": 0.0, "cc": 0.7 - (math.log(3) - math.log(2))}
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-12), name
    sid_weight = {"paper": 0.5, "official": 1.0}[preset]
    total = expected["id"] + expected["cc"] + sid_weight * expected["sid"] + 2.5 * expected["mm"]
    assert terms["total"].item() == pytest.approx(total, rel=1e-12)

    terms["mm"].backward()
    assert network.visible_classifier_.weight.grad is None
    # Through own only. Visible image, d/d(logit): paper p − t = 1/4;
    # official p(1−p)(log p/(1−p) − log t/(1−t))/3 = 3/16·ln 3/3.
    expected_gradient = 1 / 4 if preset == "paper" else 3 / 16 * math.log(3) / 3
    assert g.grad[0, 0].item() == pytest.approx(expected_gradient, rel=1e-12)


def test_ema_comes_before_the_loss_and_the_ratio_follows_the_preset():
    assert [ema_ratio("paper", epoch) for epoch in (1, 140)] == [0.2, 0.2]
    assert ema_ratio("official", 99) == 0.2
    assert ema_ratio("official", 139) == pytest.approx(0.2 * 100 / 140)
    network = tiny()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images, labels, modality = batch()
    train_step(network, make_optimizer(network), images, labels, modality, preset="official", epoch=199)
    for name in ("visible_classifier", "infrared_classifier"):
        expected = 0.9 * before[f"{name}_.weight"] + 0.1 * before[f"{name}.weight"]
        torch.testing.assert_close(getattr(network, f"{name}_").weight, expected)
        assert not torch.equal(getattr(network, name).weight, before[f"{name}.weight"])


def test_adam_step_is_l2_and_by_hand():
    """Adam's first update is lr·ĝ/(|ĝ|+eps) with ĝ = gradient + 5e-4·parameter; the neck's bias stays 0."""
    network, twin = tiny(seed=1), tiny(seed=1)
    images, labels, modality = batch()
    optimizer = make_optimizer(network, 0.01)
    train_step(network, optimizer, images, labels, modality, learning_rate=0.02)

    twin.train()
    for own, mean in twin.classifier_pairs():
        mean.weight.data.copy_(0.8 * mean.weight + 0.2 * own.weight)
    reference_losses.losses(twin, twin(images), labels, modality)["total"].backward()
    after = dict(network.named_parameters())
    trained = {name: parameter for name, parameter in twin.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(optimizer.state)
    for name, parameter in trained.items():
        gradient = parameter.grad + 5e-4 * parameter.detach()
        expected = parameter.detach() - 0.02 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(after[name].detach(), expected, msg=name)
    assert network.bn_neck.bias.eq(0).all()


def test_running_variance_is_unbiased():
    network = tiny()
    network.train()
    images, _, _ = batch()
    before = network.bn_neck.running_var.clone()
    feature = network(images).feature
    expected = 0.9 * before + 0.1 * feature.detach().var(dim=0, unbiased=True)
    torch.testing.assert_close(network.bn_neck.running_var, expected)
