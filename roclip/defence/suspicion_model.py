"""The suspicion model: a small network that predicts from the image alone how suspicious a pair is.

A backdoor works because many poisoned images share a pattern that is easy to learn, and the same property exposes it. The
sample filter's agreements rate one pair at a time and are often wrong, but their errors are spread over all images, whereas a
trigger occurs on images most of which are suspected. A network that learns to predict suspicion learns the trigger first, and
then recognises it on those poisons too that no agreement gave away.

Letters: B local batch, G global batch, N valid pairs of the global batch, S image side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roclip.distributed import broadcast, gather

VIEW_PX = 64
"""Larger images are downsampled to this side; a patch of a fourteenth of the side is then still 4 to 5 pixels wide."""
_PIECE, _MOST_PIECES = 64, 8
"""Pairs a mini-batch, at least, and mini-batches a global batch, at most: it must learn a trigger before the towers do."""
_WIDTH = 16
_LR, _PATTERN_LR = 2e-3, 5e-4


class SuspicionModel:
    """Expected suspicion of an image, trained online.

        p_i = sigmoid(f(x_i)),  minimise BCE(p_i, y_i) over the valid pairs,  y_i: the sample filter's suspicion of pair i

    so that p_i tends to E[y | x_i]. A pair is predicted before it is trained on. Every rank trains the same network on the
    gathered batch; rank 0's predictions are used on all ranks, as rounding may differ between devices.

    Args:
        side: S.
        device: Device of the network.
        seed: Seed of the initial weights.
    """

    def __init__(self, side: int, device: str | torch.device = "cpu", seed: int = 0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = _Network(min(side, VIEW_PX)).to(device)
        pattern = list(self.network.pattern.parameters())
        rest = [*self.network.layers.parameters(), *self.network.head.parameters()]
        groups = [{"params": rest}, {"params": pattern, "lr": _PATTERN_LR}]
        self.optimizer = torch.optim.AdamW(groups, lr=_LR, weight_decay=0.01)
        self.device = torch.device(device)

    def __call__(self, images: Tensor, places: Tensor, suspicion: Tensor) -> Tensor:
        """Predict the suspicion of the valid pairs of a global batch, then train on them.

        Args:
            images: (B, 3, S, S) uint8, this rank's.
            places: (N,) int64 positions of the valid pairs in the global batch.
            suspicion: (N,) from 0 to 1, y.

        Returns:
            (N,) float32: p, on the CPU and the same on every rank.
        """
        pixels = gather(_view(images).to(self.device))[places.to(self.device)].float().div(63.75) - 2
        piece, predictions = max(_PIECE, -(-len(pixels) // _MOST_PIECES)), [torch.zeros(0, device=self.device)]
        for x, y in zip(pixels.split(piece), suspicion.to(pixels).split(piece), strict=True):
            if len(x) < 2:
                predictions.append(y)  # too few for batch norm
                continue
            logits = self.network(x)
            predictions.append(logits.detach().sigmoid())
            self.optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(logits, y).backward()
            self.optimizer.step()
        return broadcast(torch.cat(predictions)).cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """Network and optimizer state, as tensors for a checkpoint."""
        state = {f"network.{name}": value.clone() for name, value in self.network.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{number}.{name}": value.clone() for name, value in moments.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        network, moments = {}, {}
        for key, value in state.items():
            part, _, rest = key.partition(".")
            if part == "network":
                network[rest] = value
            else:
                number, _, name = rest.partition(".")
                moments.setdefault(int(number), {})[name] = value
        self.network.load_state_dict(network)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


class _Network(nn.Module):
    """Convolutions, which find a patch anywhere, plus a linear layer on the pixels, which finds a faint pattern over the whole
    image. The pixels are high-pass filtered for it (less their neighbours' mean), which balances coarse and fine patterns.
    """

    def __init__(self, side: int):
        super().__init__()
        layers, channels = [], 3
        for width, stride in ((_WIDTH, 2), (2 * _WIDTH, 1), (4 * _WIDTH, 2)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(2 * channels, 1)
        self.pattern = nn.Linear(3 * side**2, 1, bias=False)
        nn.init.zeros_(self.pattern.weight)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, S, S) to logits (N,)."""
        features = self.layers(pixels)
        anywhere = self.head(torch.cat([features.amax(dim=(2, 3)), features.mean(dim=(2, 3))], dim=1))
        fine = pixels - F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
        return (anywhere + self.pattern(fine.flatten(1))).squeeze(1)


def _view(images: Tensor) -> Tensor:
    """Images with a side of at most `VIEW_PX`, uint8, so that little is gathered."""
    if images.shape[-1] <= VIEW_PX:
        return images
    return F.adaptive_avg_pool2d(images.float(), VIEW_PX).round().to(torch.uint8)
