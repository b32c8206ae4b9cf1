"""On points with one coordinate for the task and one for the domain, DANN forgets the domain and keeps the task."""

import pytest
import torch
from torch import nn

from dann_experiments.adaptation.dann import DANNMethod
from dann_experiments.adaptation.domain_classifier import DomainClassifier
from dann_experiments.adaptation.method import Progress
from dann_experiments.models.taps import resolve_taps
from dann_experiments.training.losses import segmentation_loss
from dann_experiments.training.module import AdaptationModule
from dann_experiments.training.optimizers import build_optimizer


class Points(nn.Module):
    """A linear encoder of images of one pixel with two bands, and a linear decoder for two classes."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(2, 4, 1)
        self.decoder = nn.Conv2d(4, 2, 1)

    def forward(self, images):
        return self.decoder(self.encoder(images))


def points(domain, generator, count=64):
    """Band 0 tells the class (-1, 1), band 1 the domain (-1, 1; its noise leaves 95 % right at best)."""
    labels = torch.randint(0, 2, (count, 1, 1), generator=generator)
    task = 2.0 * labels - 1 + 0.3 * torch.randn(count, 1, 1, generator=generator)
    other = 2.0 * domain - 1 + 0.6 * torch.randn(count, 1, 1, generator=generator)
    return {"image": torch.stack([task, other], 1), "mask": labels}


def train(lambda_now, seed, steps=700, last=200):
    """Domain accuracy and source accuracy over the last steps, and accuracy on target points at the end."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = Points()
    method = DANNMethod("encoder", 4, hidden_size=16, discriminator_lr=0.1, lambda_da=lambda_now, lambda_schedule=None)
    module = AdaptationModule(network, method, resolve_taps(network, ["encoder"], 2, size=1), torch.optim.SGD)
    groups = [{"params": list(network.parameters())}, *method.param_groups()]
    optimizer = build_optimizer(groups, "sgd", 0.1, (0.9, 0.999), 0.0, 0.0)
    domain_accuracy, task_accuracy = [], []
    for step in range(steps):
        outputs = module.step_outputs({"source": points(0, generator), "target": points(1, generator)})
        share = method.loss(outputs, Progress(0, 1, step, steps))
        optimizer.zero_grad()
        (segmentation_loss(outputs.source_logits, outputs.source_labels, 255) + share.differentiated).backward()
        optimizer.step()
        domain_accuracy.append(share.metrics["da/domain_acc"])
        task_accuracy.append((outputs.source_logits.argmax(1) == outputs.source_labels).float().mean())
    target = points(1, generator, count=1000)
    with torch.no_grad():
        target_accuracy = (network(target["image"]).argmax(1) == target["mask"]).float().mean()
    recent = [float(torch.stack(values[-last:]).mean()) for values in (domain_accuracy, task_accuracy)]
    return (*recent, float(target_accuracy))


@pytest.mark.parametrize("kind", ["pooled", "pixel"])
def test_the_domain_classifier_alone_tells_separable_domains_apart(kind):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    classifier = DomainClassifier(8, hidden_size=32, kind=kind)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)

    def features(domain):  # (32, 8, 4, 4): the first channel gives the domain away
        maps = torch.randn(32, 8, 4, 4, generator=generator)
        maps[:, 0] += 4.0 * domain - 2.0
        return maps

    for _ in range(60):
        losses = [classifier.domain_loss(features(domain), domain)[0] for domain in (0, 1)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    with torch.no_grad():
        for domain in (0, 1):
            assert classifier.domain_loss(features(domain), domain)[1] > 0.95


@pytest.mark.parametrize("seed", [0, 3])
def test_with_lambda_1_the_domain_falls_to_chance_and_the_task_stays_solved(seed):
    domain, source, target = train(lambda_now=1.0, seed=seed)
    assert abs(domain - 0.5) < 0.1
    assert source > 0.95
    assert target > 0.95


def test_with_lambda_0_the_domain_stays_separable():
    domain, source, _ = train(lambda_now=0.0, seed=0)
    assert domain > 0.9
    assert source > 0.95
