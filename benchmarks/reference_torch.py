"""The same training step in plain PyTorch, eager: modules, autograd, fused Adam."""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import softplus


class Layer(nn.Module):
    """tanh layers, and a dense layer for each head."""

    def __init__(self, n_in, hidden_units, *heads):
        super().__init__()
        sizes = [n_in, *hidden_units]
        hidden = [part for pair in zip(sizes[:-1], sizes[1:], strict=True) for part in (nn.Linear(*pair), nn.Tanh())]
        self.hidden = nn.Sequential(*hidden)
        self.heads = nn.ModuleList(nn.Linear(sizes[-1], units) for units in heads)

    def forward(self, inputs):
        hidden = self.hidden(inputs)
        return [head(hidden) for head in self.heads]


class Net(nn.Module):
    def __init__(self, features, latent_units, hidden_units):
        super().__init__()
        self.encoder, self.decoder, below = nn.ModuleList(), nn.ModuleList(), features
        for hidden, units in zip(hidden_units, latent_units, strict=True):
            self.encoder.append(Layer(below, hidden, units, units))
            heads = (below, below) if len(self.decoder) else (below,)
            self.decoder.append(Layer(units, hidden[::-1], *heads))
            below = units

    def loss(self, x, k):
        z, log_w, samples = x, 0.0, []
        for layer in self.encoder:
            mean, log_std = layer(z)
            shape = mean.shape if samples else (k, *mean.shape)
            z = mean + log_std.exp() * torch.randn(shape)
            log_w = log_w - log_normal(z, mean, log_std)
            samples.append(z)
        log_w = log_w + log_normal(z, torch.zeros(()), torch.zeros(()))
        for layer, below, above in zip(self.decoder[1:], samples[:-1], samples[1:], strict=True):
            log_w = log_w + log_normal(below, *layer(above))
        (logits,) = self.decoder[0](samples[0])
        log_w = log_w + (x * logits - softplus(logits)).sum(-1)
        return -(torch.logsumexp(log_w, 0) - np.log(k)).mean()


def log_normal(z, mean, log_std):
    return (-0.5 * np.log(2 * np.pi) - log_std - 0.5 * ((z - mean) * torch.exp(-log_std)) ** 2).sum(-1)


def make_run(images, latent_units, hidden_units, k, batch):
    """A function of a number of steps that takes so many, and returns when they are done."""
    images = torch.from_numpy(images)
    net = Net(images.shape[1], latent_units, hidden_units)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-4, fused=True)
    order = torch.randperm(len(images))[: len(images) // batch * batch].reshape(-1, batch)

    def run(steps):
        for rows in order[:steps]:
            grey = images[rows].float() / 255
            loss = net.loss((torch.rand(grey.shape) < grey).float(), k)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run
